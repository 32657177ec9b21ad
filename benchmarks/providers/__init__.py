"""Providers of a LoRA layer: ours, eager PyTorch, and the peers. A file a provider; a peer that is not installed, or
that cannot run on the device, is listed with the reason.

Those named "…-style" are our own plain statements of a published algorithm, by its products and by what it saves; they
are not the peer's code, and what its kernels gain over torch's is not in them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch

import peft_kernels as pk
from peft_kernels.testing.lora_linear import LoRACase

BARE, EAGER, PEFT = "bare linear", "eager", "PEFT"


@dataclass
class Ready:
    """A provider on one case: `forward()` gives the ys; `leaves` take gradients, in the order x, then A, B each.

    Attributes:
        kept: what a model holds anyway (weights, adapters); saving it for backward costs nothing.
    """

    forward: Callable[[], tuple[torch.Tensor, ...]]
    leaves: list[torch.Tensor]
    grad_ys: list[torch.Tensor]
    kept: list[torch.Tensor] = field(default_factory=list)

    def backward(self, ys: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(ys, self.leaves, self.grad_ys)

    def both(self) -> tuple[torch.Tensor, ...]:
        return self.backward(self.forward())


@dataclass(frozen=True)
class Provider:
    """An implementation that `build(case)` makes ready to run.

    Attributes:
        adapters: whether it computes the low-rank part at all.
        our_masks: whether its dropout draws the masks that ours draws, so that it can be checked with dropout.
        base: what its base weight [N, K] holds in the end, if it is quantised.
        sixteen_bits: whether it is for 16-bit bases only.
        dropout: whether it has any.
        why_not: why it cannot run here, or None.
    """

    name: str
    build: Callable[[LoRACase], Ready]
    adapters: bool = True
    our_masks: bool = False
    base: Callable[[torch.Tensor], torch.Tensor] | None = None
    sixteen_bits: bool = False
    dropout: bool = True
    why_not: str | None = None


def why_not_installed(package: str) -> str | None:
    try:
        version(package)
    except PackageNotFoundError:
        return f"{package} is not installed"
    return None


def leaves_of(
    case: LoRACase, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, list[pk.Projection], list[torch.Tensor]]:
    """Return x and adapters of a case as leaves: x, the projections with them, and all of them flat."""
    x = case.x.clone().requires_grad_()
    projections = [
        p._replace(
            lora_A=p.lora_A.to(dtype or p.lora_A.dtype, copy=True).requires_grad_(),
            lora_B=p.lora_B.to(dtype or p.lora_B.dtype, copy=True).requires_grad_(),
        )
        for p in case.projections
    ]
    return x, projections, [x] + [leaf for p in projections for leaf in (p.lora_A, p.lora_B)]


def ready(
    case: LoRACase,
    expression: Callable[[torch.Tensor, list[pk.Projection], float], tuple[torch.Tensor, ...]],
    dtype: torch.dtype | None = None,
) -> Ready:
    """Make a provider of an expression of x, the projections and the probability of dropout."""
    x, projections, leaves = leaves_of(case, dtype)
    kept = [p.weight for p in projections] + leaves[1:]
    return Ready(lambda: expression(x, projections, case.dropout_p), leaves, case.grad_ys, kept)


@functools.cache
def all_providers(device: str) -> tuple[Provider, ...]:
    """Return all providers, the bare linear first, ours last."""
    from . import axolotl_style, bare, bitsandbytes, compiled, eager, lorafusion_style, ours, peft, unsloth

    modules = (bare, eager, compiled, peft, unsloth, axolotl_style, lorafusion_style, bitsandbytes, ours)
    return tuple(provider for module in modules for provider in module.providers(device))
