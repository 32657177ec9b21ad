"""The second half of a split reduction: float32 partials are summed in a fixed order, scaled and rounded once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def scaling_of(rows, columns, rows_inside, scales, row_scale_ptrs, row_scale_strides, R, NUM: tl.constexpr):
    """float32 [BM, BC]: the scaling of the projection that each column of a stacked S or dH [M, NUM·R] belongs
    to: a float, times a tensor of one value (stride 0) or one value a row."""
    result = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for j in tl.static_range(NUM):
        scale = tl.zeros((rows.shape[0],), tl.float32) + scales[j]
        if row_scale_ptrs[j] is not None:
            value = tl.load(row_scale_ptrs[j] + rows * row_scale_strides[j], mask=rows_inside, other=0.0)
            scale *= value.to(tl.float32)
        result = tl.where((columns // R == j)[None, :], scale[:, None], result)
    return result


@triton.jit(do_not_specialize=["rows_total", "splits"])
def split_reduce_kernel(
    partial_ptr, out_ptr, scales, row_scale_ptrs, row_scale_strides,
    rows_total, columns_total, splits, stride_split, stride_row, stride_om, stride_on, R,
    NUM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[m, n] = scaling · Σ_split partial[split, m, n], a tile a program."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < rows_total)[:, None] & (columns < columns_total)[None, :]
    pointers = partial_ptr + rows[:, None] * stride_row + columns[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(splits):
        total += tl.load(pointers, mask=inside, other=0.0)
        pointers += stride_split
    total *= scaling_of(rows, columns, rows < rows_total, scales, row_scale_ptrs, row_scale_strides, R, NUM)
    out = out_ptr + rows[:, None] * stride_om + columns[None, :].to(tl.int64) * stride_on
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


def split_reduce(
    partials: torch.Tensor, out: torch.Tensor, scales: tuple[float, ...] = (1.0,), row_scalings: tuple = (None,)
) -> None:
    """out[m, n] = scale · Σ_s partials[s, m, n], columns split evenly among the scales.

    Args:
        partials: float32 [S, M, C]; the columns are adjacent, splits and rows may be strided.
        out: [M, C], any float dtype and strides; written.
        scales: one float a projection; projection j owns columns j·C/n to (j+1)·C/n.
        row_scalings: for each projection None, a 0-dim tensor or a contiguous tensor of M values.
    """
    splits, rows, columns = partials.shape
    block_m, block_n = blocks(columns)
    grid = (triton.cdiv(rows, block_m), triton.cdiv(columns, block_n))
    split_reduce_kernel[grid](
        partials, out, tuple(scales), tuple(row_scalings), row_strides(row_scalings),
        rows, columns, splits, partials.stride(0), partials.stride(1), out.stride(0), out.stride(1),
        columns // len(scales), NUM=len(scales), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip


def row_strides(row_scalings: tuple) -> tuple[int, ...]:
    """0 for a scaling of one value, 1 for one a row."""
    return tuple(0 if scaling is None or scaling.dim() == 0 else 1 for scaling in row_scalings)


def blocks(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile, four elements a thread: narrow for S and dH, wide for a weight's gradient."""
    block_n = min(max(triton.next_power_of_2(columns), 16), 256)
    return 512 // block_n, block_n
