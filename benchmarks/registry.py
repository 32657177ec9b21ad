"""Defines what is measured: an op of the benchmark (OpSpec), its parts, and the request for a case.

A case is one amount of work: a shape, a layout, a training's setting. Its name, `str(case)`, is the key of its rows. A
provider is one implementation of it. A mode is a part of it: forward, backward, forward + backward, a whole step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .guard import Guard
from .resultfile import WHOLE, Row

#: The modes, in the order of their length.
FORWARD, BACKWARD, BOTH, STEP = MODES = ("forward", "backward", "both", "step")


class Part(NamedTuple):
    """Providers of a case that are measured by turns. A run takes the parts of the lowest stage first, of all ops and
    cases, so that what matters most is there if time runs out.

    Attributes:
        wants: whether a provider belongs to it. The references of ratios are measured with each part.
        least: seconds that must be left to begin it, before one of its kind has been timed.
        seconds: the least and the most time of a case.
    """

    name: str = WHOLE
    stage: int = 1
    wants: Callable[[str], bool] = lambda provider: True
    least: float = 0.0
    seconds: tuple[float, float] = (0.0, math.inf)


#: The time of a case on a GPU: the fewest rounds take less, and there are many cases.
GPU_SECONDS = (2.0, 4.0)


def whole_cases(case: Any, device: str) -> list[Part]:
    """Return one part with all providers."""
    return [Part(seconds=GPU_SECONDS) if device == "cuda" else Part()]


@dataclass
class Request:
    """A request to measure a case.

    Attributes:
        device: "cpu" or "cuda".
        ceilings: measured on this machine: FLOP/s a dtype, and bytes/s ("bytes").
        seconds: about how long to measure.
        modes: the modes to measure; all that the op has if empty.
        providers: parts of the names of the providers to measure; all if empty. References of ratios always run.
        part: the part to measure.
        guard: runs the code of providers.
    """

    device: str
    ceilings: dict[str, float] = field(default_factory=dict)
    seconds: float = 5.0
    modes: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()
    part: Part = Part()  # noqa: RUF009 (a tuple)
    guard: Guard = field(default_factory=Guard)

    def wants(self, provider: str) -> bool:
        asked_for = not self.providers or any(part.lower() in provider.lower() for part in self.providers)
        return asked_for and self.part.wants(provider)


@dataclass(frozen=True)
class OpSpec:
    """An op of the benchmark.

    Attributes:
        what: a line for `list`.
        modes: the modes of its rows.
        cases: the cases on a device, what matters most first, in case that time runs out.
        providers: their names on a device, each with the reason why it cannot run there, or None.
        measure: measures the rows of a case. Rows have provider, mode, p20_us, p50_us, p80_us, rounds, of_bare and
            of_floor (over the roofline); or an error (it was wrong), what it failed with, or why it was skipped, and
            no time.
        columns: the columns of its tables: heading → key of a row.
        summary: says how all the rows stand to the op's bars.
        plot: draws a picture of all the rows, and returns its path.
        share: its share of a run's time, beside the other ops'.
        parts: the parts of a case on a device.
    """

    name: str
    what: str
    modes: tuple[str, ...]
    cases: Callable[[str], list[Any]]
    providers: Callable[[str], dict[str, str | None]]
    measure: Callable[[Any, Request], list[Row]]
    columns: dict[str, str]
    summary: Callable[[list[Row]], str]
    plot: Callable[[list[Row], str, Path], Path]
    share: float = 1.0
    parts: Callable[[Any, str], list[Part]] = whole_cases
