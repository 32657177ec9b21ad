"""PEFT's `lora.Linear` with a forward by the LoRA op, and the conditions under which it is the same computation."""

from __future__ import annotations

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraLayer
from torch.nn import Dropout, Identity, Linear
from transformers.pytorch_utils import Conv1D

from ...ops.lora_linear import is_row_scaling, lora_linear
from .tuner import PLAIN, Tuner, autocasts, dtypes_fit, is_hooked, only_adapter, short, why_hooked, why_not_plain


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
        autocast = autocasts(x)
        resolved = resolve(self, only_adapter(self), x, autocast)
        if type(resolved) is str:
            return self._forward_of_peft(x)
        if call is not None and (y := call.compute(group, name, self, x, resolved, autocast)) is not None:
            return y
        (weight, lora_A, lora_B, scaling, bias), p = resolved
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


def resolve(layer: lora.Linear, adapter: str | None, x: torch.Tensor | None, autocast: bool) -> tuple | str:
    """The fields of a `Projection`, as a plain tuple, which costs less, and the probability of dropout (0 in
    evaluation); or why PEFT's forward is not plain LoRA. Arguments as `Tuner.resolve` has them; of x the dtype, the
    device and the leading dimensions count."""
    modules = layer._modules
    base, lora_A = modules["base_layer"], modules["lora_A"]._modules.get(adapter)
    if lora_A is None:
        return "not exactly one adapter is active"
    if adapter in layer.lora_variant:
        return f"{type(layer.lora_variant[adapter]).__name__} adapter"
    kind = type(base)
    if kind is not Linear and kind is not Conv1D:
        return f"its base_layer is {kind.__name__}, not nn.Linear or Conv1D"
    lora_B, dropout = modules["lora_B"]._modules[adapter], modules["lora_dropout"]._modules[adapter]
    if type(lora_A) is not Linear or type(lora_B) is not Linear:
        role, other = ("lora_A", lora_A) if type(lora_A) is not Linear else ("lora_B", lora_B)
        return f"its {role} is {type(other).__name__}, not nn.Linear"
    p = 0.0
    if type(dropout) is not Identity:
        if type(dropout) is not Dropout or dropout.inplace:
            return f"its lora_dropout is {dropout}, not nn.Dropout"
        if dropout.training:
            p = dropout.p
    if is_hooked(base, lora_A, lora_B, dropout):
        return why_hooked(base_layer=base, lora_A=lora_A, lora_B=lora_B, lora_dropout=dropout)

    of_base, of_A, of_B = base._parameters, lora_A._parameters, lora_B._parameters
    weight, bias, a, b = of_base.get("weight"), of_base.get("bias"), of_A.get("weight"), of_B.get("weight")
    if of_A.get("bias") is not None or of_B.get("bias") is not None:
        return f"lora_bias: its {'lora_B' if of_A.get('bias') is None else 'lora_A'} has a bias"
    if type(weight) not in PLAIN or type(a) not in PLAIN or type(b) not in PLAIN:
        return why_not_plain(base_layer=weight, lora_A=a, lora_B=b)
    dtype, dtype_A, dtype_B = weight.dtype, a.dtype, b.dtype
    if bias is not None:
        if type(bias) not in PLAIN:
            return f"the bias of its base_layer is a {type(bias).__name__}"
        if bias.dtype != dtype:
            return f"a bias {short(bias.dtype)} beside a {short(dtype)} weight"
    dtype_x = dtype if x is None else x.dtype
    alike = dtype == dtype_x == dtype_A == dtype_B and not autocast  # mostly, and asked faster than the rule
    if not alike and not dtypes_fit(dtype_x, dtype, dtype_A, dtype_B, autocast, layer.cast_input_dtype_enabled):
        return f"lora_A {short(dtype_A)} and lora_B {short(dtype_B)} beside a {short(dtype)} weight"

    scaling = layer.scaling[adapter]
    if type(scaling) is not float and not _is_scaling(scaling, weight if x is None else x, x is not None):
        return "its scaling is a tensor that is trained or has dimensions"
    return (weight if kind is Linear else weight.t(), a, b, scaling, bias), p


def _is_scaling(scaling: object, x: torch.Tensor, by_row: bool) -> bool:
    """Whether the op takes it; with `by_row` also one value for each row of x."""
    if not isinstance(scaling, torch.Tensor):
        return isinstance(scaling, (float, int))
    if not scaling.is_floating_point() or scaling.requires_grad or scaling.device != x.device:
        return False
    return scaling.dim() == 0 or (by_row and is_row_scaling(scaling, x))


TUNER = Tuner(
    "LoRA", LoraLayer, lora.Linear, FusedLoraLinear, lambda layer: layer.lora_A, resolve, attributes=("_shared_input",)
)
