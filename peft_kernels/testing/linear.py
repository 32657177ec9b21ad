"""Tools that the cases of ops with one x and one y share: fresh leaves, seeded operands, one runner.

A new op joins with a file beside this one: a case, `make_case`, what it runs (`ours`, `eager_expression`), its
`float64_reference`, and how many terms its sums have; an entry in `tests/checks/contract.py` holds it to all that ops
of this kind are held to.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from .bounds import Sums


class LinearCase:
    """Inputs of one call. A dataclass that is one has a tensor, or None, for each of `NAMES`, grad_y [..., N], and
    `frozen`, the names of those that take no gradient."""

    NAMES: ClassVar[tuple[str, ...]]

    def operands(self) -> dict[str, torch.Tensor | None]:
        """The tensors that may train, by name."""
        return {name: getattr(self, name) for name in self.NAMES}

    def leaves(self) -> dict[str, torch.Tensor | None]:
        """Fresh copies of what may train, by name."""
        return {
            name: tensor if tensor is None else tensor.clone().requires_grad_(name not in self.frozen)
            for name, tensor in self.operands().items()
        }

    def in_float64(self) -> dict[str, torch.Tensor | None]:
        """All tensors in float64, for `dataclasses.replace`."""
        tensors = self.operands() | {"grad_y": self.grad_y}
        return {name: tensor if tensor is None else tensor.double() for name, tensor in tensors.items()}


Expression = Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]


def seeded(batch: tuple[int, ...], in_features: int, out_features: int, draw: int, device: str) -> Callable:
    """`normal(*shape, dtype, scale=1.0)`: the same numbers in every dtype, others for each `draw`."""
    generator = torch.Generator().manual_seed(in_features * 7919 + out_features * 31 + len(batch) + 104729 * draw)

    def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(device=device, dtype=dtype)

    return normal


def run(case: LinearCase, expression: Expression, autocast: torch.dtype | None = None) -> dict[str, torch.Tensor]:
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


def sums(case: LinearCase, backend: str, over_tokens: tuple[str, ...] = ()) -> dict[str, Sums]:
    """How many terms are summed up for an element of each float32 result, on a GPU.

    Args:
        over_tokens: operands whose gradients a kernel sums up element by element. Triton's interpreter adds these up
            one after the other, too; its products are numpy's.
    """
    if case.x.dtype != torch.float32 or not (case.x.is_cuda or backend == "triton"):
        return {}
    N, K = case.weight.shape
    M = case.grad_y.numel() // max(N, 1)
    terms = {f"grad of {name}": M for name in (case.NAMES if case.x.is_cuda else over_tokens)}
    if case.x.is_cuda:
        terms |= {"y": K, "grad of x": N}
    return {name: Sums(count) for name, count in terms.items()}
