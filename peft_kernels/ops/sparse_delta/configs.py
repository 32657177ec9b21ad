"""Which kernel, and which tile: pure functions of shapes, dtype and architecture.

What was measured on the GPU at hand (`tuned`) comes first; the rules below decide the rest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

from ..core import tuning
from ..core.tuning import FEATURES, Buckets, Crossover, largest_up_to

CHOICES = tuning.Choices("sparse_delta")
tuned = CHOICES.tuned

#: Up to this density each entry's gradient is sampled on its own; above, a dense tile of dW is computed and gathered
#: from. The rule is from the bytes of the two (README).
sampled_up_to = CHOICES.size(
    "sampled_up_to",
    Crossover(
        ("tiles", "sampled"), [(density,) for density in (0.02, 0.01, 0.005, 0.002, 0.001, 0.0005)], largest_up_to
    ),
    rule={2: 0.002, 4: 0.002},
)
#: Bytes of the part of W that is copied and patched at a time: it stays in the L2 cache of a data-centre GPU.
BAND_BYTES = 16 << 20
#: Entries that a program writes, or steps.
WRITTEN = 512
#: Of keys: entries in 64 neighbours of a row; rows and columns of a thin product, the largest for anything wide.
PER_64 = Buckets(1, 8)
THIN = Buckets(16, 256)


class GradTile(NamedTuple):
    """A tile of dW [block_n, block_k] summed over block_m tokens at a time; `gathered` entries of a row leave it at
    once."""

    block_n: int
    block_k: int
    block_m: int
    gathered: int
    num_warps: int
    num_stages: int
    group_n: int = 8


class ThinTile(NamedTuple):
    """A tile of the gradient of rows, columns or blocks, summed over block_m tokens at a time."""

    block_n: int
    block_k: int
    block_m: int
    num_warps: int
    num_stages: int


class SampledTile(NamedTuple):
    """Entries of a program, and tokens at a time."""

    entries: int
    block_m: int
    num_warps: int


def _per_64(density: float) -> int:
    return PER_64.of(math.ceil(64 * density))


@CHOICES.tile(N=FEATURES, K=FEATURES, density=("per_64", _per_64))
def grad_tile(N: int, K: int, density: float, element_size: int, arch: int) -> GradTile:
    """Tile of the dense product whose entries are gathered in the epilogue.

    Args:
        arch: 0 stands for anything that is no NVIDIA GPU (64 KiB of shared memory are assumed).
    """
    if element_size == 4:  # multiplied without tensor cores: operands fill the registers
        return GradTile(32, 32, 16, 8, 4, 2)
    block_n, block_k = 64 if N <= 64 else 128, 64  # a square of 128 would spill when it is gathered from
    gathered = 4 if density * block_k <= 3 else 8
    return GradTile(block_n, block_k, 32 if arch == 0 else 64, gathered, 8, 2 if arch == 0 else 3)


@grad_tile.candidates
def grad_candidates(N: int, K: int, per_64: int, element_size: int, arch: int) -> list[GradTile]:
    rule = grad_tile(N, K, per_64 / 64, element_size, arch)
    if element_size == 4:
        return [rule]
    tiles = [rule._replace(block_n=block_n, gathered=gathered) for block_n in (64, 128) for gathered in (4, 8)]
    return tuning.with_rule_first(rule, tiles)


@CHOICES.tile(N=THIN, K=THIN)
def thin_tile(N: int, K: int, element_size: int) -> ThinTile:
    """Tile of products [N, K]: of rows (a wide K), of columns (a wide N), of blocks."""
    widest = 32 if element_size == 4 else 128

    def block(size: int) -> int:
        return min(max(1 << max(0, size - 1).bit_length(), 16), widest)

    block_n, block_k, block_m = block(N), block(K), 16 if element_size == 4 else 64
    # With four warps a tile of 64 × 128 spills kilobytes on sm_80 where rows start anywhere (Triton 3.9).
    num_warps, num_stages = 8 if block_n * block_k >= 8192 else 4, 3 if element_size == 2 else 2
    return ThinTile(block_n, block_k, block_m, num_warps, num_stages)


@thin_tile.candidates
def thin_candidates(N: int, K: int, element_size: int, arch: int) -> list[ThinTile]:
    rule = thin_tile(N, K, element_size)
    if element_size == 4:
        return [rule]
    small = ThinTile(min(rule.block_n, 64), min(rule.block_k, 64), 64, 4, rule.num_stages)
    return tuning.with_rule_first(rule, [rule._replace(block_m=32), small, small._replace(block_m=32)])


def token_splits(tile: ThinTile, N: int, K: int, M: int, batch: int, programs: int) -> int:
    """In how many parts the tokens of each of `batch` products [N, K] are summed, so that `programs` fill the GPU."""
    tiles = batch * -(-N // tile.block_n) * -(-K // tile.block_k)
    return max(1, min(32, programs // max(1, tiles), -(-M // (4 * tile.block_m))))


@CHOICES.tile()
def sampled_tile(element_size: int) -> SampledTile:
    return SampledTile(16, 128 if element_size == 2 else 64, 4)


@sampled_tile.candidates
def sampled_candidates(element_size: int, arch: int) -> list[SampledTile]:
    rule = sampled_tile(element_size)
    sizes = [(8, 64), (8, 128), (16, 64), (16, 128), (32, 64)]
    return tuning.with_rule_first(rule, [SampledTile(entries, block_m, num_warps=4) for entries, block_m in sizes])


def keys(architecture: int) -> Iterator[tuple[str, tuple]]:
    """Yield what is measured: a choice and a key, at the upper ends of all buckets, large shapes first."""
    for element_size in (2, 4):
        yield "sampled_tile", (element_size,)
    for N, K in itertools.product(THIN.all(), repeat=2):
        yield "thin_tile", (N, K, 2)
    for N, K, per_64 in itertools.product(FEATURES.all(), FEATURES.all(), PER_64.all()):
        yield "grad_tile", (N, K, per_64, 2)
