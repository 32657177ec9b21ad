"""`nn.LoRALinear`: that it stands wherever an `nn.Linear` stood."""

import copy
import io
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_kernels as pk


def make(r=4, dtype=None, **options) -> pk.nn.LoRALinear:
    torch.manual_seed(0)
    layer = pk.nn.LoRALinear(24, 16, r, dtype=dtype, **options)
    nn.init.normal_(layer.lora_B)
    return layer


X = torch.randn(5, 24, generator=torch.Generator().manual_seed(1))


def test_is_a_linear_and_starts_as_its_base():
    linear = nn.Linear(24, 16)
    layer = pk.nn.LoRALinear.from_linear(linear, 4, lora_alpha=8)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.scaling) == (24, 16, 2.0)
    torch.testing.assert_close(layer(X), linear(X))


def test_from_linear_without_bias():
    linear = nn.Linear(6, 5, bias=False)
    layer = pk.nn.LoRALinear.from_linear(linear, 2)
    x = torch.randn(3, 6)
    torch.testing.assert_close(layer(x), linear(x))
    assert layer.bias is None and "bias" not in layer.state_dict()


def test_from_linear_shares_and_freezes():
    linear = nn.Linear(24, 16).eval()
    layer = pk.nn.LoRALinear.from_linear(linear, 4)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling_and_initialisation_as_in_peft(use_rslora):
    model = nn.Sequential(nn.Linear(24, 16))
    config = LoraConfig(r=4, lora_alpha=10, use_rslora=use_rslora, target_modules=["0"])
    peft = get_peft_model(copy.deepcopy(model), config).base_model.model[0]
    layer = pk.nn.LoRALinear.from_linear(model[0], 4, lora_alpha=10, use_rslora=use_rslora)
    torch.manual_seed(3)
    peft.reset_lora_parameters("default", init_lora_weights=True)
    torch.manual_seed(3)
    layer.reset_adapter()
    assert layer.scaling == peft.scaling["default"]
    assert torch.equal(layer.lora_A, peft.lora_A["default"].weight)
    assert not layer.lora_B.any()


def test_forward_is_the_op():
    layer = make(lora_alpha=6, lora_dropout=0.3)
    torch.manual_seed(2)
    y = layer(X)
    torch.manual_seed(2)
    expected = pk.lora_linear(
        X, layer.weight, layer.lora_A, layer.lora_B, 1.5, layer.bias, dropout_p=0.3, training=True
    )  # fmt: skip
    assert torch.equal(y, expected)
    layer.eval()
    torch.testing.assert_close(layer(X), X @ (layer.weight + 1.5 * layer.lora_B @ layer.lora_A).t() + layer.bias)


def test_trains():
    layer = make()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(20):
        loss = layer(X).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert layer.weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_and_unmerge(dtype):
    linear = nn.Linear(24, 16, dtype=dtype)
    layer = pk.nn.LoRALinear.from_linear(linear, 4)
    nn.init.normal_(layer.lora_B)
    before, y = (
        linear.weight.detach().clone(),
        layer.double()(X.double()) if dtype == torch.float64 else layer(X.to(dtype)),
    )
    layer.merge()
    assert layer.merged
    assert layer.weight is not linear.weight
    assert torch.equal(linear.weight, before), "a weight that others share stays as it is"
    expected = (before.float() + layer.lora_B.float() @ layer.lora_A.float() * layer.scaling).to(dtype)
    assert torch.equal(layer.weight, expected)
    tolerance = {} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 6e-2}
    torch.testing.assert_close(layer(X.to(dtype)), y, **tolerance)
    assert "merged (base weight kept on cpu" in repr(layer)
    assert f"{before.numel() * before.element_size()} bytes" in repr(layer)
    layer.unmerge()
    assert not layer.merged
    assert torch.equal(layer.weight, before)
    assert layer.weight.data_ptr() == linear.weight.data_ptr()


def test_merge_errors():
    layer = make()
    with pytest.raises(RuntimeError, match="expected a merged layer"):
        layer.unmerge()
    layer.merge()
    with pytest.raises(RuntimeError, match="expected an unmerged layer"):
        layer.merge()


def test_loads_a_plain_linear_checkpoint():
    linear, layer = nn.Linear(24, 16), make()
    adapter = layer.lora_A.clone()
    layer.load_state_dict(linear.state_dict(), strict=True)
    assert torch.equal(layer.weight, linear.weight)
    assert torch.equal(layer.lora_A, adapter)
    nested = nn.Sequential(make(), nn.ReLU())
    nested.load_state_dict(nn.Sequential(linear, nn.ReLU()).state_dict(), strict=True)
    assert torch.equal(nested[0].weight, linear.weight)


def test_state_dict_round_trip_and_missing_keys():
    layer, other = make(), pk.nn.LoRALinear(24, 16, 4)
    state = layer.state_dict()
    assert set(state) == {"weight", "bias", "lora_A", "lora_B"}
    other.load_state_dict(state)
    assert torch.equal(other(X), layer(X))
    del state["lora_B"]
    with pytest.raises(RuntimeError, match="lora_B"):
        other.load_state_dict(state)


def test_merged_state_dict_holds_the_base():
    layer = make()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.merge()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, state[key]), key
    layer.load_state_dict(state)
    assert not layer.merged


@pytest.mark.parametrize("merged", [False, True])
def test_copies(merged):
    layer = make(lora_dropout=0.1).eval()
    if merged:
        layer.merge()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(other) is pk.nn.LoRALinear
        assert torch.equal(other(X), layer(X))
        assert other.lora_A is not layer.lora_A
        if merged:
            other.unmerge()
            assert torch.equal(other.weight, layer.unmerged_weight)


def test_moves_as_a_whole():
    layer = make().double()
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    layer.merge()
    assert layer.to(torch.float32).unmerged_weight.dtype == torch.float32


@pytest.mark.parametrize("precision", ["default", "high"])
def test_float32_adapters_beside_a_16_bit_base(precision):
    layer = make(dtype=torch.bfloat16, adapter_dtype=torch.float32, adapter_precision=precision)
    y = layer(X.bfloat16())
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


def test_compiles():
    torch._dynamo.reset()
    layer = make(lora_dropout=0.2).eval()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(X), layer(X))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "expected a rank r of at least 1, got 0"),
        ({"r": 2, "lora_dropout": -0.5}, "expected lora_dropout between 0 and 1, got -0.5"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        pk.nn.LoRALinear(4, 4, **options)


def test_from_linear_wants_a_plain_linear():
    with pytest.raises(ValueError, match=r"expected a plain nn.Linear, got Conv1d"):
        pk.nn.LoRALinear.from_linear(nn.Conv1d(4, 4, 1), 2)
    with pytest.raises(ValueError, match=r"expected a plain nn.Linear, got LoRALinear"):
        pk.nn.LoRALinear.from_linear(make(), 2)


def test_extra_repr():
    assert repr(make(lora_alpha=8)) == (
        "LoRALinear(in_features=24, out_features=16, bias=True, r=4, lora_alpha=8, lora_dropout=0.0)"
    )
