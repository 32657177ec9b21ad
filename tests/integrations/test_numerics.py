"""The accelerated layer and model against PEFT's own: float64 reference, PEFT in the same dtype, ours."""

import copy

import pytest
import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_kernels as pk
from peft_kernels.integrations.peft.report import Report
from peft_kernels.testing import assert_within_eager
from tests.integrations.peft_models import (
    KINDS,
    assert_as_close_as_peft,
    batch_for,
    make,
    replay_dropout,
    run,
    run_layer,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# dtype of the input and the base, of the adapters, of autocast
PRECISIONS = {
    "float32": (F32, F32, None),
    "bfloat16": (BF16, BF16, None),
    "float16": (F16, F16, None),
    "bfloat16, float32 adapters": (BF16, F32, None),
    "float16, float32 adapters": (F16, F32, None),
    "bfloat16, float32 adapters, autocast": (BF16, F32, BF16),
    "float16, float32 adapters, bfloat16 autocast": (F16, F32, BF16),
    "float32, autocast": (F32, F32, BF16),
}


def layer_of(base: nn.Module, dtype, adapters, p=0.0) -> lora.Linear:
    layer = lora.Linear(base.to(dtype), "default", LoraConfig(r=5, lora_dropout=p), r=5, lora_alpha=7)
    torch.manual_seed(0)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    base.requires_grad_(False)
    layer.lora_A.to(adapters), layer.lora_B.to(adapters)
    return layer


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("base", [lambda: nn.Linear(48, 40), lambda: Conv1D(40, 48)], ids=["Linear", "Conv1D"])
def test_layer(base, precision, p, taken):
    dtype, adapters, autocast = PRECISIONS[precision]
    layer = layer_of(base(), dtype, adapters, p)
    x, grad = torch.randn(3, 11, 48).to(dtype), torch.randn(3, 11, 40).to(autocast or dtype)
    eager = replay_dropout(nn.ModuleDict({"layer": layer}), Report(("layer",), (), {})) if p else {"layer": layer}
    wide = copy.deepcopy(eager["layer"]).double()
    expected = run_layer(eager["layer"], x, grad, autocast)
    float64_reference = run_layer(wide, x.double(), grad.double())

    pk.integrations.peft.accelerate(layer)
    ours = run_layer(layer, x, grad, autocast)
    assert taken == ["alone"]
    assert ours.keys() == float64_reference.keys()
    for name in ours:
        assert_within_eager(name, ours[name], expected[name], float64_reference[name])


@pytest.mark.parametrize("leading", [(), (0,), (4,), (2, 3), (2, 0, 3), (1, 2, 1, 3)])
def test_any_leading_dimensions(leading):
    layer = layer_of(nn.Linear(12, 8), F32, F32)
    x, grad = torch.randn(*leading, 12), torch.randn(*leading, 8)
    expected = run_layer(layer, x, grad)
    pk.integrations.peft.accelerate(layer)
    torch.testing.assert_close(run_layer(layer, x, grad), expected)


def runs(model, autocast=None):
    return [run(model, batch_for(model, seed=seed), autocast, seed) for seed in range(24)]


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("kind", KINDS)
def test_model_in_float32(kind, p):
    compare(kind, F32, F32, None, p)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    "precision",
    ["bfloat16", "bfloat16, float32 adapters", "bfloat16, float32 adapters, autocast", "float32, autocast"],
)
def test_model_in_other_precisions(precision, p):
    compare("llama", *PRECISIONS[precision], p)


def compare(kind, dtype, adapters, autocast, p):
    model = make(kind, dtype, adapters, lora_dropout=p)
    plain = copy.deepcopy(model)
    report = pk.integrations.peft.accelerate(model)
    assert not report.kept
    eager = replay_dropout(plain, report) if p else plain
    float64_reference = copy.deepcopy(eager).double()
    assert_as_close_as_peft(runs(model, autocast), runs(eager, autocast), runs(float64_reference))


def test_mixtures_that_only_autocast_can_run(taken):
    layer = layer_of(nn.Linear(48, 40), F32, F32)
    x, grad = torch.randn(3, 48), torch.randn(3, 40)
    pk.integrations.peft.accelerate(layer)
    layer.lora_A.to(BF16), layer.lora_B.to(BF16)
    float64_reference = run_layer(copy.deepcopy(layer).double(), x.double(), grad.double())
    taken.clear()
    ours = run_layer(layer, x, grad, BF16)
    assert taken == ["alone"]
    pk.integrations.peft.restore(layer)
    eager = run_layer(layer, x, grad, BF16)
    for name in ours:
        assert_within_eager(name, ours[name], eager[name], float64_reference[name])


@pytest.mark.parametrize("autocast", [None, BF16])
def test_float64(autocast):
    layer = layer_of(nn.Linear(48, 40), torch.float64, torch.float64)
    x, grad = torch.randn(3, 48).double(), torch.randn(3, 40).double()
    expected = run_layer(layer, x, grad, autocast)
    pk.integrations.peft.accelerate(layer)
    torch.testing.assert_close(run_layer(layer, x, grad, autocast), expected)


def test_dtypes_that_peft_casts_and_the_op_does_not_take_peft_s_forward(taken):
    layer = layer_of(nn.Linear(48, 40), F32, F32)
    plain = copy.deepcopy(layer)
    pk.integrations.peft.accelerate(layer)
    x = torch.randn(3, 48)
    for module in (layer, plain):
        module.lora_A.to(BF16), module.lora_B.to(BF16)
    assert torch.equal(layer(x), plain(x))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x.to(BF16))  # as nn.Linear does
    layer.cast_input_dtype_enabled = False
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x)
    assert taken == []


def test_dropout_is_applied_while_training_only():
    model = make(lora_dropout=0.5)
    plain = copy.deepcopy(model)
    pk.integrations.peft.accelerate(model)
    trained = run(model)
    assert not torch.equal(trained["logits"], run(model, seed=4)["logits"])
    assert torch.equal(trained["logits"], run(model)["logits"])
    torch.testing.assert_close(run(model.eval())["logits"], run(plain.eval())["logits"])
