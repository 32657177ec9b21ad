"""PEFT's `lora.Linear` with a fused forward, and the conditions under which it is the same computation.

A layer is taken over by setting its `__class__`: its parameters, buffers, hooks, state_dict and PEFT's own
methods (merge, set_adapter, …) stay as they are. What PEFT's forward does depends on state that may change at
any time (active adapters, merging, a second adapter that is DoRA, hooks, dtypes), so `read` looks at it
afresh at every call, by plain dictionary look-ups, and gives up wherever the answer is not exactly one
vanilla LoRA adapter on one plain linear layer: then PEFT's own forward runs.
"""

from __future__ import annotations

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from torch._C import _is_any_autocast_enabled
from torch.nn import Dropout, Identity, Linear, Module, Parameter
from transformers.pytorch_utils import Conv1D

from ...ops.lora_linear import is_row_scaling, lora_linear

PLAIN = (Parameter, torch.Tensor)  # no DTensor, no quantised tensor subclass
_HALF = (torch.bfloat16, torch.float16)
_AUTOCASTABLE = (torch.float32, torch.bfloat16, torch.float16)


class FusedLoraLinear(lora.Linear):
    """`peft.tuners.lora.Linear`, forward by :func:`peft_kernels.lora_linear`; made by `accelerate` only."""

    #: (group, own name in the parent), set on the instance where the layer shares its input with siblings.
    _shared_input = None

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if args or kwargs:  # adapter_names of a mixed batch, arguments of a variant or of the base layer
            return self._forward_of_peft(x, *args, **kwargs)
        call = None
        if self._shared_input is not None and not torch.compiler.is_compiling():
            group, name = self._shared_input
            call = group.running()
            if call is not None and (y := call.computed(name, x)) is not None:
                return y
        autocast = _is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)
        taken = read(self, x, autocast)
        if taken is None:
            return self._forward_of_peft(x)
        if call is not None and (y := call.compute(group, name, self, x, taken, autocast)) is not None:
            return y
        (weight, lora_A, lora_B, scaling, bias), p = taken
        return lora_linear(
            x, weight, lora_A, lora_B, scaling, bias,
            dropout_p=p, training=True, adapter_precision="default" if autocast else "high",
        )  # fmt: skip

    def _forward_of_peft(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        for adapter, scaling in self.scaling.items():
            if isinstance(scaling, torch.Tensor) and scaling.numel() > 1 and scaling.dim() < x.dim():
                raise ValueError(  # PEFT would broadcast it against other dimensions
                    f"expected one plain LoRA adapter and x of shape {[*scaling.shape, 'K']} for a scaling a row, got "
                    f"{list(x.shape)} for {adapter!r}, which does not run fused"
                )
        return super().forward(x, *args, **kwargs)


def read(layer: lora.Linear, x: torch.Tensor, autocast: bool) -> tuple[tuple, float] | None:
    """What PEFT's forward of `layer` would compute with for `x`, or None where it is not plain LoRA.

    Args:
        layer: of class `FusedLoraLinear`, or a `lora.Linear` that may become one.
        x: the input, or any tensor of its dtype, device and leading dimensions.
        autocast: whether autocast is on for x's device.

    Returns:
        The fields of a `Projection`, as a plain tuple, which costs less, and the probability of dropout (0 in
        evaluation).
    """
    active = only_adapter(layer)
    modules = layer._modules
    lora_A = modules["lora_A"]._modules.get(active)
    if lora_A is None or active in layer.lora_variant:
        return None
    base = modules["base_layer"]
    lora_B, dropout = modules["lora_B"]._modules[active], modules["lora_dropout"]._modules[active]
    kind = type(base)
    if (kind is not Linear and kind is not Conv1D) or type(lora_A) is not Linear or type(lora_B) is not Linear:
        return None
    if is_watched(base, lora_A, lora_B, dropout):
        return None
    p = 0.0
    if type(dropout) is not Identity:
        if type(dropout) is not Dropout or dropout.inplace:
            return None
        if dropout.training:
            p = dropout.p

    of_base, of_A, of_B = base._parameters, lora_A._parameters, lora_B._parameters
    weight, bias, a, b = of_base.get("weight"), of_base.get("bias"), of_A.get("weight"), of_B.get("weight")
    if type(weight) not in PLAIN or type(a) not in PLAIN or type(b) not in PLAIN:
        return None  # also FSDP1, which keeps the parameters elsewhere
    if of_A.get("bias") is not None or of_B.get("bias") is not None:
        return None
    dtype, dtype_x, dtype_A, dtype_B = weight.dtype, x.dtype, a.dtype, b.dtype
    if bias is not None and (type(bias) not in PLAIN or bias.dtype != dtype):
        return None
    alike = dtype == dtype_x == dtype_A == dtype_B and not autocast  # mostly, and asked faster than the rule
    if not alike and not dtypes_fit(dtype_x, dtype, dtype_A, dtype_B, autocast, layer.cast_input_dtype_enabled):
        return None

    scaling = layer.scaling[active]
    if type(scaling) is not float and not _is_scaling(scaling, x):
        return None
    return (weight if kind is Linear else weight.t(), a, b, scaling, bias), p


def only_adapter(layer: BaseTunerLayer) -> str | None:
    """The active adapter, if there is one, and neither merged nor disabled. The layer need not have it."""
    if layer._disable_adapters or layer.merged_adapters:
        return None
    active = layer._active_adapter
    if type(active) is str:
        return active
    return active[0] if len(active) == 1 else None


def is_watched(*modules: Module) -> bool:
    """Whether calling one of `modules` may do something else than its class's forward."""
    for module in modules:
        own = module.__dict__  # a look-up through a class with `__getattr__` costs the host twice as much
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
        ):
            return True
    return False


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


def _is_scaling(scaling: object, x: torch.Tensor) -> bool:
    if not isinstance(scaling, torch.Tensor):
        return isinstance(scaling, (float, int))
    if not scaling.is_floating_point() or scaling.requires_grad or scaling.device != x.device:
        return False
    return scaling.dim() == 0 or is_row_scaling(scaling, x)
