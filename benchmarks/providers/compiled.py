"""The definition, compiled by torch; with autotuned GEMM templates too where Inductor has them."""

from __future__ import annotations

import torch

from peft_kernels.testing.lora_linear import LoRACase

from . import Provider, Ready, ready
from .eager import expression


def providers(device: str) -> list[Provider]:
    autotune = "max-autotune-no-cudagraphs"  # graphs are a mode of measuring here, the same for all
    why = None if device == "cuda" else "Inductor's GEMM templates for a CPU are for inference"
    return [
        Provider("torch.compile", lambda case: build(case, "default")),
        Provider("torch.compile, max-autotune", lambda case: build(case, autotune), why_not=why),
    ]


def build(case: LoRACase, mode: str) -> Ready:
    torch._dynamo.reset()

    def forward(x, weights, lora_As, lora_Bs, scalings, p):
        return expression(x, list(zip(weights, lora_As, lora_Bs, scalings, weights)), p)

    compiled = torch.compile(forward, dynamic=False, mode=mode)

    def call(x, projections, p):
        weights, lora_As, lora_Bs, scalings, _ = (list(column) for column in zip(*projections))
        return compiled(x, weights, lora_As, lora_Bs, scalings, p)

    return ready(case, call)
