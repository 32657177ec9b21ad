"""PEFT's `ia3.Linear` with a forward by `scaled_linear`, and the conditions under which it is the same computation.

PEFT multiplies the input or the output by the vector in an operation of its own, whose backward keeps what was
multiplied and makes its gradient as large as the activation before it is summed up. The op does both in one pass.
"""

from __future__ import annotations

import torch
from peft.tuners import ia3
from peft.tuners.ia3 import IA3Layer
from torch.nn import Linear
from transformers.pytorch_utils import Conv1D

from ...ops.scaled_linear import scaled_linear
from .tuner import PLAIN, Tuner, autocasts, dtypes_fit, is_hooked, only_adapter, short, why_hooked, why_not_plain


class FusedIA3Linear(ia3.Linear):
    """`peft.tuners.ia3.Linear`, forward by :func:`peft_kernels.scaled_linear`; made by `accelerate` only."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        resolved = "arguments" if args or kwargs else resolve(self, only_adapter(self), x, autocasts(x))
        if type(resolved) is str:
            return super().forward(x, *args, **kwargs)
        return scaled_linear(x, *resolved, scale_input=self.is_feedforward)


def resolve(layer: ia3.Linear, adapter: str | None, x: torch.Tensor | None, autocast: bool) -> tuple | str:
    """What `scaled_linear` takes after x: weight, scale and bias; or why it cannot. Arguments as `Tuner.resolve` has
    them."""
    modules = layer._modules
    base, vector = modules["base_layer"], modules["ia3_l"]._parameters.get(adapter)
    if vector is None:
        return "not exactly one adapter is active"
    kind = type(base)
    if kind is not Linear and kind is not Conv1D:
        return f"its base_layer is {kind.__name__}, not nn.Linear or Conv1D"
    if is_hooked(base):
        return why_hooked(base_layer=base)
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(weight) not in PLAIN:
        return why_not_plain(base_layer=weight)
    if type(vector) not in PLAIN:
        return f"its ia3_l is a {type(vector).__name__}"
    dtype = weight.dtype
    if bias is not None:
        if type(bias) not in PLAIN:
            return f"the bias of its base_layer is a {type(bias).__name__}"
        if bias.dtype != dtype:
            return f"a bias {short(bias.dtype)} beside a {short(dtype)} weight"
    dtype_x = dtype if x is None else x.dtype
    if not dtypes_fit(dtype_x, dtype, vector.dtype, vector.dtype, autocast, cast_input=True):
        return f"ia3_l {short(vector.dtype)} and x {short(dtype_x)} beside a {short(dtype)} weight"
    return weight if kind is Linear else weight.t(), vector.flatten(), bias


TUNER = Tuner("IA3", IA3Layer, ia3.Linear, FusedIA3Linear, lambda layer: layer.ia3_l, resolve)
