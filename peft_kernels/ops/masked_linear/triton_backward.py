"""Backward by Triton: dx is forward's GEMM with W untransposed; the gradients of weight and scores come from one
product, multiplied element by element before it leaves the registers. No partial sums, no atomics: the same bits
every time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..blocks.device import dot, tile_of
from ..core.machine import architecture
from ..core.tensors import flatten
from ..core.triton_host import dot_precision
from . import configs
from .triton_forward import aligned, masked_gemm, rounded_threshold


@triton.jit(do_not_specialize=["M"])
def masked_grad_kernel(
    dy_ptr, x_ptr, w_ptr, s_ptr, dw_ptr, ds_ptr, threshold, threshold_ptr, M, N, K,
    stride_dym, stride_dyn, stride_xm, stride_xk, stride_wn, stride_wk, stride_sn, stride_sk,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, GROUP_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """With G = dyᵀ·x [N, K], a tile a program: dW = G ⊙ 1[S ≥ τ] and dS = G ⊙ W, adjacent columns. Either pointer may
    be None, and with dW's that of S, with dS's that of W."""
    n, k = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), GROUP_N)
    rows = n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    tokens = tl.arange(0, BLOCK_M)
    dy = dy_ptr + rows[:, None] * stride_dyn + tokens.to(tl.int64)[None, :] * stride_dym
    x = x_ptr + tokens.to(tl.int64)[:, None] * stride_xm + columns[None, :] * stride_xk
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    tl.assume(M > 0)  # a sum that may have no step makes ptxas serialise wgmma (C7515; Triton 3.6, sm_90)
    for m in range(0, M, BLOCK_M):
        dy_tile = tl.load(dy, mask=(rows < N)[:, None] & (m + tokens < M)[None, :], other=0.0)
        x_tile = tl.load(x, mask=(m + tokens < M)[:, None] & (columns < K)[None, :], other=0.0)
        acc = dot(dy_tile, x_tile, acc, PRECISION)
        dy += tl.full((), BLOCK_M, tl.int64) * stride_dym
        x += tl.full((), BLOCK_M, tl.int64) * stride_xm
    inside = (rows < N)[:, None] & (columns < K)[None, :]
    out = rows[:, None] * K + columns[None, :]
    if ds_ptr is not None:
        w = tl.load(w_ptr + rows[:, None] * stride_wn + columns[None, :] * stride_wk, mask=inside, other=0.0)
        tl.store(ds_ptr + out, (acc * w.to(tl.float32)).to(ds_ptr.dtype.element_ty), mask=inside)
    if dw_ptr is not None:
        tau = rounded_threshold(threshold, threshold_ptr, s_ptr.dtype.element_ty)
        s = tl.load(s_ptr + rows[:, None] * stride_sn + columns[None, :] * stride_sk, mask=inside, other=0.0)
        # The addition comes between the accumulator and its rounding, which ptxas would begin while wgmma runs and then
        # serialise it (C7514; Triton 3.6, sm_90, scores of 16 bits).
        kept = tl.where(s.to(tl.float32) >= tau, acc + 0.0, 0.0)
        tl.store(dw_ptr + out, kept.to(dw_ptr.dtype.element_ty), mask=inside)


def masked_grad(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    scores: torch.Tensor | None,
    grad_weight: torch.Tensor | None,
    grad_scores: torch.Tensor | None,
    threshold: float,
    threshold_tensor: torch.Tensor | None,
    tile: configs.Tile | None = None,
) -> None:
    """Write grad_weight = (dyᵀ·x) ⊙ 1[S ≥ τ] and grad_scores = (dyᵀ·x) ⊙ W, where they are given.

    Args:
        dy: [M, N]. x: [M, K]. Any strides.
        weight: [N, K], read for grad_scores. scores: [N, K], read for grad_weight. Any strides.
        grad_weight, grad_scores: [N, K], contiguous.
        tile: another than `configs` takes.
    """
    (M, N), K = dy.shape, x.shape[1]
    if N == 0 or K == 0:
        return
    if M == 0:
        for grad in (grad_weight, grad_scores):
            if grad is not None:
                grad.zero_()
        return
    tile = tile or configs.grad_tile(
        N,
        K,
        dy.element_size(),
        architecture(dy.device),
        aligned(dy, x),
        table=configs.tuned(dy.device),
    )
    masked_grad_kernel[(triton.cdiv(N, tile.block_m) * triton.cdiv(K, tile.block_n),)](
        dy, x, weight, scores, grad_weight, grad_scores, threshold, threshold_tensor, M, N, K,
        *dy.stride(), *x.stride(), *(weight.stride() if weight is not None else (0, 0)),
        *(scores.stride() if scores is not None else (0, 0)),
        BLOCK_N=tile.block_m, BLOCK_K=tile.block_n, BLOCK_M=tile.block_k, GROUP_N=tile.group_m,
        PRECISION=dot_precision(dy.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def backward(
    grad_y: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    scores: torch.Tensor | None,
    tau: torch.Tensor | None,
    threshold: float,
    needs: list[bool],
    scores_dtype: torch.dtype,
    backend: str,
) -> list[torch.Tensor]:
    """Compute what `reference.backward` does."""
    needs_x, needs_weight, needs_scores, needs_bias = needs
    dy, grads = flatten(grad_y), []
    if 0 in dy.stride():  # of `y.sum().backward()`: kernels would load each element by itself
        dy = dy.contiguous()
    if needs_x:
        grad_x = masked_gemm(dy, weight, scores, None, threshold, tau)
        grads.append(grad_x.view(*grad_y.shape[:-1], weight.shape[1]))
    if needs_weight or needs_scores:
        rows = flatten(x)
        shape = dy.shape[1], rows.shape[1]
        grad_weight = dy.new_empty(shape) if needs_weight else None
        grad_scores = dy.new_empty(shape, dtype=scores_dtype) if needs_scores else None
        masked_grad(
            dy, rows, weight if needs_scores else None, scores if needs_weight else None, grad_weight, grad_scores,
            threshold, tau,
        )  # fmt: skip
        grads += [grad for grad in (grad_weight, grad_scores) if grad is not None]
    if needs_bias:
        grads.append(dy.sum(0))
    return grads
