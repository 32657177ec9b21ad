"""Where the values of a layout stand, and writing them: into the weight that is trained, or into a patched copy of a
band of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs
from .layout import SparseLayout

#: The number of each kind, as kernels know it.
KINDS = {"entries": 0, "rows": 1, "columns": 2, "blocks": 3, "n_of_m": 4}


@triton.jit
def row_of(i, inside, starts_ptr, N, steps):
    """The row, int64, of the entries number `i` (int64): starts[row] ≤ i < starts[row + 1]."""
    low, high = tl.zeros_like(i), tl.zeros_like(i) + N
    for _ in range(steps):
        middle = (low + high) // 2
        before = tl.load(starts_ptr + middle, mask=inside, other=0) <= i
        low, high = tl.where(before, middle, low), tl.where(before, high, middle)
    return low


@triton.jit
def position(i, inside, first_ptr, second_ptr, K, count, tile_rows, tile_columns, steps, KIND: tl.constexpr):
    """Row and column, int64, of the values number `i` (int64), as `SparseLayout.indices` has them.

    first_ptr, second_ptr: row_starts and columns of entries; else twice what the layout holds. count: rows of the
    weight for entries, else how many the layout holds. steps: of a binary search among the rows.
    """
    if KIND == 0:
        row = row_of(i, inside, first_ptr, count, steps)
        return row, tl.load(second_ptr + i, mask=inside, other=0).to(tl.int64)
    elif KIND == 1:
        return tl.load(first_ptr + i // K, mask=inside, other=0), i % K
    elif KIND == 2:
        return i // count, tl.load(first_ptr + i % count, mask=inside, other=0)
    elif KIND == 3:
        size, across = tile_rows.to(tl.int64) * tile_columns, K // tile_columns
        block, within = tl.load(first_ptr + i // size, mask=inside, other=0), i % size
        row = block // across * tile_rows + within // tile_columns
        return row, block % across * tile_columns + within % tile_columns
    else:
        group, across = i // tile_rows, K // tile_columns
        offset = tl.load(first_ptr + i, mask=inside, other=0).to(tl.int64)
        return group // across, group % across * tile_columns + offset


@triton.jit(
    do_not_specialize=[
        "nnz", "count", "tile_rows", "tile_columns", "steps", "row_start", "row_stop", "column_start", "column_stop"
    ]
)  # fmt: skip
def write_kernel(
    target_ptr, source_ptr, values_ptr, first_ptr, second_ptr, nnz, K, count, tile_rows, tile_columns, steps,
    row_start, row_stop, column_start, column_stop, stride_tn, stride_tk, stride_sn, stride_sk,
    KIND: tl.constexpr, BY_NUMBER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """target[row − row_start, column − column_start] = source + value at the positions in a window of the weight. The
    source is read at [row, column], or BY_NUMBER, as the values are."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < nnz
    row, column = position(i, inside, first_ptr, second_ptr, K, count, tile_rows, tile_columns, steps, KIND)
    inside &= (row >= row_start) & (row < row_stop) & (column >= column_start) & (column < column_stop)
    source = source_ptr + (i if BY_NUMBER else row * stride_sn + column * stride_sk)
    total = tl.load(source, mask=inside, other=0.0).to(tl.float32) + tl.load(values_ptr + i, mask=inside, other=0.0)
    target = target_ptr + (row - row_start) * stride_tn + (column - column_start) * stride_tk
    tl.store(target, total.to(target_ptr.dtype.element_ty), mask=inside)


def write(
    target: torch.Tensor,
    source: torch.Tensor,
    values: torch.Tensor,
    layout: SparseLayout,
    rows: slice | None = None,
    columns: slice | None = None,
) -> None:
    """target = source + values at the layout's positions, rounded once to target's dtype.

    Args:
        target: the weight [N, K], or the window of it that `rows` and `columns` say.
        source: [nnz], or the weight [N, K], read at the positions.
        values: [nnz].
    """
    N, K = layout.shape
    rows, columns = rows or slice(0, N), columns or slice(0, K)
    if layout.nnz == 0 or target.numel() == 0:
        return
    strides = (0, 0) if source.dim() == 1 else source.stride()
    write_kernel[(triton.cdiv(layout.nnz, configs.WRITTEN),)](
        target, source.contiguous() if source.dim() == 1 else source, values.contiguous(), *described(layout),
        rows.start, rows.stop, columns.start, columns.stop, *target.stride(), *strides,
        KIND=KINDS[layout.kind], BY_NUMBER=source.dim() == 1, BLOCK=configs.WRITTEN, num_warps=4,
    )  # fmt: skip


def described(layout: SparseLayout) -> tuple:
    """The arguments of `position`: first_ptr, second_ptr; and nnz, K, count, tile_rows, tile_columns, steps."""
    (N, K), held = layout.shape, list(layout.tensors.values())
    count = N if layout.kind == "entries" else len(held[0])
    return held[0], held[-1], layout.nnz, K, count, *(layout.tile or (1, 1)), N.bit_length()
