"""Cases of the masked linear op: inputs, the float64 reference, the eager expression, and one runner that takes any of
them through forward and backward."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..ops.masked_linear import masked_linear
from .bounds import Sums
from .linear import Expression, LinearCase, seeded
from .linear import run as run_case
from .linear import sums as sums_of_case

NAMES = ("x", "weight", "scores", "bias")


@dataclass
class MaskedCase(LinearCase):
    """Inputs of one call: x [..., K], weight and scores [N, K], bias [N], grad_y [..., N]."""

    NAMES = NAMES

    x: torch.Tensor
    weight: torch.Tensor
    scores: torch.Tensor
    bias: torch.Tensor | None
    grad_y: torch.Tensor
    threshold: float | torch.Tensor
    frozen: tuple[str, ...] = ()  # of NAMES

    def mask(self) -> torch.Tensor:
        """1[S ≥ τ] in bool, with τ rounded to the scores' dtype."""
        threshold = self.threshold
        if not isinstance(threshold, torch.Tensor):
            threshold = torch.tensor(threshold, dtype=torch.float64)
        return self.scores >= threshold.to(self.scores)


def make_case(
    batch: tuple[int, ...] = (6,),
    in_features: int = 24,
    out_features: int = 16,
    dtype: torch.dtype = torch.float32,
    scores_dtype: torch.dtype | None = None,
    bias: bool = True,
    threshold: float = 0.1,
    tensor_threshold: bool = False,
    device: str = "cpu",
    draw: int = 0,
    **settings,
) -> MaskedCase:
    """A seeded case with operands of order one, another one for each `draw`. Every fifth score lies on the threshold;
    of the others about half reach it. `settings` are those of :class:`MaskedCase`."""
    normal = seeded(batch, in_features, out_features, draw, device)
    scores = normal(out_features, in_features, dtype=scores_dtype or dtype)
    scores.view(-1)[::5] = threshold
    return MaskedCase(
        x=normal(*batch, in_features, dtype=dtype),
        weight=normal(out_features, in_features, dtype=dtype, scale=max(in_features, 1) ** -0.5),
        scores=scores,
        bias=normal(out_features, dtype=dtype) if bias else None,
        grad_y=normal(*batch, out_features, dtype=dtype),
        threshold=torch.tensor(threshold, device=device) if tensor_threshold else threshold,
        **settings,
    )


def ours(case: MaskedCase, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    return masked_linear(leaves["x"], leaves["weight"], leaves["scores"], case.threshold, leaves["bias"])


class Binarizer(torch.autograd.Function):
    """1[S ≥ τ] whose gradient goes straight through: what implementations of Threshold-Mask put before `F.linear`."""

    @staticmethod
    def forward(ctx, scores, mask):
        return mask.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def eager_expression(case: MaskedCase, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    mask = Binarizer.apply(leaves["scores"], case.mask().to(leaves["weight"].dtype))
    return F.linear(leaves["x"], leaves["weight"] * mask, leaves["bias"])


def run(
    case: MaskedCase, expression: Expression = ours, autocast: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """y and every gradient of one expression by name."""
    return run_case(case, expression, autocast)


def eager(case: MaskedCase, autocast: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The eager expression in the case's own dtypes."""
    return run(case, eager_expression, autocast)


def sums(case: MaskedCase, backend: str) -> dict[str, Sums]:
    """How many terms are summed up for an element of each float32 result."""
    return sums_of_case(case, backend)


def float64_reference(case: MaskedCase) -> dict[str, torch.Tensor]:
    """The definition in float64 by autograd alone, y = x·(W ⊙ m)ᵀ + bias with m = 1[S ≥ τ] − S.detach() + S, on the
    same inputs and the same mask."""
    mask = case.mask().double()

    def expression(_: MaskedCase, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        m = mask - leaves["scores"].detach() + leaves["scores"]
        y = leaves["x"] @ (leaves["weight"] * m).T
        return y if leaves["bias"] is None else y + leaves["bias"]

    return run(replace(case, **case.in_float64()), expression)
