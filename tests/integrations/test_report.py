"""What accelerate takes, what it leaves and why, and that restore undoes it to the bit."""

import copy
import subprocess
import sys
from operator import attrgetter

import pytest
import torch
from peft import LoraConfig, OFTConfig, get_peft_model
from peft.tuners import lora
from torch import nn
from torch.nn.utils import parametrizations

import peft_kernels as pk
from peft_kernels.integrations.peft.lora import FusedLoraLinear
from tests.integrations.peft_models import assert_equal, make, run, snapshot

accelerate, restore = pk.integrations.peft.accelerate, pk.integrations.peft.restore
Q = "base_model.model.model.layers.0.self_attn.q_proj"
BLOCK = "base_model.model.model.layers.0"


def test_importing_the_package_does_not_import_peft():
    program = "import sys, peft_kernels as pk; assert 'peft' not in sys.modules; pk.integrations.peft.accelerate"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert "peft" in dir(pk.integrations)
    with pytest.raises(AttributeError, match="no attribute 'pfet'"):
        attrgetter("pfet")(pk.integrations)


def test_every_layer_of_a_llama():
    model = make()
    report = accelerate(model)
    assert len(report.fused) == 14 and not report.kept
    assert report.shared[:2] == (
        tuple(f"{BLOCK}.self_attn.{name}_proj" for name in "qkv"),
        (f"{BLOCK}.mlp.gate_proj", f"{BLOCK}.mlp.up_proj"),
    )
    for name in report.fused:
        assert type(model.get_submodule(name)) is FusedLoraLinear
    assert str(report).splitlines() == [
        "14 of 14 LoRA layers run fused",
        "     2 × model.layers.*.self_attn.{q_proj, k_proj, v_proj}  one op: they share their input",
        "     2 × model.layers.*.mlp.{gate_proj, up_proj}  one op: they share their input",
        "     2 × model.layers.*.self_attn.o_proj",
        "     2 × model.layers.*.mlp.down_proj",
    ]


def dora(model):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", use_dora=True)
    return get_peft_model(model.unload(), config)


def dora_besides(model):
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    model.base_model.set_adapter(["default", "dora"])


def lora_bias(model):
    return get_peft_model(model.unload(), LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True))


def hook(path, register):
    def change(model):
        getattr(model.get_submodule(f"{Q}.{path}"), register)(lambda *args: None)

    return change


def accelerate_hook(path):
    def change(model):
        from accelerate.hooks import ModelHook, add_hook_to_module

        add_hook_to_module(model.get_submodule(f"{Q}{path}"), ModelHook())

    return change


def instance_forward(path):
    def change(model):
        module = model.get_submodule(f"{Q}{path}")
        module.forward = lambda x, forward=module.forward: forward(x)

    return change


def parametrised(path):
    def change(model):
        torch.manual_seed(0)
        parametrizations.orthogonal(model.get_submodule(f"{Q}{path}"))

    return change


def spectral_norm(model):
    torch.manual_seed(0)
    torch.nn.utils.spectral_norm(model.get_submodule(f"{Q}.base_layer"))


class OtherLinear(nn.Linear):
    pass


class OtherLora(lora.Linear):
    pass


class OtherTensor(torch.Tensor):
    pass


def base_class(model):
    model.get_submodule(f"{Q}.base_layer").__class__ = OtherLinear


def layer_class(model):
    model.get_submodule(Q).__class__ = OtherLora


def tensor_subclass(model):
    base = model.get_submodule(f"{Q}.base_layer")
    base.weight = nn.Parameter(base.weight.detach().as_subclass(OtherTensor), requires_grad=False)


def adapter_dtype(dtype):
    def change(model):
        model.get_submodule(f"{Q}.lora_A").to(dtype)

    return change


def own_dropout(model):
    model.get_submodule(Q).lora_dropout["default"] = nn.AlphaDropout(0.0)


def inplace_dropout(model):
    model.get_submodule(Q).lora_dropout["default"] = nn.Dropout(0.0, inplace=True)


def trained_scaling(model):
    model.get_submodule(Q).scaling["default"] = torch.ones((), requires_grad=True)


CHANGES = {
    "DoRA": (dora, "DoraLinearVariant adapter"),
    "DoRA beside LoRA": (dora_besides, "DoraLinearVariant adapter"),
    "lora_bias": (lora_bias, "lora_bias: its lora_B has a bias"),
    "subclass of lora.Linear": (layer_class, "OtherLora: a subclass of lora.Linear"),
    "subclass of nn.Linear": (base_class, "its base_layer is OtherLinear, not nn.Linear or Conv1D"),
    "hook before the base": (hook("base_layer", "register_forward_pre_hook"), "hooks on its base_layer"),
    "hook after lora_A": (hook("lora_A.default", "register_forward_hook"), "hooks on its lora_A"),
    "backward hook of lora_B": (hook("lora_B.default", "register_full_backward_hook"), "hooks on its lora_B"),
    "backward pre-hook of the base": (
        hook("base_layer", "register_full_backward_pre_hook"),
        "hooks on its base_layer",
    ),
    "hook of dropout": (hook("lora_dropout.default", "register_forward_hook"), "hooks on its lora_dropout"),
    "accelerate": (accelerate_hook(""), "hooked by accelerate"),
    "accelerate on the base": (accelerate_hook(".base_layer"), "its base_layer is hooked by accelerate"),
    "forward of the layer": (instance_forward(""), "its forward is set on the instance"),
    "forward of the base": (
        instance_forward(".base_layer"),
        "the forward of its base_layer is set on the instance",
    ),
    "forward of lora_A": (
        instance_forward(".lora_A.default"),
        "the forward of its lora_A is set on the instance",
    ),
    "parametrised base": (
        parametrised(".base_layer"),
        "its base_layer is ParametrizedLinear, not nn.Linear or Conv1D",
    ),
    "parametrised adapter": (
        parametrised(".lora_A.default"),
        "its lora_A is ParametrizedLinear, not nn.Linear",
    ),
    "spectral norm": (spectral_norm, "hooks on its base_layer"),
    "tensor subclass": (tensor_subclass, "the weight of its base_layer is a OtherTensor"),
    "one adapter in float64": (
        adapter_dtype(torch.float64),
        "lora_A float64 and lora_B float32 beside a float32 weight",
    ),
    "dropout of another kind": (
        own_dropout,
        "its lora_dropout is AlphaDropout(p=0.0, inplace=False), not nn.Dropout",
    ),
    "dropout in place": (inplace_dropout, "its lora_dropout is Dropout(p=0.0, inplace=True), not nn.Dropout"),
    "scaling that trains": (trained_scaling, "its scaling is a tensor that is trained or has dimensions"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_layer_that_keeps_peft_s_forward_and_why(case):
    change, reason = CHANGES[case]
    model = make()
    model = change(model) or model
    layer = model.get_submodule(Q)
    kind, before = type(layer), dict(layer.__dict__)
    report = accelerate(model)
    assert report.kept[Q] == reason
    assert Q not in report.fused and not any(Q in group for group in report.shared)
    assert type(layer) is kind and layer.__dict__ == before
    assert reason in str(report)


LATER = CHANGES.keys() - {
    "DoRA",
    "lora_bias",
    "DoRA beside LoRA",
    "one adapter in float64",
}  # of the whole model; raises


@pytest.mark.parametrize("case", sorted(LATER))
def test_the_same_after_accelerate_takes_peft_s_forward(case, taken):
    """What would have kept the layer, done to it later, is seen at run time."""
    change, _ = CHANGES[case]
    model, plain = make(), make()
    accelerate(model)
    for changed in (model, plain):
        change(changed)
    results, expected = run(model, backward=False), run(plain, backward=False)
    assert_equal(results, expected)
    # Layer 0: k and v by themselves, or together; accelerate's hook on the whole layer wraps its forward.
    assert taken.count(3) == 1
    if case not in ("accelerate", "forward of the layer", "subclass of lora.Linear"):
        assert "alone" in taken and taken.count(2) == 3


def test_other_lora_layers_are_listed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.conv, self.out = nn.Embedding(9, 8), nn.Conv1d(8, 8, 1), nn.Linear(8, 8)

        def forward(self, ids):
            return self.out(self.conv(self.tokens(ids).transpose(1, 2)).transpose(1, 2))

    model = get_peft_model(Model(), LoraConfig(r=2, target_modules=["tokens", "conv", "out"]))
    report = accelerate(model)
    assert report.fused == ("base_model.model.out",)
    assert report.kept == {
        "base_model.model.tokens": "Embedding: not lora.Linear",
        "base_model.model.conv": "Conv1d: not lora.Linear",
    }


def test_quantised_base():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(16, 16), nn.Linear(16, 16))
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["0", "1"]))
    report = accelerate(model)
    assert report.fused == ("base_model.model.1",)
    # PEFT has a class of its own for it where bitsandbytes finds a GPU.
    plain = type(model.get_submodule("base_model.model.0")) is lora.Linear
    reason = "its base_layer is Linear4bit, not nn.Linear or Conv1D" if plain else "Linear4bit: not lora.Linear"
    assert report.kept == {"base_model.model.0": reason}


def test_restore_is_to_the_bit():
    model = make(lora_dropout=0.1)
    model.get_submodule(f"{BLOCK}.self_attn").register_forward_hook(lambda *args: None)
    model.get_submodule(Q).register_forward_hook(lambda *args: None)
    before = snapshot(model)
    accelerate(model)
    assert snapshot(model) != before
    run(model)
    model.zero_grad(set_to_none=True)
    restore(model)
    assert snapshot(model) == before
    accelerate(model)
    restore(model)
    assert snapshot(model) == before


def test_errors_in_one_line_and_nothing_changed():
    model = make()
    before = snapshot(model)
    for call, given, message in [
        (
            restore,
            model,
            "restore: expected a model that `accelerate` took layers of, got one without such layers",
        ),
        (restore, 3, "restore: expected a torch.nn.Module, got int"),
        (accelerate, None, "accelerate: expected a torch.nn.Module, got NoneType"),
        (
            accelerate,
            nn.Linear(2, 2),
            "accelerate: expected a model with LoRA, SHiRA or IA3 layers of PEFT, got Linear without",
        ),
    ]:
        with pytest.raises(ValueError) as error:
            call(given)
        assert str(error.value) == message
    assert snapshot(model) == before
    accelerate(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="got one that is accelerated already"):
        accelerate(model)
    assert snapshot(model) == before
    other = get_peft_model(nn.Sequential(nn.Linear(4, 4)), OFTConfig(target_modules=["0"], oft_block_size=2))
    with pytest.raises(ValueError, match="LoRA, SHiRA or IA3 layers of PEFT, got PeftModel without"):
        accelerate(other)


def test_a_deepcopy_taken_before_is_not_touched():
    model = make()
    twin = copy.deepcopy(model)
    before = snapshot(twin)
    accelerate(model)
    assert snapshot(twin) == before
