"""Accelerated SHiRA layers: the numbers of PEFT's own, and all that PEFT and torch do with them."""

import copy
import pickle
import warnings

import pytest
import torch
from peft import PeftModel
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.integrations.peft.shira import layout_of
from peft_kernels.testing import assert_within_eager, saved_tensors
from tests.integrations.peft_models import KINDS, assert_equal, batch_for, run, run_layer
from tests.integrations.shira_models import inputs, layer_of, make_shira, shira_layers, shuffle, with_adapter

accelerate, restore = pk.integrations.peft.accelerate, pk.integrations.peft.restore
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# dtype of the input and the base, of the values, of autocast
PRECISIONS = {
    "float64": (F64, F64, None),
    "float32": (F32, F32, None),
    "bfloat16": (BF16, BF16, None),
    "bfloat16, float32 values": (BF16, F32, None),
    "float16, float32 values": (F16, F32, None),
    "float32, autocast": (F32, F32, BF16),
    "bfloat16, float32 values, autocast": (BF16, F32, BF16),
    "bfloat16, float16 autocast": (BF16, BF16, F16),
}


@pytest.mark.parametrize("bias", ["no bias", "bias", "bias that trains"])
@pytest.mark.parametrize("how", ["shuffled", "scaled"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_layer(precision, how, bias, taken):
    dtype, values, autocast = PRECISIONS[precision]
    layer = layer_of(dtype, values, bias != "no bias")
    layer.base_layer.weight.requires_grad_(False)
    if bias == "bias":
        layer.base_layer.bias.requires_grad_(False)
    if how == "shuffled":
        shuffle(layer)
    if how == "scaled":
        layer.set_scale("default", 0.7)
    x, grad = inputs(dtype, autocast)
    expected = run_layer(layer, x, grad, autocast)
    float64_reference = run_layer(copy.deepcopy(layer).double(), x.double(), grad.double())
    assert not accelerate(layer).kept and taken == []
    ours = run_layer(layer, x, grad, autocast)
    assert taken == ["sparse"]
    assert ours.keys() == float64_reference.keys() >= {"y", "x", "shira_weight.default"}
    for name in ours:
        if dtype == F64:
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-13, atol=1e-13)
        else:
            assert_within_eager(name, ours[name], expected[name], float64_reference[name])


def test_the_base_weight_takes_no_gradient_and_nothing_is_kept_beside_it():
    layer = layer_of()
    accelerate(layer)
    x, grad = inputs()
    x.requires_grad_()
    with saved_tensors(ignore=(x, *layer.parameters())) as saved:
        y = layer(x)
    assert saved == []
    y.backward(grad)
    assert layer.base_layer.weight.grad is None and layer.base_layer.bias.grad is not None  # as PEFT's


@pytest.fixture
def models():
    """An accelerated model, its positions in any order, and its plain twin."""
    plain = make_shira(shuffled=True)
    ours = copy.deepcopy(plain)
    accelerate(ours)
    return ours, plain


def test_saved_adapters_load_in_plain_peft_and_back(models, taken, tmp_path):
    ours, _ = models
    trained = run(ours)
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(KINDS["llama"](), tmp_path, is_trainable=True)
    assert not any("Fused" in type(module).__name__ for module in loaded.modules())
    assert_equal(run(loaded), trained)
    other = make_shira(random_seed=9)
    accelerate(other)
    run(other, backward=False)
    other.load_adapter(tmp_path, "default", is_trainable=True)  # over the positions that were there
    taken.clear()
    assert_equal(run(other), trained)
    assert taken == ["sparse"] * 14


def test_scaling_that_changes(taken):
    ours, plain = layer_of(), layer_of()
    accelerate(ours)
    x, grad = inputs()
    for scale in (0.5, 2, 0.0, torch.tensor(0.3), 1.0):
        for layer in (ours, plain):
            layer.base_layer.requires_grad_(False)
            layer.set_scale("default", scale)
        torch.testing.assert_close(run_layer(ours, x, grad), run_layer(plain, x, grad))
    assert len(taken) == 4  # the tensor is PEFT's


def test_positions_that_change(taken):
    ours, plain = layer_of(), layer_of()
    accelerate(ours)
    x, _ = inputs()
    for change in (
        lambda indices: indices.flip(1),
        lambda indices: (indices + 1) % torch.tensor([[40], [48]], dtype=torch.int32),
        lambda indices: indices.copy_((indices + 3) % torch.tensor([[40], [48]], dtype=torch.int32)),  # in place
    ):
        for layer in (ours, plain):
            layer.shira_indices["default"] = change(layer.shira_indices["default"])
        torch.testing.assert_close(ours(x), plain(x))
    assert len(taken) == 3


def test_extra_arguments_take_peft_s_forward(taken):
    ours, plain = layer_of(), layer_of()
    accelerate(ours)
    x, _ = inputs()
    assert torch.equal(ours(x, task=1), plain(x, task=1))
    assert taken == []


def test_positions_found_in_inference_mode_serve_training(models, taken):
    for model in models:
        with_adapter(model, "second")
        model.set_adapter("second")
        for layer in shira_layers(model):
            shuffle(layer, "second")
    ours, plain = models
    with torch.inference_mode():
        ours(**batch_for(ours))
    assert_equal(run(ours), run(plain))
    assert taken == ["sparse"] * 28


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(models, taken, copied):
    ours, plain = models
    expected = run(plain)
    assert len(pickle.dumps(ours)) == pytest.approx(len(pickle.dumps(plain)), rel=0.02)  # no layouts in it
    twin = copied(ours)
    for layer in shira_layers(ours):
        layer.shira_weight["default"].data.zero_()
        layer.shira_indices["default"].zero_()
    assert_equal(run(twin), expected)
    assert taken == ["sparse"] * 14
    restore(twin)
    assert_equal(run(twin), expected)


def test_moving_a_model(models, taken):
    ours, plain = (model.double() for model in models)
    assert_equal(run(ours), run(plain))
    assert taken == ["sparse"] * 14
    lost = copy.deepcopy(ours).to("meta")
    with pytest.raises(NotImplementedError):  # PEFT's own, which moves the positions
        lost(input_ids=torch.zeros(1, 3, dtype=torch.long, device="meta"))
    lost.to_empty(device="cpu")
    ours.to("meta")
    assert len(taken) == 14 and all(type(layer._positions["default"].found) is str for layer in shira_layers(ours))
    ours.to_empty(device="cpu").load_state_dict(plain.state_dict())
    ours.base_model.model.model.rotary_emb = plain.base_model.model.model.rotary_emb  # its buffers are in no state_dict
    assert all(type(layer._positions["default"].found) is tuple for layer in shira_layers(ours))  # before any forward
    assert_equal(run(ours), run(plain))
    assert taken == ["sparse"] * 28


@pytest.mark.gpu
def test_moving_to_the_gpu_and_compiling_there(fresh_compiler):
    ours, plain = layer_of(), layer_of()
    accelerate(ours)
    ours, plain, (x, _) = ours.cuda(), plain.cuda(), inputs()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.cuda()), plain(x.cuda()), rtol=1e-4, atol=1e-4)


def test_checkpointing_under_autocast():
    layer = layer_of()
    accelerate(layer)
    x, _ = inputs()
    results = []
    for function in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        with torch.autocast("cpu", dtype=BF16):
            y = function(x)
        assert y.dtype == BF16
        results.append(torch.autograd.grad(y.square().sum(), layer.shira_weight["default"]))
    assert torch.equal(*results[0], *results[1])


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compile_the_whole_model(models, taken, fresh_compiler):
    ours, plain = models
    expected = run(plain)
    for model in (ours, copy.deepcopy(ours)):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        results = run(compiled, batch_for(plain))
        assert_equal({name.removeprefix("_orig_mod."): value for name, value in results.items()}, expected)
    assert "sparse" in taken


def test_compile_sees_what_changes(fresh_compiler):
    ours, plain = layer_of(), layer_of()
    accelerate(ours)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    graphs_may_break = torch.compile(ours, backend="aot_eager")
    x, _ = inputs()
    torch.testing.assert_close(compiled(x), plain(x))
    for scale in (0.5, 0.25):
        for layer in (ours, plain):
            layer.set_scale("default", scale)
        torch.testing.assert_close(compiled(x), plain(x))
    for layer in (ours, plain):
        shuffle(layer)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="new shira_indices: call the layer once outside"):
        compiled(x)
    torch.testing.assert_close(graphs_may_break(x), plain(x))
    torch.testing.assert_close(compiled(x), plain(x))
    for layer in (ours, plain):
        layer.merge()
    torch.testing.assert_close(compiled(x), plain(x))


def test_hooks_on_the_base_are_not_called_as_in_peft():
    x, _ = inputs()
    for layer in (layer_of(), layer_of()):
        layer.base_layer.register_forward_hook(lambda *args: pytest.fail("called"))
        layer.base_layer.forward = lambda x: pytest.fail("called")
    report = accelerate(layer)
    assert not report.kept
    with pytest.warns(UserWarning, match="base layers adapted with ShiRA has backward/forward"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)  # once


def test_dtypes_that_do_not_fit_take_peft_s_forward(taken):
    ours, plain = layer_of(), layer_of()
    accelerate(ours)
    x, _ = inputs(BF16)
    for layer in (ours, plain):
        with pytest.raises(RuntimeError, match="dtype"):  # as nn.Linear does
            layer(x)
        layer.shira_weight.bfloat16()
    x, _ = inputs()
    assert torch.equal(ours(x), plain(x))
    assert taken == []
    with torch.autocast("cpu", dtype=BF16):
        torch.testing.assert_close(ours(x), plain(x), rtol=0.02, atol=0.05)
    assert taken == ["sparse"]


def test_the_layout_of_unsorted_positions():
    indices = torch.tensor([[2, 0, 1, 0], [0, 3, 2, 1]], dtype=torch.int32)
    layout, order = layout_of(indices, torch.zeros(4), (3, 4))
    assert layout.indices().tolist() == [1, 3, 6, 8] and order.tolist() == [3, 1, 2, 0]
    assert layout_of(indices[:, order], torch.zeros(4), (3, 4))[1] is None
