"""`python -m benchmarks run`: measures what the machine can run within a time budget, and goes on where it ended."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from tqdm import tqdm

from . import tables
from .measure import ceilings, gpu_state, machine, where
from .registry import MODES, OpSpec, Request
from .resultfile import ResultFile
from .specs import SPECS

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


def main(options: argparse.Namespace) -> list[Path]:
    """The result files."""
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
            peaks = peaks or ceilings(device, {case.dtype for cases in planned.values() for case in cases})
        aside += [path for path in [file.begin(spec.name, facts, peaks)] if path]
    for path in aside:
        console.print(f"results of another commit, machine or choice are now in {path}")
    for name, peak in next(iter(files.values())).ceilings.items():
        unit, size = ("GB/s copy", 1e9) if name == "bytes" else (f"TFLOP/s {name.removeprefix('torch.')}", 1e12)
        console.print(f"ceiling, measured: {peak / size:.2f} {unit}")

    left = [(spec, case) for spec in specs for case in planned[spec.name] if str(case) not in files[spec.name].cases]
    total = sum(map(len, planned.values()))
    if len(left) < total:
        console.print(f"{total - len(left)} of {total} cases are there already")
    took: dict[str, list[float]] = {spec.name: [] for spec in specs}
    with tqdm(total=total, initial=total - len(left), unit="case", bar_format=_BAR, leave=False) as bar:
        while chosen := next_case(left, took, remaining := deadline - time.perf_counter()):
            spec, case = chosen
            bar.set_description(f"{remaining / 60:.1f} min left, {spec.name} {case}"[:60])
            request = Request(
                device, files[spec.name].ceilings, seconds_of(spec, left, remaining), tuple(options.mode),
                tuple(options.provider),
            )  # fmt: skip
            began = time.perf_counter()
            rows = spec.measure(case, request)
            took[spec.name].append(time.perf_counter() - began)
            left.remove(chosen)
            state = gpu_state() if device == "cuda" else {}
            files[spec.name].add(str(case), [row | state for row in rows])
            with console.capture() as capture:
                console.print(tables.terminal(files[spec.name].cases[str(case)], spec.columns))
            tqdm.write(capture.get())
            bar.update()
    if left:
        console.print(f"out of time, {len(left)} cases are left: the same command goes on with them")
    for spec in specs:
        rows = files[spec.name].rows
        if rows:
            console.print(f"{spec.name}: {spec.summary(rows)}", highlight=False)
            console.print(f"plot: {spec.plot(rows, where(facts), files[spec.name].path.with_suffix('.png'))}")
    return [file.path for file in files.values()]


_BAR = "{desc} |{bar}| {n_fmt}/{total_fmt}, {elapsed}"


def asked_for(spec: OpSpec, device: str, options: argparse.Namespace) -> list:
    """The op's cases that were asked for, what matters most first."""
    return [
        case for case in spec.cases(device)
        if options.dtype in (None, str(case.dtype).removeprefix("torch."))
        and (not options.case or any(part in str(case) for part in options.case))
    ]  # fmt: skip


def next_case(
    left: list[tuple[OpSpec, object]], took: dict[str, list[float]], remaining: float
) -> tuple[OpSpec, object] | None:
    """Of the op that has had the least of its share, so that all are there if time runs out; None if that is so: if
    what remains is less than the longest case of each op took, or nothing."""
    fits = [(spec, case) for spec, case in left if remaining > max(took[spec.name], default=0.0)]
    return min(fits, key=lambda one: sum(took[one[0].name]) / one[0].share, default=None)


def seconds_of(spec: OpSpec, left: list[tuple[OpSpec, object]], remaining: float) -> float:
    """Of the op's next case: its part of what remains, by its share among the ops that are left, over its cases."""
    shares = {other.name: other.share for other, _ in left}
    cases = sum(1 for other, _ in left if other is spec)
    return remaining * spec.share / sum(shares.values()) / cases


def slug(facts: dict[str, str]) -> str:
    return facts.get("gpu", "cpu").replace(" ", "_")
