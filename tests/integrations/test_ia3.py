"""What is special to accelerated IA3 layers: which are taken and why not, what they save, GPT-2's Conv1D."""

import copy

import pytest
import torch
from peft import IA3Config
from peft.tuners import ia3
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_kernels as pk
from peft_kernels.testing import saved_tensors
from tests.integrations.peft_models import run_layer
from tests.integrations.shira_models import inputs
from tests.integrations.tuners import ia3_layer

accelerate = pk.integrations.peft.accelerate


class OtherIA3(ia3.Linear):
    pass


class OtherLinear(nn.Linear):
    pass


class OtherTensor(torch.Tensor):
    pass


def of_another_class(owner, name):
    setattr(owner, name, nn.Parameter(getattr(owner, name).detach().as_subclass(OtherTensor), requires_grad=False))


CHANGES = {
    "subclass of ia3.Linear": (
        lambda layer: setattr(layer, "__class__", OtherIA3),
        "OtherIA3: a subclass of ia3.Linear",
    ),
    "subclass of nn.Linear": (
        lambda layer: setattr(layer.base_layer, "__class__", OtherLinear),
        "its base_layer is OtherLinear, not nn.Linear or Conv1D",
    ),
    "hook": (
        lambda layer: layer.base_layer.register_forward_hook(lambda *args: None),
        "hooks on its base_layer",
    ),
    "weight of another class": (
        lambda layer: of_another_class(layer.base_layer, "weight"),
        "the weight of its base_layer is a OtherTensor",
    ),
    "bias of another class": (
        lambda layer: of_another_class(layer.base_layer, "bias"),
        "the bias of its base_layer is a OtherTensor",
    ),
    "vector of another class": (
        lambda layer: of_another_class(layer.ia3_l, "default"),
        "its ia3_l is a OtherTensor",
    ),
    "vector in float64": (
        lambda layer: layer.ia3_l.double(),
        "ia3_l float64 and x float32 beside a float32 weight",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_layer_that_keeps_peft_s_forward_and_why(case):
    change, reason = CHANGES[case]
    model = nn.ModuleDict({"layer": ia3_layer(), "plain": ia3_layer()})
    change(model["layer"])
    report = accelerate(model)
    assert report.kept == {"layer": reason} and report.fused == ("plain",)
    assert str(report).splitlines()[0] == "1 of 2 IA3 layers run fused" and reason in str(report)


@pytest.mark.parametrize("case", CHANGES)
def test_the_same_after_accelerate_takes_peft_s_forward(case, taken):
    """What would have kept the layer, done to it later, is seen at run time."""
    change, _ = CHANGES[case]
    ours, plain = ia3_layer(), ia3_layer()
    accelerate(ours)
    x, _ = inputs()
    for layer in (ours, plain):
        change(layer)
    torch.testing.assert_close(ours(x), plain(x))
    assert taken == []


@pytest.mark.parametrize("feedforward", [False, True])
def test_conv1d(feedforward, taken):
    torch.manual_seed(0)
    config = IA3Config(fan_in_fan_out=True)
    layer = ia3.Linear(Conv1D(40, 48), "default", config, is_feedforward=feedforward, is_target_conv_1d_layer=True)
    nn.init.normal_(layer.ia3_l["default"])
    layer.base_layer.requires_grad_(False)
    x, grad = inputs()
    expected = run_layer(layer, x, grad)
    accelerate(layer)
    torch.testing.assert_close(run_layer(layer, x, grad), expected)
    assert taken == ["scaled"]


@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_bytes(dtype, feedforward):
    """The unscaled output and no more; of a scaled input nothing beside x."""
    layer = ia3_layer(dtype, feedforward=feedforward)
    layer.base_layer.requires_grad_(False)
    plain = copy.deepcopy(layer)
    accelerate(layer)
    x, _ = inputs(dtype)
    x.requires_grad_()
    sizes = []
    for one in (layer, plain):
        with saved_tensors(ignore=(x, *one.parameters())) as saved:
            one(x)
        sizes.append(sum(tensor.nbytes for tensor in saved))
    assert sizes[0] == (0 if feedforward else 33 * 40 * dtype.itemsize) and sizes[0] <= sizes[1], sizes
