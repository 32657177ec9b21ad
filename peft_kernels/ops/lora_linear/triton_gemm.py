"""The GEMM whose reduction goes on over the rank (K-extension), for forward and for dx.

    out[M, N] = Σ_j P_j[M, K_j]·Q_j[K_j, N] + D_j(E_j[M, R]·F_j[R, N]) + bias[N]

Forward is one projection: P = x, Q = Wᵀ, E = S, F = Bᵀ. The gradient of an x that several projections share is
their sum: P_j = dy_j, Q_j = W_j, E_j = dH_j, F_j = A_j. Nothing is concatenated and `out` is written once. Two
kernels compute it: plain pointers for any strides and any architecture, and a persistent one whose operands come
through TMA descriptors (sm_90 and later).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ..blocks.device import divisible, dot, dot_high, load_mask, tile_of
from ..core.machine import architecture, sm_count
from ..core.triton_host import divisor, dot_precision, high_precision
from . import configs


@triton.jit
def _low_rank(
    acc, e_ptr, f_ptr, rows, first_column, M, N, R, stride_em, stride_fr, stride_fn, HIGH: tl.constexpr,
    R_DIVISOR: tl.constexpr, FN_DIVISOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + E·F for one tile; E's columns are adjacent."""
    columns = first_column + tl.arange(0, BLOCK_N)
    for r in range(0, R, BLOCK_R):
        e, f = _load_low_rank(
            e_ptr, f_ptr, rows, columns, r, M, N, R, stride_em, stride_fr, stride_fn, R_DIVISOR, FN_DIVISOR, BLOCK_R
        )
        acc = dot_high(e, f, acc, HIGH) if HIGH is not None else dot(e, f, acc, PRECISION)
    return acc


@triton.jit
def _load_low_rank(
    e_ptr, f_ptr, rows, columns, r, M, N, R, stride_em, stride_fr, stride_fn, R_DIVISOR: tl.constexpr,
    FN_DIVISOR: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    R, stride_em = divisible(R, R_DIVISOR), divisible(stride_em, R_DIVISOR)
    stride_fn = divisible(stride_fn, FN_DIVISOR)
    ranks = r + tl.arange(0, BLOCK_R)
    e = tl.load(
        e_ptr + rows[:, None] * stride_em + ranks[None, :],
        mask=(rows < M)[:, None] & (ranks < R)[None, :], other=0.0,
    )  # fmt: skip
    f = tl.load(
        f_ptr + ranks.to(tl.int64)[:, None] * stride_fr + columns.to(tl.int64)[None, :] * stride_fn,
        mask=(ranks < R)[:, None] & (columns < N)[None, :], other=0.0,
    )  # fmt: skip
    return e, f


@triton.jit
def _dropped_low_rank(
    acc, e_ptrs, f_ptrs, mask_ptr, rows, first_column, M, N, R, strides_em, strides_fr, strides_fn,
    mask_stride_index, mask_stride_row, NUM: tl.constexpr, HIGH: tl.constexpr, R_DIVISOR: tl.constexpr,
    FN_DIVISOR: tl.constexpr, MASK_DIVISOR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + Σ_j D_j(E_j·F_j) for one tile, acc = 0 at first. The masks come before the large products: a second
    accumulator for what they must not touch would spill, so only further masked projections pay for one."""
    mask_stride_index = divisible(mask_stride_index, MASK_DIVISOR)
    mask_stride_row = divisible(mask_stride_row, MASK_DIVISOR)
    tl.assume(R > 0)  # a sum that may have no step makes ptxas serialise wgmma (C7514, C7515; sm_90)
    for j in tl.static_range(NUM):
        start = acc if mask_ptr is None or j == 0 else tl.zeros_like(acc)
        product = _low_rank(
            start, e_ptrs[j], f_ptrs[j], rows, first_column, M, N, R, strides_em[j], strides_fr[j], strides_fn[j],
            HIGH, R_DIVISOR, FN_DIVISOR, BLOCK_N, BLOCK_R, PRECISION,
        )  # fmt: skip
        if mask_ptr is not None:
            mask = mask_ptr + tl.full((), j, tl.int64) * mask_stride_index
            kept = load_mask(mask, rows, first_column, M, mask_stride_row, BLOCK_N)
            # The addition comes between the accumulator and its rounding, which ptxas would begin while wgmma runs and
            # then serialise it (C7514; Triton 3.6, sm_90, without the large product).
            product = tl.where(kept, product + 0.0, 0.0)
        acc = product if mask_ptr is None or j == 0 else acc + product
    return acc


@triton.jit(do_not_specialize=["M", "mask_stride_index"])
def extended_gemm_kernel(
    p_ptrs, q_ptrs, e_ptrs, f_ptrs, bias_ptr, mask_ptr, out_ptr, M, N, Ks, R,
    strides_pm, strides_pk, strides_qk, strides_qn, strides_em, strides_fr, strides_fn, stride_om, stride_on,
    mask_stride_index, mask_stride_row,
    NUM: tl.constexpr, BASE: tl.constexpr, ONTO: tl.constexpr, HIGH: tl.constexpr, R_DIVISOR: tl.constexpr,
    FN_DIVISOR: tl.constexpr, MASK_DIVISOR: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of `out` a program. Without BASE only the low-rank products are computed: the large ones then follow by
    cuBLAS's GEMM with beta = 1, or have been computed and are in `out`, with ONTO."""
    m, n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = _dropped_low_rank(
        acc, e_ptrs, f_ptrs, mask_ptr, rows, n * BLOCK_N, M, N, R, strides_em, strides_fr, strides_fn,
        mask_stride_index, mask_stride_row, NUM, HIGH, R_DIVISOR, FN_DIVISOR, MASK_DIVISOR, BLOCK_N, BLOCK_R,
        PRECISION,
    )  # fmt: skip
    if BASE:
        for j in tl.static_range(NUM):
            depth = tl.arange(0, BLOCK_K)
            p = p_ptrs[j] + rows[:, None] * strides_pm[j] + depth.to(tl.int64)[None, :] * strides_pk[j]
            q = q_ptrs[j] + depth.to(tl.int64)[:, None] * strides_qk[j] + columns.to(tl.int64)[None, :] * strides_qn[j]
            for k in range(0, Ks[j], BLOCK_K):
                p_inside = (rows < M)[:, None] & (k + depth < Ks[j])[None, :]
                q_inside = (k + depth < Ks[j])[:, None] & (columns < N)[None, :]
                acc = dot(
                    tl.load(p, mask=p_inside, other=0.0), tl.load(q, mask=q_inside, other=0.0), acc, PRECISION
                )  # fmt: skip
                p += tl.full((), BLOCK_K, tl.int64) * strides_pk[j]
                q += tl.full((), BLOCK_K, tl.int64) * strides_qk[j]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + rows[:, None] * stride_om + columns.to(tl.int64)[None, :] * stride_on
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    if ONTO:
        acc += tl.load(out, mask=inside, other=0.0).to(tl.float32)
    tl.store(out, acc.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["M", "mask_stride_index"])
def extended_gemm_tma_kernel(
    p_desc0, p_desc1, p_desc2, q_desc0, q_desc1, q_desc2, out_desc, e_ptrs, f_ptrs, bias_ptr, mask_ptr, M, N, Ks, R,
    strides_em, strides_fr, strides_fn, mask_stride_index, mask_stride_row,
    NUM: tl.constexpr, Q_TRANSPOSED: tl.constexpr, HIGH: tl.constexpr, PREFETCH: tl.constexpr,
    R_DIVISOR: tl.constexpr, FN_DIVISOR: tl.constexpr, MASK_DIVISOR: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr, SPLIT_EPILOGUE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Persistent: a program takes every num_programs-th tile; P, Q and `out` go through TMA, which also cuts off
    what lies outside. With PREFETCH (one projection, no mask, R in one block) the low-rank operands are asked for
    before the loop over K, which hides their latency, and multiplied after it."""
    # Triton 3.6's launcher knows no descriptors inside a tuple: they come one by one, None from the last on.
    p_descs, q_descs = (p_desc0, p_desc1, p_desc2), (q_desc0, q_desc1, q_desc2)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    dtype: tl.constexpr = out_desc.dtype
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        m, n = tile_of(tile, tiles_m, tiles_n, GROUP_M)
        row, column = m * BLOCK_M, n * BLOCK_N
        rows = row.to(tl.int64) + tl.arange(0, BLOCK_M)
        columns = column + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if PREFETCH:
            e, f = _load_low_rank(
                e_ptrs[0], f_ptrs[0], rows, columns, 0, M, N, R, strides_em[0], strides_fr[0], strides_fn[0],
                R_DIVISOR, FN_DIVISOR, BLOCK_R,
            )  # fmt: skip
        else:
            acc = _dropped_low_rank(
                acc, e_ptrs, f_ptrs, mask_ptr, rows, column, M, N, R, strides_em, strides_fr, strides_fn,
                mask_stride_index, mask_stride_row, NUM, HIGH, R_DIVISOR, FN_DIVISOR, MASK_DIVISOR, BLOCK_N, BLOCK_R,
                PRECISION,
            )  # fmt: skip
        for j in tl.static_range(NUM):
            tl.assume(Ks[j] > 0)  # as TMA takes nothing else
            for k in range(0, Ks[j], BLOCK_K):
                p = p_descs[j].load([row, k])
                if Q_TRANSPOSED:
                    q = q_descs[j].load([column, k]).T
                else:
                    q = q_descs[j].load([k, column])
                acc = dot(p, q, acc, PRECISION)
        if PREFETCH:
            acc = dot_high(e, f, acc, HIGH) if HIGH is not None else dot(e, f, acc, PRECISION)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        if SPLIT_EPILOGUE:  # two stores of half the width need half the shared memory
            halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            left, right = tl.split(halves)
            out_desc.store([row, column], left.to(dtype))
            out_desc.store([row, column + BLOCK_N // 2], right.to(dtype))
        else:
            out_desc.store([row, column], acc.to(dtype))


def extended_gemm(
    ps: list[torch.Tensor],
    qs: list[torch.Tensor],
    es: list[torch.Tensor],
    fs: list[torch.Tensor],
    out: torch.Tensor,
    bias: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
    base: bool = True,
    onto: bool = False,
    tile: configs.GemmTile | None = None,
) -> torch.Tensor:
    """out = Σ_j P_j·Q_j + D_j(E_j·F_j) + bias; without `base` only the low-rank products and the bias, with `onto`
    added to what `out` holds.

    Args:
        ps: [M, K_j] in out's dtype. qs: [K_j, N], the same. Any strides.
        es: [M, R], adjacent columns, in out's dtype, or float32 to multiply E and F with float32 accuracy.
        fs: [R, N], any strides, out's dtype or float32.
        out: [M, N], written. bias: [N] or None.
        masks: packed, uint8 [1 or n, M, ceil(N / 8)], applied to the low-rank products; or None.
        tile: another than `configs` takes.
    """
    M, N = out.shape
    R = es[0].shape[1]
    if M == 0 or N == 0:
        return out
    arch = architecture(out.device)
    stream_stride = masks.stride(0) if masks is not None and masks.shape[0] > 1 else 0
    row_stride = masks.stride(1) if masks is not None else 0
    strides_em = tuple(e.stride(0) for e in es)
    strides_fr, strides_fn = tuple(f.stride(0) for f in fs), tuple(f.stride(1) for f in fs)
    high = es[0].dtype != out.dtype
    masked = len(es) if masks is not None else 0
    layout = _tma_layout(ps, qs, out) if base and arch >= 90 and out.element_size() == 2 else None
    common = {"NUM": len(es), "HIGH": high_precision(high), "PRECISION": dot_precision(out.dtype),
              "R_DIVISOR": divisor(R, *strides_em), "FN_DIVISOR": divisor(*strides_fn),
              "MASK_DIVISOR": divisor(row_stride)}  # fmt: skip
    tile = tile or configs.gemm_tile(
        M,
        N,
        R,
        out.element_size(),
        arch,
        layout is not None,
        masked,
        high,
        base,
        table=configs.tuned(out.device),
    )
    blocks = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_R": tile.block_r,
              "GROUP_M": tile.group_m, "num_warps": tile.num_warps, "num_stages": tile.num_stages}  # fmt: skip
    tiles = triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n)
    if layout is not None:
        transposed = layout == "transposed"
        q_block = [tile.block_n, tile.block_k] if transposed else [tile.block_k, tile.block_n]
        out_block = [tile.block_m, tile.block_n // 2 if tile.split_epilogue else tile.block_n]
        extended_gemm_tma_kernel[(min(tiles, sm_count(out.device)),)](
            *_descriptors(ps, [tile.block_m, tile.block_k]),
            *_descriptors([q.t() if transposed else q for q in qs], q_block),
            TensorDescriptor.from_tensor(out, out_block),
            tuple(es), tuple(fs), bias, masks, M, N, tuple(p.shape[1] for p in ps), R,
            strides_em, strides_fr, strides_fn, stream_stride, row_stride,
            Q_TRANSPOSED=transposed, PREFETCH=len(es) == 1 and masks is None and not high and tile.block_r >= R,
            SPLIT_EPILOGUE=tile.split_epilogue, **common, **blocks,
        )  # fmt: skip
        return out
    extended_gemm_kernel[(tiles,)](
        tuple(ps), tuple(qs), tuple(es), tuple(fs), bias, masks, out, M, N, tuple(p.shape[1] for p in ps), R,
        tuple(p.stride(0) for p in ps), tuple(p.stride(1) for p in ps),
        tuple(q.stride(0) for q in qs), tuple(q.stride(1) for q in qs),
        strides_em, strides_fr, strides_fn, out.stride(0), out.stride(1), stream_stride, row_stride,
        BASE=base, ONTO=onto, **common, **blocks,
    )  # fmt: skip
    return out


_MOST_DESCRIPTORS = 3  # of P and of Q: query, key and value


def _descriptors(matrices: list[torch.Tensor], block: list[int]) -> list[TensorDescriptor | None]:
    made = [TensorDescriptor.from_tensor(matrix, block) for matrix in matrices]
    return made + [None] * (_MOST_DESCRIPTORS - len(made))


def _tma_layout(ps: list[torch.Tensor], qs: list[torch.Tensor], out: torch.Tensor) -> str | None:
    """How Q lies in memory ("natural" [K, N], "transposed" [N, K]), or None where TMA cannot take an operand."""
    if len(ps) > _MOST_DESCRIPTORS or not all(map(_tma_takes, [*ps, out])):
        return None
    if all(_tma_takes(q.t()) for q in qs):
        return "transposed"
    return "natural" if all(map(_tma_takes, qs)) else None


def _tma_takes(tensor: torch.Tensor) -> bool:
    """Adjacent columns, rows and start on 16 bytes, and coordinates within 32 bits."""
    pitch = tensor.stride(0) * tensor.element_size()
    return (
        tensor.stride(1) == 1 and tensor.shape[1] > 0 and pitch > 0 and pitch % 16 == 0
        and tensor.data_ptr() % 16 == 0 and max(tensor.shape) < 2**31
    )  # fmt: skip
