"""The scaling of columns by Triton. Products are cuBLAS's: beside them this is one pass over an operand, forward and
backward, with all sums over the tokens that its gradients ask for."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..core.machine import sm_count
from . import reference

BLOCK_M, BLOCK_N = 32, 128
_PROGRAMS_PER_SM = 4  # enough loads in flight for a kernel that only moves bytes


@triton.jit(do_not_specialize=["M", "rows_per_chunk"])
def scale_columns_kernel(
    p_ptr, scale_ptr, q_ptr, out_ptr, inner_ptr, sum_ptr, M, N, rows_per_chunk, stride_pm, stride_pn, stride_qm,
    stride_qn, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_N columns and a chunk of rows a program: out = P ⊙ scale [M, N]; inner[chunk, N] = Σ_m P ⊙ Q and
    sum[chunk, N] = Σ_m P ⊙ scale, float32 partials. The pointers of what is not asked for are None."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = columns < N
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
    first = tl.program_id(1).to(tl.int64) * rows_per_chunk
    inner = tl.zeros((BLOCK_N,), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, rows_per_chunk, BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & inside[None, :]
        places = rows[:, None] * stride_pm + columns.to(tl.int64)[None, :] * stride_pn
        p = tl.load(p_ptr + places, mask=mask, other=0.0).to(tl.float32)
        if scale_ptr is not None:
            scaled = p * scale
            tl.store(out_ptr + rows[:, None] * N + columns[None, :], scaled.to(out_ptr.dtype.element_ty), mask=mask)
            if sum_ptr is not None:
                total += tl.sum(scaled, 0)
        if inner_ptr is not None:
            places = rows[:, None] * stride_qm + columns.to(tl.int64)[None, :] * stride_qn
            inner += tl.sum(p * tl.load(q_ptr + places, mask=mask, other=0.0).to(tl.float32), 0)
    partial = tl.program_id(1).to(tl.int64) * N + columns
    if inner_ptr is not None:
        tl.store(inner_ptr + partial, inner, mask=inside)
    if sum_ptr is not None:
        tl.store(sum_ptr + partial, total, mask=inside)


def scaled_with_sums(
    values: torch.Tensor, scale: torch.Tensor | None, others: torch.Tensor | None, sums: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """As `reference.scaled_with_sums`, by one pass over values and others; any strides. The sums of chunks of rows are
    added in a fixed order."""
    M, N = values.shape
    blocks = triton.cdiv(N, BLOCK_N)
    chunks = max(1, min(triton.cdiv(M, BLOCK_M), _PROGRAMS_PER_SM * sm_count(values.device) // max(blocks, 1)))
    rows_per_chunk = triton.cdiv(triton.cdiv(M, chunks), BLOCK_M) * BLOCK_M
    out = None if scale is None else values.new_empty(M, N)
    inner = None if others is None else values.new_zeros(chunks, N, dtype=torch.float32)
    total = values.new_zeros(chunks, N, dtype=torch.float32) if sums else None
    if M and N:
        q_strides = (0, 0) if others is None else others.stride()
        scale_columns_kernel[(blocks, chunks)](
            values, None if scale is None else scale.contiguous(), others, out, inner, total, M, N, rows_per_chunk,
            *values.stride(), *q_strides, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, num_warps=4,
        )  # fmt: skip
    return out, None if inner is None else inner.sum(0), None if total is None else total.sum(0)


def scaled(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Compute what `reference.scaled` does."""
    return scaled_with_sums(values, scale, None, False)[0]


#: As `reference.forward`.
forward = functools.partial(reference.forward, scaled=scaled)
