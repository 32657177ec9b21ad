"""The GEMM that masks a weight on its way in, for forward and for dx, by Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..blocks.device import dot, tile_of
from ..core.machine import architecture
from ..core.tensors import flatten, unflatten
from ..core.triton_host import dot_precision
from . import configs


@triton.jit
def rounded_threshold(threshold, threshold_ptr, DTYPE: tl.constexpr):
    """τ rounded to the scores' dtype, as float32: the tensor's value if there is one, else the float."""
    tau = tl.full((), threshold, tl.float32) if threshold_ptr is None else tl.load(threshold_ptr).to(tl.float32)
    return tau.to(DTYPE).to(tl.float32)


@triton.jit(do_not_specialize=["M"])
def masked_gemm_kernel(
    p_ptr, q_ptr, s_ptr, bias_ptr, out_ptr, threshold, threshold_ptr, M, N, K,
    stride_pm, stride_pk, stride_qk, stride_qn, stride_sk, stride_sn, stride_om, stride_on,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out[M, N] = P[M, K]·(Q ⊙ 1[S ≥ τ])[K, N] + bias[N], a tile a program."""
    m, n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    rows = m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    tau = rounded_threshold(threshold, threshold_ptr, s_ptr.dtype.element_ty)
    p = p_ptr + rows[:, None] * stride_pm + depth.to(tl.int64)[None, :] * stride_pk
    q = q_ptr + depth.to(tl.int64)[:, None] * stride_qk + columns[None, :] * stride_qn
    s = s_ptr + depth.to(tl.int64)[:, None] * stride_sk + columns[None, :] * stride_sn
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        q_inside = (k + depth < K)[:, None] & (columns < N)[None, :]
        q_tile = tl.load(q, mask=q_inside, other=0.0)
        s_tile = tl.load(s, mask=q_inside, other=0.0)
        q_tile = tl.where(s_tile.to(tl.float32) >= tau, q_tile, 0.0)
        p_tile = tl.load(p, mask=(rows < M)[:, None] & (k + depth < K)[None, :], other=0.0)
        acc = dot(p_tile, q_tile, acc, PRECISION)
        p += tl.full((), BLOCK_K, tl.int64) * stride_pk
        q += tl.full((), BLOCK_K, tl.int64) * stride_qk
        s += tl.full((), BLOCK_K, tl.int64) * stride_sk
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + rows[:, None] * stride_om + columns[None, :] * stride_on
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(rows < M)[:, None] & (columns < N)[None, :])


def masked_gemm(
    p: torch.Tensor,
    q: torch.Tensor,
    scores: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    threshold_tensor: torch.Tensor | None,
    tile: configs.Tile | None = None,
) -> torch.Tensor:
    """P·(Q ⊙ 1[S ≥ τ]) + bias [M, N] in P's dtype.

    Args:
        p: [M, K]. q: [K, N] in its dtype. scores: [K, N]. Any strides.
        bias: [N], adjacent values, or None.
        threshold: read where threshold_tensor, one value on the device, is None.
        tile: another than `configs` takes.
    """
    (M, K), N = p.shape, q.shape[1]
    out = p.new_empty(M, N)
    if M == 0 or N == 0:
        return out
    tile = tile or configs.gemm_tile(
        M,
        N,
        p.element_size(),
        architecture(p.device),
        aligned(p, q, scores),
        table=configs.tuned(p.device),
    )
    masked_gemm_kernel[(triton.cdiv(M, tile.block_m) * triton.cdiv(N, tile.block_n),)](
        p, q, scores, bias, out, threshold, threshold_tensor, M, N, K,
        *p.stride(), *q.stride(), *scores.stride(), *out.stride(),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP_M=tile.group_m,
        PRECISION=dot_precision(p.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def aligned(*matrices: torch.Tensor) -> bool:
    """Whether Triton sees of all matrices that rows or columns are adjacent and begin on 16 bytes."""
    strides = [stride for matrix in matrices for stride in matrix.stride()]
    return all(stride == 1 or stride % 16 == 0 for stride in strides)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    bias: torch.Tensor | None,
    tau: torch.Tensor | None,
    threshold: float,
    backend: str,
) -> torch.Tensor:
    """Compute what `reference.forward` does."""
    bias = None if bias is None else bias.contiguous()
    y = masked_gemm(flatten(x), weight.t(), scores.t(), bias, threshold, tau)
    return unflatten(y, x)
