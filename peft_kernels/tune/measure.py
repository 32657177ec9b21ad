"""One job on the GPU: every candidate held against float64, then timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import triton

from ..testing.bounds import assert_within_eager
from .plan import Job
from .problems import Problem, problem

_SECONDS = 0.3  # spent on the timing of one job, if the fewest rounds take less
_FEWEST, _MOST, _WARM_UP = 7, 51, 2  # rounds
_FLUSHED = 256 << 20  # bytes: more than any L2 cache


class Measure:
    """`measure(job, table)`: µs of each candidate on the current device, or why there is none: "wrong: …" for one
    whose result is off, "skipped: …" for one that does not compile or wants more than the GPU has."""

    def __init__(self) -> None:
        self.flush = torch.empty(_FLUSHED, dtype=torch.uint8, device="cuda")

    def __call__(self, job: Job, table: dict[tuple, Any]) -> list[float | str]:
        try:
            prepared = problem(job, table, "cuda")
            results = check(prepared, job.candidates)
        except torch.OutOfMemoryError:
            return ["skipped: the operands do not fit into the GPU's memory"] * len(job.candidates)
        sound = [candidate for candidate, result in zip(job.candidates, results) if not result]
        times = self._medians([lambda candidate=candidate: prepared.launch(candidate) for candidate in sound])
        return [result or times.pop(0) for result in results]

    def _medians(self, calls: list[Callable[[], object]]) -> list[float]:
        """Every call once a round (ABC CBA ABC …), so that a GPU that slows down slows all of them down."""
        times: list[list[float]] = [[] for _ in calls]
        began, rounds = time.perf_counter(), -_WARM_UP
        while rounds < _FEWEST or (rounds < _MOST and time.perf_counter() - began < _SECONDS):
            for number in list(range(len(calls)))[:: -1 if rounds % 2 else 1]:
                elapsed = self._time(calls[number])
                if rounds >= 0:
                    times[number].append(elapsed)
            rounds += 1
        return [statistics.median(found) for found in times]

    def _time(self, call: Callable[[], object]) -> float:
        """µs by events, from a cold L2 cache. While it is flushed, the host gets ahead of the GPU."""
        self.flush.random_(0, 255)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def check(prepared: Problem, candidates: tuple) -> list[str]:
    """What keeps each candidate from being timed, or an empty string: at most twice the error of plain PyTorch in the
    same dtype is allowed, against float64."""
    expected = prepared.expression(*prepared.inputs)
    exact = prepared.expression(*(operand.double() for operand in prepared.inputs))
    return [_fault(prepared, candidate, expected, exact) for candidate in candidates]


def _fault(prepared: Problem, candidate: Any, expected: tuple, exact: tuple) -> str:
    try:
        found = prepared.launch(candidate)
        for number, tensors in enumerate(zip(found, expected, exact)):
            assert_within_eager(f"output {number}", *tensors)
    except AssertionError as error:
        return f"wrong: {error}"
    except torch.AcceleratorError:  # the device is lost for this process
        raise
    except (triton.TritonError, RuntimeError) as error:  # the compiler's passes raise RuntimeError
        return f"skipped: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""
