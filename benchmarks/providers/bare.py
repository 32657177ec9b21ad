"""The frozen linear alone: forward and dx. No LoRA layer can undercut it."""

from __future__ import annotations

import torch.nn.functional as F

from peft_kernels.testing.lora_linear import LoRACase

from . import BARE, Provider, Ready


def providers(device: str) -> list[Provider]:
    return [Provider(BARE, build, adapters=False)]


def build(case: LoRACase) -> Ready:
    x = case.x.clone().requires_grad_()
    weights = [p.weight for p in case.projections]
    return Ready(lambda: tuple(F.linear(x, weight) for weight in weights), [x], case.grad_ys, weights)
