"""The tuners that `accelerate` takes: how PEFT makes a layer and a model of each, with numbers that matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from peft import IA3Config, LoraConfig, PeftModel
from peft.tuners import ia3, lora
from torch import nn

from tests.integrations import shira_models
from tests.integrations.peft_models import KINDS

NAMES = [f"{letter}_proj" for letter in ("q", "k", "v", "o", "gate", "up", "down")]


class Case(NamedTuple):
    """One tuner.

    Attributes:
        layer: of the dtypes of base and adapter, and whether the base has a bias: a layer of 48 features in, 40 out.
        with_adapter: adds an adapter of that name to a model, with or without others, for target modules.
        owned: what is in the names of its parameters, and in no others.
        calls: what a forward of an accelerated Llama of two blocks fills the fixture `taken` with.
        alone: what that of one layer does.
    """

    layer: Callable[..., nn.Module]
    with_adapter: Callable[..., PeftModel]
    owned: str
    calls: list
    alone: str


def model_of(case: Case) -> PeftModel:
    """A tiny Llama with one adapter, in train mode."""
    torch.manual_seed(0)
    base = KINDS["llama"]()
    base.loss_type = base.loss_type or "ForCausalLM"  # or else a warning, which torch.compile cannot trace
    return case.with_adapter(base, "default", NAMES).train()


def _with_adapter(owned: str, config_of: Callable) -> Callable:
    def with_adapter(model: nn.Module, name: str, targets: list[str]) -> PeftModel:
        config = config_of(targets)
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
        else:
            model = PeftModel(model, config, name, autocast_adapter_dtype=False)
        for index, (path, parameter) in enumerate(model.named_parameters()):
            if owned in path and name in path:
                parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(index))
        return model

    return with_adapter


def _ia3_config(targets: list[str]) -> IA3Config:
    return IA3Config(target_modules=targets, feedforward_modules=[name for name in targets if name == "down_proj"])


def _lora_layer(dtype=torch.float32, adapter=torch.float32, bias=True) -> lora.Linear:
    torch.manual_seed(0)
    layer = lora.Linear(nn.Linear(48, 40, bias=bias), "default", LoraConfig(r=5), r=5, lora_alpha=7)
    return _prepared(layer, dtype, adapter, layer.lora_A, layer.lora_B)


def ia3_layer(dtype=torch.float32, adapter=torch.float32, bias=True, feedforward=False) -> ia3.Linear:
    torch.manual_seed(0)
    layer = ia3.Linear(nn.Linear(48, 40, bias=bias), "default", IA3Config(), is_feedforward=feedforward)
    return _prepared(layer, dtype, adapter, layer.ia3_l)


def _prepared(layer: nn.Module, dtype: torch.dtype, adapter: torch.dtype, *adapters: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    layer.base_layer.to(dtype)
    for module in adapters:
        module.to(adapter)
    return layer


TUNERS = {
    "LoRA": Case(
        _lora_layer,
        _with_adapter("lora_", lambda targets: LoraConfig(r=3, lora_alpha=6, target_modules=targets)),
        "lora_",
        [3, "alone", 2, "alone"] * 2,
        "alone",
    ),
    "SHiRA": Case(
        shira_models.layer_of,
        lambda model, name, targets: shira_models.with_adapter(model, name, target_modules=targets),
        "shira_",
        ["sparse"] * 14,
        "sparse",
    ),
    "IA3": Case(ia3_layer, _with_adapter("ia3_l", _ia3_config), "ia3_l", ["scaled"] * 14, "scaled"),
    "IA3, feed-forward": Case(
        lambda *args: ia3_layer(*args, feedforward=True),
        _with_adapter("ia3_l", lambda targets: IA3Config(target_modules=targets, feedforward_modules=targets)),
        "ia3_l",
        ["scaled"] * 14,
        "scaled",
    ),
}
