"""Cases of the masked linear op: inputs, the float64 reference, the eager expression, and one runner that takes any of
them through forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..ops.masked_linear import masked_linear
from .bounds import Sums

NAMES = ("x", "weight", "scores", "bias")


@dataclass
class MaskedCase:
    """Inputs of one call: x [..., K], weight and scores [N, K], bias [N], grad_y [..., N]."""

    x: torch.Tensor
    weight: torch.Tensor
    scores: torch.Tensor
    bias: torch.Tensor | None
    grad_y: torch.Tensor
    threshold: float | torch.Tensor
    frozen: tuple[str, ...] = ()  # of NAMES

    def leaves(self) -> dict[str, torch.Tensor | None]:
        """Fresh copies of what may train, by name."""
        tensors = {name: getattr(self, name) for name in NAMES}
        return {
            name: tensor if tensor is None else tensor.clone().requires_grad_(name not in self.frozen)
            for name, tensor in tensors.items()
        }

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
    generator = torch.Generator().manual_seed(in_features * 7919 + out_features * 31 + len(batch) + 104729 * draw)

    def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(device=device, dtype=dtype)

    scores = random(out_features, in_features, dtype=scores_dtype or dtype)
    scores.view(-1)[::5] = threshold
    return MaskedCase(
        x=random(*batch, in_features),
        weight=random(out_features, in_features, scale=max(in_features, 1) ** -0.5),
        scores=scores,
        bias=random(out_features) if bias else None,
        grad_y=random(*batch, out_features),
        threshold=torch.tensor(threshold, device=device) if tensor_threshold else threshold,
        **settings,
    )


Expression = Callable[[MaskedCase, dict[str, torch.Tensor]], torch.Tensor]


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
    """Forward and backward of one expression on fresh leaves: y and every gradient by name."""
    leaves = case.leaves()
    with torch.autocast(case.x.device.type, dtype=autocast) if autocast else contextlib.nullcontext():
        y = expression(case, leaves)
    results = {"y": y.detach()}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    if wanted:
        grads = torch.autograd.grad(y, list(wanted.values()), case.grad_y.to(y.dtype))
        results |= {f"grad of {name}": grad for name, grad in zip(wanted, grads)}
    return results


def eager(case: MaskedCase, autocast: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The eager expression in the case's own dtypes."""
    return run(case, eager_expression, autocast)


def sums(case: MaskedCase) -> dict[str, Sums]:
    """What lies behind an element of each float32 result of a GPU's kernels."""
    if not case.x.is_cuda or case.x.dtype != torch.float32:
        return {}
    N, K = case.weight.shape
    M = case.grad_y.numel() // max(N, 1)
    terms = {"y": K, "grad of x": N, "grad of weight": M, "grad of scores": M, "grad of bias": M}
    return {name: Sums(count) for name, count in terms.items()}


def float64_reference(case: MaskedCase) -> dict[str, torch.Tensor]:
    """The definition in float64 by autograd alone, y = x·(W ⊙ m)ᵀ + bias with m = 1[S ≥ τ] − S.detach() + S, on the
    same inputs and the same mask."""
    mask = case.mask().double()
    wide = {name: None if getattr(case, name) is None else getattr(case, name).double() for name in NAMES}

    def expression(_: MaskedCase, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
        m = mask - leaves["scores"].detach() + leaves["scores"]
        y = leaves["x"] @ (leaves["weight"] * m).T
        return y if leaves["bias"] is None else y + leaves["bias"]

    return run(replace(case, **wide, grad_y=case.grad_y.double()), expression)
