"""Take over the LoRA layers of a model, and give them back."""

from __future__ import annotations

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from .layers import PLAIN, FusedLoraLinear, dtypes_fit, is_watched
from .report import Report
from .shared_input import SharedInput, siblings_of_one_input


def accelerate(model: nn.Module) -> Report:
    """Let the LoRA layers of a PEFT model compute by the fused op.

    The layers stay the objects that they are, with their parameters, names and hooks; only the class of each
    becomes a subclass of PEFT's with another forward. Saving, merging, switching and disabling adapters,
    deepcopy, pickle, torch.compile and checkpointing work as before. Wherever a forward is not that of
    exactly one plain LoRA adapter (several active adapters, a mixed batch, merged, disabled, an adapter added
    later that is DoRA, …), PEFT's own runs. Global module hooks see a fused layer, not the modules in it.

    Layers that the parent's forward calls on the same variable (query/key/value, gate/up) run as one op; see
    `shared_input.py`.

    Args:
        model: any module with PEFT's LoRA layers in it.

    Returns:
        Which layers run fused, which of them share their input, which keep PEFT's forward and why. A layer is
        judged by the adapters that are active now.

    Raises:
        ValueError: if `model` is no module, has no LoRA layer or is accelerated already; nothing is changed
        then.
    """
    layers = _lora_layers(model)
    if not layers:
        raise ValueError(f"accelerate: expected a model with LoRA layers of PEFT, got {type(model).__name__} without")
    if any(isinstance(layer, FusedLoraLinear) for layer in layers.values()):
        raise ValueError("accelerate: expected a model as PEFT made it, got one that is accelerated already")
    kept = {name: reason for name, layer in layers.items() if (reason := why_not(layer))}
    fused = {name: layer for name, layer in layers.items() if name not in kept}
    for layer in fused.values():
        layer.__class__ = FusedLoraLinear
    return Report(tuple(fused), tuple(_share_inputs(model)), kept)


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: classes, hooks and attributes are what they were. Works on copies of the model
    too.

    Raises:
        ValueError: if `model` is no module or nothing in it is accelerated; nothing is changed then.
    """
    changed = _lora_layers(model, "restore")
    changed = [layer for layer in changed.values() if isinstance(layer, FusedLoraLinear)]
    hooked = [module for module in model.modules() if any(map(_is_ours, module._forward_hooks.values()))]
    if not changed and not hooked:
        raise ValueError("restore: expected a model that `accelerate` took layers of, got one without such layers")
    for layer in changed:
        layer.__dict__.pop("_shared_input", None)
        layer.__class__ = lora.Linear
    for module in hooked:
        for hooks, flags in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_always_called),
        ):
            for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                del hooks[key]
                flags.pop(key, None)


def _lora_layers(model: nn.Module, asked: str = "accelerate") -> dict[str, LoraLayer]:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{asked}: expected a torch.nn.Module, got {type(model).__name__}")
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _is_ours(hook) -> bool:
    return isinstance(getattr(hook, "__self__", None), SharedInput)


def _share_inputs(model: nn.Module):
    for path, parent in model.named_modules():
        # One child under two names, or in two parents, would be in two groups: it stays by itself.
        children = {
            name
            for name, child in parent.named_children()
            if type(child) is FusedLoraLinear and child._shared_input is None
        }
        for names in siblings_of_one_input(parent, children):
            SharedInput(names).join(parent)
            yield tuple(f"{path}.{name}".lstrip(".") for name in names)


def why_not(layer: LoraLayer) -> str | None:
    """Why a layer cannot be taken, in a line; None if it can."""
    if type(layer) is not lora.Linear:
        kind = "a subclass of lora.Linear" if isinstance(layer, lora.Linear) else "not lora.Linear"
        return f"{type(layer).__name__}: {kind}"
    if "forward" in layer.__dict__:
        return "hooked by accelerate" if hasattr(layer, "_hf_hook") else "its forward is set on the instance"
    base = layer.base_layer
    if type(base) not in (nn.Linear, Conv1D):
        return f"its base_layer is {type(base).__name__}, not nn.Linear or Conv1D"
    active = [name for name in layer.active_adapters if name in layer.lora_A] or list(layer.lora_A)
    reasons = (_why_not_module("base_layer", base), *(_why_not_adapter(layer, name) for name in active))
    return next((reason for reason in reasons if reason), None)


def _why_not_adapter(layer: lora.Linear, name: str) -> str | None:
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


def _why_not_module(role: str, module: nn.Module) -> str | None:
    if hasattr(module, "_hf_hook"):
        return f"its {role} is hooked by accelerate"
    if "forward" in module.__dict__:
        return f"the forward of its {role} is set on the instance"
    if is_watched(module):
        return f"hooks on its {role}"
    for name, parameter in module._parameters.items():
        if parameter is not None and type(parameter) not in PLAIN:
            return f"the {name} of its {role} is a {type(parameter).__name__}"
    return None
