"""Backward by Triton: one pass over each dy for dH and dB, one pass over x for dA, one GEMM for dx. Partial sums
go through memory and are added in a fixed order: no atomics, the same bits every time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..blocks.device import divisible, dot, dot_high, load_mask
from ..blocks.reduce import SplitKPartials, reduce_partials
from ..core import dropout
from ..core.machine import architecture, sm_count
from ..core.tensors import by_field, matmul_float32
from ..core.triton_host import divisor, dot_precision
from ..core.triton_host import high_precision as high
from . import configs
from .triton_forward import flat, stack
from .triton_gemm import extended_gemm


@triton.jit(do_not_specialize=["M", "rows_per_chunk"])
def lora_bwd_dh_db_kernel(
    dy_ptr, b_ptr, s_ptr, dh_ptr, db_ptr, M, N, R, rows_per_chunk, stride_dym, stride_dyn, stride_bn, stride_br,
    stride_sm,
    HIGH: tl.constexpr, R_DIVISOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N columns and a chunk of rows of dy, which it reads once. It writes float32 partials:
    dH[n_block, M, R] = dy·B over its columns, dB[chunk, N, R] = dyᵀ·S over its rows. Either pointer may be None.

    dB comes before dH in the loop: in the other order ptxas serialises wgmma (C7515), as dH's accumulator leaves for
    memory while dB's is in flight (Triton 3.6 and 3.9, sm_90)."""
    R, stride_bn, stride_sm = divisible(R, R_DIVISOR), divisible(stride_bn, R_DIVISOR), divisible(stride_sm, R_DIVISOR)
    n_block, chunk = tl.program_id(0), tl.program_id(1)
    columns = n_block * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    column_inside, rank_inside = columns < N, ranks < R
    if dh_ptr is not None:
        b = tl.load(
            b_ptr + columns.to(tl.int64)[:, None] * stride_bn + ranks.to(tl.int64)[None, :] * stride_br,
            mask=column_inside[:, None] & rank_inside[None, :], other=0.0,
        )  # fmt: skip
    db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    tl.assume(rows_per_chunk > 0)
    first = chunk.to(tl.int64) * rows_per_chunk
    for start in range(0, rows_per_chunk, BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        row_inside = rows < M
        dy = tl.load(
            dy_ptr + rows[:, None] * stride_dym + columns.to(tl.int64)[None, :] * stride_dyn,
            mask=row_inside[:, None] & column_inside[None, :], other=0.0,
        )  # fmt: skip
        if db_ptr is not None:
            s = tl.load(
                s_ptr + rows[:, None] * stride_sm + ranks[None, :],
                mask=row_inside[:, None] & rank_inside[None, :], other=0.0,
            )  # fmt: skip
            db = dot_high(dy.T, s, db, HIGH) if HIGH is not None else dot(dy.T, s, db, PRECISION)
        if dh_ptr is not None:
            dh = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            dh = dot_high(dy, b, dh, HIGH) if HIGH is not None else dot(dy, b, dh, PRECISION)
            target = dh_ptr + (n_block.to(tl.int64) * M + rows)[:, None] * R + ranks[None, :]
            tl.store(target, dh, mask=row_inside[:, None] & rank_inside[None, :])
    if db_ptr is not None:
        target = db_ptr + (chunk.to(tl.int64) * N + columns)[:, None] * R + ranks[None, :]
        tl.store(target, db, mask=column_inside[:, None] & rank_inside[None, :])


@triton.jit(do_not_specialize=["M", "rows_per_chunk", "mask_stride_index"])
def lora_bwd_da_kernel(
    x_ptr, dh_ptr, da_ptr, mask_ptr, M, K, C, width, rows_per_chunk, stride_xm, stride_xk, stride_dhm,
    mask_stride_index, mask_stride_row,
    HIGH: tl.constexpr, C_DIVISOR: tl.constexpr, MASK_DIVISOR: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA[chunk, C, K] = dHᵀ·D(x) over a chunk of rows: BLOCK_K columns of x and BLOCK_C columns of the stacked dH
    [M, C] a program, float32 partials. Groups of `width` columns of dH share a mask, as in `shrink_kernel`."""
    width, stride_dhm = divisible(width, C_DIVISOR), divisible(stride_dhm, C_DIVISOR)
    mask_stride_index = divisible(mask_stride_index, MASK_DIVISOR)
    mask_stride_row = divisible(mask_stride_row, MASK_DIVISOR)
    blocks_per_group = tl.cdiv(width, BLOCK_C)
    blocks = (C // width) * blocks_per_group
    k_block, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    group, block = block // blocks_per_group, block % blocks_per_group
    within = block * BLOCK_C + tl.arange(0, BLOCK_C)
    dh_columns = group * width + within
    columns = k_block * BLOCK_K + tl.arange(0, BLOCK_K)
    chunk = tl.program_id(1)
    first = chunk.to(tl.int64) * rows_per_chunk
    acc = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
    tl.assume(rows_per_chunk > 0)  # a sum that may have no step makes ptxas serialise wgmma (C7515; Triton 3.6, sm_90)
    for start in range(0, rows_per_chunk, BLOCK_M):
        rows = first + start + tl.arange(0, BLOCK_M)
        inside = (rows < M)[:, None] & (columns < K)[None, :]
        x = tl.load(
            x_ptr + rows[:, None] * stride_xm + columns.to(tl.int64)[None, :] * stride_xk, mask=inside, other=0.0
        )
        if mask_ptr is not None:
            kept = load_mask(
                mask_ptr + group.to(tl.int64) * mask_stride_index, rows, k_block * BLOCK_K, M, mask_stride_row, BLOCK_K
            )
            x = tl.where(kept, x, 0.0)
        dh = tl.load(
            dh_ptr + rows[None, :] * stride_dhm + dh_columns[:, None],
            mask=(rows < M)[None, :] & (within < width)[:, None], other=0.0,
        )  # fmt: skip
        acc = dot_high(dh, x, acc, HIGH) if HIGH is not None else dot(dh, x, acc, PRECISION)
    target = da_ptr + (chunk.to(tl.int64) * C + dh_columns)[:, None] * K + columns[None, :]
    tl.store(target, acc, mask=(within < width)[:, None] & (columns < K)[None, :])


def sums_over_dy(
    dy: torch.Tensor,
    lora_B: torch.Tensor | None,
    s: torch.Tensor | None,
    dh: torch.Tensor | None,
    scale: float,
    row_scaling: torch.Tensor | None,
    adapter_dtype: torch.dtype,
    high_precision: bool,
    tile: configs.PassTile | None = None,
) -> tuple[torch.Tensor | None, list[SplitKPartials]]:
    """dB = dyᵀ·S [N, R] if `s` is given, and dH = scale · dy·B into `dh` [M, R] if that is: by one pass over dy [M, N].
    Both are there once `reduce_partials` has added up the second part of the answer. `tile`: another than `configs`
    takes.
    """
    M, N = dy.shape
    R = lora_B.shape[1] if lora_B is not None else s.shape[1]
    if configs.LARGEST_RANK_OF_DH_DB[dy.element_size()] < R:
        return _products_with_dy(dy, lora_B, s, dh, scale, row_scaling, adapter_dtype, high_precision), []
    tile = tile or configs.dh_db_tile(
        M,
        N,
        R,
        dy.element_size(),
        high_precision,
        architecture(dy.device),
        table=configs.tuned(dy.device),
    )
    n_blocks = triton.cdiv(N, tile.block_n)
    chunks, rows_per_chunk = configs.split(M, tile.block_m, n_blocks, sm_count(dy.device))
    dh_partials = dy.new_empty(n_blocks, M, R, dtype=torch.float32) if dh is not None else None
    db_partials = dy.new_empty(chunks, N, R, dtype=torch.float32) if s is not None else None
    lora_bwd_dh_db_kernel[(n_blocks, chunks)](
        dy, lora_B, s, dh_partials, db_partials, M, N, R, rows_per_chunk, dy.stride(0), dy.stride(1),
        lora_B.stride(0) if lora_B is not None else 0, lora_B.stride(1) if lora_B is not None else 0,
        s.stride(0) if s is not None else 0,
        HIGH=high(high_precision),
        R_DIVISOR=divisor(R, *(matrix.stride(0) for matrix in (lora_B, s) if matrix is not None)),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_R=tile.block_r,
        PRECISION=dot_precision(dy.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    db = None if s is None else dy.new_empty(N, R, dtype=adapter_dtype)
    sums = [] if dh is None else [SplitKPartials(dh_partials, dh, N, tile.block_n, scale, row_scaling)]
    return db, sums if db is None else [*sums, SplitKPartials(db_partials, db, M, rows_per_chunk)]


def _products_with_dy(dy, lora_B, s, dh, scale, row_scaling, adapter_dtype, high_precision):
    """The same by cuBLAS: the partials of the pass over dy grow with R, and above a rank of about 32
    they cost more than reading dy twice."""
    low = dy.float() if high_precision else dy
    if dh is not None:
        torch.addmm(dh, low, lora_B.to(low.dtype), beta=0, alpha=scale, out=dh)
        if row_scaling is not None:
            dh.mul_(row_scaling[:, None] if row_scaling.dim() else row_scaling)
    return None if s is None else matmul_float32(low.t(), s).to(adapter_dtype)


def grad_lora_A(
    x: torch.Tensor,
    dh: torch.Tensor,
    masks: torch.Tensor | None,
    ranks: list[int],
    wanted: list[bool],
    adapter_dtype: torch.dtype,
    high_precision: bool,
    tile: configs.PassTile | None = None,
) -> list[torch.Tensor]:
    """dA_j = dH_jᵀ·D_j(x) [R_j, K] of the wanted projections, from one pass over x [M, K] and the stacked dH
    [M, n·R]; with masks of their own the projections read x one after the other while it is in L2. `tile`: another
    than `configs` takes."""
    (M, K), C = x.shape, dh.shape[1]
    R = C // len(ranks)
    num_masks = 1 if masks is None else masks.shape[0]
    tile = tile or configs.da_tile(
        M, K, C // num_masks, x.element_size(), high_precision, table=configs.tuned(x.device)
    )
    blocks = triton.cdiv(K, tile.block_k) * num_masks * triton.cdiv(C // num_masks, tile.block_c)
    chunks, rows_per_chunk = configs.split(M, tile.block_m, blocks, sm_count(x.device))
    partials = x.new_empty(chunks, C, K, dtype=torch.float32)
    lora_bwd_da_kernel[(blocks, chunks)](
        x, dh, partials, masks, M, K, C, C // num_masks, rows_per_chunk, x.stride(0), x.stride(1), dh.stride(0),
        0 if masks is None else masks.stride(0), 0 if masks is None else masks.stride(1),
        HIGH=high(high_precision), C_DIVISOR=divisor(C // num_masks, dh.stride(0)),
        MASK_DIVISOR=1 if masks is None else divisor(masks.stride(1)),
        BLOCK_M=tile.block_m, BLOCK_C=tile.block_c, BLOCK_K=tile.block_k,
        PRECISION=dot_precision(x.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    sums = [
        SplitKPartials(partials[:, j * R : j * R + rank], x.new_empty(rank, K, dtype=adapter_dtype), M, rows_per_chunk)
        for j, (rank, needed) in enumerate(zip(ranks, wanted))
        if needed
    ]
    reduce_partials(sums, M)
    return [one.out for one in sums]


def backward(
    dys: list[torch.Tensor],
    x: torch.Tensor | None,
    s: torch.Tensor | None,
    masks: torch.Tensor | None,
    weights: list[torch.Tensor | None],
    lora_As: list[torch.Tensor | None],
    lora_Bs: list[torch.Tensor | None],
    row_scalings: list[torch.Tensor | None],
    scalings: list[float],
    ranks: list[int],
    dropout_p: float,
    needs: list[bool],
    adapter_dtype: torch.dtype,
    high_precision: bool,
    backend: str,
) -> list[torch.Tensor]:
    """Compute what `reference.backward` does."""
    batch = dys[0].shape[:-1]
    dys = [_dense(dy) for dy in dys]
    M, num, R = dys[0].shape[0], len(dys), max(ranks)
    needs_x, (needs_weight, needs_bias, needs_A, needs_B) = needs[0], by_field(needs[1:], num, 4)
    low_rank = [needs_x or needed for needed in needs_A]
    dh = None
    if any(low_rank):
        allocate = dys[0].new_empty if all(rank == R for rank in ranks) and all(low_rank) else dys[0].new_zeros
        dh = allocate(M, num * R, dtype=torch.float32 if high_precision else dys[0].dtype)
    grad_Bs, sums, column = [], [], 0
    for j, dy in enumerate(dys):
        lora_B, row_scaling = lora_Bs[j], row_scalings[j]
        s_j = None
        if needs_B[j]:
            s_j = s[:, column : column + ranks[j]]
            column += ranks[j]
        dh_j = dh[:, j * R : j * R + ranks[j]] if low_rank[j] else None
        if s_j is None and dh_j is None:
            grad_Bs.append(None)
            continue
        scale = scalings[j] * dropout.rescale(dropout_p)
        grad_B, some = sums_over_dy(dy, lora_B, s_j, dh_j, scale, flat(row_scaling), adapter_dtype, high_precision)
        grad_Bs.append(grad_B)
        sums += some
    reduce_partials(sums, M)
    rows = x if x is None or x.dim() == 2 else x.reshape(-1, x.shape[-1])
    grads_A = grad_lora_A(rows, dh, masks, ranks, needs_A, adapter_dtype, high_precision) if any(needs_A) else []
    grads = []
    if needs_x:
        grad_x = grad_x_of(dys, weights, lora_As, dh, masks, ranks, high_precision, backend)
        grads.append(grad_x.view(*batch, grad_x.shape[1]))
    grads += [dy.t().mm(rows) for dy, needed in zip(dys, needs_weight) if needed]
    grads += [dy.sum(0) for dy, needed in zip(dys, needs_bias) if needed]
    return grads + grads_A + [grad for grad, needed in zip(grad_Bs, needs_B) if needed]


def grad_x_of(dys, weights, lora_As, dh, masks, ranks, high_precision, backend) -> torch.Tensor:
    """dx = Σ_j dy_j·W_j + D_j(dH_j·A_j) [M, K]: one GEMM whose reduction runs over all projections, or the
    low-rank products followed by cuBLAS with beta = 1."""
    M, R, K = dys[0].shape[0], max(ranks), weights[0].shape[1]
    grad_x = dys[0].new_empty(M, K)
    es = [dh[:, j * R : (j + 1) * R] for j in range(len(dys))]
    fs = lora_As if all(rank == R for rank in ranks) else stack(lora_As, R).split(R)
    features = max(dy.shape[1] for dy in dys)
    device = grad_x.device
    path = configs.expand_path(M, K, features, R, grad_x.dtype, architecture(device), backend, configs.tuned(device))
    if path == "fused":
        return extended_gemm(dys, weights, es, fs, grad_x, masks=masks)
    if masks is None and len(dys) == 1 and not high_precision:
        torch.mm(es[0], fs[0].to(grad_x.dtype), out=grad_x)
    else:
        extended_gemm([], [], es, fs, grad_x, masks=masks, base=False)
    for dy, weight in zip(dys, weights):
        grad_x.addmm_(dy, weight)
    return grad_x


def _dense(grad_y: torch.Tensor) -> torch.Tensor:
    """[M, N] with rows that kernels can address: `y.sum().backward()` brings a gradient of strides (0, 0)."""
    dy = grad_y if grad_y.dim() == 2 else grad_y.reshape(-1, grad_y.shape[-1])
    return dy if 0 not in dy.stride() else dy.contiguous()
