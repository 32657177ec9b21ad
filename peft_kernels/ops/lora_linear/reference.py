"""LoRA linear in plain PyTorch: any dtype, any device, forward and explicit backward.

This is the definition that the kernels are tested against, and the path of the CPU: every product is an `mm`
or an `addmm_` with beta = 1, so that the low-rank term costs no pass over y of its own. The arguments of both
functions are those of the registered ops (`op.py`).
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import linear

from ..core import dropout
from ..core.tensors import by_field, constant, flatten, matmul_float32, mm_over_rows, unflatten

_TINY_PRODUCT = 1 << 16  # multiply-adds


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
    backend: str = "reference",
) -> list[torch.Tensor]:
    """y_j = x·W_jᵀ + bias_j + S_j·B_jᵀ with S_j = scaling_j · D_j(x)·A_jᵀ, for every projection j.

    Returns the ys [..., N_j]; then, if any is to be kept, S [M, Σ R_j] of the projections marked in save_s;
    then, if it is to be kept, the packed mask [num_masks, M, ceil(K / 8)].
    """
    rows, rescale, dtype = flatten(x), 1.0 if seed is None else dropout.rescale(dropout_p), x.dtype
    low_dtype = _low_rank_dtype(rows, lora_As[0].shape[0], high_precision)
    masks = dropped = None
    if seed is None:
        dropped = rows if low_dtype == dtype else rows.to(low_dtype)
    else:
        masks = dropout.draw_mask(seed, *rows.shape, dropout_p, 1 if shared_dropout else len(scalings))
    ys, kept_s = [], []
    for j, scaling in enumerate(scalings):
        if masks is not None and (j == 0 or not shared_dropout):
            kept = dropout.unpack_mask(masks[j], rows.shape[1], dtype)
            dropped = _as(rows * kept, low_dtype)
        s = scaled_mm(dropped, _as(lora_As[j], low_dtype), scaling * rescale, row_scalings[j], transposed=True)
        y = add_base(s, lora_Bs[j], rows, weights[j], biases[j])
        ys.append(unflatten(y, x))
        if save_s[j]:
            kept_s.append(s if high_precision or low_dtype == dtype else s.to(dtype))
    if kept_s:
        ys.append(kept_s[0] if len(kept_s) == 1 else torch.cat(kept_s, dim=1))
    if save_mask and masks is not None:
        ys.append(masks)
    return ys


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
    backend: str = "reference",
) -> list[torch.Tensor]:
    """The gradients that are needed, in the order of `needs`: of x, the weights, the biases, the As, the Bs.

    dH_j = scaling_j · dy_j·B_j, dx = Σ_j dy_j·W_j + D_j(dH_j·A_j), dA_j = dH_jᵀ·D_j(x), dB_j = dy_jᵀ·S_j.
    """
    rows = None if x is None else flatten(x)
    needs_x, (needs_weight, needs_bias, needs_A, needs_B) = needs[0], by_field(needs[1:], len(dys), 4)
    rescale = dropout.rescale(dropout_p)
    grad_x, column, kept = None, 0, None
    grads_weight, grads_bias, grads_A, grads_B = [], [], [], []
    for j, dy in enumerate(dys):
        dy = flatten(dy)
        low = _as(dy, _low_rank_dtype(dy, ranks[j], high_precision))
        if masks is not None and j < len(masks):  # else the mask of the projection before is for all
            kept = dropout.unpack_mask(masks[j], (lora_As[j] if needs_x else rows).shape[1], dy.dtype)
        if needs_x or needs_A[j]:
            dh = scaled_mm(low, _as(lora_Bs[j], low.dtype), scalings[j] * rescale, row_scalings[j])
        if needs_x:
            low_rank = dh.mm(_as(lora_As[j], low.dtype))
            low_rank = _as(low_rank if kept is None else low_rank.mul_(kept), dy.dtype)
            grad_x = (low_rank if grad_x is None else grad_x.add_(low_rank)).addmm_(dy, weights[j])
        if needs_weight[j]:
            grads_weight.append(dy.t().mm(rows))
        if needs_bias[j]:
            grads_bias.append(dy.sum(0))
        if needs_A[j]:
            dropped = _as(rows if kept is None else rows * kept, low.dtype)
            grads_A.append(_adapter_grad(dh, dropped, adapter_dtype))
        if needs_B[j]:
            kept_s = s if s.shape[1] == ranks[j] else s[:, column : column + ranks[j]]
            grads_B.append(_adapter_grad(low, _as(kept_s, low.dtype), adapter_dtype))
            column += ranks[j]
    grads = grads_weight + grads_bias + grads_A + grads_B
    return [unflatten(grad_x, dys[0]), *grads] if needs_x else grads


def add_base(
    s: torch.Tensor,
    lora_B: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """S·Bᵀ + bias + x·Wᵀ [M, N] in x's dtype. The product with W is added onto the low-rank one, which it reads in its
    epilogue. A float32 low-rank one is added to it instead: rounded first it would err by its own size, which may be
    the larger."""
    low_rank = linear(s, _as(lora_B, s.dtype), bias if bias is None else _as(bias, s.dtype))
    if s.dtype == x.dtype:
        return low_rank.addmm_(x, weight.t())
    return linear(x, weight).add_(low_rank)  # in float32, rounded once


def _low_rank_dtype(rows: torch.Tensor, rank: int, high_precision: bool) -> torch.dtype:
    """The dtype of low-rank products. At 16 bits oneDNN sets up a primitive at every call, 15 µs on a CPU: for
    a token or few, casts to float32 cost less."""
    dtype = rows.dtype
    if dtype == torch.float32 or high_precision:
        return torch.float32
    tiny = dtype != torch.float64 and rows.numel() * rank < _TINY_PRODUCT and rows.is_cpu
    return torch.float32 if tiny else dtype


def scaled_mm(
    left: torch.Tensor, right: torch.Tensor, scale: float, row_scaling: torch.Tensor | None, transposed: bool = False
) -> torch.Tensor:
    """scale · row_scaling · left·right, or left·rightᵀ; the scale is applied before a product is rounded to 16 bits."""
    if left.numel() == right.numel() and left.shape[0] == 1 == right.shape[0 if transposed else 1]:
        # A dot product: MKL errs twice as much with the longer one on the left.
        left, right = (right, left) if transposed else (right.t(), left.t())
    mm = linear if transposed else torch.mm
    if scale == 1.0:
        product = mm(left, right)
    elif left.dtype.itemsize > 2 or math.frexp(scale)[0] == 0.5:  # a power of two rounds nothing
        product = mm(left, right).mul_(constant(scale, left.dtype))
    else:  # dearer for the CPU: oneDNN sets up another primitive
        product = torch.addmm(left.new_empty(()), left, right.t() if transposed else right, beta=0, alpha=scale)
    if row_scaling is None:
        return product
    return product.mul_(row_scaling.reshape(-1, 1) if row_scaling.dim() else row_scaling)


def _adapter_grad(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """leftᵀ·right; on a GPU float32 sums of 16-bit operands leave in float32, unrounded."""
    if left.is_cuda and dtype == torch.float32:
        return matmul_float32(left.t(), right)
    return _as(mm_over_rows(left, right), dtype)


def _as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # the CPU overhead of `to` counts at small M
