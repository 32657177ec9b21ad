"""Forward, backward and writing by the native library on a CPU, for entries: a band of W is patched as it is copied,
and the gradient of the values is a dot product each (SDDMM), where entries are not so many that torch's product of all
of dW is faster. All other kinds of layout are refused (`backends.OPS`). A weight whose rows are not adjacent is patched
by torch."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from ..core.tensors import slices
from . import reference
from .layout import SparseLayout

#: Up to this density the gradient of entries is sampled, by bytes of an element; from there on the product that fills
#: all of dW is faster. Measured on a CPU with AVX-512.
SAMPLED_UP_TO = {2: 0.15, 4: 0.25}

_native = torch.ops.peft_kernels_native


def grad_values(dy: torch.Tensor, x: torch.Tensor, layout: SparseLayout, dtype: torch.dtype) -> torch.Tensor:
    """Compute what `reference.grad_values` does, in float32 until it is rounded to `dtype`."""
    if layout.density > SAMPLED_UP_TO[dy.element_size()]:
        return reference.grad_values(dy, x, layout, dtype)
    return _native.sparse_sampled(_with_rows(dy), _with_rows(x), *_entries(layout)).to(dtype)


def patched_bands(
    weight: torch.Tensor, values: torch.Tensor, layout: SparseLayout, dim: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Compute what `reference.patched_bands` does."""
    if weight.stride(1) != 1:
        yield from reference.patched_bands(weight, values, layout, dim)
        return
    (N, K), entries, values = layout.shape, _entries(layout), values.contiguous()
    step = reference.band_step(layout, dim, weight.element_size(), reference.PIECE_BYTES)
    for band in slices(layout.shape[dim], step):
        corners = (band.start, band.stop, 0, K) if dim == 0 else (0, N, band.start, band.stop)
        yield band, _native.sparse_patched(weight, values, *entries, *corners)


#: As `reference.forward`, `reference.grad_x` and `reference.backward`.
forward = functools.partial(reference.forward, patched_bands=patched_bands)
grad_x = functools.partial(reference.grad_x, patched_bands=patched_bands)
backward = functools.partial(reference.backward, grad_x=grad_x, grad_values=grad_values)


def write(weight: torch.Tensor, base: torch.Tensor, values: torch.Tensor, layout: SparseLayout) -> None:
    """base + values, added in float32 and rounded once, to the layout's positions of `weight`."""
    if weight.stride(1) != 1:
        layout.put_(weight, base + values)
    else:
        _native.sparse_write(weight, base, values.contiguous(), *_entries(layout))


def _entries(layout: SparseLayout) -> tuple[torch.Tensor, torch.Tensor]:
    return layout.tensors["row_starts"].long(), layout.tensors["columns"]


def _with_rows(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()
