"""The problems that `python -m peft_kernels tune` runs for each choice in `configs.py`."""

from __future__ import annotations

import torch

from ..core.problem import Inputs, Problem
from .triton_backward import masked_grad
from .triton_forward import masked_gemm


def _gemm(inputs: Inputs, M, N, **_) -> Problem:
    """Forward and dx with the same output [M, N]."""
    K = inputs.K
    p, q, scores = inputs.normal(M, K), inputs.normal(K, N, scale=K**-0.5), inputs.normal(K, N)
    weight, its_scores = q.t().contiguous(), scores.t().contiguous()

    def launch(tile):
        y = masked_gemm(p, weight.t(), its_scores.t(), None, 0.0, None, tile)
        return y, masked_gemm(p, q, scores, None, 0.0, None, tile)

    return Problem(launch, lambda p, q, scores: (p @ (q * (scores >= 0)),) * 2, (p, q, scores))


def _grad(inputs: Inputs, N, K, **_) -> Problem:
    dy, x = inputs.normal(inputs.K, N), inputs.normal(inputs.K, K)
    weight, scores = inputs.normal(N, K), inputs.normal(N, K)

    def launch(tile):
        grads = torch.empty_like(weight), torch.empty_like(scores)
        masked_grad(dy, x, weight, scores, *grads, 0.0, None, tile)
        return grads

    def expression(dy, x, weight, scores):
        product = dy.t() @ x
        return product * (scores >= 0), product * weight

    return Problem(launch, expression, (dy, x, weight, scores))


PROBLEMS = {"gemm_tile": _gemm, "grad_tile": _grad}
