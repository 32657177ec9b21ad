"""Which tile and which path, as pure functions of shape, dtype and architecture: testable without a GPU.

What was measured on the GPU at hand (`tuned`) comes first; the rules below decide the rest.

Shapes and scalings are never constants of a compiled kernel, beyond the power of two that a rank is rounded up to, and
M is not even looked at by Triton's own specialisation (divisible by 16, equal to 1): a new batch size compiles anew
only where it takes another tile, or makes a stride (in)divisible by 16.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..core import tuning
from ..core.tuning import FEATURES, RANKS, TOKENS, UNTUNED, Crossover, Table, smallest_from

CHOICES = tuning.Choices("lora_linear")
tuned = CHOICES.tuned

#: By element size: above, dH and dB come from cuBLAS, since the partials of the pass over dy grow with R.
LARGEST_RANK_OF_DH_DB = {2: 32, 4: 16}
_PROGRAMS_PER_SM = 2  # enough loads in flight for a kernel that only reads


class ShrinkTile(NamedTuple):
    block_m: int
    block_c: int
    block_k: int
    num_warps: int
    num_stages: int


class PassTile(NamedTuple):
    """The tile of a pass over dy (block_n columns, block_r ranks) or x (block_k columns, block_c ranks)."""

    block_m: int
    block_n: int
    block_r: int
    num_warps: int
    num_stages: int

    block_k = property(lambda self: self.block_n)
    block_c = property(lambda self: self.block_r)


class GemmTile(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    block_r: int
    group_m: int
    num_warps: int
    num_stages: int
    split_epilogue: bool = False


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def rank_block(rank: int, largest: int) -> int:
    """tl.dot wants at least 16."""
    return min(max(next_power_of_two(rank), 16), largest)


def split(length: int, block: int, programs: int, processors: int) -> tuple[int, int]:
    """How many programs share one reduction of `length`, and how much each takes (a multiple of `block`), so that
    the launch fills the processors; at most 32, since partial sums go through memory."""
    blocks = max(1, -(-length // block))
    splits = max(1, min(blocks, 32, (_PROGRAMS_PER_SM * processors) // max(programs, 1)))
    per_split = -(-blocks // splits) * block
    return -(-length // per_split) if length else 1, per_split


@CHOICES.tile(M=TOKENS, K=FEATURES, width=RANKS)
def shrink_tile(M: int, K: int, width: int, element_size: int, dropping: bool, high: bool) -> ShrinkTile:
    """Pass over x for S: `width` columns of the stacked A share a mask."""
    if element_size == 4:  # multiplied without tensor cores: operands fill the registers
        return ShrinkTile(32, rank_block(width, 16), 32, num_warps=4, num_stages=2)
    block_c = rank_block(width, 64)
    if M <= 64:
        return ShrinkTile(16, block_c, 32 if high else 64, num_warps=4, num_stages=2 if dropping or high else 3)
    if high:
        return ShrinkTile(64, block_c, 32, num_warps=8, num_stages=2)
    if dropping:  # Philox fills the registers: of 64 × 128 elements one program would fit a multiprocessor
        return ShrinkTile(64, block_c, 64, num_warps=4, num_stages=2)
    return ShrinkTile(64, block_c, 128, num_warps=8, num_stages=3)


@shrink_tile.candidates
def shrink_candidates(
    M: int, K: int, width: int, element_size: int, dropping: bool, high: bool, arch: int
) -> list[ShrinkTile]:
    rule = shrink_tile(M, K, width, element_size, dropping, high)
    if element_size == 4 or high:
        return [rule]
    sizes = [(16, 64, 4), (32, 64, 8), (64, 64, 8), (64, 128, 8)]
    if not dropping and arch == 90:  # so many rows would spill on sm_80 and sm_100
        sizes.append((128, 64, 8))
    tiles = [ShrinkTile(m, rule.block_c, k, warps, rule.num_stages) for m, k, warps in sizes]
    return tuning.with_rule_first(rule, tiles)


@CHOICES.tile(M=TOKENS, N=FEATURES, R=RANKS)
def dh_db_tile(M: int, N: int, R: int, element_size: int, high: bool, arch: int) -> PassTile:
    block_r = rank_block(R, LARGEST_RANK_OF_DH_DB[element_size])
    if element_size == 4:
        return PassTile(32, 32, block_r, num_warps=4, num_stages=2)
    if high:
        return PassTile(32, 64, block_r, num_warps=4, num_stages=2)
    # Wide, since the partials of dH are written once for each block of columns. `split` plans two programs a
    # multiprocessor; with three stages of 256 columns the shared memory of sm_90 would hold one.
    if block_r == 16:
        return PassTile(64, 256, block_r, num_warps=8, num_stages=2)
    return PassTile(64, 128, block_r, num_warps=4, num_stages=3 if arch else 2)


@dh_db_tile.candidates
def dh_db_candidates(M: int, N: int, R: int, element_size: int, high: bool, arch: int) -> list[PassTile]:
    rule = dh_db_tile(M, N, R, element_size, high, arch)
    if element_size == 4 or high:
        return [rule]
    sizes = [(32, 128, 8), (64, 128, 4), (64, 64, 4)]
    if not 0 < arch < 90:  # dB alone would spill
        sizes.append((128, 128, 8))
    tiles = [PassTile(m, n, rule.block_r, warps, rule.num_stages) for m, n, warps in sizes]
    return tuning.with_rule_first(rule, tiles)


@CHOICES.tile(M=TOKENS, K=FEATURES, width=RANKS)
def da_tile(M: int, K: int, width: int, element_size: int, high: bool) -> PassTile:
    if element_size == 4:
        return PassTile(32, 32, rank_block(width, 16), num_warps=4, num_stages=2)
    if high:
        return PassTile(32, 128, rank_block(width, 64), num_warps=8, num_stages=2)
    block_c = rank_block(width, 64)
    # A third stage of 32 ranks would spill two registers on sm_90 (Triton 3.9).
    return PassTile(64, 128, block_c, num_warps=8, num_stages=2 if block_c == 32 else 3)


@da_tile.candidates
def da_candidates(M: int, K: int, width: int, element_size: int, high: bool, arch: int) -> list[PassTile]:
    rule = da_tile(M, K, width, element_size, high)
    if element_size == 4 or high:
        return [rule]
    sizes = [(64, 64, 4)]
    if not 0 < arch < 90 or rule.block_c < 32:  # would spill on sm_80
        sizes.append((128, 128, 8))
    tiles = [PassTile(m, k, rule.block_c, warps, rule.num_stages) for m, k, warps in sizes]
    return tuning.with_rule_first(rule, tiles)


@CHOICES.tile(M=TOKENS, N=FEATURES, R=RANKS)
def gemm_tile(
    M: int, N: int, R: int, element_size: int, arch: int, tma: bool, masks: int = 0, high: bool = False,
    base: bool = True,
) -> GemmTile:  # fmt: skip
    """Tile of the K-extension GEMM.

    Args:
        arch: 0 stands for anything that is no NVIDIA GPU (64 KiB of shared memory are assumed).
        tma: the persistent kernel with descriptors, of 16-bit operands.
        masks: projections whose low-rank product is masked: from two on, registers hold two accumulators.
        high: low-rank operands are float32.
        base: with the large product. The rule takes the same tile without it.
    """
    if element_size == 4:  # multiplied without tensor cores: operands fill the registers
        return GemmTile(32, 32, 32, 16, 8, 4, 2)
    crowded = masks > 1 or high
    block_r = rank_block(R, 16 if crowded or arch >= 100 else 32)  # of 32 some spill on sm_100
    if tma:
        if masks > 1 and high:
            return GemmTile(64, 64, 64, block_r, 8, 4, 4)
        if M <= 512 or N <= 512:
            return GemmTile(64, 128, 64, block_r, 8, 8 if crowded else 4, 4)
        if masks > 1:  # a square of 128 would spill (8 bytes with Triton 3.9, sm_90)
            return GemmTile(128, 64, 64, block_r, 8, 8, 4)
        if arch >= 100 or crowded:
            return GemmTile(128, 128, 64, block_r, 8, 8, 4)
        return GemmTile(128, 256, 64, block_r, 8, 8, 3, split_epilogue=True)
    num_stages = 4 if arch else 2
    if M <= 64 or crowded:
        return GemmTile(64, 64, 32, block_r, 8, 4, num_stages)
    if M <= 512 or N <= 512:
        return GemmTile(64, 128, 32, block_r, 8, _warps_of_64_by_128(arch), num_stages)
    return GemmTile(128, 128, 32, block_r, 8, 8 if arch else 4, num_stages)


def _warps_of_64_by_128(arch: int) -> int:
    """Four would spill on sm_80 (36 bytes with Triton 3.9)."""
    return 8 if 0 < arch < 90 else 4


@gemm_tile.candidates
def gemm_candidates(
    M: int, N: int, R: int, element_size: int, tma: bool, masks: int, high: bool, base: bool, arch: int
) -> list[GemmTile]:
    rule = gemm_tile(M, N, R, element_size, arch, tma, masks, high)
    if element_size == 4 or masks > 1 or high:
        return [rule]
    if tma:
        sizes = [(64, 128, 4, 4, False), (128, 128, 8, 4, False)]
        if arch < 100:  # three projections would spill on sm_100
            sizes += [(64, 64, 8, 4, False), (64, 256, 8, 3, False), (256, 128, 8, 3, True)]
        tiles = [GemmTile(m, n, 64, rule.block_r, 8, *rest) for m, n, *rest in sizes]
    else:
        sizes = [(64, 64, 4), (64, 128, _warps_of_64_by_128(arch)), (128, 64, 4), (128, 128, 8)]
        tiles = [GemmTile(m, n, 32, rule.block_r, 8, warps, rule.num_stages) for m, n, warps in sizes]
    return tuning.with_rule_first(rule, tiles)


def _squares(*tokens: int, features: tuple[int, ...] = (8192, 4096, 2048, 1024)) -> list[tuple[int, int, int]]:
    """(M, N, K) of square layers."""
    return [(M, N, N) for M in tokens for N in features]


# By element size, the smallest M·N·K from which on a path is the faster one; it is not taken where none was measured.
#: Triton's fused GEMM, beside cuBLAS with beta = 1.
fused_from = CHOICES.size("fused_from", Crossover(("blas", "fused"), _squares(8192, 2048, 512), smallest_from))
#: S and y by one native kernel, beside a pass over x and the GEMM.
cuda_fused_from = CHOICES.size(
    "cuda_fused_from",
    Crossover(("cuda:passes", "cuda:fused"), _squares(16384, 8192, 2048, 512), smallest_from, only_on=90),
)
#: Triton's kernels, beside the reference's torch products, at sizes where launches rule. The rule: Triton's kernels
#: cost the CPU about 0.2 ms a layer, forward and backward, which a GPU of 300 TFLOP/s needs for 4·M·N·K operations at
#: 2³⁴ (1024 tokens of 4096 × 4096). Torch's products take about half of that on the CPU, and on the GPU one pass over
#: dy more. Without tensor cores a GPU is an order slower.
triton_from = CHOICES.size(
    "triton_from",
    Crossover(
        ("reference", "triton"), _squares(4096, 1024, 256, 64, features=(4096, 2048, 1024)), smallest_from, calls=16
    ),
    rule={2: 2**34, 4: 2**31},
)
#: The native CUDA kernels, beside both other ways; with small M, at which K is split.
cuda_from = CHOICES.size(
    "cuda_from", Crossover(("reference or triton", "cuda"), _squares(8192, 2048, 512, 64), smallest_from, calls=16)
)


def expand_path(
    M: int, N: int, K: int, R: int, dtype: torch.dtype, arch: int, backend: str, table: Table = UNTUNED
) -> str:
    """ "fused" (the rank inside the GEMM) or "blas" (low-rank product first, then cuBLAS added onto it)."""
    forced = backend.partition(":")[2]
    return forced or ("fused" if _reached(fused_from(dtype.itemsize, table), M, N, K) else "blas")


def gpu_backend(
    M: int, N: int, K: int, dtype: torch.dtype, arch: int, table: Table = UNTUNED, dropping: bool = False
) -> str:
    """ "cuda" where its kernels were measured faster (N of all projections together), else as
    :func:`reference_or_triton`."""
    taken = _reached(cuda_from(dtype.itemsize, table), M, N, K)
    return "cuda" if taken else reference_or_triton(M, N, K, dtype, table, dropping)


def reference_or_triton(
    M: int, N: int, K: int, dtype: torch.dtype, table: Table = UNTUNED, dropping: bool = False
) -> str:
    """ "reference" where launches rule and no mask is drawn or applied, which takes torch many passes over x."""
    return "triton" if dropping or _reached(triton_from(dtype.itemsize, table), M, N, K) else "reference"


def cuda_path(M: int, N: int, K: int, dtype: torch.dtype, arch: int, backend: str, table: Table = UNTUNED) -> str:
    """Forward by the native kernels: "fused" (S and y by one, which reads x once) or "passes" (a pass over x first)."""
    forced = backend.partition(":")[2]
    return forced or ("fused" if _reached(cuda_fused_from(dtype.itemsize, table), M, N, K) else "passes")


def _reached(smallest: float | None, M: int, N: int, K: int) -> bool:
    return smallest is not None and smallest <= M * N * K


def keys(architecture: int) -> Iterator[tuple[str, tuple]]:
    """Yield what is measured: a choice and a key, at the upper ends of all buckets, large shapes first."""
    for M, N, R in itertools.product(TOKENS.all(), FEATURES.all(), RANKS.all()):
        for dropping in (False, True):
            yield "shrink_tile", (M, N, R, 2, dropping, False)
        if LARGEST_RANK_OF_DH_DB[2] >= R:
            yield "dh_db_tile", (M, N, R, 2, False)
        yield "da_tile", (M, N, R, 2, False)
        yield "gemm_tile", (M, N, R, 2, False, 1, False, False)  # dx with dropout, onto which cuBLAS adds
        for masks in (0, 1):
            yield "gemm_tile", (M, N, R, 2, architecture >= 90, masks, False, True)
