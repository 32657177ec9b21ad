"""Forward by Triton: one pass over x for the low-rank products of every projection that shares it (shrink),
then one GEMM a projection that takes the low-rank product in (expand)."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..blocks.device import divisible, dot, dot_high, draw_mask_bytes, spread_mask_bytes
from ..blocks.reduce import SplitKPartials, reduce_partials, row_strides, scaling_of
from ..core import dropout
from ..core.machine import architecture, sm_count
from ..core.tensors import unflatten
from ..core.triton_host import divisor, dot_precision
from ..core.triton_host import high_precision as high
from . import configs
from .reference import add_base
from .triton_gemm import extended_gemm


@triton.jit(do_not_specialize=["M", "stride_split", "mask_stride_index"])
def shrink_kernel(
    x_ptr, a_ptr, s_ptr, mask_ptr, seed_ptr, scales, row_scale_ptrs, row_scale_strides,
    M, K, C, R, width, k_per_split, stride_xm, stride_xk, stride_ac, stride_ak, stride_split,
    mask_stride_index, mask_stride_row, threshold,
    NUM: tl.constexpr, DROPOUT: tl.constexpr, SPLIT: tl.constexpr, HIGH: tl.constexpr,
    C_DIVISOR: tl.constexpr, MASK_DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S[M, C] = scaling · D(x)[M, K]·Aᵀ for the stacked A [C, K]: a block of rows and columns a program.

    Columns come in groups of `width` that share a mask: all of them without dropout or with one mask for all,
    else the R columns of a projection. Programs of one block of rows are neighbours, so that only the first
    of them reads x from memory. With SPLIT, each split of K writes float32 partials, unscaled.
    """
    C, width, stride_split = divisible(C, C_DIVISOR), divisible(width, C_DIVISOR), divisible(stride_split, C_DIVISOR)
    mask_stride_index = divisible(mask_stride_index, MASK_DIVISOR)
    mask_stride_row = divisible(mask_stride_row, MASK_DIVISOR)
    blocks_per_group = tl.cdiv(width, BLOCK_C)
    blocks = (C // width) * blocks_per_group
    row_block, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    group, block = block // blocks_per_group, block % blocks_per_group
    rows = row_block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    within = block * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = group * width + within
    k_start = tl.program_id(1) * k_per_split
    depth = tl.arange(0, BLOCK_K)
    x = x_ptr + rows[:, None] * stride_xm + (k_start + depth).to(tl.int64)[None, :] * stride_xk
    a = a_ptr + (k_start + depth).to(tl.int64)[:, None] * stride_ak + columns.to(tl.int64)[None, :] * stride_ac
    if DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    k_end = min(k_start + k_per_split, K)
    tl.assume(k_end > k_start)  # a sum that may have no step makes ptxas serialise wgmma (C7515; sm_90)
    for k in range(k_start, k_end, BLOCK_K):
        inside = k + depth < K
        x_tile = tl.load(x, mask=(rows < M)[:, None] & inside[None, :], other=0.0)
        a_tile = tl.load(a, mask=inside[:, None] & (within < width)[None, :], other=0.0)
        if DROPOUT:
            groups = k // 8 + tl.arange(0, BLOCK_K // 8)
            kept = draw_mask_bytes(seed, rows, groups, group, threshold)
            x_tile = tl.where(spread_mask_bytes(kept, BLOCK_K), x_tile, 0.0)
            if mask_ptr is not None:
                target = (
                    mask_ptr
                    + group.to(tl.int64) * mask_stride_index
                    + rows[:, None] * mask_stride_row
                    + groups[None, :]
                )
                # Where a group has several blocks (a large rank) they all write the same bytes.
                tl.store(target, kept.to(tl.uint8), mask=(rows < M)[:, None] & (groups < mask_stride_row)[None, :])
        acc = dot_high(x_tile, a_tile, acc, HIGH) if HIGH is not None else dot(x_tile, a_tile, acc, PRECISION)
        x += tl.full((), BLOCK_K, tl.int64) * stride_xk
        a += tl.full((), BLOCK_K, tl.int64) * stride_ak
    if not SPLIT:
        acc *= scaling_of(rows, columns, rows < M, scales, row_scale_ptrs, row_scale_strides, R, NUM)
    out = s_ptr + tl.program_id(1).to(tl.int64) * stride_split + rows[:, None] * C + columns[None, :]
    tl.store(out, acc.to(s_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (within < width)[None, :])


def shrink(
    x: torch.Tensor,
    lora_A: torch.Tensor,
    scales: list[float],
    row_scalings: list[torch.Tensor | None],
    seed: torch.Tensor | None,
    dropout_p: float,
    shared_dropout: bool,
    save_mask: bool,
    high_precision: bool,
    tile: configs.ShrinkTile | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """S [M, C] of all projections and, if it is to be kept, the packed mask [num_masks, M, ceil(K / 8)].

    Args:
        x: [M, K]. lora_A: [C, K], the projections' A stacked, of one rank R = C / n.
        scales: a float a projection; row_scalings: None, a 0-dim tensor or [M], a projection.
        tile: another than `configs` takes.
    """
    (M, K), C, num = x.shape, lora_A.shape[0], len(scales)
    num_masks = 1 if shared_dropout or seed is None else num
    s = x.new_empty(M, C, dtype=torch.float32 if high_precision else x.dtype)
    masks = None
    if save_mask and seed is not None:
        masks = x.new_empty(num_masks, M, dropout.mask_bytes(K), dtype=torch.uint8)
    if K == 0:
        return s.zero_(), masks
    tile = tile or configs.shrink_tile(
        M,
        K,
        C // num_masks,
        x.element_size(),
        seed is not None,
        high_precision,
        table=configs.tuned(x.device),
    )
    blocks = num_masks * triton.cdiv(C // num_masks, tile.block_c)
    row_blocks = triton.cdiv(M, tile.block_m)
    splits, k_per_split = configs.split(K, tile.block_k, row_blocks * blocks, sm_count(x.device))
    target = x.new_empty(splits, M, C, dtype=torch.float32) if splits > 1 else s
    scales, row_scalings = tuple(scales), tuple(row_scalings)
    shrink_kernel[(row_blocks * blocks, splits)](
        x, lora_A, target, masks, seed, scales, row_scalings, row_strides(row_scalings),
        M, K, C, C // num, C // num_masks, k_per_split, x.stride(0), x.stride(1), lora_A.stride(0), lora_A.stride(1),
        M * C, masks.stride(0) if masks is not None else 0, dropout.mask_bytes(K),
        dropout.threshold(dropout_p) if seed is not None else 0,
        NUM=num, DROPOUT=seed is not None, SPLIT=splits > 1, HIGH=high(high_precision),
        C_DIVISOR=divisor(C // num_masks), MASK_DIVISOR=divisor(dropout.mask_bytes(K)),
        BLOCK_M=tile.block_m, BLOCK_C=tile.block_c, BLOCK_K=tile.block_k, PRECISION=dot_precision(x.dtype),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if splits > 1:
        parts = zip(target.split(C // num, dim=2), s.split(C // num, dim=1), scales, row_scalings)
        reduce_partials([SplitKPartials(part, out, K, k_per_split, *scaling) for part, out, *scaling in parts], M)
    return s, masks


def forward(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    lora_As: list[torch.Tensor],
    lora_Bs: list[torch.Tensor],
    row_scalings: list[torch.Tensor | None],
    scalings: list[float],
    seed: torch.Tensor | None,
    dropout_p: float,
    shared_dropout: bool,
    save_s: list[bool],
    save_mask: bool,
    high_precision: bool,
    backend: str,
) -> list[torch.Tensor]:
    """Compute what `reference.forward` does; `backend` may force the path ("triton:fused", "triton:blas")."""
    rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    (M, K), num = rows.shape, len(scalings)
    ranks = [lora_A.shape[0] for lora_A in lora_As]
    R = max(ranks)
    arch, table = architecture(x.device), configs.tuned(x.device)
    if M == 0:
        s = x.new_empty(0, 0)
        masks = rows.new_empty(1 if shared_dropout else num, 0, dropout.mask_bytes(K), dtype=torch.uint8)
    else:
        s, masks = shrink(
            rows, stack(lora_As, R), [scale * dropout.rescale(dropout_p) for scale in scalings],
            [flat(scaling) for scaling in row_scalings], seed, dropout_p, shared_dropout, save_mask,
            high_precision,
        )  # fmt: skip
    ys, kept_s = [], []
    for j, rank in enumerate(ranks):
        weight, bias, lora_B = weights[j], biases[j], lora_Bs[j]
        N = weight.shape[0]
        s_j = (
            s[:, j * R : j * R + rank]
            if M
            else x.new_empty(0, rank, dtype=torch.float32 if high_precision else x.dtype)
        )
        if configs.expand_path(M, N, K, rank, x.dtype, arch, backend, table) == "fused":
            y = extended_gemm([rows], [weight.t()], [s_j], [lora_B.t()], x.new_empty(M, N), contiguous(bias))
        elif high_precision:
            y = rows.mm(weight.t())  # first: its rounding is eager's, and that of a low-rank term may be larger
            extended_gemm([], [], [s_j], [lora_B.t()], y, contiguous(bias), base=False, onto=True)
        else:
            y = add_base(s_j, lora_B, rows, weight, bias)
        ys.append(unflatten(y, x))
        if save_s[j]:
            kept_s.append(s_j)
    if kept_s:
        everything = len(kept_s) == num and all(rank == R for rank in ranks) and M > 0
        ys.append(s if everything else torch.cat(kept_s, dim=1))
    if save_mask and seed is not None:
        ys.append(masks)
    return ys


def stack(matrices: list[torch.Tensor], rank: int) -> torch.Tensor:
    """The projections' A [R_j, K] under one another, each filled up with zeros to `rank` rows."""
    if len(matrices) == 1:
        return matrices[0]
    if all(matrix.shape[0] == rank for matrix in matrices):
        return torch.cat(matrices)
    return torch.cat([torch.nn.functional.pad(matrix, (0, 0, 0, rank - matrix.shape[0])) for matrix in matrices])


def flat(scaling: torch.Tensor | None) -> torch.Tensor | None:
    """A scaling as the kernels read it: one value, or adjacent values a row."""
    return scaling if scaling is None or scaling.dim() == 0 else scaling.reshape(-1).contiguous()


def contiguous(bias: torch.Tensor | None) -> torch.Tensor | None:
    return bias if bias is None else bias.contiguous()
