"""One job on the GPU: every candidate held against float64, then timed in turns."""

from __future__ import annotations

import functools
import importlib
import statistics
from typing import Any

import torch
import triton

from ..ops.core.problem import Inputs, Problem
from ..testing.bounds import assert_within_eager
from ..testing.device import device_fault
from ..testing.timing import Timer, interleaved, whole
from .jobs import PACKAGES, Job
from .session import DeviceLost

_SECONDS = 0.3  # spent on the timing of one job, if the fewest rounds take less
_MOST = 51  # rounds
_DTYPES = {2: torch.bfloat16, 4: torch.float32}


class Measure:
    """`measure(job, table)`: µs of each candidate on the current device, or why there is none: "wrong: …" for one
    whose result is off, "skipped: …" for one that does not compile or wants more than the GPU has."""

    def __init__(self) -> None:
        self.timer = Timer("cuda")

    def __call__(self, job: Job, table: dict[tuple, Any]) -> list[float | str]:
        try:
            prepared = problem(job, table, "cuda")
            results = check(prepared, job.candidates)
        except torch.OutOfMemoryError:
            return ["skipped: the operands do not fit into the GPU's memory"] * len(job.candidates)
        sound = [number for number, result in enumerate(results) if not result]
        crossover = PACKAGES[job.op].CHOICES[job.choice].crossover
        count = crossover.calls if crossover else 1

        def launch(number: int) -> None:
            for _ in range(count):
                prepared.launch(job.candidates[number])

        calls = {number: whole(functools.partial(launch, number)) for number in sound}
        try:
            times = interleaved(calls, self.timer, _SECONDS, most=_MOST)
        except RuntimeError:
            if why := device_fault():
                raise DeviceLost(why, ["skipped: the GPU was lost while it was timed"] * len(results)) from None
            raise
        return [results[n] or statistics.median(us for (us,) in times[n]) / count for n in range(len(results))]


def problem(job: Job, table: dict[tuple, Any], device: str, dtype: torch.dtype | None = None, K: int = 4096) -> Problem:
    """The :class:`Problem` of a job.

    Args:
        table: what was found so far; crossovers are measured with its tiles.
        dtype: bfloat16 or float32, as the key says, unless given.
        K: every size that the key leaves open.
    """
    key = dict(zip(PACKAGES[job.op].CHOICES[job.choice].fields, job.key))
    inputs = Inputs(device, dtype or _DTYPES[key["element_size"]], K)
    build = importlib.import_module(f"..ops.{job.op}.tune", __package__).PROBLEMS[job.choice]
    return build(inputs, job.at, table, **key) if job.at else build(inputs, **key)


def check(prepared: Problem, candidates: tuple) -> list[str]:
    """Say what keeps each candidate from being timed, or nothing: at most twice the error of plain PyTorch in the
    same dtype is allowed, against float64.

    Raises:
        DeviceLost: one of them made the GPU useless for this process.
    """
    expected = prepared.expression(*prepared.inputs)
    exact = prepared.expression(*(operand.double() for operand in prepared.inputs))
    found: list[str] = []
    for candidate in candidates:
        found.append(_fault(prepared, candidate, expected, exact))
        if why := found[-1] and device_fault():
            results = [fault or "skipped: the GPU was lost before it was timed" for fault in found[:-1]]
            left = len(candidates) - len(found)
            raise DeviceLost(why, [*results, f"wrong: it lost the GPU: {why}", *["skipped: the GPU was lost"] * left])
    return found


def _fault(prepared: Problem, candidate: Any, expected: tuple, exact: tuple) -> str:
    try:
        found = prepared.launch(candidate)
        for number, tensors in enumerate(zip(found, expected, exact)):
            assert_within_eager(f"output {number}", *tensors)
    except AssertionError as error:
        return f"wrong: {error}"
    except (triton.TritonError, RuntimeError) as error:  # the compiler's passes raise RuntimeError
        return f"skipped: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""
