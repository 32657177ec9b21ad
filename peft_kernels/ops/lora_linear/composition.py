"""LoRA linear as a composition of torch's own operations, which torch differentiates, batches and traces itself; and
the floating-point operations of the registered ops."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import linear

from ..core import dropout
from ..core.tensors import by_field


def forward(
    x: torch.Tensor, projections: tuple, dropout_p: float, adapter_precision: str, shared_dropout: bool = False
) -> tuple[torch.Tensor, ...]:
    """y_j = x·W_jᵀ + bias_j + scaling_j · (D_j(x)·A_jᵀ)·B_jᵀ, [..., N_j], for every projection j."""
    count, adapter_dtype = len(projections), projections[0][1].dtype
    low_dtype = adapter_dtype if adapter_precision == "high" else x.dtype  # as wide as x, or float32
    operands = [x]
    if dropout_p > 0.0:
        operands = dropout.dropped(x, dropout_p, 1 if shared_dropout else count)
    if len(operands) < count:
        operands *= count
    ys = []
    for dropped, (weight, lora_A, lora_B, scaling, bias) in zip(operands, projections):
        if isinstance(scaling, torch.Tensor):
            scaling = (scaling.unsqueeze(-1) if scaling.dim() else scaling).to(low_dtype)
        s = linear(dropped.to(low_dtype), lora_A.to(low_dtype)) * scaling
        y = linear(x, weight, bias) + linear(s, lora_B.to(low_dtype))
        ys.append(y.to(x.dtype))
    return tuple(ys)


def forward_flops(x, weights, biases, lora_As, *_, **__) -> int:
    """2·M·(K·N + K·R + R·N) a projection, as of `linear` and two products of the adapter."""
    M, K = math.prod(x[:-1]), x[-1]
    sizes = ((weight[0], lora_A[0]) for weight, lora_A in zip(weights, lora_As))
    return sum(2 * M * (K * N + K * R + R * N) for N, R in sizes)


def backward_flops(
    dys, x, s, masks, weights, lora_As, lora_Bs, row_scalings, scalings, ranks, dropout_p, needs, *_, **__
) -> int:
    """Count the products that needed gradients ask for: dy·W, dy·B, dH·A, dyᵀ·x, dHᵀ·D(x) and dyᵀ·S."""
    total, needs_x = 0, needs[0]
    for dy, weight, R, needs_weight, _, needs_A, needs_B in zip(dys, weights, ranks, *by_field(needs[1:], len(dys), 4)):
        M, N = math.prod(dy[:-1]), dy[-1]
        K = weight[1] if needs_x else 0 if x is None else x[-1]
        total += 2 * M * N * K * (needs_x + needs_weight)
        total += 2 * M * N * R * ((needs_x or needs_A) + needs_B)
        total += 2 * M * R * K * (needs_x + needs_A)
    return total
