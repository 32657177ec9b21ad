"""`python -m benchmarks run`: measures what the machine can run within a time budget, and resumes where it ended."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from rich.console import Console
from tqdm import tqdm

from . import tables
from .guard import LOST, Guard
from .measure import ceilings, gpu_state, machine, where
from .registry import MODES, OpSpec, Part, Request
from .resultfile import WHOLE, ResultFile
from .specs import SPECS

#: Seconds that a provider may take at a time on a GPU, its compiler included; of later stages (whole steps,
#: torch.compile) three times that.
LIMIT = 90.0
OUTPUT = Path(__file__).parent / "output"
WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", choices=[*SPECS], help="only this (repeatable)")
    parser.add_argument(
        "--provider", action="append", default=[], help="only those with this in their name (repeatable)"
    )
    parser.add_argument("--mode", action="append", default=[], choices=MODES, help="only this (repeatable)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="only cases of this")
    parser.add_argument("--case", action="append", default=[], help="only those with this in their name (repeatable)")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="the GPU, unless there is none")
    parser.add_argument("--minutes", type=float, default=6.5, help="time budget, of which each op gets its share")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="folder of the results; those there are gone on with")
    parser.add_argument("--no-plots", action="store_true", help="results only; `plot` draws them later")


class Unit(NamedTuple):
    """A part of a case, which is measured at a time."""

    spec: OpSpec
    case: object
    part: Part

    @property
    def kind(self) -> tuple[str, int]:
        """The key of units that take about as long."""
        return self.spec.name, self.part.stage

    def __str__(self) -> str:
        return f"{self.spec.name} {self.case}"


def main(options: argparse.Namespace) -> list[Path]:
    """Run the benchmark, and return the result files."""
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("expected a CUDA GPU that torch can use, got none")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    specs = [SPECS[name] for name in options.op or SPECS]
    deadline, console = time.perf_counter() + 60 * options.minutes, Console(width=WIDTH)
    facts = machine(device)
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))
    facts |= {key: ", ".join(found) for key in ("provider", "mode") if (found := getattr(options, key))}

    planned = {spec.name: asked_for(spec, device, options) for spec in specs}
    files, aside, peaks = {}, [], {}
    for spec in specs:
        file = files[spec.name] = ResultFile(options.out / f"{spec.name}_{slug(facts)}.jsonl")
        if file.machine != facts:
            peaks = peaks or ceilings(device, {unit.case.dtype for units in planned.values() for unit in units})
        aside += [path for path in [file.begin(spec.name, facts, peaks)] if path]
    for path in aside:
        console.print(f"results of another commit, machine or choice are now in {path}")
    for name, peak in next(iter(files.values())).ceilings.items():
        unit, size = ("GB/s copy", 1e9) if name == "bytes" else (f"TFLOP/s {name.removeprefix('torch.')}", 1e12)
        console.print(f"ceiling, measured: {peak / size:.2f} {unit}")

    left = [unit for units in planned.values() for unit in units if not is_done(unit, files[unit.spec.name])]
    total = sum(map(len, planned.values()))
    if len(left) < total:
        console.print(f"{total - len(left)} of {total} cases are there already")
    took = measure(left, files, device, options, deadline, total)
    if left:
        console.print(f"out of time, {len(left)} cases are left: the same command goes on with them")
    for spec in specs:
        rows = files[spec.name].rows
        if rows:
            seconds = sum(sum(times) for (name, _), times in took.items() if name == spec.name)
            console.print(f"{spec.name}, {seconds / 60:.1f} min: {spec.summary(rows)}", highlight=False)
            if not options.no_plots and any("mode" in row for row in rows):
                console.print(f"plot: {spec.plot(rows, where(facts), files[spec.name].path.with_suffix('.png'))}")
    return [file.path for file in files.values()]


#: The name for a failure that is no single provider's.
EVERYONE = "every provider"
_BAR = "{desc} |{bar}| {n_fmt}/{total_fmt}, {elapsed}"


def measure(
    left: list[Unit],
    files: dict[str, ResultFile],
    device: str,
    options: argparse.Namespace,
    deadline: float,
    total: int,
) -> dict[tuple[str, int], list[float]]:
    """Measure into the files until time is over, remove what is done from `left`, and return seconds by kind."""
    took: dict[tuple[str, int], list[float]] = {unit.kind: [] for unit in left}
    console = Console(width=WIDTH)
    guarding = contextlib.closing(Guard(LIMIT if device == "cuda" else None))
    counting = tqdm(total=total, initial=total - len(left), unit="case", bar_format=_BAR, leave=False, disable=None)
    with guarding as guard, counting as bar:
        while unit := next_unit(left, took, remaining := deadline - time.perf_counter()):
            file, case = files[unit.spec.name], str(unit.case)
            bar.set_description(f"{remaining / 60:.1f} min left, {unit}"[:60])
            guard.failed, guard.without, guard.lose = {}, file.lost, partial(lose, file, unit)
            if guard.limit is not None:
                guard.limit = LIMIT * (3 if unit.part.stage > 1 else 1)
            request = Request(
                device, file.ceilings, seconds_of(unit, left, remaining), tuple(options.mode), tuple(options.provider),
                unit.part, guard,
            )  # fmt: skip
            began, rows = time.perf_counter(), []
            with guard(EVERYONE):
                rows = unit.spec.measure(unit.case, request)
            if not rows:
                rows = [{"provider": EVERYONE, "failed": guard.failed.get(EVERYONE, "no provider is here")}]
            took[unit.kind].append(time.perf_counter() - began)
            left.remove(unit)
            state = gpu_state() if device == "cuda" else {}
            file.add(case, [row | state for row in rows], unit.part.name)
            with console.capture() as capture:
                console.print(tables.terminal(file.cases[case], unit.spec.columns))
            tqdm.write(capture.get())
            bar.update()
    return took


def lose(file: ResultFile, unit: Unit, provider: str, why: str) -> NoReturn:
    """Note who took the process with it, and end it at once: cleaning up would call the lost GPU. The case is still to
    do, unless it was no single provider."""
    rows = [{"provider": provider, "failed": f"it took the process with it: {why}"}]
    file.add(str(unit.case), rows, unit.part.name if provider == EVERYONE else None)
    print(f"{unit}: {provider}: {why}: the same command goes on without it", flush=True)
    os._exit(LOST)


def asked_for(spec: OpSpec, device: str, options: argparse.Namespace) -> list[Unit]:
    """Return the parts of the op's cases that were asked for, what matters most first."""
    cases = [
        case for case in spec.cases(device)
        if options.dtype in (None, str(case.dtype).removeprefix("torch."))
        and (not options.case or any(part in str(case) for part in options.case))
    ]  # fmt: skip
    units = [Unit(spec, case, part) for case in cases for part in spec.parts(case, device)]
    if not options.provider:
        return units
    asked = [name for name in spec.providers(device) if Request(device, providers=tuple(options.provider)).wants(name)]
    return [unit for unit in units if unit.part.name == WHOLE or any(map(unit.part.wants, asked))]


def is_done(unit: Unit, file: ResultFile) -> bool:
    return bool({(str(unit.case), part) for part in (unit.part.name, WHOLE)} & file.done)


def next_unit(left: list[Unit], took: dict[tuple[str, int], list[float]], remaining: float) -> Unit | None:
    """Choose the next unit in the lowest stage, of the op that has had the least of its share, so that all are there if
    time runs out; None if nothing is left, or less time than the longest unit of each kind took."""
    fits = [unit for unit in left if remaining > max(took[unit.kind], default=unit.part.least)]
    return min(fits, key=lambda unit: (unit.part.stage, sum(took[unit.kind]) / unit.spec.share), default=None)


def seconds_of(unit: Unit, left: list[Unit], remaining: float) -> float:
    """Return the time of a case: what remains, by its op's share among those left in its stage, over the op's cases
    left there; within the bounds of its part."""
    of_stage = [other for other in left if other.part.stage == unit.part.stage]
    shares = {other.spec.name: other.spec.share for other in of_stage}
    cases = sum(1 for other in of_stage if other.spec is unit.spec)
    least, most = unit.part.seconds
    return min(most, max(least, remaining * unit.spec.share / sum(shares.values()) / cases))


def slug(facts: dict[str, str]) -> str:
    return facts.get("gpu", "cpu").replace(" ", "_")
