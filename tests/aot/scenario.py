"""A call of the package whose launches are compiled."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Scenario(NamedTuple):
    """`run(device)` on a backend.

    Attributes:
        dtype: of x.
        regular: sizes are multiples of 16 (under a dropout mask of 128) and ranks of 8, as those of models are: no
            kernel may spill.
        compiled: in every run of the tests "everywhere" or for "sm_90", or only where "all" is.
        configs: of the op's package, which picks the tiles.
    """

    name: str
    backend: str
    run: Callable[[torch.device], None]
    dtype: str
    regular: bool
    compiled: str
    configs: ModuleType


def backward(*ys: torch.Tensor) -> None:
    """As `torch.autograd.backward` of any gradient. Torch calls that one with function modes off, and phantoms are made
    by one; hence what it calls in the end."""
    grads = tuple(torch.empty_like(y) for y in ys)
    torch.autograd.graph._engine_run_backward(ys, grads, False, False, (), allow_unreachable=True, accumulate_grad=True)
