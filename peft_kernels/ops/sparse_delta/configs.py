"""Which kernel, and which tile: pure functions of shapes, dtype and architecture."""

from __future__ import annotations

from typing import NamedTuple

#: Up to this density each entry's gradient is sampled on its own; above, a dense tile of dW is computed and gathered
#: from. From the bytes of the two (README); not measured on a GPU yet.
SAMPLED_UP_TO = 0.002
#: Bytes of the part of W that is copied and patched at a time: it stays in the L2 cache of a data-centre GPU.
BAND_BYTES = 16 << 20
#: Entries that a program writes, or steps.
WRITTEN = 512


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
    """A tile of the gradient of rows, columns or blocks, and in how many parts the tokens are summed."""

    block_n: int
    block_k: int
    block_m: int
    splits: int
    num_warps: int
    num_stages: int


class SampledTile(NamedTuple):
    """Entries of a program, and tokens at a time."""

    entries: int
    block_m: int
    num_warps: int


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


def thin_tile(N: int, K: int, M: int, batch: int, element_size: int, programs: int) -> ThinTile:
    """Tile of [N, K] for each of `batch` products over M tokens, split until `programs` of them fill the GPU."""
    widest = 32 if element_size == 4 else 128

    def block(size: int) -> int:
        return min(max(1 << max(0, size - 1).bit_length(), 16), widest)

    block_n, block_k, block_m = block(N), block(K), 16 if element_size == 4 else 64
    tiles = batch * -(-N // block_n) * -(-K // block_k)
    splits = max(1, min(32, programs // max(1, tiles), -(-M // (4 * block_m))))
    num_warps, num_stages = 8 if block_n * block_k > 8192 else 4, 3 if element_size == 2 else 2
    return ThinTile(block_n, block_k, block_m, splits, num_warps, num_stages)


def sampled_tile(element_size: int) -> SampledTile:
    return SampledTile(16, 128 if element_size == 2 else 64, 4)
