"""The algorithm of Unsloth's and Axolotl's LoRA functions, in plain PyTorch: the low-rank product is added onto the
base's by `addmm_`, only x is saved, and S = x·Aᵀ is computed again in backward. Dropout stands outside, so that its
output is saved as well."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import peft_kernels as pk

from . import Provider, ready


def providers(device: str) -> list[Provider]:
    return [Provider("Axolotl-style", lambda case: ready(case, expression))]


def expression(x: torch.Tensor, projections: list[pk.Projection], p: float) -> tuple[torch.Tensor, ...]:
    return tuple(
        AddmmChain.apply(x, F.dropout(x, p) if p else x, weight, lora_A, lora_B, scaling)
        for weight, lora_A, lora_B, scaling, _ in projections
    )


class AddmmChain(torch.autograd.Function):
    """y = x·Wᵀ + scaling·(D(x)·Aᵀ)·Bᵀ of rows x [M, K]; without dropout D(x) is x itself, whose gradient is one."""

    @staticmethod
    def forward(ctx, x, dropped, weight, lora_A, lora_B, scaling):
        ctx.save_for_backward(dropped, weight, lora_A, lora_B)
        ctx.scaling, ctx.same = scaling, dropped is x
        return x.mm(weight.t()).addmm_(dropped.mm(lora_A.t()), lora_B.t(), alpha=scaling)

    @staticmethod
    def backward(ctx, dy):
        dropped, weight, lora_A, lora_B = ctx.saved_tensors
        dy_B = dy.mm(lora_B)
        grad_A = dy_B.t().mm(dropped).mul_(ctx.scaling)
        grad_B = dy.t().mm(dropped.mm(lora_A.t())).mul_(ctx.scaling)
        dx = dy.mm(weight)
        if ctx.same:
            return dx.addmm_(dy_B, lora_A, alpha=ctx.scaling), None, None, grad_A, grad_B, None
        return dx, dy_B.mm(lora_A).mul_(ctx.scaling), None, grad_A, grad_B, None
