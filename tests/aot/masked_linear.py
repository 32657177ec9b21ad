"""What the masked linear op launches: calls of it, as a user makes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

import peft_kernels as pk
from peft_kernels.ops.masked_linear import configs
from tests.aot.scenario import DTYPES, Scenario, backward

#: dtype of x and weight, dtype of the scores.
KINDS = [("bf16", "bf16"), ("fp16", "fp32"), ("fp32", "fp32")]
#: M, K and N: of multiples of 16, the last with a gradient that takes the smaller tile.
SHAPES = [(8192, 4096, 4096), (256, 4096, 4096), (64, 4096, 4096), (8192, 576, 576)]
#: Beside the tiles: still multiples of 16, then not of 16, then of nothing.
BESIDE = [(1000, 4112, 4144), (1000, 4104, 4104), (1000, 4095, 4097)]


class Call(NamedTuple):
    dtype: str
    scores: str
    shape: tuple[int, int, int]
    trains: str  # of x, W and S
    tensor: bool = False  # the threshold

    @property
    def name(self) -> str:
        words = ["masked", self.dtype, f"{self.scores}-scores", "x".join(map(str, self.shape))]
        return "-".join([*words, f"trains-{self.trains}"] + ["threshold-tensor"] * self.tensor)

    def run(self, device: torch.device) -> None:
        (M, K, N), dtype = self.shape, DTYPES[self.dtype]

        def empty(*shape: int, dtype: torch.dtype = dtype, trains: bool = False) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=device, requires_grad=trains)

        y = pk.masked_linear(
            empty(M, K, trains="x" in self.trains),
            empty(N, K, trains="W" in self.trains),
            empty(N, K, dtype=DTYPES[self.scores], trains="S" in self.trains),
            torch.zeros((), device=device) if self.tensor else 0.0,
            empty(N),
        )
        backward(y)


def calls() -> Iterator[Call]:
    for (dtype, scores), shape in itertools.product(KINDS, SHAPES):
        yield Call(dtype, scores, shape, "xWS", tensor=True)
        if shape in SHAPES[::3]:
            yield Call(dtype, scores, shape, "W")
            yield Call(dtype, scores, shape, "S")
    for shape in BESIDE:
        yield Call(*KINDS[0], shape, "xWS", tensor=True)


def scenarios() -> Iterator[Scenario]:
    for number, call in enumerate(calls()):
        regular = all(size % 16 == 0 for size in call.shape[1:])
        place = "sm_90" if number else "everywhere"
        yield Scenario(call.name, "triton", call.run, call.dtype, regular, place, configs)
