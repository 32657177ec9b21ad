"""Which tile, as pure functions of shape, dtype and architecture: testable without a GPU.

What was measured on the GPU at hand (`tuned`) comes first; the rules below decide the rest.

Shapes are never constants of a compiled kernel, and M is not even looked at by Triton's own specialisation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from ..core import tuning
from ..core.tuning import FEATURES, TOKENS

CHOICES = tuning.Choices("masked_linear")
tuned = CHOICES.tuned


class Tile(NamedTuple):
    """`block_m` × `block_n` of the output a program, `block_k` of the sum a step; programs run down `group_m` rows of
    tiles before the next column."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


@CHOICES.tile(M=TOKENS, N=FEATURES)
def gemm_tile(M: int, N: int, element_size: int, arch: int, aligned: bool) -> Tile:
    """Tile of an output [M, N] = P·(masked Q): y, or dx with K in place of N. `aligned`: eight values a load."""
    if element_size == 4 or not aligned:
        return _scalar_tile(element_size, arch)
    block_k, num_stages = _steps(arch)
    if M <= 64:
        return Tile(64, 64, block_k, 8, 4, num_stages)
    if M <= 512 or N <= 512:
        return Tile(128, 64, block_k, 8, 4, num_stages)
    # Tall: a column of the tile reads a weight and its score (up to 6 bytes), a row reads one element of P (2).
    return Tile(256 if arch >= 90 else 128, 128, block_k, 8, 8, num_stages)


@gemm_tile.candidates
def gemm_candidates(M: int, N: int, element_size: int, aligned: bool, arch: int) -> list[Tile]:
    rule = gemm_tile(M, N, element_size, arch, aligned)
    if element_size == 4 or not aligned:
        return [rule]
    sizes = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8), (256, 64, 8)]
    return tuning.with_rule_first(rule, [rule._replace(block_m=m, block_n=n, num_warps=warps) for m, n, warps in sizes])


@CHOICES.tile(N=FEATURES, K=FEATURES)
def grad_tile(N: int, K: int, element_size: int, arch: int, aligned: bool) -> Tile:
    """Tile of G [N, K] = dyᵀ·x: `block_m` rows and `block_n` columns of G, `block_k` tokens a step."""
    if element_size == 4 or not aligned:
        return _scalar_tile(element_size, arch)
    block_k, num_stages = _steps(arch)
    # Fewer than 64 of the large tiles leave processors idle. With four warps the small one spills a register on sm_100
    # (both 16-bit, both gradients; compiled by Triton 3.6 and 3.9).
    size = 64 if N * K < 1 << 20 else 128
    return Tile(size, size, block_k, 8, 8, num_stages)


@grad_tile.candidates
def grad_candidates(N: int, K: int, element_size: int, aligned: bool, arch: int) -> list[Tile]:
    rule = grad_tile(N, K, element_size, arch, aligned)
    if element_size == 4 or not aligned:
        return [rule]
    sizes = [(64, 64), (128, 128)]
    if arch < 100:  # both gradients would spill on sm_100
        sizes += [(64, 128), (128, 64)]
    return tuning.with_rule_first(rule, [rule._replace(block_m=m, block_n=n) for m, n in sizes])


def _scalar_tile(element_size: int, arch: int) -> Tile:
    """Small, as operands fill the registers: float32, which is multiplied without tensor cores, and rows that do not
    start on 16 bytes, which are loaded value by value (a tile of 256 × 128 would spill 600 times on sm_90)."""
    if element_size == 4:
        return Tile(64, 64, 16, 8, 8, 2)
    return Tile(64, 64, 32, 8, 8, 3 if arch else 2)


def _steps(arch: int) -> tuple[int, int]:
    """block_k and num_stages of 16-bit operands that are loaded eight values at once."""
    if arch >= 90:
        return 64, 3
    return 32, 4 if arch else 2


def keys(architecture: int) -> Iterator[tuple[str, tuple]]:
    """Yield what is measured: a choice and a key, at the upper ends of all buckets, large shapes first."""
    for M, N in itertools.product(TOKENS.all(), FEATURES.all()):
        yield "gemm_tile", (M, N, 2, True)
    for N, K in itertools.product(FEATURES.all(), repeat=2):
        yield "grad_tile", (N, K, 2, True)
