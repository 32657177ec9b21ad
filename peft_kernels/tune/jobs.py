"""The jobs of a run: one for each bucket of shapes of each choice, and for each size that a crossover is looked for.

Sizes are the upper ends of the buckets that `configs.py` looks a tile up by, so a measured table has no gaps; what a
key leaves open is fixed in the op package's `tune.py`. Choices with one candidate (float32, which takes no
tensor cores, and "high") are left to the rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

from ..ops.core.tuning import Crossover, smallest_from
from ..ops.lora_linear import configs as lora_linear
from ..ops.masked_linear import configs as masked_linear
from ..ops.sparse_delta import configs as sparse_delta

PACKAGES: dict[str, ModuleType] = {
    "lora_linear": lora_linear,
    "masked_linear": masked_linear,
    "sparse_delta": sparse_delta,
}


class Job(NamedTuple):
    """One measurement: `candidates` are tiles, or the names of two paths of which the second is the one in question.

    Attributes:
        key: what the table will be asked by, as the choice's `fields` name it.
        at: sizes at which two paths are compared; empty where tiles are. Their product is what the table holds.
    """

    op: str
    choice: str
    key: tuple
    at: tuple
    candidates: tuple


def jobs(ops: list[str], architecture: int) -> list[Job]:
    """All of them for the ops named. First the crossovers, as a path decides more than a tile; with the tiles that are
    known, which are the rules' in a first run. Then tiles, large shapes first."""
    return [job for find in (_crossovers, _tiles) for op in ops for job in find(op, architecture)]


def best(jobs: Iterable[Job], rows: Mapping[Job, list[float | str]]) -> dict[tuple, Any]:
    """The table that measurements make. Of a crossover that was not finished it has a bound: the path in question is
    taken where it was seen to be faster, and counts as slower at the sizes that were not measured.

    Args:
        rows: of each job that was measured, µs of each of its candidates, or why there is none.
    """
    table: dict[tuple, Any] = {}
    points: dict[tuple, list] = {}
    crossovers: dict[tuple, Crossover] = {}
    for job in jobs:
        key = job.choice, *job.key
        times = {
            candidate: result
            for candidate, result in zip(job.candidates, rows.get(job, ()))
            if not isinstance(result, str)
        }
        if job.at:
            faster = min(times, key=times.get, default=None) == job.candidates[1]
            crossovers[key] = PACKAGES[job.op].CHOICES[job.choice].crossover
            points.setdefault(key, []).append((math.prod(job.at), faster if job in rows else None))
        elif times:
            table[key] = min(times, key=times.get)
    for key, found in points.items():
        if any(faster is not None for _, faster in found):
            table[key] = crossovers[key].of([(size, bool(faster)) for size, faster in found])
    return table


def _tiles(op: str, architecture: int) -> Iterator[Job]:
    for choice, key in PACKAGES[op].keys(architecture):
        candidates = PACKAGES[op].CHOICES[choice].candidates(*key, architecture)
        if len(candidates) > 1:
            yield Job(op, choice, key, (), tuple(candidates))


def _crossovers(op: str, architecture: int) -> Iterator[Job]:
    for name, choice in PACKAGES[op].CHOICES.items():
        crossover = choice.crossover
        if crossover is not None and crossover.only_on in (None, architecture):
            # From the end at which a bound grows, so that what is measured counts although others are not.
            for at in sorted(crossover.sizes, key=math.prod, reverse=crossover.of is smallest_from):
                yield Job(op, name, (2,), at, crossover.paths)
