"""Masked linear in plain PyTorch: any dtype, any device, forward and explicit backward.

This is the definition that the kernels are tested against, and the path of the CPU. The weight is masked band by band,
so that no masked copy of all of it is made. A band is taken out of what a product does not sum over (rows of W in
forward, its columns for dx), so that every element is one sum, rounded once. The arguments of both functions are those
of the registered ops (`op.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..core.tensors import constant, flatten, slices, unflatten

_BAND_BYTES = 4 << 20


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    bias: torch.Tensor | None,
    tau: torch.Tensor | None,
    threshold: float,
    backend: str = "reference",
) -> torch.Tensor:
    """y = x·(W ⊙ 1[S ≥ τ])ᵀ + bias [..., N], with τ the tensor if one is given, else the float."""
    rows = flatten(x)
    y = rows.new_empty(rows.shape[0], weight.shape[0])
    tau = rounded(threshold, tau, scores.dtype)
    for band in bands(weight.shape[0], weight.shape[1], weight.element_size()):
        masked = mask(weight[band], scores[band], tau).t()
        if bias is None:
            torch.mm(rows, masked, out=y[:, band])
        else:
            torch.addmm(bias[band], rows, masked, out=y[:, band])
    return unflatten(y, x)


def backward(
    grad_y: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    scores: torch.Tensor | None,
    tau: torch.Tensor | None,
    threshold: float,
    needs: list[bool],
    scores_dtype: torch.dtype,
    backend: str = "reference",
) -> list[torch.Tensor]:
    """The gradients that are needed, in this order: x, weight, scores, bias.

    dx = dy·(W ⊙ 1[S ≥ τ]), and with G = dyᵀ·x: dweight = G ⊙ 1[S ≥ τ], dscores = G ⊙ W.
    """
    needs_x, needs_weight, needs_scores, needs_bias = needs
    dy, grads = flatten(grad_y), []
    tau = rounded(threshold, tau, scores_dtype)
    if needs_x:
        N, K = weight.shape
        grad_x = dy.new_empty(dy.shape[0], K)
        for band in bands(K, N, dy.element_size()):
            torch.mm(dy, mask(weight[:, band], scores[:, band], tau), out=grad_x[:, band])
        grads.append(grad_x.view(*grad_y.shape[:-1], K))
    if needs_weight or needs_scores:
        rows, N = flatten(x), dy.shape[1]
        grad_weight = dy.new_empty(N, rows.shape[1]) if needs_weight else None
        grad_scores = dy.new_empty(N, rows.shape[1], dtype=scores_dtype) if needs_scores else None
        in_place = needs_scores and scores_dtype == dy.dtype  # no other memory for the product
        for band in bands(N, rows.shape[1], dy.element_size()):
            left = dy[:, band].t()
            product = torch.mm(left, rows, out=grad_scores[band]) if in_place else left.mm(rows)
            if needs_weight:
                grad_weight[band] = mask(product, scores[band], tau)
            if in_place:
                product.mul_(weight[band])
            elif needs_scores:  # in float32 where the scores are: one rounding to 16 bits less
                torch.mul(product.to(scores_dtype), weight[band], out=grad_scores[band])
        grads += [grad for grad in (grad_weight, grad_scores) if grad is not None]
    if needs_bias:
        grads.append(dy.sum(0))
    return grads


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def mask(values: torch.Tensor, scores: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
    """The values where their scores reach τ, 0 elsewhere, whatever stands there.

    On a CPU `torch.where` branches at every element, and guesses wrong at every other one of trained scores: 5 to 15
    times as long as to compare into numbers and multiply. As integers, since 0·∞ is no 0.
    """
    if not values.is_cpu:
        return torch.where(scores >= tau, values, 0)
    bits = _BITS[values.dtype.itemsize]
    kept = torch.ge(scores, tau, out=torch.empty_like(scores)).to(bits)
    return kept.mul_(values.view(bits)).view(values.dtype)


def rounded(threshold: float, tau: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """τ in the scores' dtype: the tensor if one is given, else the float."""
    return constant(threshold, dtype) if tau is None else tau.to(dtype)


def bands(length: int, other: int, element_size: int) -> Iterator[slice]:
    """Slices of `length` such that a band of [length, other] takes a few megabytes."""
    step = max(1, _BAND_BYTES // max(other * element_size, 1))
    return slices(length, step)
