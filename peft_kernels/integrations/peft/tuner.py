"""What the layers of every tuner share: the record by which `accelerate` knows a tuner, and the conditions under which
PEFT's forward of a layer is the same computation as an op's.

A layer is taken over by setting its `__class__`: its parameters, buffers, hooks, state_dict and PEFT's own methods
(merge, set_adapter, …) stay as they are. What PEFT's forward does depends on state that may change at any time (active
adapters, merging, a second adapter of another variant, hooks, dtypes). So a tuner's `resolve` looks at it afresh at
every call, by plain dictionary look-ups, and where the answer is not exactly one plain adapter on one plain linear
layer it gives the reason, and PEFT's own forward runs. The report of `accelerate` asks the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._C import _is_any_autocast_enabled
from torch.nn import Module, Parameter

PLAIN = (Parameter, torch.Tensor)  # no DTensor, no quantised tensor subclass
_HALF = (torch.bfloat16, torch.float16)
_AUTOCASTABLE = (torch.float32, torch.bfloat16, torch.float16)


class Tuner(NamedTuple):
    """A tuner of PEFT whose linear layers `accelerate` takes.

    Attributes:
        name: as reports have it, "LoRA".
        layer: the class of all its layers.
        plain: the only class that is taken.
        fused: the subclass of `plain` that it becomes, which has our forward.
        adapters: of a layer, the names of its adapters.
        resolve: of (layer, adapter, x, autocast), what the op computes the same from as PEFT's forward with that
            adapter alone, or, as a str, the reason why it cannot. `x` is the input, or None for any in the weight's
            dtype; `autocast` says whether autocast is on for x's device.
        prepare: called with a layer that has been taken.
        attributes: what `accelerate` sets on such a layer, for `restore` to take away.
    """

    name: str
    layer: type[BaseTunerLayer]
    plain: type[Module]
    fused: type[Module]
    adapters: Callable[[Module], Iterable[str]]
    resolve: Callable[[Module, str, torch.Tensor | None, bool], tuple | str]
    prepare: Callable[[Module], None] = lambda layer: None
    attributes: tuple[str, ...] = ()

    def why_not(self, layer: Module) -> str | None:
        """Why a layer cannot be taken, in a line; None if it can. It is judged by its adapters that are active, or by
        all where none is."""
        if type(layer) is not self.plain:
            relation = "a subclass of" if isinstance(layer, self.plain) else "not"
            return f"{type(layer).__name__}: {relation} {self.name.lower()}.Linear"
        if "forward" in layer.__dict__:
            return "hooked by accelerate" if hasattr(layer, "_hf_hook") else "its forward is set on the instance"
        adapters = list(self.adapters(layer))
        for adapter in [name for name in layer.active_adapters if name in adapters] or adapters:
            if type(reason := self.resolve(layer, adapter, None, False)) is str:
                return reason
        return None


def only_adapter(layer: BaseTunerLayer) -> str | None:
    """The active adapter, if there is one, and neither merged nor disabled. The layer need not have it."""
    if layer._disable_adapters or layer.merged_adapters:
        return None
    active = layer._active_adapter
    if type(active) is str:
        return active
    return active[0] if len(active) == 1 else None


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on for x's device."""
    return _is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)


def is_hooked(*modules: Module) -> bool:
    """Whether calling one of `modules` may do something else than its class's forward."""
    for module in modules:
        own = module.__dict__  # a look-up through a class with `__getattr__` costs the CPU twice as much
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return True
    return False


def why_hooked(**modules: Module) -> str:
    """The reason that the first of these modules, by role, for which `is_hooked` gives."""
    role, module = next((role, module) for role, module in modules.items() if is_hooked(module))
    if hasattr(module, "_hf_hook"):
        return f"its {role} is hooked by accelerate"
    if "forward" in module.__dict__:
        return f"the forward of its {role} is set on the instance"
    return f"hooks on its {role}"


def why_not_plain(**weights: torch.Tensor | None) -> str:
    """The reason that the first of these weights, by the role of their modules, gives whose type is not among PLAIN."""
    role, weight = next((role, weight) for role, weight in weights.items() if type(weight) not in PLAIN)
    if weight is None:  # FSDP1 keeps the parameters elsewhere
        return f"its {role} has no weight"
    return f"the weight of its {role} is a {type(weight).__name__}"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtypes_fit(
    x: torch.dtype, weight: torch.dtype, a: torch.dtype, b: torch.dtype, autocast: bool, cast_input: bool
) -> bool:
    """Whether PEFT's casts lead to a case of the op: base product in x's dtype (autocast's under autocast),
    the adapters' products in the same or in float32."""
    if a != b:
        return False
    if autocast:
        return x in _AUTOCASTABLE and weight in _AUTOCASTABLE and a in _AUTOCASTABLE
    return x == weight and (a == x or (a == torch.float32 and x in _HALF and cast_input))
