"""`nn.LoRALinear`: what is special to it among the layers with an adapter."""

import copy

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


@pytest.mark.parametrize("precision", ["default", "high"])
def test_float32_adapters_beside_a_16_bit_base(precision):
    layer = make(dtype=torch.bfloat16, adapter_dtype=torch.float32, adapter_precision=precision)
    y = layer(X.bfloat16())
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


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


def test_extra_repr():
    assert repr(make(lora_alpha=8)) == (
        "LoRALinear(in_features=24, out_features=16, bias=True, r=4, lora_alpha=8, lora_dropout=0.0)"
    )


def test_the_merged_weight_is_rounded_once():
    layer = make(dtype=torch.bfloat16, lora_alpha=6)
    before = layer.weight.detach().clone()
    layer.merge()
    expected = before.float() + layer.lora_B.float() @ layer.lora_A.float() * 1.5
    assert torch.equal(layer.weight, expected.bfloat16())
    layer.unmerge()
    layer.scaling = torch.ones(5)
    with pytest.raises(RuntimeError, match=r"expected one scaling to merge with, got \[5\]"):
        layer.merge()
