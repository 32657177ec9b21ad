"""Masked linear as a composition of torch's own operations, which torch differentiates, batches and traces itself; and
the floating-point operations of the registered ops."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import linear

from ..core.transforms import straight_through


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    threshold: float | torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """y = x·(W ⊙ 1[S ≥ τ])ᵀ + bias, where 1[S ≥ τ] has the derivative 1 by S. Neither an infinite weight that is masked
    nor an infinite score becomes a NaN."""
    if not isinstance(threshold, torch.Tensor):  # no constant that is kept: a tracer would meet it again
        tau = torch.full((), threshold, dtype=scores.dtype, device=scores.device)
    else:
        tau = threshold.to(scores.dtype)
    indicator = straight_through(torch.zeros_like(scores), scores)  # 0, as what is masked below has its value
    slope = (weight * indicator).to(weight.dtype)
    return linear(x, straight_through(torch.where(scores >= tau, weight, 0), slope), bias)


def forward_flops(x, weight, *_, **__) -> int:
    return 2 * math.prod(x) * weight[0]


def backward_flops(grad_y, x, weight, scores, tau, threshold, needs, *_, **__) -> int:
    """Count dy·(W ⊙ 1[S ≥ τ]), and of G = dyᵀ·x once, whether weight, scores or both take it."""
    needs_x, needs_weight, needs_scores, _ = needs
    K = weight[1] if needs_x else 0 if x is None else x[-1]
    return 2 * math.prod(grad_y) * K * (needs_x + (needs_weight or needs_scores))
