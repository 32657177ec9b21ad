"""Every tuner that `accelerate` takes: the numbers of PEFT's own layers, and all that PEFT and torch do with them."""

import copy
import pickle

import pytest
import torch
from peft import PeftModel

import peft_kernels as pk
from peft_kernels.testing import assert_within_eager
from tests.integrations.peft_models import KINDS, assert_equal, batch_for, run, run_layer, snapshot
from tests.integrations.shira_models import inputs
from tests.integrations.tuners import TUNERS, model_of

accelerate, restore = pk.integrations.peft.accelerate, pk.integrations.peft.restore
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# dtype of the input and the base, of the adapter, of autocast
PRECISIONS = {
    "float64": (F64, F64, None),
    "float32": (F32, F32, None),
    "bfloat16": (BF16, BF16, None),
    "bfloat16, float32 adapter": (BF16, F32, None),
    "float16, float32 adapter": (F16, F32, None),
    "float32, autocast": (F32, F32, BF16),
    "bfloat16, float32 adapter, autocast": (BF16, F32, BF16),
    "bfloat16, float16 autocast": (BF16, BF16, F16),
}


@pytest.fixture(params=TUNERS)
def case(request):
    return TUNERS[request.param]


@pytest.fixture
def models(case):
    """An accelerated model and its plain twin."""
    plain = model_of(case)
    ours = copy.deepcopy(plain)
    accelerate(ours)
    return ours, plain


@pytest.mark.parametrize("bias", ["no bias", "bias", "bias that trains"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_layer(case, precision, bias, taken):
    dtype, adapter, autocast = PRECISIONS[precision]
    layer = case.layer(dtype, adapter, bias != "no bias")
    layer.base_layer.weight.requires_grad_(False)
    if bias == "bias":
        layer.base_layer.bias.requires_grad_(False)
    x, grad = inputs(dtype, autocast)
    expected = run_layer(layer, x, grad, autocast)
    float64_reference = run_layer(copy.deepcopy(layer).double(), x.double(), grad.double())
    assert not accelerate(layer).kept and taken == []
    ours = run_layer(layer, x, grad, autocast)
    assert taken == [case.alone]
    assert ours.keys() == float64_reference.keys() and any(case.owned in name for name in ours)
    for name in ours:
        if dtype == F64:
            torch.testing.assert_close(ours[name], expected[name], rtol=1e-13, atol=1e-13)
        else:
            assert_within_eager(name, ours[name], expected[name], float64_reference[name])


@pytest.mark.parametrize("leading", [(), (0,), (4,), (2, 0, 3), (1, 2, 1, 3)])
def test_any_leading_dimensions(case, leading):
    layer = case.layer()
    layer.base_layer.requires_grad_(False)
    x, grad = inputs(leading=leading)
    expected = run_layer(layer, x, grad)
    accelerate(layer)
    torch.testing.assert_close(run_layer(layer, x, grad), expected)


def test_model(case, models, taken):
    ours, plain = models
    assert_equal(run(ours), run(plain))
    assert taken == case.calls


def test_report_and_restore_to_the_bit(case):
    model = model_of(case)
    before = snapshot(model)
    report = accelerate(model)
    assert len(report.fused) == 14 and not report.kept
    assert str(report).startswith("14 of 14 ")
    with pytest.raises(ValueError, match="got one that is accelerated already"):
        accelerate(model)
    run(model)
    model.zero_grad(set_to_none=True)
    restore(model)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="got one without such layers"):
        restore(model)


def test_state_dict_and_parameters_are_peft_s(models):
    ours, plain = models
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in plain.named_parameters()]
    ours.load_state_dict(plain.state_dict())


def test_saved_adapters_load_in_plain_peft(models, tmp_path):
    ours, _ = models
    trained = run(ours)
    ours.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(KINDS["llama"](), tmp_path, is_trainable=True)
    assert not any("Fused" in type(module).__name__ for module in loaded.modules())
    assert_equal(run(loaded), trained)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate")
def test_merge_and_unmerge(case, models, taken, safe):
    ours, plain = models
    for model in models:
        model.merge_adapter(safe_merge=safe)
    assert_equal(run(ours, backward=False), run(plain, backward=False))
    assert taken == []
    for model in models:
        model.unmerge_adapter()
    assert_equal(run(ours), run(plain))
    assert taken == case.calls


def test_merge_and_unload_leaves_a_plain_model(models):
    ours, plain = models
    expected = run(plain, backward=False)
    unloaded = ours.merge_and_unload()
    assert not any("Fused" in type(module).__name__ for module in unloaded.modules())
    assert_equal(run(unloaded, backward=False), expected)


def test_disable_adapter(case, models, taken):
    ours, plain = models
    with ours.disable_adapter(), plain.disable_adapter():
        assert torch.equal(run(ours, backward=False)["logits"], run(plain, backward=False)["logits"])
    assert taken == []
    assert_equal(run(ours), run(plain))
    assert taken == case.calls


def test_switching_adapters_and_several_active(case, models, taken):
    ours, plain = models
    for model in models:
        case.with_adapter(model, "second", ["q_proj", "down_proj"])
        model.set_adapter("second")
    assert_equal(run(ours), run(plain))
    assert taken == [case.alone] * 4  # PEFT's where there is no such adapter
    for model in models:
        model.base_model.set_adapter(["default", "second"])
    taken.clear()
    assert_equal(run(ours), run(plain))
    assert taken == []
    for model in models:
        model.set_adapter("default")
    assert_equal(run(ours), run(plain))
    for model in models:
        model.delete_adapter("second")
    assert_equal(run(ours), run(plain))
    assert taken == case.calls * 2


def test_extra_arguments_take_peft_s_forward(case, taken):
    ours, plain = case.layer(), case.layer()
    accelerate(ours)
    x, _ = inputs()
    for layer in (ours, plain):
        with pytest.raises(TypeError, match="task"):  # as nn.Linear does
            layer.base_layer(x, task=1)
        layer.base_layer.forward = lambda x, task=0, forward=layer.base_layer.forward: forward(x)
    assert torch.equal(ours(x, task=1), plain(x, task=1))
    assert taken == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(case, models, taken, copied):
    ours, plain = models
    expected = run(plain)
    twin = copied(ours)
    for name, parameter in ours.named_parameters():
        if case.owned in name:
            parameter.data.zero_()
    assert_equal(run(twin), expected)
    assert taken == case.calls
    restore(twin)
    assert_equal(run(twin), expected)


def test_moving_a_model_to_another_dtype(case, models, taken):
    ours, plain = (model.double() for model in models)
    assert_equal(run(ours), run(plain))
    assert taken == case.calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(case, models, reentrant, taken):
    ours, plain = models
    expected = run(plain)
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_equal(run(ours), expected)
    assert taken == case.calls * 2


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compile_the_whole_model(models, fresh_compiler):
    ours, plain = models
    expected = run(plain)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    results = run(compiled, batch_for(plain))
    assert_equal({name.removeprefix("_orig_mod."): value for name, value in results.items()}, expected)


def test_functional_call_with_other_parameters(case):
    ours, plain = case.layer(), case.layer()
    accelerate(ours)
    others = {name: parameter.detach() * 0.5 for name, parameter in plain.named_parameters()}
    x, _ = inputs()
    results = [torch.func.functional_call(layer, others, (x,)) for layer in (ours, plain)]
    torch.testing.assert_close(*results)


def test_dtypes_that_do_not_fit_take_peft_s_forward(case, taken):
    ours, plain = case.layer(), case.layer()
    accelerate(ours)
    x, _ = inputs(BF16)
    for layer in (ours, plain):
        with pytest.raises(RuntimeError, match="dtype"):  # as nn.Linear does
            layer(x)
    assert taken == []
