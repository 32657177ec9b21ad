"""The command: tables of predicted times; or predicted beside measured, so that one sees who is away from its model."""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from ..registry import BACKWARD, BOTH, FORWARD, STEP
from ..resultfile import ResultFile
from ..sparse_providers import ACCELERATED, SHIRA
from ..specs import SPECS
from ..tables import short
from . import lora_launches, sparse_launches
from .ceilings import PUBLISHED, ceilings_of_file, ceilings_of_gpu
from .launches import Ceilings, timed
from .predict import LORA_OPS, OPS, floor_us, launches_of, predicted

WIDTH = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--gpu", choices=[*PUBLISHED], default="h200", help="predict times on this (default: h200)")
    source.add_argument("--results", type=Path, help="a result file: predicted beside measured, by its ceilings")
    parser.add_argument("--op", choices=OPS, help="only this")
    parser.add_argument("--case", action="append", default=[], help="only those with this in their name (repeatable)")
    parser.add_argument("--launches", metavar="PROVIDER", help="what this one launches, instead of times")


def main(options: argparse.Namespace) -> None:
    console = Console(width=WIDTH)
    if options.results:
        file = ResultFile(options.results)
        if file.op not in OPS or not file.ceilings:
            sys.exit(f"expected results of {', '.join(OPS)} with their ceilings, got {file.op or 'none'}")
        for title, found in beside_measured(file, options.case):
            show(console, title, found)
        return
    ceilings = ceilings_of_gpu(options.gpu)
    console.print(described(options.gpu, ceilings), highlight=False)
    cases = [(op, case) for op in ([options.op] if options.op else OPS) for case in chosen(op, options.case)]
    if not cases:
        sys.exit(f"expected a case with {' or '.join(options.case)} in its name, got none")
    if options.launches:
        cases = [(op, case) for op, case in cases if launches_of(op, case, options.launches, ceilings)]
        if not cases:
            sys.exit(f"expected a provider that these cases have a model of, got {options.launches!r}")
    for op, case in cases:
        made = launches(op, case, options.launches, ceilings) if options.launches else times(op, case, ceilings)
        show(console, f"PREDICTED for {options.gpu}, not measured: {op}: {case}", made)


def show(console: Console, title: str, found: Table) -> None:
    console.print(title, style="italic", highlight=False)  # a table's own title would be cut to its width
    console.print(found)


def described(gpu: str, ceilings: Ceilings) -> str:
    source = "measured" if gpu == "h200" else "published peaks, less what an H200 was measured to fall short of its own"
    return (
        f"{gpu}: {ceilings['torch.bfloat16'] / 1e12:.0f} TFLOP/s bfloat16, {ceilings['bytes'] / 1e12:.2f} TB/s copy "
        f"({source}); {ceilings['gap_us']} µs between two launches (assumed)"
    )


def chosen(op: str, parts: list[str]) -> list:
    """Cases of a GPU with one of these in their name; else those of the reference shape that come first."""
    cases = SPECS[op].cases("cuda")
    if parts:
        return [case for case in cases if any(part in str(case) for part in parts)]
    return cases[:2] if op in LORA_OPS else [case for case in cases if case.shape == cases[0].shape][:4]


def names(op: str, case: object) -> list[str]:
    """Providers that have a model of this case."""
    if op in LORA_OPS:
        return [name for name in (*lora_launches.PROVIDERS, *lora_launches.DESIGNS) if name != "ours, reference"]
    return [name for name in sparse_launches.PROVIDERS if case.pattern.r or name not in (SHIRA, ACCELERATED)]


def times(op: str, case: object, ceilings: Ceilings) -> Table:
    """µs of each mode, then the longest one's over the bare linear's and over the floor."""
    modes = (FORWARD, BACKWARD, BOTH) if op in LORA_OPS else (FORWARD, BOTH, STEP)
    last, body, bare = modes[-1], [], 0.0
    for name in names(op, case):
        found = [predicted(op, case, name, mode, ceilings) for mode in modes]
        if found[-1] is None:
            continue
        bare = bare or found[-1]  # which is the first
        ratios = found[-1] / bare, found[-1] / floor_us(op, case, last, ceilings)
        if op in LORA_OPS and name in lora_launches.DESIGNS:
            name = f"({name})"
        body.append([name, *(short("_us", µs) for µs in found), *(f"{ratio:.2f}" for ratio in ratios)])
    made = table(["", *modes, "× bare", "× floor"], body)
    made.caption = "(…): a design, no provider of the benchmark" if op in LORA_OPS else None
    return made


def launches(op: str, case: object, provider: str, ceilings: Ceilings) -> Table:
    """What a provider launches, in order."""
    passes, body = launches_of(op, case, provider, ceilings), []
    for mode, part in ((FORWARD, 0), (BACKWARD, 1), ("update", 2)):
        for launch, limit, µs in timed(passes[part], case.dtype, ceilings):
            sizes = f"{launch.flops / 1e9:.2f}", f"{launch.read / 1e6:.2f}", f"{launch.written / 1e6:.2f}"
            body.append([mode, launch.name, *sizes, short("_us", µs), limit])
    head = ["", "launch", "GFLOP", "MB read", "written", "time", "limited by"]
    return table(head, body, texts=2)


def beside_measured(file: ResultFile, parts: list[str]) -> list[tuple[str, Table]]:
    """A title and a table a case, of its longest mode; and those of all of them by provider."""
    ceilings, mode = ceilings_of_file(file), SPECS[file.op].modes[-1]
    ratios: dict[str, list[float]] = {}
    made = []
    for case, rows in file.cases.items():
        if parts and not any(part in case for part in parts):
            continue
        body = []
        for row in rows:
            if row.get("mode") != mode:
                continue
            guess = predicted(file.op, row, row["provider"], mode, ceilings)
            ratio = row["p50_us"] / guess if guess else None
            if ratio:
                ratios.setdefault(row["provider"], []).append(ratio)
            body.append([row["provider"], short("_us", row["p50_us"]), short("_us", guess), short("", ratio)])
        if body:
            title = f"measured beside PREDICTED, {mode}: {file.op}: {case}"
            made.append((title, table(["", "measured", "predicted", "measured / predicted"], body)))
    body = [
        [name, str(len(found)), *(short("", value) for value in (min(found), statistics.median(found), max(found)))]
        for name, found in ratios.items()
    ]
    title = f"measured / PREDICTED, {mode}, over the cases of {file.op}"
    return [*made, (title, table(["", "cases", "least", "median", "most"], body))]


def table(head: list[str], body: list[list[str]], texts: int = 1) -> Table:
    """`texts`: how many columns from the left are words."""
    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), caption_justify="left")
    for number, heading in enumerate(head):
        made.add_column(heading, justify="left" if number < texts else "right")
    for cells in body:
        made.add_row(*cells)
    return made
