"""A choice of an op package as something to run: a launcher that takes a candidate, and the same in plain torch.

An op package's `tune.py` has one for each of its choices (`CHOICES` in its `configs.py`). Where a kernel serves both
directions, both are launched (y = x·Wᵀ reads W along its rows, dx = dy·W across them), so that the tile that is kept is
good for a training step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Problem(NamedTuple):
    """`launch(candidate)` and `expression(*inputs)` give the same tensors."""

    launch: Callable[[Any], tuple[torch.Tensor, ...]]
    expression: Callable[..., tuple[torch.Tensor, ...]]
    inputs: tuple[torch.Tensor, ...]


class Inputs:
    """Seeded operands on one device, of one dtype. `K` stands for every size that a key leaves open: the length of a
    GEMM's sum, the tokens of a weight's gradient, a weight's sides where its rows or blocks are the key."""

    def __init__(self, device: str, dtype: torch.dtype, K: int) -> None:
        self.device, self.dtype, self.K = torch.device(device), dtype, K
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=self.generator, device=self.device) * scale).to(self.dtype)

    def below(self, end: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(end, shape, generator=self.generator, device=self.device, dtype=dtype)

    def some(self, count: int, end: int) -> torch.Tensor:
        """`count` different numbers below `end`."""
        return torch.randperm(end, generator=self.generator, device=self.device)[:count]
