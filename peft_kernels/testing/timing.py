"""Times of several calls that are fair to each other: in turns, in an order drawn anew, from a cold L2 cache."""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)

#: Runs some work, and calls what it is given at the end of each part.
Marked = Callable[[Callable[[], None]], None]

_FLUSHED = 256 << 20  # bytes: more than any L2 cache
_LONG = 5000.0  # µs: what ran before does not count then


class Timer:
    """µs from the start of a call to each of its marks: CUDA events with a cold L2 on a GPU, the wall clock (the mean
    of `repeats`) on the CPU."""

    def __init__(self, device: str) -> None:
        self.flush = torch.empty(_FLUSHED, dtype=torch.uint8, device=device) if device == "cuda" else None

    def __call__(self, call: Marked, repeats: int = 1) -> tuple[float, ...]:
        if self.flush is None:
            runs = [self._wall_clock(call) for _ in range(repeats)]
            return tuple(statistics.fmean(part) * 1e6 for part in zip(*runs))
        marks: list[torch.cuda.Event] = []

        def mark() -> None:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()

        self.flush.random_(0, 255)
        mark()
        call(mark)
        marks[-1].synchronize()
        return tuple(marks[0].elapsed_time(end) * 1e3 for end in marks[1:])

    @staticmethod
    def _wall_clock(call: Marked) -> list[float]:
        marks: list[float] = []
        began = time.perf_counter()
        call(lambda: marks.append(time.perf_counter()))
        return [end - began for end in marks]


def whole(call: Callable[[], object]) -> Marked:
    """A call of one part."""

    def marked(mark: Callable[[], None]) -> None:
        call()
        mark()

    return marked


def interleaved(
    calls: dict[Name, Marked],
    timer: Callable[..., tuple[float, ...]],
    seconds: float,
    least: int = 7,
    most: int = 101,
    guard: Callable[[Name], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> dict[Name, list[tuple[float, ...]]]:
    """Every call once a round, in an order drawn anew, for about `seconds`; the first two rounds warm up and do not
    count.

    What ran before a call is not its concern, but is felt: 2 % at 300 µs. So short ones run once untimed right before,
    and are repeated on the CPU until the shortest fills 2 ms.

    Args:
        guard: entered around all that is done with a call. If it keeps an exception to itself, that call is over, and
            not among the results.
    """
    times: dict[Name, list[tuple[float, ...]]] = {name: [] for name in calls}
    order, began, rounds, repeats, shortest = random.Random(0), time.perf_counter(), 0, 1, float("inf")
    while times and (rounds < 2 + least or (rounds < 2 + most and time.perf_counter() - began < seconds)):
        for name in order.sample(list(times), len(times)):
            elapsed = None
            with guard(name):
                if rounds == 0 or shortest < _LONG:
                    calls[name](lambda: None)
                elapsed = timer(calls[name], repeats)
            if elapsed is None:
                del times[name]
                continue
            if rounds >= 2:
                times[name].append(elapsed)
            shortest = min(shortest, elapsed[-1])
        rounds += 1
        repeats = max(1, int(2000 / shortest)) if times else 1
    return times
