"""Why a layer of PEFT keeps PEFT's own forward, for the report of `accelerate`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from peft.tuners import lora, shira
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.shira import ShiraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .layers import PLAIN, dtypes_fit, is_watched
from .shira import layout_of


def why_not(layer: LoraLayer | ShiraLayer) -> str | None:
    """Why a layer cannot be taken, in a line; None if it can."""
    if isinstance(layer, LoraLayer):
        kind, name, bases, expected = lora.Linear, "lora.Linear", (nn.Linear, Conv1D), "nn.Linear or Conv1D"
    else:
        kind, name, bases, expected = shira.Linear, "shira.Linear", (nn.Linear,), "nn.Linear"
    if type(layer) is not kind:
        return f"{type(layer).__name__}: {'a subclass of' if isinstance(layer, kind) else 'not'} {name}"
    if "forward" in layer.__dict__:
        return "hooked by accelerate" if hasattr(layer, "_hf_hook") else "its forward is set on the instance"
    if type(layer.base_layer) not in bases:
        return f"its base_layer is {type(layer.base_layer).__name__}, not {expected}"
    reasons = _why_not_lora(layer) if kind is lora.Linear else _why_not_shira(layer)
    return next((reason for reason in reasons if reason), None)


def _why_not_lora(layer: lora.Linear) -> Iterator[str | None]:
    yield _why_not_module("base_layer", layer.base_layer)
    for name in _judged(layer, layer.lora_A):
        yield _why_not_lora_adapter(layer, name)


def _why_not_shira(layer: shira.Linear) -> Iterator[str | None]:
    yield _why_not_tensors("base_layer", layer.base_layer)  # hooks do not matter: PEFT does not call them either
    weight = layer.base_layer._parameters.get("weight")
    if weight is None or weight.is_meta:
        yield "its base_layer has no weight" if weight is None else "the weight of its base_layer has no data"
    for name in _judged(layer, layer.shira_weight):
        yield _why_not_shira_adapter(layer, name, weight)


def _judged(layer: LoraLayer | ShiraLayer, adapters: Iterable[str]) -> list[str]:
    """The active ones of the layer's adapters, or all where none is."""
    adapters = list(adapters)
    return [name for name in layer.active_adapters if name in adapters] or adapters


def _why_not_lora_adapter(layer: lora.Linear, name: str) -> str | None:
    if variant := layer.lora_variant.get(name):
        return f"{type(variant).__name__} adapter"
    lora_A, lora_B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    for role, module in (("lora_A", lora_A), ("lora_B", lora_B)):
        if type(module) is not nn.Linear:
            return f"its {role} is {type(module).__name__}, not nn.Linear"
        if module.bias is not None:
            return f"lora_bias: its {role} has a bias"
    if type(dropout) not in (nn.Identity, nn.Dropout) or getattr(dropout, "inplace", False):
        return f"its lora_dropout is {dropout}, not nn.Dropout"
    for role, module in (("lora_A", lora_A), ("lora_B", lora_B), ("lora_dropout", dropout)):
        if reason := _why_not_module(role, module):
            return reason
    dtypes = layer.base_layer.weight.dtype, lora_A.weight.dtype, lora_B.weight.dtype
    if not dtypes_fit(dtypes[0], *dtypes, autocast=False, cast_input=True):
        weight, a, b = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"lora_A {a} and lora_B {b} beside a {weight} weight"
    scaling = layer.scaling[name]
    if isinstance(scaling, torch.Tensor) and (scaling.dim() or scaling.requires_grad):
        return "its scaling is a tensor that is trained or has dimensions"
    return None


def _why_not_shira_adapter(layer: shira.Linear, name: str, weight: torch.Tensor) -> str | None:
    values, scaling, indices = layer.shira_weight[name], layer.scaling[name], layer.shira_indices.get(name)
    if type(values) not in PLAIN:
        return f"its shira_weight is a {type(values).__name__}"
    dtypes = weight.dtype, values.dtype, values.dtype
    if not dtypes_fit(dtypes[0], *dtypes, autocast=False, cast_input=True):
        base, own = (str(dtype).removeprefix("torch.") for dtype in dtypes[:2])
        return f"shira_weight {own} beside a {base} weight"
    if not isinstance(scaling, (float, int)):
        return f"its scaling is a {type(scaling).__name__}, not a number"
    if indices is None:
        return "it has no shira_indices"
    try:
        layout_of(indices, values, (layer.out_features, layer.in_features))
    except ValueError as error:
        return str(error)
    return None


def _why_not_module(role: str, module: nn.Module) -> str | None:
    if hasattr(module, "_hf_hook"):
        return f"its {role} is hooked by accelerate"
    if "forward" in module.__dict__:
        return f"the forward of its {role} is set on the instance"
    if is_watched(module):
        return f"hooks on its {role}"
    return _why_not_tensors(role, module)


def _why_not_tensors(role: str, module: nn.Module) -> str | None:
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) not in PLAIN:
            return f"the {name} of its {role} is a {type(parameter).__name__}"
    return None
