"""What changes a model checks all of it first: where it raises, nothing of the model is another than before."""

import importlib

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations

import peft_kernels as pk
from peft_kernels.sparse.regrow import Regrown

LAYOUT = pk.SparseLayout.from_indices((16, 16), torch.arange(9))


class Packed(torch.Tensor):
    """As the weights of torchao and HQQ: the layer's class stays nn.Linear, and most operations are not there."""

    @staticmethod
    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data):
        self.packed = data

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"Packed: {function}")


def linear(**options):
    return nn.Linear(16, 16, **options)


def packed(role="weight"):
    layer = linear()
    setattr(layer, role, nn.Parameter(Packed(getattr(layer, role).detach()), requires_grad=False))
    return layer


def in_four_bits():
    layer = bitsandbytes.nn.Linear4bit(16, 16, bias=False)
    layer.weight = bitsandbytes.nn.Params4bit(torch.randn(16, 16), requires_grad=False)
    return layer.to("cpu")  # quantised here


def in_eight_bits():
    layer = bitsandbytes.nn.Linear8bitLt(16, 16, bias=False)
    layer.weight = bitsandbytes.nn.Int8Params(torch.randn(16, 16), requires_grad=False)
    return layer.to("cpu")


def of_integers():
    layer = linear(bias=False)
    layer.weight = nn.Parameter(torch.ones(16, 16, dtype=torch.int8), requires_grad=False)
    return layer


def in_float8():
    return linear(bias=False).requires_grad_(False).to(torch.float8_e4m3fn)


LAYERS = {
    "bitsandbytes, 4 bits": (in_four_bits, "Linear4bit, whose weight is a Params4bit"),
    "bitsandbytes, 8 bits": (in_eight_bits, "Linear8bitLt, whose weight is a Int8Params"),
    "a tensor subclass": (packed, "Linear, whose weight is a Packed"),
    "a bias that is one": (lambda: packed("bias"), "Linear, whose bias is a Packed"),
    "integers": (of_integers, r"Linear, whose weight is \[16, 16\] int8"),
    "float8": (in_float8, r"Linear, whose weight is \[16, 16\] float8_e4m3fn"),
    "a parametrisation": (lambda: parametrizations.weight_norm(linear()), "whose weight is no parameter of its own"),
    "not yet made": (lambda: nn.LazyLinear(16), "LazyLinear, whose weight is a UninitializedParameter"),
}


def state(model):
    """What may not change: classes, parameters, what trains, hooks, numbers."""
    found = []
    for name, module in model.named_modules(remove_duplicate=False):
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        found.append((name, module, type(module), hooks, "forward" in module.__dict__))
        for key, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None:
                plain = type(tensor) in (torch.Tensor, nn.Parameter)
                found.append((key, id(tensor), tensor.requires_grad, tensor.tolist() if plain else None))
    return found


def assert_refused(model, function, message):
    before = state(model)
    with pytest.raises(ValueError, match=message) as error:
        function()
    assert state(model) == before
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_that_are_not_plain(kind):
    make, message = LAYERS[kind]
    layer = make()
    assert_refused(layer, lambda: pk.nn.LoRALinear.from_linear(layer, 2), message)
    assert_refused(layer, lambda: pk.nn.SparseDeltaLinear.from_linear(layer, LAYOUT), message)


@pytest.mark.parametrize("kind", [k for k in LAYERS if k not in ("a parametrisation", "not yet made")])
def test_add_deltas_to_a_model_with_one(kind):
    make, message = LAYERS[kind]
    model = nn.Sequential(linear(), make())
    if type(model[1]) is not nn.Linear:
        message = "expected the name of an nn.Linear, got '1', Linear"
    assert_refused(model, lambda: pk.sparse.add_deltas(model, {"0": LAYOUT, "1": LAYOUT}), message)


def test_an_inference_tensor_is_not_written_to():
    with torch.inference_mode():
        model = nn.Sequential(linear(), linear())
    assert_refused(
        model, lambda: pk.sparse.add_deltas(model, {"1": LAYOUT}), "'1', Linear, whose weight is an inference"
    )


BAD_DELTAS = {
    "of another type": ({"0": LAYOUT, "2": LAYOUT.mask()}, {}, "expected a SparseLayout or a SparseDelta for '2'"),
    "of another shape": (
        {"0": LAYOUT, "2": pk.SparseLayout.rows((8, 16), torch.tensor([1]))}, {}, "expected a delta of"
    ),
    "empty, of another shape": (
        {"0": LAYOUT, "2": pk.SparseLayout.rows((8, 16), torch.tensor([], dtype=torch.int64))}, {}, "for '2'"
    ),
    "of no layer": ({"0": LAYOUT, "1": LAYOUT}, {}, "got '1', ReLU"),
    "of no module": ({"0": LAYOUT, "elsewhere": LAYOUT}, {}, "got 'elsewhere', NoneType"),
    "with dots in its name": ({"0": LAYOUT}, {"name": "a.b"}, "expected a name without dots"),
    "without a name": ({"0": LAYOUT}, {"name": ""}, "expected a name without dots"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_DELTAS)
def test_deltas_that_do_not_fit(kind):
    deltas, options, message = BAD_DELTAS[kind]
    model = nn.Sequential(linear(), nn.ReLU(), linear())
    assert_refused(model, lambda: pk.sparse.add_deltas(model, deltas, **options), message)


def test_a_weight_without_data():
    model = nn.Sequential(linear(), linear(device="meta"))
    with pytest.raises(ValueError, match="expected a weight with data, got '1'"):
        pk.sparse.add_deltas(model, {"0": LAYOUT, "1": LAYOUT})
    assert type(model[0]) is nn.Linear


def test_a_model_that_is_the_layer_itself():
    layer = linear()
    assert_refused(
        layer, lambda: pk.sparse.add_deltas(layer, {"": LAYOUT}), "expected the name of an nn.Linear, got ''"
    )
    layer = pk.nn.SparseDeltaLinear.from_linear(layer, LAYOUT)
    layer.values.data.fill_(1.0)
    layer.write(changed=True)
    for function in (pk.sparse.remove_deltas, pk.sparse.merge_deltas):
        assert_refused(layer, lambda function=function: function(layer), r"use its restore\(\) and merge\(\)")


def test_a_layer_in_two_places():
    model = nn.ModuleDict({"one": linear()})
    pk.sparse.add_deltas(model, {"one": LAYOUT})
    model["other"] = model["one"]
    pk.sparse.remove_deltas(model)
    assert type(model["one"]) is nn.Linear and model["other"] is model["one"]


def test_regrowing():
    layer = pk.nn.SparseDeltaLinear.from_linear(linear(), LAYOUT)
    optimizer = torch.optim.AdamW([layer.values])
    layer(torch.randn(3, 16)).sum().backward()
    optimizer.step()
    moments = {name: moment.clone() for name, moment in optimizer.state[layer.values].items()}
    other = pk.SparseLayout.from_indices((16, 16), torch.arange(20, 29))
    source = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, -4])
    layer.write()
    for regrown, starts, message in (
        (Regrown(other, source), {"square": torch.zeros(2)}, "expected a number for each candidate"),
        (Regrown(other, source[:-1]), {}, "expected what to carry"),
        (Regrown(pk.SparseLayout.rows((16, 16), torch.tensor([1])), source), {}, "expected a layout as"),
    ):
        assert_refused(
            layer, lambda r=regrown, s=starts: pk.sparse.regrow(layer, r, optimizer, **s), message
        )  # fmt: skip
    for name, moment in optimizer.state[layer.values].items():
        assert torch.equal(moment, moments[name])


def test_merging_that_fails():
    layer = pk.nn.LoRALinear(16, 16, 2)
    layer.lora_B = nn.Parameter(torch.zeros(16, 3))  # as a faulty load might leave it
    with pytest.raises(RuntimeError):
        layer.merge()
    assert not layer.merged and layer.unmerged_weight is None


def test_options_of_an_adapter():
    layer = linear()
    for options, message in (
        ({"r": 0}, "expected a rank"),
        ({"r": 2, "adapter_precision": "higher"}, "expected adapter_precision 'default' or 'high', got 'higher'"),
        ({"r": 2, "adapter_dtype": torch.float16}, "expected an adapter_dtype as the weight's, torch.float32, got"),
        ({"r": 2, "adapter_dtype": torch.int8}, "expected an adapter_dtype"),
    ):
        assert_refused(layer, lambda options=options: pk.nn.LoRALinear.from_linear(layer, **options), message)


def test_optimizers():
    with pytest.raises(ValueError, match=r"expected floating-point parameters, got a Parameter \[4\] int8"):
        pk.optim.SparseAdamW([nn.Parameter(torch.ones(4, dtype=torch.int8), requires_grad=False)])
    one = pk.optim.SparseAdamW([nn.Parameter(torch.ones(4))])
    two = pk.optim.SparseAdamW([{"params": [nn.Parameter(torch.ones(4))]} for _ in range(2)])
    with pytest.raises(ValueError, match="expected the state of an optimizer with 1 groups, got 2"):
        one.load_state_dict(two.state_dict())


def test_accelerate_takes_nothing_where_it_raises(monkeypatch):
    """What looks at the parents' sources comes before the first layer is taken."""
    module = importlib.import_module("peft_kernels.integrations.peft.accelerate")
    model = get_peft_model(nn.Sequential(linear(), linear()), LoraConfig(target_modules=["0", "1"]))

    def broken(parent, children):
        raise ValueError("a source that cannot be read")

    monkeypatch.setattr(module, "siblings_of_one_input", broken)
    assert_refused(model, lambda: module.accelerate(model), "cannot be read")


def test_accelerate_leaves_quantised_layers_to_peft():
    model = nn.Sequential(linear(), in_four_bits())
    model = get_peft_model(model, LoraConfig(target_modules=["0", "1"]))
    report = pk.integrations.peft.accelerate(model)
    assert len(report.fused) == 1 and list(report.kept) == ["base_model.model.1"]
