"""Linear layers with a sparse delta as compositions of torch's own operations, which torch differentiates, batches and
traces itself; and the floating-point operations of the registered ops."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import linear

from ..core.transforms import straight_through, untraced
from .layout import SparseLayout


def forward(
    x: torch.Tensor, weight: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, layout: SparseLayout
) -> torch.Tensor:
    """y = x·(W + Δ)ᵀ + bias, [..., N], with a whole W + Δ."""
    return linear(x, _with_values(weight, weight.reshape(-1)[_positions(layout)], values, layout), bias)


def written(weight: torch.Tensor, base: torch.Tensor, values: torch.Tensor, layout: SparseLayout) -> torch.Tensor:
    """What `write_delta` makes of the weight, as another tensor: base + values at the positions. It has the derivatives
    of a weight that holds W₀ + Δ, by itself and by the values."""
    slope = weight + _at_positions(values.to(weight.dtype), layout)
    return straight_through(_with_values(weight.detach(), base, values.detach(), layout), slope)


def _with_values(weight: torch.Tensor, base: torch.Tensor, values: torch.Tensor, layout: SparseLayout) -> torch.Tensor:
    """base + values [nnz], added in the wider dtype and rounded once, in the place of what the weight has there."""
    sums = (base + values).to(weight.dtype)
    return weight.reshape(-1).scatter(0, _positions(layout), sums).view(weight.shape)


def _at_positions(values: torch.Tensor, layout: SparseLayout) -> torch.Tensor:
    """[N, K], zero elsewhere."""
    zeros = torch.zeros(math.prod(layout.shape), dtype=values.dtype, device=values.device)
    return zeros.scatter(0, _positions(layout), values).view(layout.shape)


def _positions(layout: SparseLayout) -> torch.Tensor:
    with untraced():  # a constant of the graph
        return layout.indices()


def with_gradient(y: torch.Tensor, x: torch.Tensor, values: torch.Tensor, layout: SparseLayout) -> torch.Tensor:
    """The numbers of y, to whose derivatives that of x·Δᵀ by the values is added."""
    values = straight_through(torch.zeros_like(values), values).to(x.dtype)  # 0: y holds Δ already
    return straight_through(y, linear(x, _at_positions(values, layout)))


def forward_flops(x, weight, *_, **__) -> int:
    """Count x·(W + Δ)ᵀ, one dense product."""
    return 2 * math.prod(x) * weight[0]


def backward_flops(
    dy, x, weight, values, layout, kind, tile, shape, needs, values_dtype, backend, out_shape=None, **_
) -> int:
    """Count dy·(W + Δ) and dyᵀ·x, dense products, and for each value's gradient a dot product over the tokens."""
    needs_x, needs_weight, needs_values, _ = needs
    nnz = out_shape[needs_x + needs_weight][0] if needs_values else 0
    return 2 * dy[0] * (shape[0] * shape[1] * (needs_x + needs_weight) + nnz)
