"""What accelerate takes of SHiRA layers, what it leaves and why, and that restore undoes it to the bit."""

import copy

import pytest
import torch
from peft import ShiraConfig, inject_adapter_in_model
from peft.tuners import shira
from torch import nn

import peft_kernels as pk
from peft_kernels.integrations.peft.shira import FusedShiraLinear
from tests.integrations.peft_models import assert_equal, make, run, snapshot
from tests.integrations.shira_models import inputs, layer_of, make_shira, with_adapter

accelerate, restore = pk.integrations.peft.accelerate, pk.integrations.peft.restore
Q = "base_model.model.model.layers.0.self_attn.q_proj"


class OtherLinear(nn.Linear):
    pass


class OtherShira(shira.Linear):
    pass


class OtherTensor(torch.Tensor):
    pass


def indices_changed(change):
    def apply(layer):
        layer.shira_indices["default"] = change(layer.shira_indices["default"])

    return apply


def repeat_a_position(indices):
    indices[:, 7] = indices[:, 3]
    return indices


def too_large(row_or_column, size):
    def change(indices):
        indices[row_or_column, 5] = size
        return indices

    return change


def tensor_subclass(layer):
    base = layer.base_layer
    base.weight = nn.Parameter(base.weight.detach().as_subclass(OtherTensor), requires_grad=False)


def values_subclass(layer):
    values = layer.shira_weight["default"].detach().as_subclass(OtherTensor)
    layer.shira_weight["default"] = nn.Parameter(values)


def accelerate_hook(layer):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(layer, ModelHook())


OUTSIDE = "a position in its shira_indices lies outside of the weight"
CHANGES = {
    "subclass of shira.Linear": (
        lambda layer: setattr(layer, "__class__", OtherShira),
        "OtherShira: a subclass of shira.Linear",
    ),
    "subclass of nn.Linear": (
        lambda layer: setattr(layer.base_layer, "__class__", OtherLinear),
        "its base_layer is OtherLinear, not nn.Linear",
    ),
    "forward of the layer": (
        lambda layer: setattr(layer, "forward", layer.forward),
        "its forward is set on the instance",
    ),
    "accelerate": (accelerate_hook, "hooked by accelerate"),
    "weight of another class": (tensor_subclass, "the weight of its base_layer is a OtherTensor"),
    "values of another class": (values_subclass, "its shira_weight is a OtherTensor"),
    "spectral norm": (
        lambda layer: torch.nn.utils.spectral_norm(layer.base_layer),
        "its base_layer has no weight",
    ),
    "meta": (lambda layer: layer.base_layer.to("meta"), "the weight of its base_layer has no data"),
    "values in float64": (
        lambda layer: layer.shira_weight.double(),
        "shira_weight float64 beside a float32 weight",
    ),
    "scaling": (
        lambda layer: layer.set_scale("default", torch.tensor(0.5)),
        "its scaling is a Tensor, not a number",
    ),
    "no positions": (lambda layer: layer.shira_indices.clear(), "it has no shira_indices"),
    "a position twice": (indices_changed(repeat_a_position), "a position is in its shira_indices twice"),
    "a row too many": (indices_changed(too_large(0, 40)), OUTSIDE),
    "a column too many": (indices_changed(too_large(1, 48)), OUTSIDE),
    "a negative row": (indices_changed(too_large(0, -1)), OUTSIDE),
    "too few": (
        indices_changed(lambda indices: indices[:, 1:]),
        "its shira_indices are [2, 439] int32 on cpu, beside values [440] float32 on cpu",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_layer_that_keeps_peft_s_forward_and_why(case):
    change, reason = CHANGES[case]
    model = nn.ModuleDict({"layer": layer_of(), "plain": layer_of()})
    layer = model["layer"]
    torch.manual_seed(0)
    change(layer)
    kind, before = type(layer), dict(layer.__dict__)
    report = accelerate(model)
    assert report.kept == {"layer": reason} and report.fused == ("plain",)
    assert str(report).splitlines()[0] == "1 of 2 SHiRA layers run fused" and reason in str(report)
    assert type(layer) is kind and layer.__dict__ == before


RAISES = {"meta", "no positions", "too few"}
LATER = [case for case, (_, reason) in CHANGES.items() if reason != OUTSIDE]  # PEFT's writes outside of its memory


@pytest.mark.parametrize("case", LATER)
def test_the_same_after_accelerate_takes_peft_s_forward(case, taken):
    """What would have kept the layer, done to it later, is seen at run time."""
    change, _ = CHANGES[case]
    ours, plain = layer_of(), layer_of()
    accelerate(ours)
    x, _ = inputs()
    results = []
    for layer in (ours, plain):
        torch.manual_seed(0)
        change(layer)
        results.append(result_of(layer, x))
    if case in RAISES:
        assert results[0] is results[1] and issubclass(results[0], Exception)
    else:
        torch.testing.assert_close(*results)
    assert taken == (["sparse"] if case in ("forward of the layer", "accelerate") else [])  # around ours


def result_of(layer, x):
    try:
        return layer(x)
    except Exception as error:
        return type(error)


def test_quantised_base():
    bnb = pytest.importorskip("bitsandbytes")
    model = with_adapter(
        nn.Sequential(bnb.nn.Linear4bit(16, 16), nn.Linear(16, 16)), "default", target_modules=["0", "1"]
    )
    report = accelerate(model)
    assert report.kept == {"base_model.model.0": "its base_layer is Linear4bit, not nn.Linear"}
    assert report.fused == ("base_model.model.1",)


def test_report_and_restore_to_the_bit():
    model = make_shira(shuffled=True)
    model.get_submodule(Q).register_forward_hook(lambda *args: None)
    before = snapshot(model)
    report = accelerate(model)
    assert all(type(model.get_submodule(name)) is FusedShiraLinear for name in report.fused)
    assert len(report.fused) == 14 and not report.kept and not report.shared
    assert str(report).splitlines()[:2] == [
        "14 of 14 SHiRA layers run fused",
        "     2 × model.layers.*.self_attn.q_proj",
    ]
    with pytest.raises(ValueError, match="got one that is accelerated already"):
        accelerate(model)
    run(model)
    model.zero_grad(set_to_none=True)
    restore(model)
    assert snapshot(model) == before
    with pytest.raises(ValueError, match="got one without such layers"):
        restore(model)


def test_lora_and_shira_in_one_model(taken):
    """LoRA in the attention, SHiRA in the MLP."""
    plain = make(target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    config = ShiraConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj"], random_seed=0, init_weights=False)
    inject_adapter_in_model(config, plain.base_model.model)
    before = snapshot(plain)
    ours = copy.deepcopy(plain)
    report = accelerate(ours)
    assert str(report).splitlines() == [
        "14 of 14 LoRA and SHiRA layers run fused",
        "     2 × model.layers.*.self_attn.{q_proj, k_proj, v_proj}  one op: they share their input",
        "     2 × model.layers.*.self_attn.o_proj",
        "     2 × model.layers.*.mlp.gate_proj",
        "     2 × model.layers.*.mlp.up_proj",
        "     2 × model.layers.*.mlp.down_proj",
    ]
    assert_equal(run(ours), run(plain))
    assert taken == [3, "alone", *["sparse"] * 3] * 2
    accelerate(plain)
    restore(plain)
    plain.zero_grad(set_to_none=True)
    assert snapshot(plain) == before
