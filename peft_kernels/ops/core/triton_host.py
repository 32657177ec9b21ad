"""How Triton multiplies, as launchers ask it to."""

from __future__ import annotations

import math

import torch
import triton


def dot_precision(dtype: torch.dtype) -> str:
    """How `tl.dot` multiplies: float32 as torch's own matmuls are set to (Triton would default to tf32)."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


def divisor(*sizes: int) -> int:
    """The largest power of two, up to 16, that divides all of these sizes and strides: what `device.divisible` takes as
    a constant. It follows from ranks and features, not from the number of tokens, so that no batch compiles anew."""
    return math.gcd(16, *sizes)


def high_precision(wanted: bool) -> str | None:
    """How `dot_high` multiplies, None where it is not wanted: float32 accuracy on the 16-bit tensor cores. Each
    operand is taken as the sum of three bfloat16 numbers, which hold all of its 24 bits, and the six products
    that reach 2⁻²⁴ are added. The interpreter knows no such thing and multiplies in float32."""
    if not wanted:
        return None
    return "ieee" if triton.knobs.runtime.interpret else "bf16x6"
