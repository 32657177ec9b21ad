"""Cases of the scaled linear op: inputs, the float64 reference, the eager expression of Hugging Face PEFT, and one
runner that takes any of them through forward and backward."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..ops.scaled_linear import scaled_linear
from .bounds import Sums
from .linear import Expression, LinearCase, seeded
from .linear import run as run_case
from .linear import sums as sums_of_case

NAMES = ("x", "weight", "scale", "bias")


@dataclass
class ScaledCase(LinearCase):
    """Inputs of one call: x [..., K], weight [N, K], scale [N] or [K], bias [N], grad_y [..., N]."""

    NAMES = NAMES

    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    grad_y: torch.Tensor
    scale_input: bool
    frozen: tuple[str, ...] = ()  # of NAMES


def make_case(
    batch: tuple[int, ...] = (6,),
    in_features: int = 24,
    out_features: int = 16,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype | None = None,
    bias: bool = True,
    scale_input: bool = False,
    device: str = "cpu",
    draw: int = 0,
    **settings,
) -> ScaledCase:
    """A seeded case with operands of order one, another one for each `draw`; every fifth value of the scale is 0.
    `settings` are those of :class:`ScaledCase`."""
    normal = seeded(batch, in_features, out_features, draw, device)
    scale = normal(in_features if scale_input else out_features, dtype=scale_dtype or dtype)
    scale[::5] = 0.0
    return ScaledCase(
        x=normal(*batch, in_features, dtype=dtype),
        weight=normal(out_features, in_features, dtype=dtype, scale=max(in_features, 1) ** -0.5),
        scale=scale,
        bias=normal(out_features, dtype=dtype) if bias else None,
        grad_y=normal(*batch, out_features, dtype=dtype),
        scale_input=scale_input,
        **settings,
    )


def ours(case: ScaledCase, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    return scaled_linear(**leaves, scale_input=case.scale_input)


def eager_expression(case: ScaledCase, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    x, weight, scale, bias = leaves.values()
    if case.scale_input:
        return F.linear((x * scale).to(x.dtype), weight, bias)
    z = F.linear(x, weight, bias)
    return (z * scale).to(z.dtype)


def run(
    case: ScaledCase, expression: Expression = ours, autocast: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """y and every gradient of one expression by name."""
    return run_case(case, expression, autocast)


def eager(case: ScaledCase, autocast: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """PEFT's expression in the case's own dtypes."""
    return run(case, eager_expression, autocast)


def sums(case: ScaledCase, backend: str) -> dict[str, Sums]:
    """How many terms are summed up for an element of each float32 result."""
    return sums_of_case(case, backend, over_tokens=("scale", "bias"))


def float64_reference(case: ScaledCase) -> dict[str, torch.Tensor]:
    """The eager expression in float64 on the same inputs."""
    return run(replace(case, **case.in_float64()), eager_expression)
