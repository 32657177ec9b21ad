"""What the scaled linear op launches: calls of it, as a user makes them."""

from __future__ import annotations

import itertools
import types
from collections.abc import Iterator
from typing import NamedTuple

import torch

import peft_kernels as pk
from tests.aot.scenario import DTYPES, Scenario, backward

#: dtype of x and weight, dtype of the scale.
KINDS = [("bf16", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "fp32")]
#: M, K and N: of multiples of 16, then of nothing.
SHAPES = [(8192, 4096, 4096), (1000, 4095, 4097)]
#: It picks no tile by what was measured.
UNTUNED = types.SimpleNamespace(CHOICES={}, tuned=lambda device: {})


class Call(NamedTuple):
    dtype: str
    scale: str
    shape: tuple[int, int, int]
    scale_input: bool
    trains: str  # of x and L, the scale

    @property
    def name(self) -> str:
        words = ["scaled", self.dtype, f"{self.scale}-scale", "x".join(map(str, self.shape))]
        return "-".join([*words, "input" if self.scale_input else "output", f"trains-{self.trains}"])

    def run(self, device: torch.device) -> None:
        (M, K, N), dtype = self.shape, DTYPES[self.dtype]

        def empty(*shape: int, dtype: torch.dtype = dtype, trains: bool = False) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=device, requires_grad=trains)

        scale = empty(K if self.scale_input else N, dtype=DTYPES[self.scale], trains="L" in self.trains)
        y = pk.scaled_linear(
            empty(M, K, trains="x" in self.trains),
            empty(N, K),
            scale,
            empty(N, trains=not self.scale_input),
            scale_input=self.scale_input,
        )
        backward(y)


def scenarios() -> Iterator[Scenario]:
    for number, ((dtype, scale), shape, scale_input) in enumerate(itertools.product(KINDS, SHAPES, (False, True))):
        for trains in ("xL", "L") if scale_input else ("xL",):
            call = Call(dtype, scale, shape, scale_input, trains)
            regular = all(size % 16 == 0 for size in shape)
            place = "sm_90" if number else "everywhere"
            yield Scenario(call.name, "triton", call.run, dtype, regular, place, UNTUNED)
