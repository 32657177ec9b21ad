"""What the LoRA linear ops launch: calls of them, as a user makes them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

import peft_kernels as pk
from peft_kernels.ops.lora_linear import configs
from tests.aot.scenario import DTYPES, Scenario, backward

#: M, K and N, multiples of 16; the first is the one at which speed is planned.
SHAPES = [(8192, 4096, 4096), (1, 4096, 4096), (64, 4096, 4096), (256, 4096, 4096), (2048, 256, 256)]
#: The same beside the tiles: still multiples of 16, then neither of 16 nor of 2.
BESIDE_TILES, ODD = (1000, 4112, 4144), (1000, 4095, 4097)
#: PEFT's default first.
RANKS = [8, 16, 32, 64, 3]


class Layer(NamedTuple):
    """One call with its backward. `n` layers share x; masks: of dropout, "own" to each of them or "shared"; rows: a
    scaling for every row; trains: which of x, A and B take a gradient."""

    rank: int = 8
    shape: tuple[int, int, int] = SHAPES[0]
    dtype: str = "bf16"
    adapter: str = ""
    high: bool = False
    n: int = 1
    masks: str = ""
    rows: bool = False
    trains: str = "xAB"

    @property
    def name(self) -> str:
        words = ["lora", self.dtype, f"r{self.rank}", "x".join(map(str, self.shape))]
        words += (
            [f"{self.adapter}-adapters"] * bool(self.adapter) + ["high"] * self.high + [f"n{self.n}"] * (self.n > 1)
        )
        words += [f"{self.masks}-masks"] * bool(self.masks) + ["rows"] * self.rows
        trains = f"trains-{self.trains}" if self.trains else "frozen"
        return "-".join(words + [trains] * (self.trains != "xAB"))

    @property
    def regular(self) -> bool:
        """A row of a dropout mask has K / 8 bytes, and is to begin on 16 as well."""
        _, K, N = self.shape
        return self.rank % 8 == 0 and K % (128 if self.masks else 16) == 0 and N % 16 == 0

    def run(self, device: torch.device) -> None:
        (M, K, N), dtype, adapter = self.shape, DTYPES[self.dtype], DTYPES[self.adapter or self.dtype]

        def empty(*shape: int, dtype: torch.dtype = dtype, trains: bool = False) -> torch.Tensor:
            return torch.empty(*shape, dtype=dtype, device=device, requires_grad=trains)

        x = empty(M, K, trains="x" in self.trains)
        projections = [
            pk.Projection(
                empty(N, K),
                empty(self.rank, K, dtype=adapter, trains="A" in self.trains),
                empty(N, self.rank, dtype=adapter, trains="B" in self.trains),
                empty(M, dtype=torch.float32) if self.rows else 2.0,
                empty(N) if self.n == 1 else None,
            )
            for _ in range(self.n)
        ]
        ys = pk.lora_linear_shared_input(
            x, projections, dropout_p=0.1 if self.masks else 0.0, training=True, shared_dropout=self.masks == "shared",
            adapter_precision="high" if self.high else "default",
        )  # fmt: skip
        if self.trains:
            backward(*ys)


VARIANTS = [
    Layer(),
    Layer(masks="own"),
    Layer(n=3),
    Layer(n=3, masks="own"),
    Layer(adapter="fp32"),
    Layer(adapter="fp32", high=True),
    Layer(adapter="fp32", high=True, n=3, masks="own"),
    Layer(dtype="fp16", masks="own"),
    Layer(dtype="fp32"),
    Layer(dtype="fp32", n=3, masks="own"),
]
#: With these nothing changes but a few arguments: at one rank.
FEW = [
    Layer(n=2),
    Layer(n=2, masks="own"),
    Layer(n=3, masks="shared"),
    Layer(rows=True),
    Layer(rows=True, n=3, masks="own"),
    Layer(trains="x"),
    Layer(trains="B"),
    Layer(trains="", masks="own"),
]


#: What every other rank is tried with in every run.
OFTEN = VARIANTS[:5]


def layers() -> Iterator[tuple[str, Layer]]:
    """Each with where it is compiled."""
    for layer in (VARIANTS[0], VARIANTS[3]):
        yield "everywhere", layer
    for rank, layer in itertools.product(RANKS, VARIANTS):
        yield "sm_90" if rank == RANKS[0] or layer in OFTEN else "all", layer._replace(rank=rank)
    for layer in FEW:
        yield "sm_90", layer
    for shape, rank, layer in itertools.product(SHAPES[1:], (8, 16), (VARIANTS[0], VARIANTS[3])):
        yield "sm_90" if rank == 8 else "all", layer._replace(shape=shape, rank=rank)
    for masks in ("", "own"):
        yield "all", Layer(n=4, masks=masks)  # more than descriptors are for
    for rank in (32, 512):
        yield "all", Layer(rank=rank, shape=SHAPES[1])
        yield "sm_90" if rank == 512 else "all", Layer(rank=rank, n=3, masks="own")
    for shape, rank in ((BESIDE_TILES, 8), (ODD, 8), (ODD, 3), (ODD, 32)):
        for layer in (VARIANTS[0], VARIANTS[1], VARIANTS[3], VARIANTS[5]):
            yield "sm_90" if rank == 8 else "all", layer._replace(shape=shape, rank=rank)


def scenarios() -> Iterator[Scenario]:
    places: dict[Layer, str] = {}
    for place, layer in layers():
        places.setdefault(layer, place)
    for (layer, place), way in itertools.product(places.items(), ("fused", "blas")):
        name = f"{layer.name}-{way}"
        yield Scenario(name, f"triton:{way}", layer.run, layer.dtype, layer.regular, place, configs)
