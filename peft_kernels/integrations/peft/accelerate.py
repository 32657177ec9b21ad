"""Take over the layers of PEFT's tuners in a model, and give them back."""

from __future__ import annotations

from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from . import ia3, lora, shira
from .report import Report
from .shared_input import SharedInput, siblings_of_one_input
from .tuner import Tuner

TUNERS = (lora.TUNER, shira.TUNER, ia3.TUNER)
FUSED = tuple(tuner.fused for tuner in TUNERS)
NAMES = "LoRA, SHiRA or IA3"


def accelerate(model: nn.Module) -> Report:
    """Let the LoRA, SHiRA and IA3 layers of a PEFT model compute by the fused ops.

    The layers stay the objects that they are, with their parameters, names and hooks; only the class of each
    becomes a subclass of PEFT's with another forward. Saving, merging, switching and disabling adapters,
    deepcopy, pickle, torch.compile and checkpointing work as before. Wherever a forward is not that of
    exactly one plain adapter (several active adapters, a mixed batch, merged, disabled, an adapter added
    later that is DoRA, …), PEFT's own runs. Global module hooks see a fused layer, not the modules in it.

    LoRA layers that the parent's forward calls on the same variable (query/key/value, gate/up) run as one op; see
    `shared_input.py`.

    A SHiRA layer runs without a dense dW, and keeps no clone of its weight until backward: forward and dx copy and
    patch rows or columns of it, at most half at a time (by the backend `cuda` all of it); see `shira.py`. It compiles
    with `fullgraph=True`, which PEFT's does not. An adapter added to it later has to run once before that, or the
    graph breaks.

    Args:
        model: any module with such layers in it.

    Returns:
        Which layers run fused, which of them share their input, which keep PEFT's forward and why. A layer is
        judged by the adapters that are active now.

    Raises:
        ValueError: if `model` is no module, has no such layer or is accelerated already; nothing is changed then.
    """
    layers = _layers_of_peft(model)
    if not layers:
        raise ValueError(
            f"accelerate: expected a model with {NAMES} layers of PEFT, got {type(model).__name__} without"
        )
    if any(isinstance(layer, FUSED) for layer in layers.values()):
        raise ValueError("accelerate: expected a model as PEFT made it, got one that is accelerated already")
    tuners = {name: _tuner_of(layer) for name, layer in layers.items()}
    kept = {name: reason for name, layer in layers.items() if (reason := tuners[name].why_not(layer))}
    fused = {name: layer for name, layer in layers.items() if name not in kept}
    groups = list(_groups(model, {layer for name, layer in fused.items() if tuners[name] is lora.TUNER}))
    # All that may raise is behind us.
    for name, layer in fused.items():
        layer.__class__ = tuners[name].fused
        tuners[name].prepare(layer)
    for _, parent, names in groups:
        SharedInput(names).join(parent)
    shared = tuple(tuple(f"{path}.{name}".lstrip(".") for name in names) for path, parent, names in groups)
    kinds = [tuner.name for tuner in TUNERS if tuner in tuners.values()]
    return Report(tuple(fused), shared, kept, " and ".join(kinds))


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: classes, hooks and attributes are what they were. Works on copies of the model
    too.

    Raises:
        ValueError: if `model` is no module or nothing in it is accelerated; nothing is changed then.
    """
    changed = _layers_of_peft(model, "restore")
    changed = [layer for layer in changed.values() if isinstance(layer, FUSED)]
    hooked = [module for module in model.modules() if any(map(_is_ours, module._forward_pre_hooks.values()))]
    if not changed and not hooked:
        raise ValueError("restore: expected a model that `accelerate` took layers of, got one without such layers")
    for layer in changed:
        tuner = _tuner_of(layer)
        for name in tuner.attributes:
            layer.__dict__.pop(name, None)
        layer.__class__ = tuner.plain
    for module in hooked:
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
            del hooks[key]


def _layers_of_peft(model: nn.Module, asked: str = "accelerate") -> dict[str, BaseTunerLayer]:
    if not isinstance(model, nn.Module):
        raise ValueError(f"{asked}: expected a torch.nn.Module, got {type(model).__name__}")
    return {name: module for name, module in model.named_modules() if _tuner_of(module)}


def _tuner_of(module: nn.Module) -> Tuner | None:
    return next((tuner for tuner in TUNERS if isinstance(module, tuner.layer)), None)


def _is_ours(hook) -> bool:
    return isinstance(getattr(hook, "__self__", None), SharedInput)


def _groups(model: nn.Module, fused: set[nn.Module]) -> Iterator[tuple[str, nn.Module, tuple[str, ...]]]:
    """The path of a parent, the parent, and the names of those of its children among `fused` that share their input."""
    grouped: set[nn.Module] = set()
    for path, parent in model.named_modules():
        # One child under two names, or in two parents, would be in two groups: it stays by itself.
        children = {name for name, child in parent.named_children() if child in fused and child not in grouped}
        for names in siblings_of_one_input(parent, children):
            grouped |= {parent.get_submodule(name) for name in names}
            yield path, parent, names
