"""The definition, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import peft_kernels as pk

from . import EAGER, Provider, ready


def providers(device: str) -> list[Provider]:
    return [Provider(EAGER, lambda case: ready(case, expression))]


def expression(x: torch.Tensor, projections: list[pk.Projection], p: float) -> tuple[torch.Tensor, ...]:
    return tuple(
        F.linear(x, weight) + F.linear(F.linear(F.dropout(x, p), lora_A), lora_B) * scaling
        for weight, lora_A, lora_B, scaling, _ in projections
    )
