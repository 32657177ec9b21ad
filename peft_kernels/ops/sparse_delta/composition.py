"""Linear layers with a sparse delta as compositions of torch's own operations, which torch differentiates, batches and
traces itself; and the floating-point operations of the registered ops."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import linear

from ..common.transforms import StraightThrough
from .layout import SparseLayout


def forward(
    x: torch.Tensor, weight: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, layout: SparseLayout
) -> torch.Tensor:
    """y = x·(W + Δ)ᵀ + bias, [..., N], with a whole W + Δ."""
    positions = layout.indices()
    base = weight.reshape(-1)
    return linear(x, patched(weight, base[positions], values, positions), bias)


def patched(weight: torch.Tensor, base: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The weight [N, K] with base + values [nnz], added in the wider dtype and rounded once, at the positions."""
    return weight.reshape(-1).scatter(0, positions, (base + values).to(weight.dtype)).view(weight.shape)


def with_gradient(y: torch.Tensor, x: torch.Tensor, values: torch.Tensor, layout: SparseLayout) -> torch.Tensor:
    """The numbers of y, to whose derivatives that of x·Δᵀ by the values is added."""
    values = StraightThrough.apply(torch.zeros_like(values), values).to(x.dtype)  # 0: y holds Δ already
    delta = x.new_zeros(math.prod(layout.shape)).scatter(0, layout.indices(), values).view(layout.shape)
    return StraightThrough.apply(y, linear(x, delta))


def forward_flops(x, weight, *_, **__) -> int:
    """Of x·(W + Δ)ᵀ, one dense product."""
    return 2 * math.prod(x) * weight[0]


def backward_flops(
    dy, x, weight, values, layout, kind, tile, shape, needs, values_dtype, backend, out_shape=None, **_
) -> int:
    """Of dy·(W + Δ) and dyᵀ·x, dense products, and of the values' gradient, a dot product over the tokens for each."""
    needs_x, needs_weight, needs_values, _ = needs
    nnz = out_shape[needs_x + needs_weight][0] if needs_values else 0
    return 2 * dy[0] * (shape[0] * shape[1] * (needs_x + needs_weight) + nnz)
