"""Forward and dx by Triton: where a delta has no structure, a band of W at a time is copied, patched by one kernel and
multiplied by the vendor's GEMM. The copy costs two bytes of traffic for every byte of W, which is small beside the
product; a GEMM of our own that patches its tiles would have to search the layout again for every block of tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import configs, reference
from .layout import SparseLayout
from .triton_write import write


def forward(
    x: torch.Tensor, weight: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, layout: SparseLayout
) -> torch.Tensor:
    """As `reference.forward`. Rows and columns are thin products of the vendor's there already."""
    if layout.kind in ("rows", "columns"):
        return reference.forward(x, weight, values, bias, layout)
    y = x.new_empty(x.shape[0], weight.shape[0])
    for band in _bands(layout, 0, weight.element_size()):
        patched = weight[band].clone()
        write(patched, weight, values, layout, rows=band)
        if bias is None:
            torch.mm(x, patched.t(), out=y[:, band])
        else:
            torch.addmm(bias[band], x, patched.t(), out=y[:, band])
    return y


def grad_x(dy: torch.Tensor, weight: torch.Tensor, values: torch.Tensor, layout: SparseLayout) -> torch.Tensor:
    """As `reference.grad_x`."""
    if layout.kind in ("rows", "columns"):
        return reference.grad_x(dy, weight, values, layout)
    dx = dy.new_empty(dy.shape[0], weight.shape[1])
    for band in _bands(layout, 1, weight.element_size()):
        patched = weight[:, band].clone()
        write(patched, weight, values, layout, columns=band)
        torch.mm(dy, patched, out=dx[:, band])
    return dx


def _bands(layout: SparseLayout, dim: int, element_size: int) -> Iterator[slice]:
    size, step = layout.shape[dim], reference.band_step(layout, dim, element_size, configs.BAND_BYTES)
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
