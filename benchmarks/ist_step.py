"""Whole training steps: LoRA and IST on plain PEFT, and both of ours, by turns on one frozen model.

    python -m benchmarks.ist_step                # SmolLM2-135M on the CPU, layers of Llama-3-8B's shapes on a GPU
    python -m benchmarks.ist_step --tiny         # a model of nothing: does it run?

Every provider trains adapters of its own by AdamW, on a base that all share; the settings are the IST paper's.

How a number comes about. First, those that must agree are compared: loss and gradients of the accelerated model and of
PEFT's, with all layers and with one drawn set of them, and what the importance loops find. Then rounds: each provider
makes one step, in an order drawn anew. How fast the machine was in a round is the median over providers of usual time /
time, and all its times are multiplied by that, so that a slow phase meets all alike. Steps leave the importance loop
out; every third round times it by itself, and the parts of a step.

What a step of IST costs is mostly the depth of its backward, L - lowest layer drawn. A few dozen steps do not average
that out, so the mean is not left to luck: a line through (depth, time), whose slope is the median of all pairs',
carries each time to the expected depth, found by `DRAWS` draws; of these the median is reported, and the distance of
their 20 and 80 % quantiles as the spread of the measurement. Without draws that is the plain median. It is exact as far
as time is linear in depth; where layers beyond a budget are checkpointed, time bends, and it is an approximation. Saved
bytes are carried there in the same way, from a few forwards. Importance is nearly flat here, as at the start of a
training; later the depth depends on what is trained.

Peak memory is a GPU's, of steps and loops, without what the other providers keep there. On the CPU one process cannot
tell it apart: there is none.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from . import plots
from .ist_providers import (
    ACCELERATED,
    AUTHORS,
    BUDGET,
    LORA,
    Case,
    Lane,
    at_depth,
    check,
    load,
    make_lanes,
    parts_of,
    saved_at,
)
from .measure import machine, quantile, write

LABELLED = {"labels everywhere": 1.0, "labels on a quarter": 0.25}  # share of a row's positions
INTERVAL, EXAMPLES = 10, 16  # of the importance loop
DRAWS = 500

#: (ms, depth of backward) of each (lane, "step"), (lane, "loop") and (part, "part"); the depth counts for steps only.
Times = dict[tuple[str, str], list[tuple[float, int]]]


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries about each other
    deadline, console = time.perf_counter() + 60 * options.minutes, Console(width=100)
    facts, case = machine(options.device), load(options.device, options.tokens, options.tiny)
    where = facts.get("gpu", facts["cpu"])
    console.print(f"{case.name}, text of Python's help, PEFT {facts['peft']}, {where}")
    lanes = make_lanes(case.base)
    for setting, labelled in LABELLED.items():
        console.print(f"relative differences, {setting}: {check(lanes, case, labelled)}")
    depths = {lane.name: statistics.fmean(lane.choose() for _ in range(DRAWS)) for lane in lanes}
    if options.device == "cuda":  # its first calls choose configurations, and our estimator a way
        for number in range(5):
            for lane in lanes:
                lane.step(case.batch(number, case.rows, 1.0))
                if lane.ist:
                    lane.loop(case.batch(number, EXAMPLES, 1.0))
    rows, parts, stem = [], {}, f"ist_step_{facts.get('gpu', 'cpu').replace(' ', '_')}"
    for number, (setting, labelled) in enumerate(LABELLED.items()):
        batch = case.batch(0, case.rows, labelled)
        saved = {lane.name: saved_at(lane, batch, depths[lane.name]) for lane in lanes}
        seconds = (deadline - time.perf_counter()) / (len(LABELLED) - number)
        times = interleave(lanes, case, labelled, seconds, options.rounds, setting)
        found, parts[setting] = summarize(lanes, times, depths, saved, batch["input_ids"].numel())
        rows += [{"setting": setting} | row for row in found]
        console.print(table(f"{setting}, {found[0]['rounds']} rounds", found))
        console.print(bounds(found, parts[setting]))
        write({"machine": facts, "case": case.name, "rows": rows, "parts_ms": parts}, options.out, stem)
    plot = plots.draw_steps(rows, f"{case.name}, {where}", options.out / f"{stem}.png")
    console.print(f"{len(rows)} rows and their plot: {plot}")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.add_argument("--minutes", type=float, default=6.0, help="time budget; three rounds are made in any case")
    parser.add_argument("--rounds", type=int, default=60, help="at most so many for each of the two settings")
    parser.add_argument("--tokens", type=int, help="of a row (CPU: 64, GPU: 512)")
    parser.add_argument("--tiny", action="store_true", help="a tiny random Llama")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output")
    options = parser.parse_args(arguments)
    options.device = "cuda" if torch.cuda.is_available() and not options.cpu else "cpu"
    options.tokens = options.tokens or (512 if options.device == "cuda" else 64)
    return options


def interleave(lanes: list[Lane], case: Case, labelled: float, seconds: float, most: int, setting: str) -> Times:
    """Rounds for about `seconds`, at most `most`, scaled to the usual one's speed. On a GPU also notes what memory the
    lanes took at their peak."""
    began, lane_of, gpu = time.perf_counter(), {lane.name: lane for lane in lanes}, case.base.device.type == "cuda"
    examples, parts = case.batch(1, EXAMPLES, labelled), parts_of(lanes[0], (case.rows, case.text.shape[1]))
    calls: dict[tuple[str, str], Callable] = {(lane.name, "step"): lane.step for lane in lanes}
    calls |= {(lane.name, "loop"): lambda _, loop=lane.loop: loop(examples) for lane in lanes if lane.ist}
    calls |= {(part, "part"): call for part, call in parts.items()}
    rounds: list[dict[tuple[str, str], tuple[float, int]]] = []
    order = random.Random(0)
    with tqdm(total=max(1, round(seconds)), bar_format="{desc} |{bar}| {n:.0f}/{total} s") as bar:
        for number in range(most):
            if number >= 3 and time.perf_counter() - began > seconds:
                break
            batch, took = case.batch(number, case.rows, labelled), {}
            keys = [key for key in calls if key[1] == "step" or number % 3 == 0]
            for key in order.sample(keys, len(keys)):
                lane = lane_of.get(key[0])
                held = lane.held_bytes() if lane else 0
                elapsed, depth, grown = clock(lambda call=calls[key], batch=batch: call(batch), gpu)
                took[key] = elapsed, depth
                if lane:
                    lane.peak = max(lane.peak, held + grown)
                bar.n = min(bar.total, time.perf_counter() - began)
                bar.set_description(f"{setting}, round {number}")
            rounds.append(took)
    usual = {key: statistics.median(took[key][0] for took in rounds) for key in calls if key[1] == "step"}
    times: Times = {key: [] for key in calls}
    for took in rounds:
        speed = statistics.median(ms / took[key][0] for key, ms in usual.items())
        for key, (elapsed, depth) in took.items():
            times[key].append((elapsed * speed, depth))
    return times


def clock(call: Callable[[], int], gpu: bool) -> tuple[float, int, int]:
    """Milliseconds, what the call returned, and on a GPU the bytes it took at its peak beyond those it found taken."""
    if not gpu:
        began = time.perf_counter()
        depth = call()
        return 1e3 * (time.perf_counter() - began), depth, 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    found, began = torch.cuda.memory_allocated(), time.perf_counter()
    depth = call()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began), depth, torch.cuda.max_memory_allocated() - found


def summarize(
    lanes: list[Lane], times: Times, depths: dict[str, float], saved: dict[str, tuple[float, float]], tokens: int
) -> tuple[list[dict], dict[str, float]]:
    """A row a provider, one more for the budget with the loop half as often, and the parts of a step in ms."""
    middle = {key: statistics.median(ms for ms, _ in values) for key, values in times.items()}
    rows = []
    for lane in lanes:
        steps = at_depth(times[lane.name, "step"], depths[lane.name])
        step, loop = statistics.median(steps), middle.get((lane.name, "loop"), 0.0)
        row = {
            "provider": lane.name, "interval": INTERVAL, "step_ms": step, "step_p20_ms": quantile(steps, 0.2),
            "step_p80_ms": quantile(steps, 0.8), "loop_ms": loop,
            "tokens_per_s": 1e3 * tokens / (step + loop / INTERVAL),
            "tokens_per_s_interval_20": 1e3 * tokens / (step + loop / 20),
            "backward_skipped": 1 - depths[lane.name] / len(lane.blocks), "saved_mib": saved[lane.name][0],
            "saved_in_layers_mib": saved[lane.name][1], "peak_gib": lane.peak / 2**30 if lane.peak else None,
            "rounds": len(steps),
        }  # fmt: skip
        rows.append(row)
        if lane.name == BUDGET:
            changed = {"provider": "  with loop every 20", "interval": 20}
            rows.append(row | changed | {"tokens_per_s": row["tokens_per_s_interval_20"]})
    speed = {row["provider"]: row["tokens_per_s"] for row in rows}
    for row in rows:
        row |= {"of_authors": row["tokens_per_s"] / speed[AUTHORS], "of_lora": row["tokens_per_s"] / speed[LORA]}
    return rows, {name: ms for (name, what), ms in middle.items() if what == "part"}


def table(title: str, rows: list[dict]) -> Table:
    result = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    headings = (
        "", "step\nms", "spread", "loop\nms", "tokens/s", "×\nauthors", "×\nLoRA", "back\nskipped", "saved\nMiB",
        "…in\nlayers", "peak\nGiB",
    )  # fmt: skip
    for heading in headings:
        result.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in rows:
        spread = (row["step_p80_ms"] - row["step_p20_ms"]) / row["step_ms"]
        result.add_row(
            row["provider"], f"{row['step_ms']:.0f}", f"{spread:.0%}",
            f"{row['loop_ms']:.0f}" if row["loop_ms"] else "–", f"{row['tokens_per_s']:.0f}",
            f"{row['of_authors']:.2f}", f"{row['of_lora']:.2f}", f"{row['backward_skipped']:.0%}",
            f"{row['saved_mib']:.0f}", f"{row['saved_in_layers_mib']:.0f}",
            f"{row['peak_gib']:.1f}" if row["peak_gib"] else "–",
        )  # fmt: skip
    return result


def bounds(rows: list[dict], parts: dict[str, float]) -> str:
    """What of a step the kernels do not touch, and how far that lets them go."""
    steps = {row["provider"]: row["step_ms"] for row in rows}
    linears, frozen, head = parts.values()
    rest = steps[ACCELERATED] - linears - head
    return (
        f"an accelerated step of all layers, {steps[ACCELERATED]:.0f} ms: adapted linears {linears:.0f} (their frozen "
        f"weights alone {frozen:.0f}), lm_head and loss {head:.0f}, attention, norms, other linears and the optimizer "
        f"{rest:.0f}. With adapters for nothing it would be {steps[LORA] / (frozen + head + rest):.2f} × as fast as "
        f"PEFT's, with adapted linears for nothing {steps[LORA] / (head + rest):.2f} ×."
    )


if __name__ == "__main__":
    main()
