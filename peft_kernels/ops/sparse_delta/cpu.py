"""Forward, backward and writing by the native library on a CPU, for entries: a band of W is patched as it is copied,
and the gradient of the values is a dot product each (SDDMM). Dense entries and all other kinds are the reference's."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..common.tensors import slices
from . import reference
from .layout import SparseLayout

#: Up to this density the gradient of entries is sampled, by bytes of an element; from there on the product that fills
#: all of dW is faster. Measured on a CPU with AVX-512.
SAMPLED_UP_TO = {2: 0.15, 4: 0.25}

_native = torch.ops.peft_kernels_native


def forward(
    x: torch.Tensor, weight: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, layout: SparseLayout
) -> torch.Tensor:
    """As `reference.forward`."""
    return reference.forward(x, weight, values, bias, layout, patched_bands)


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    values: torch.Tensor | None,
    layout: SparseLayout,
    needs: list[bool],
    values_dtype: torch.dtype,
) -> list[torch.Tensor]:
    """As `reference.backward`."""
    return reference.backward(dy, x, weight, values, layout, needs, values_dtype, grad_x, grad_values)


def grad_x(dy: torch.Tensor, weight: torch.Tensor, values: torch.Tensor, layout: SparseLayout) -> torch.Tensor:
    """As `reference.grad_x`."""
    return reference.grad_x(dy, weight, values, layout, patched_bands)


def grad_values(dy: torch.Tensor, x: torch.Tensor, layout: SparseLayout, dtype: torch.dtype) -> torch.Tensor:
    """As `reference.grad_values`, in float32 until it is rounded to `dtype`."""
    if layout.kind != "entries" or layout.density > SAMPLED_UP_TO[dy.element_size()]:
        return reference.grad_values(dy, x, layout, dtype)
    return _native.sparse_sampled(_with_rows(dy), _with_rows(x), *_entries(layout)).to(dtype)


def patched_bands(
    weight: torch.Tensor, values: torch.Tensor, layout: SparseLayout, dim: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """As `reference.patched_bands`."""
    if layout.kind != "entries" or weight.stride(1) != 1:
        yield from reference.patched_bands(weight, values, layout, dim)
        return
    (N, K), entries, values = layout.shape, _entries(layout), values.contiguous()
    for band in slices(
        layout.shape[dim], reference.band_step(layout, dim, weight.element_size(), reference.PIECE_BYTES)
    ):
        corners = (band.start, band.stop, 0, K) if dim == 0 else (0, N, band.start, band.stop)
        yield band, _native.sparse_patched(weight, values, *entries, *corners)


def write(weight: torch.Tensor, base: torch.Tensor, values: torch.Tensor, layout: SparseLayout) -> None:
    """base + values, added in float32 and rounded once, to the layout's positions of `weight`."""
    if layout.kind != "entries" or weight.stride(1) != 1:
        layout.put_(weight, base + values)
    else:
        _native.sparse_write(weight, base, values.contiguous(), *_entries(layout))


def _entries(layout: SparseLayout) -> tuple[torch.Tensor, torch.Tensor]:
    return layout.tensors["row_starts"].long(), layout.tensors["columns"]


def _with_rows(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
