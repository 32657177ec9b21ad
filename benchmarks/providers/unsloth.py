"""Unsloth's own LoRA function for one projection. It has no dropout and needs a GPU."""

from __future__ import annotations

import torch

import peft_kernels as pk

from . import Provider, ready, why_not_installed

NAME = "Unsloth"


def providers(device: str) -> list[Provider]:
    why = why_not_installed("unsloth") or (None if device == "cuda" else "unsloth needs a GPU")
    return [Provider(NAME, lambda case: ready(case, expression), why_not=why, dropout=False)]


def expression(x: torch.Tensor, projections: list[pk.Projection], p: float) -> tuple[torch.Tensor, ...]:
    from unsloth.kernels.fast_lora import LoRA_W

    ys = []
    for weight, lora_A, lora_B, scaling, _ in projections:
        # Its function takes [batch, tokens, K], and a quantisation state that a plain weight has not.
        ys.append(LoRA_W.apply(x.unsqueeze(0), weight, None, lora_A, lora_B, scaling).squeeze(0))
    return tuple(ys)
