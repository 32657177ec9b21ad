"""The algorithm of LoRAFusion (Zhu et al., 2025), in plain PyTorch: S first, in whose pass dropout is drawn; then one
product that adds S·Bᵀ; backward by one pass over dy for dB and dS, and one product for dx that masks dS·A. It
saves D(x), its mask of a byte an element, and S."""

from __future__ import annotations

import torch

import peft_kernels as pk

from . import Provider, ready


def providers(device: str) -> list[Provider]:
    return [Provider("LoRAFusion-style", lambda case: ready(case, expression))]


def expression(x: torch.Tensor, projections: list[pk.Projection], p: float) -> tuple[torch.Tensor, ...]:
    return tuple(
        ShrinkThenFuse.apply(x, weight, lora_A, lora_B, scaling, p)
        for weight, lora_A, lora_B, scaling, _ in projections
    )


class ShrinkThenFuse(torch.autograd.Function):
    """y = x·Wᵀ + S·Bᵀ, S = scaling·D(x)·Aᵀ, of rows x [M, K]."""

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling, p):
        mask = None
        dropped = x
        if p:
            dropped, mask = torch.native_dropout(x, p, True)
        s = dropped.mm(lora_A.t()).mul_(scaling)
        ctx.save_for_backward(dropped, mask, s, weight, lora_A, lora_B)
        ctx.scaling, ctx.rescale = scaling, 1.0 / (1.0 - p)
        return x.mm(weight.t()).addmm_(s, lora_B.t())

    @staticmethod
    def backward(ctx, dy):
        dropped, mask, s, weight, lora_A, lora_B = ctx.saved_tensors
        ds = dy.mm(lora_B).mul_(ctx.scaling)
        grad_B = dy.t().mm(s)
        grad_A = ds.t().mm(dropped)
        if mask is None:
            dx = dy.mm(weight).addmm_(ds, lora_A)
        else:
            dx = ds.mm(lora_A).mul_(mask).mul_(ctx.rescale).addmm_(dy, weight)
        return dx, None, grad_A, grad_B, None, None
