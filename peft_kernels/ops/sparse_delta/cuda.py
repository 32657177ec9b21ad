"""The gradient of entries and of n of m by the native library's CUDA kernels (csrc/README.md): tiles of dW on the
tensor cores, of which only the values leave the block.

They multiply 16-bit operands; float32 and all other kinds are refused (`backends.OPS`). Forward and dx are cuBLAS's
products with a copy of all of W that torch adds Δ to: on a GPU a band at a time is a launch at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from ..core.native import Sum, aligned, native, reduced
from . import reference
from .layout import SparseLayout


def grad_values(dy: torch.Tensor, x: torch.Tensor, layout: SparseLayout, dtype: torch.dtype) -> torch.Tensor:
    """Compute what `reference.grad_values` does, in float32 until it is rounded to `dtype`."""
    n, m = layout.tile or (1, 1)  # of entries neither is read
    *row_starts, columns = layout.tensors.values()
    partials = native().sparse_gathered(
        aligned(dy), aligned(x), row_starts[0] if row_starts else None, columns.contiguous(), n, m
    )
    if len(partials) == 1 and dtype == torch.float32:
        return partials[0]
    (values,) = reduced([Sum(partials.unsqueeze(1), dtype)])
    return values[0]


def patched_bands(
    weight: torch.Tensor, values: torch.Tensor, layout: SparseLayout, dim: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Compute what `reference.patched_bands` does, in one band."""
    changed = reference.add_delta(layout.take(weight), values)
    yield slice(0, layout.shape[dim]), layout.put_(weight.clone(), changed)


#: As those of `reference`.
forward = functools.partial(reference.forward, patched_bands=patched_bands)
grad_x = functools.partial(reference.grad_x, patched_bands=patched_bands)
backward = functools.partial(reference.backward, grad_x=grad_x, grad_values=grad_values)
write = reference.write
