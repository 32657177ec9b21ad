"""The second half of a split reduction: float32 partials are summed in a fixed order, scaled and rounded once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..core.triton_host import divisor
from .device import divisible


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


@triton.jit
def _reduce_tile(
    partial_ptr, out_ptr, scale, row_scale_ptr, row_scale_stride, rows_total, columns_total, splits, stride_split,
    stride_row, stride_out, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tiles_n = tl.cdiv(columns_total, BLOCK_N)
    rows = (tl.program_id(0) // tiles_n).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < rows_total)[:, None] & (columns < columns_total)[None, :]
    pointers = partial_ptr + rows[:, None] * stride_row + columns[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(splits):
        total += tl.load(pointers, mask=inside, other=0.0)
        pointers += stride_split
    total *= scale
    if row_scale_ptr is not None:
        factor = tl.load(row_scale_ptr + rows * row_scale_stride, mask=rows < rows_total, other=0.0)
        total *= factor.to(tl.float32)[:, None]
    tl.store(out_ptr + rows[:, None] * stride_out + columns[None, :], total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def reduce_partials_kernel(
    partial_ptrs, out_ptrs, scales, row_scale_ptrs, row_scale_strides, rows, columns, lengths, lengths_per_split,
    strides_split, strides_row, strides_out, tokens, NUM: tl.constexpr, DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out_j[m, n] = scaling_j · Σ_split partial_j[split, m, n], a tile of one of the sums a program. None stands for
    `tokens` among rows and lengths, and for splits that follow one another among their strides."""
    for j in tl.static_range(NUM):
        if tl.program_id(1) == j:
            rows_total = rows[j] if rows[j] is not None else tokens
            length = lengths[j] if lengths[j] is not None else tokens
            stride_row, stride_out = divisible(strides_row[j], DIVISOR), divisible(strides_out[j], DIVISOR)
            stride = strides_split[j] if strides_split[j] is not None else rows_total.to(tl.int64) * stride_row
            _reduce_tile(
                partial_ptrs[j], out_ptrs[j], scales[j], row_scale_ptrs[j], row_scale_strides[j], rows_total,
                divisible(columns[j], DIVISOR), tl.cdiv(length, lengths_per_split[j]), stride, stride_row, stride_out,
                BLOCK_M, BLOCK_N,
            )  # fmt: skip


class SplitKPartials(NamedTuple):
    """out[m, n] = scale · row_scaling[m] · Σ_s partials[s, m, n], to be computed.

    Attributes:
        partials: float32 [S, M, C]; the columns are adjacent, splits and rows may be strided.
        out: [M, C], adjacent columns, any float dtype; to be written.
        length, per_split: of the reduction, and how much of it each split took: S = ⌈length / per_split⌉.
        row_scaling: None, a 0-dim tensor or a contiguous tensor of M values.
    """

    partials: torch.Tensor
    out: torch.Tensor
    length: int
    per_split: int
    scale: float = 1.0
    row_scaling: torch.Tensor | None = None


def reduce_partials(sums: list[SplitKPartials], tokens: int) -> None:
    """All of them by one launch.

    Triton compiles anew where a member of a tuple becomes 1, or (in)divisible by 16, whatever is said of the tuple. So
    the number of tokens is passed beside the tuples, and splits by their length, a multiple of a tile's side: a new
    batch size compiles nothing.
    """
    if not sums:
        return
    partials, outs, lengths, per_split, scales, row_scalings = (tuple(column) for column in zip(*sums))
    rows, columns = zip(*(out.shape for out in outs))
    strides = [one.stride() for one in partials]
    strides_row, strides_out = tuple(row for _, row, _ in strides), tuple(out.stride(0) for out in outs)
    block_m, block_n = blocks(max(columns))
    tiles = max(triton.cdiv(M, block_m) * triton.cdiv(C, block_n) for M, C in zip(rows, columns))
    reduce_partials_kernel[(tiles, len(sums))](
        partials, outs, scales, row_scalings, row_strides(row_scalings),
        tuple(None if count == tokens else count for count in rows), columns,
        tuple(None if length == tokens else length for length in lengths), per_split,
        tuple(None if M * row == split else split for M, (split, row, _) in zip(rows, strides)),
        strides_row, strides_out, tokens, NUM=len(sums), DIVISOR=divisor(*columns, *strides_row, *strides_out),
        BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip


def row_strides(row_scalings: tuple) -> tuple[int, ...]:
    """0 for a scaling of one value, 1 for one a row."""
    return tuple(0 if scaling is None or scaling.dim() == 0 else 1 for scaling in row_scalings)


def blocks(columns: int) -> tuple[int, int]:
    """Rows and columns of a tile, four elements a thread: narrow for S and dH, wide for a weight's gradient."""
    block_n = min(max(triton.next_power_of_2(columns), 16), 256)
    return 512 // block_n, block_n
