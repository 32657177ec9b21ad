"""PEFT on a base in bitsandbytes' NF4: less memory for the base, and a dequantisation in every product."""

from __future__ import annotations

import torch

from peft_kernels.testing.lora_linear import LoRACase

from . import Provider, Ready, why_not_installed
from .peft import layers_of, ready_of


def providers(device: str) -> list[Provider]:
    missing = why_not_installed("bitsandbytes") or why_not_installed("peft")
    return [Provider("PEFT, NF4 base", build, base=dequantised, why_not=missing)]


def build(case: LoRACase) -> Ready:
    return ready_of(case, layers_of(case, case.x.dtype, quantised))


def quantised(weight: torch.Tensor) -> torch.nn.Module:
    """Make the linear layer of a weight [N, K], with the weight in NF4."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    N, K = weight.shape
    layer = Linear4bit(K, N, bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta")
    layer.weight = Params4bit(weight.detach().clone(), requires_grad=False, quant_type="nf4").to(weight.device)
    return layer


def dequantised(weight: torch.Tensor) -> torch.Tensor:
    """Return what NF4 preserves of a weight [N, K], in the weight's dtype."""
    from bitsandbytes.functional import dequantize_4bit

    packed = quantised(weight).weight
    return dequantize_4bit(packed.data, packed.quant_state)
