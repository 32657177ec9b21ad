"""`python -m benchmarks kernels`: what a LoRA layer launches on a GPU, kernel by kernel, measured beside predicted.

Times are the profiler's, of forward + backward from a cold L2 cache; each is the median over rounds, as is the gap
before it, which is negative where a kernel starts before the one before it has ended. Where as many kernels run as the
model of `benchmarks/model` says, each stands beside its launch: what it should take, and by its FLOPs and bytes what it
reached. `--once` runs the layer and nothing else, for a profiler around the whole command:

    ncu --clock-control none --set full -o gemm python -m benchmarks kernels --once
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from . import lora
from .measure import ceilings
from .model import completed, launches_of
from .model.launches import Launch, timed
from .providers import all_providers
from .tables import short

ROUNDS = 20
WIDTH = 100


class Event(NamedTuple):
    """A kernel, copy or fill on the GPU, in µs."""

    name: str
    start: float
    end: float


class Row(NamedTuple):
    """A kernel of a layer, or several that run beside each other, in µs; `launch` is the model's, if it has one."""

    name: str
    time: float
    gap: float
    launch: Launch | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [spec.name for spec in lora.SPECS]
    parser.add_argument("--op", choices=names, default=names[0], help=f"default: {names[0]}")
    parser.add_argument("--case", action="append", default=[], help="with this in its name (default: the first)")
    parser.add_argument("--provider", action="append", default=[], help='with this in its name (default: "ours, cuda")')
    parser.add_argument("--once", action="store_true", help="only run each once, for another profiler")


def main(options: argparse.Namespace) -> None:
    if not torch.cuda.is_available():
        sys.exit("expected a CUDA GPU that torch can use, got none")
    cases = next(spec for spec in lora.SPECS if spec.name == options.op).cases("cuda")
    cases = [case for case in cases if any(part in str(case) for part in options.case)] if options.case else cases[:1]
    wanted = options.provider or ["ours, cuda"]
    providers = [one for one in all_providers("cuda") if any(part.lower() in one.name.lower() for part in wanted)]
    if not cases or not providers:
        sys.exit(f"expected a case and a provider of these names, got {len(cases)} and {len(providers)}")
    console, rates = Console(width=WIDTH), {}
    for case in cases:
        if not options.once and str(case.dtype) not in rates:
            rates |= ceilings("cuda", {case.dtype})
        for provider in providers:
            why = lora.why_not(provider, case)
            if why:
                console.print(f"{provider.name} on {case}: not here: {why}", highlight=False)
                continue
            call = provider.build(lora.make_inputs(case, "cuda")).both
            call()
            if options.once:
                continue
            known = completed(rates, torch.cuda.get_device_name())
            passes = launches_of(options.op, case, provider.name, known)
            launches = [*passes.forward, *passes.backward] if passes else []
            found = by_round(call, ROUNDS)
            console.print(f"{provider.name} on {case}", highlight=False)
            console.print(table(rows(found, launches), span(found), case.dtype, known))


def by_round(call: Callable[[], object], rounds: int) -> list[list[Event]]:
    """Return what runs on the GPU in each round, in the order of its start."""
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(rounds):
            flush.zero_()
            call()
        torch.cuda.synchronize()
    events = [
        Event(event.name(), event.start_ns() / 1e3, (event.start_ns() + event.duration_ns()) / 1e3)
        for event in profile.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    ]
    events.sort(key=lambda event: event.start)
    number, left_over = divmod(len(events), rounds)
    if left_over:
        raise RuntimeError(f"expected as many kernels in each of {rounds} rounds, got {len(events)} in all")
    return [events[start + 1 : start + number] for start in range(0, len(events), number)]  # without the flush


def rows(found: Sequence[Sequence[Event]], launches: Sequence[Launch] = ()) -> list[Row]:
    """Take medians over the rounds by position. Launches are named where as many kernels ran as they are made of."""
    kernels = len(found[0])
    if sum(launch.kernels for launch in launches) != kernels:
        launches = [None] * kernels
    result, begin = [], 0
    for launch in launches:
        end = begin + (launch.kernels if launch else 1)
        times, gaps = [], []
        for events in found:
            before = max((event.end for event in events[:begin]), default=events[0].start)
            gaps.append(events[begin].start - before)
            times.append(max(event.end for event in events[begin:end]) - events[begin].start)
        name = " + ".join(event.name for event in found[0][begin:end])
        result.append(Row(name, statistics.median(times), statistics.median(gaps), launch))
        begin = end
    return result


def span(found: Sequence[Sequence[Event]]) -> float:
    """Return µs from the first start to the last end, as the median over the rounds."""
    return statistics.median(max(event.end for event in events) - events[0].start for events in found)


def table(found: Sequence[Row], whole: float, dtype: torch.dtype, rates: dict[str, float]) -> Table:
    """Make a table of the kernels. `whole`: µs of all, gaps among them."""
    made = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    made.add_column("kernel", overflow="ellipsis", no_wrap=True, max_width=30)
    for heading in ("gap", "time", "predicted", "×", "TFLOP/s", "GB/s"):
        made.add_column(heading, justify="right")
    made.add_column("what")
    known = [row.launch for row in found if row.launch]
    # The model counts what a kernel reads from the L2 cache. The gap is a column of its own.
    predicted = iter([µs for _, _, µs in timed(known, dtype, rates | {"gap_us": 0.0})])
    for row in found:
        cells = [row.name, short("_us", row.gap), short("_us", row.time)]
        if launch := row.launch:
            expected = next(predicted)
            reached = launch.flops / row.time / 1e6, (launch.read + launch.written) / row.time / 1e3
            cells += [short("_us", expected), short("", row.time / expected), *(f"{rate:.0f}" for rate in reached)]
            cells.append(launch.name)
        made.add_row(*cells)
    made.add_section()
    made.add_row("all, with gaps", "", short("_us", whole))
    return made
