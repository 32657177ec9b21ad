"""Scaled linear in plain PyTorch: any dtype, any device, forward and explicit backward; the composition that torch
differentiates itself; and the floating-point operations.

This is the definition that the kernels are tested against, and the path of the CPU. A scale multiplies in the wider of
its own and the operand's dtype, and the product is rounded once. `forward` and `backward` take the arguments of the
registered ops (`op.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from ..core.tensors import flatten, unflatten


def scaled(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """values [M, F] ⊙ scale [F], in values' dtype."""
    return (values * scale).to(values.dtype)


def scaled_with_sums(
    values: torch.Tensor, scale: torch.Tensor | None, others: torch.Tensor | None, sums: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """values ⊙ scale [M, F] where a scale is given, Σ_m values ⊙ others [F] where others [M, F] are, and the sum over m
    of the first where `sums` asks for it; both sums in float32 at least."""
    wide = torch.promote_types(values.dtype, torch.float32)
    product = None if scale is None else scaled(values, scale)
    inner = None if others is None else (values.to(wide) * others).sum(0)
    return product, inner, product.sum(0, dtype=wide) if sums else None


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    scale_input: bool,
    keep_z: bool,
    backend: str = "reference",
    scaled: Callable[..., torch.Tensor] = scaled,
) -> list[torch.Tensor]:
    """y [..., N]; then, where it is to be kept, z = x·Wᵀ + bias. `scaled`: another function that scales columns."""
    rows = flatten(x)
    if scale_input:
        return [unflatten(linear(scaled(rows, scale), weight, bias), x)]
    z = linear(rows, weight, bias)
    y = unflatten(scaled(z, scale), x)
    return [y, unflatten(z, x)] if keep_z else [y]


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    scale: torch.Tensor | None,
    z: torch.Tensor | None,
    scale_input: bool,
    needs: list[bool],
    scale_dtype: torch.dtype,
    backend: str = "reference",
    scaled: Callable[..., torch.Tensor] = scaled,
    scaled_with_sums: Callable[..., tuple] = scaled_with_sums,
) -> list[torch.Tensor]:
    """The gradients that are needed, in this order: x, weight, scale, bias.

    With dz = dy ⊙ l: dx = dz·W, dW = dzᵀ·x, dl = Σ dy ⊙ z, dbias = Σ dz. With `scale_input` and du = dy·W: dx = du ⊙ l,
    dW = dyᵀ·(x ⊙ l), dl = Σ du ⊙ x, dbias = Σ dy. `scaled`, `scaled_with_sums`: other functions, such as Triton's.
    """
    needs_x, needs_weight, needs_scale, needs_bias = needs
    rows, x = flatten(dy), x if x is None else flatten(x)
    dx = dw = dl = dbias = None
    if scale_input:
        if needs_x or needs_scale:
            du = rows.mm(weight)
            dx, dl, _ = scaled_with_sums(du, scale if needs_x else None, x if needs_scale else None, False)
        if needs_weight:
            dw = rows.t().mm(scaled(x, scale))
        if needs_bias:
            dbias = rows.sum(0)
    else:
        z = z if z is None else flatten(z)
        dz, dl, dbias = scaled_with_sums(rows, scale, z, needs_bias)
        if needs_x:
            dx = dz.mm(weight)
        if needs_weight:
            dw = dz.t().mm(x)
    if needs_x:
        dx = dx.view(*dy.shape[:-1], dx.shape[1])
    grads = dx, dw, dl if dl is None else dl.to(scale_dtype), dbias if dbias is None else dbias.to(dy.dtype)
    return [grad for grad, needed in zip(grads, needs) if needed]


def composition(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, scale_input: bool
) -> torch.Tensor:
    """y by torch's own operations, which torch differentiates, batches and traces itself."""
    if scale_input:
        return linear((x * scale).to(x.dtype), weight, bias)
    return (linear(x, weight, bias) * scale).to(x.dtype)


def forward_flops(x, weight, *_, **__) -> int:
    """2·M·N·K, as `linear`."""
    return 2 * math.prod(x) * weight[0]


def backward_flops(dy, x, weight, scale, z, scale_input, needs, *_, **__) -> int:
    """2·M·N·K for dy·W, which the scale of an input asks for as well, and as much for the weight's gradient."""
    needs_x, needs_weight, needs_scale, _ = needs
    K = next((one[-1] for one in (x, weight) if one is not None), 0)
    return 2 * math.prod(dy) * K * ((needs_x or (needs_scale and scale_input)) + needs_weight)
