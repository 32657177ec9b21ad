"""What is measured: a job for each bucket of shapes of each choice, and for each size that a crossover is looked for.

Sizes are the upper ends of the buckets that `configs.py` looks a tile up by, so a measured table has no gaps; what a
key leaves open is fixed in `problems.py`. Choices with one candidate (float32, which takes no tensor cores, and
"high") are left to the rules.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from ..ops.core.tuning import FEATURES, RANKS, TOKENS
from ..ops.lora_linear import configs as lora_linear
from ..ops.masked_linear import configs as masked_linear
from ..ops.sparse_delta import configs as sparse_delta

PACKAGES: dict[str, ModuleType] = {
    "lora_linear": lora_linear,
    "masked_linear": masked_linear,
    "sparse_delta": sparse_delta,
}


class Job(NamedTuple):
    """One measurement: `candidates` are tiles, or the names of two ways of which the second is the one in question.

    Attributes:
        key: what the table will be asked by, as the choice's `fields` name it.
        at: sizes at which two ways are compared; empty where tiles are. Their product is what the table holds.
    """

    op: str
    choice: str
    key: tuple
    at: tuple
    candidates: tuple


def jobs(ops: list[str], architecture: int) -> list[Job]:
    """All of them for the ops named. First the crossovers, as a way decides more than a tile; with the tiles that are
    known, which are the rules' in a first run. Then tiles, large shapes first."""
    return [job for find in (_crossovers, _tiles) for op in ops for job in find(op, architecture)]


def best(jobs: Iterable[Job], rows: Mapping[Job, list[float | str]]) -> dict[tuple, Any]:
    """The table that measurements make. Of a crossover that was not finished it has a bound: the way in question is
    taken where it was seen to be faster, and counts as slower at the sizes that were not measured.

    Args:
        rows: of each job that was measured, µs of each of its candidates, or why there is none.
    """
    table: dict[tuple, Any] = {}
    points: dict[tuple, list] = {}
    for job in jobs:
        key = job.choice, *job.key
        times = {
            candidate: result
            for candidate, result in zip(job.candidates, rows.get(job, ()))
            if not isinstance(result, str)
        }
        if job.at:
            faster = min(times, key=times.get, default=None) == job.candidates[1]
            points.setdefault(key, []).append((math.prod(job.at), faster if job in rows else None))
        elif times:
            table[key] = min(times, key=times.get)
    for key, found in points.items():
        if any(faster is not None for _, faster in found):
            table[key] = CROSSOVERS[key[0]].of([(size, bool(faster)) for size, faster in found])
    return table


def smallest_from(points: list[tuple[float, bool]]) -> float:
    """The smallest size from which on the way in question is always faster; infinity where it never is."""
    last_lost = max((size for size, faster in points if not faster), default=-1)
    return min((size for size, faster in points if faster and size > last_lost), default=math.inf)


def largest_up_to(points: list[tuple[float, bool]]) -> float:
    """The largest size up to which the way in question is always faster; 0 where it never is."""
    first_lost = min((size for size, faster in points if not faster), default=math.inf)
    return max((size for size, faster in points if faster and size < first_lost), default=0)


class Crossover(NamedTuple):
    """Two ways, the sizes at which they are compared, and what follows from (product of sizes, second way faster).

    Attributes:
        only_on: an architecture.
        calls: how many are timed one right after another. With many the slower of GPU and CPU decides, as in training.
    """

    ways: tuple[str, str]
    sizes: list[tuple]
    of: Callable[[list[tuple[float, bool]]], float]
    only_on: int | None = None
    calls: int = 1


CROSSOVERS = {
    # M, N, K
    "fused_from": Crossover(
        ("blas", "fused"), [(M, N, N) for M in (8192, 2048, 512) for N in (8192, 4096, 2048, 1024)], smallest_from
    ),
    # M, N, K
    "cuda_fused_from": Crossover(
        ("cuda:passes", "cuda:fused"),
        [(M, N, N) for M in (16384, 8192, 2048, 512) for N in (8192, 4096, 2048, 1024)],
        smallest_from,
        only_on=90,
    ),
    # M, N, K, smaller than those of "fused_from": launches rule there
    "triton_from": Crossover(
        ("reference", "triton"),
        [(M, N, N) for M in (4096, 1024, 256, 64) for N in (4096, 2048, 1024)],
        smallest_from,
        calls=16,
    ),
    # M, N, K, with a smaller M than that of "fused_from": the depth is split there
    "cuda_from": Crossover(
        ("reference or triton", "cuda"),
        [(M, N, N) for M in (8192, 2048, 512, 64) for N in (8192, 4096, 2048, 1024)],
        smallest_from,
        calls=16,
    ),
    # density
    "sampled_up_to": Crossover(
        ("tiles", "sampled"), [(density,) for density in (0.02, 0.01, 0.005, 0.002, 0.001, 0.0005)], largest_up_to
    ),
}


def _tiles(op: str, architecture: int) -> Iterator[Job]:
    for choice, key in _KEYS[op](architecture):
        candidates = PACKAGES[op].CHOICES[choice].candidates(*key, architecture)
        if len(candidates) > 1:
            yield Job(op, choice, key, (), tuple(candidates))


def _crossovers(op: str, architecture: int) -> Iterator[Job]:
    for choice in PACKAGES[op].CHOICES:
        if choice in CROSSOVERS and CROSSOVERS[choice].only_on in (None, architecture):
            # From the end at which a bound grows, so that what is measured counts although others are not.
            for at in sorted(CROSSOVERS[choice].sizes, key=math.prod, reverse=CROSSOVERS[choice].of is smallest_from):
                yield Job(op, choice, (2,), at, CROSSOVERS[choice].ways)


def _keys_of_lora_linear(architecture: int) -> Iterator[tuple[str, tuple]]:
    for M, N, R in itertools.product(TOKENS.all(), FEATURES.all(), RANKS.all()):
        for dropping in (False, True):
            yield "shrink_tile", (M, N, R, 2, dropping, False)
        if lora_linear.LARGEST_RANK_OF_DH_DB[2] >= R:
            yield "dh_db_tile", (M, N, R, 2, False)
        yield "da_tile", (M, N, R, 2, False)
        yield "gemm_tile", (M, N, R, 2, False, 1, False, False)  # dx with dropout, onto which cuBLAS adds
        for masks in (0, 1):
            yield "gemm_tile", (M, N, R, 2, architecture >= 90, masks, False, True)


def _keys_of_masked_linear(architecture: int) -> Iterator[tuple[str, tuple]]:
    for M, N in itertools.product(TOKENS.all(), FEATURES.all()):
        yield "gemm_tile", (M, N, 2, True)
    for N, K in itertools.product(FEATURES.all(), repeat=2):
        yield "grad_tile", (N, K, 2, True)


def _keys_of_sparse_delta(architecture: int) -> Iterator[tuple[str, tuple]]:
    for element_size in (2, 4):
        yield "sampled_tile", (element_size,)
    for N, K in itertools.product(sparse_delta.THIN.all(), repeat=2):
        yield "thin_tile", (N, K, 2)
    for N, K, per_64 in itertools.product(FEATURES.all(), FEATURES.all(), sparse_delta.PER_64.all()):
        yield "grad_tile", (N, K, per_64, 2)


_KEYS = {
    "lora_linear": _keys_of_lora_linear,
    "masked_linear": _keys_of_masked_linear,
    "sparse_delta": _keys_of_sparse_delta,
}
