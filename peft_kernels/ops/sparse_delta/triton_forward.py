"""Forward and dx by Triton: where a delta has no structure, a band of W at a time is copied, patched by one kernel and
multiplied by cuBLAS. The copy costs two bytes of traffic for every byte of W, which is small beside the
product; a GEMM of our own that patches its tiles would have to search the layout again for every block of tokens. Rows
and columns are thin cuBLAS products already."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from ..core.tensors import slices
from . import configs, reference
from .layout import SparseLayout
from .triton_write import write


def patched_bands(
    weight: torch.Tensor, values: torch.Tensor, layout: SparseLayout, dim: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Compute what `reference.patched_bands` does; the CPU does not wait to look at the layout."""
    step = reference.band_step(layout, dim, weight.element_size(), configs.BAND_BYTES)
    for band in slices(layout.shape[dim], step):
        patched, _ = reference.copy_of_band(weight, dim, band)
        write(patched, weight, values, layout, **{("rows", "columns")[dim]: band})
        yield band, patched


#: As `reference.forward` and `reference.grad_x`.
forward = functools.partial(reference.forward, patched_bands=patched_bands)
grad_x = functools.partial(reference.grad_x, patched_bands=patched_bands)
