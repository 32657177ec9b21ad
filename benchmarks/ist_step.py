"""The op `ist_step`, whole training steps: LoRA and IST on plain PEFT, and both of ours, by turns on one frozen model.

SmolLM2-135M on the CPU, layers of Llama-3-8B's shapes on a GPU. Every provider trains adapters of its own by AdamW, on
a base that all share; the settings are the IST paper's.

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
bytes are carried there in the same way, from two forwards. Importance is nearly flat here, as at the start of a
training; later the depth depends on what is trained.

Peak memory is a GPU's, of steps and loops, without what the other providers keep there. On the CPU one process cannot
tell it apart: there is none.
"""

from __future__ import annotations

import functools
import random
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from . import plots
from .guard import Guard, failures
from .ist_providers import (
    ACCELERATED,
    AT_LABELS,
    AUTHORS,
    BUDGET,
    CHECKPOINTED,
    HALF,
    LIGER,
    LORA,
    OURS,
    PARTS,
    Case,
    Lane,
    at_depth,
    check,
    load,
    make_lanes,
    parts_of,
    saved_at,
    why_no_liger,
)
from .measure import quantile
from .registry import STEP, OpSpec, Part, Request
from .resultfile import Row

LABELLED = {"labels everywhere": 1.0, "labels on a quarter": 0.25}  # share of a row's positions
INTERVAL, EXAMPLES = 10, 16  # the importance loop's
DRAWS = 500

#: (ms, depth of backward) of each (lane, "step"), (lane, "loop") and (part, "part"); the depth counts for steps only.
Times = dict[tuple[str, str], list[tuple[float, int]]]


class Setting(NamedTuple):
    """A setting of the benchmark: a share of a row's positions carries labels.

    Attributes:
        tokens: the length of a row.
        tiny: whether the model is a tiny random Llama.
    """

    name: str
    labelled: float
    dtype: torch.dtype
    tokens: int
    tiny: bool = False

    def __str__(self) -> str:
        return self.name


def cases(device: str) -> list[Setting]:
    dtype, tokens = (torch.bfloat16, 512) if device == "cuda" else (torch.float32, 64)
    return [Setting(name, share, dtype, tokens) for name, share in LABELLED.items()]


@functools.cache
def prepared(
    device: str, tokens: int, tiny: bool, guard: Guard
) -> tuple[Case, list[Lane], dict[str, float], list[Row]]:
    """Prepare a model for all settings, with its providers, the mean depth of each one's backward in layers, and rows
    of those that are wrong or failed."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # libraries' about each other
    case = load(device, tokens, tiny)
    lanes, wrong = make_lanes(case.base, guard), {}
    for labelled in LABELLED.values():
        wrong |= check(lanes, case, labelled, guard)
        lanes = [lane for lane in lanes if lane.name not in wrong | guard.failed]
    depths = {lane.name: statistics.fmean(lane.choose() for _ in range(DRAWS)) for lane in lanes}
    if device == "cuda":  # its first calls choose configurations, and our estimator a path
        for number in range(5):
            for lane in lanes:
                with guard(lane.name):
                    lane.step(case.batch(number, case.rows, 1.0))
                    if lane.ist:
                        lane.loop(case.batch(number, EXAMPLES, 1.0))
    faults: list[Row] = [{"provider": name, "error": why} for name, why in wrong.items()] + failures(guard)
    faults += [{"provider": name, "skipped": why} for name, why in guard.without.items()]
    return case, [lane for lane in lanes if lane.name not in guard.failed], depths, faults


def measure(setting: Setting, request: Request, most: int = 60) -> list[Row]:
    """Measure a row a provider, one more for the budget with the loop half as often, and the parts of a step."""
    began = time.perf_counter()
    guard = request.guard
    case, lanes, depths, faults = prepared(request.device, setting.tokens, setting.tiny, guard)
    guard.failed = {}  # those are among `faults`
    lanes = [lane for lane in lanes if request.wants(lane.name) or lane.name in (LORA, AUTHORS, ACCELERATED)]
    batch = case.batch(0, case.rows, setting.labelled)
    saved = {}
    for lane in lanes:
        with guard(lane.name):
            saved[lane.name] = saved_at(lane, batch, depths[lane.name])
    lanes = [lane for lane in lanes if lane.name in saved]
    seconds = request.seconds - (time.perf_counter() - began)
    times = interleave(lanes, case, setting.labelled, seconds, most, setting.name, guard)
    lanes = [lane for lane in lanes if lane.name not in guard.failed]
    rows, parts = summarize(lanes, times, depths, saved, batch["input_ids"].numel())
    facts = {"model": case.name, "dtype": str(setting.dtype).removeprefix("torch.")}
    rows += [{"provider": PARTS, "parts_us": parts}, *faults, *failures(guard)]
    return [facts | row for row in rows]


def interleave(
    lanes: list[Lane], case: Case, labelled: float, seconds: float, most: int, setting: str, guard: Guard
) -> Times:
    """Run rounds for about `seconds`, at most `most`, and scale their times to the usual speed. On a GPU also note the
    peak memory of the lanes. A lane or part that fails is not among the times."""
    began, lane_of, gpu = time.perf_counter(), {lane.name: lane for lane in lanes}, case.base.device.type == "cuda"
    examples, parts = case.batch(1, EXAMPLES, labelled), parts_of(lanes[0], (case.rows, case.text.shape[1]))
    calls: dict[tuple[str, str], Callable] = {(lane.name, "step"): lane.step for lane in lanes}
    calls |= {(lane.name, "loop"): lambda _, loop=lane.loop: loop(examples) for lane in lanes if lane.ist}
    calls |= {(part, "part"): call for part, call in parts.items() if part not in guard.without}
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
                with guard(key[0]):
                    held = lane.held_bytes() if lane else 0
                    elapsed, depth, grown = clock(lambda call=calls[key], batch=batch: call(batch), gpu)
                    took[key] = elapsed, depth
                    if lane:
                        lane.peak = max(lane.peak, held + grown)
                bar.n = min(bar.total, time.perf_counter() - began)
                bar.set_description(f"{setting}, round {number}")
            calls = {key: call for key, call in calls.items() if key[0] not in guard.failed}
            rounds.append({key: found for key, found in took.items() if key in calls})
    rounds = [{key: found for key, found in took.items() if key in calls} for took in rounds]
    usual = {key: statistics.median(took[key][0] for took in rounds) for key in calls if key[1] == "step"}
    times: Times = {key: [] for key in calls}
    for took in rounds:
        speed = statistics.median(ms / took[key][0] for key, ms in usual.items()) if usual else 1.0
        for key, (elapsed, depth) in took.items():
            times[key].append((elapsed * speed, depth))
    return times


def clock(call: Callable[[], int], gpu: bool) -> tuple[float, int, int]:
    """Return milliseconds, the call's result, and on a GPU the bytes that it took at its peak beyond those before."""
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
) -> tuple[list[Row], dict[str, float]]:
    """Return a row a provider, one more for the budget with the loop half as often, and the parts of a step in µs."""
    middle = {key: 1e3 * statistics.median(ms for ms, _ in values) for key, values in times.items()}
    rows: list[Row] = []
    for lane in lanes:
        steps = [1e3 * ms for ms in at_depth(times[lane.name, "step"], depths[lane.name])]
        step, loop = statistics.median(steps), middle.get((lane.name, "loop"), 0.0)
        row: Row = {
            "provider": lane.name, "mode": STEP, "interval": INTERVAL, "p20_us": quantile(steps, 0.2), "p50_us": step,
            "p80_us": quantile(steps, 0.8), "rounds": len(steps), "loop_us": loop or None,
            "tokens_per_s": 1e6 * tokens / (step + loop / INTERVAL),
            "backward_skipped_share": 1 - depths[lane.name] / len(lane.blocks),
            "saved_bytes": saved[lane.name][0], "saved_in_layers_bytes": saved[lane.name][1],
            "peak_bytes": lane.peak or None,
        }  # fmt: skip
        rows.append(row)
        if lane.name == BUDGET:
            half = {"provider": HALF, "interval": 20, "tokens_per_s": 1e6 * tokens / (step + loop / 20)}
            rows.append(row | half)
    speed = {row["provider"]: row["tokens_per_s"] for row in rows}
    for row in rows:
        for key, reference in (("of_authors", AUTHORS), ("of_lora", LORA)):
            row[key] = row["tokens_per_s"] / speed[reference] if reference in speed else None
    return rows, {name: us for (name, what), us in middle.items() if what == "part"}


COLUMNS = {
    "loop": "loop_us", "tokens\n/s": "tokens_per_s", "×\nauthors": "of_authors", "×\nLoRA": "of_lora",
    "back\nskipped": "backward_skipped_share", "saved\nMiB": "saved_bytes", "…in\nlayers": "saved_in_layers_bytes",
    "peak\nMiB": "peak_bytes",
}  # fmt: skip


def summary(rows: list[Row]) -> str:
    """Say what part of a step the kernels do not touch, and what speed that leaves possible."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        of_case = {row["provider"]: row for row in rows if row["case"] == case and ("mode" in row or "parts_us" in row)}
        if not {PARTS, ACCELERATED, LORA} <= of_case.keys() or len(of_case[PARTS]["parts_us"]) < 3:
            continue
        linears, frozen, head = (us / 1e3 for us in of_case[PARTS]["parts_us"].values())
        accelerated, lora = (of_case[name]["p50_us"] / 1e3 for name in (ACCELERATED, LORA))
        rest = accelerated - linears - head
        lines.append(
            f"{case}: an accelerated step of all layers, {accelerated:.0f} ms: adapted linears {linears:.0f} (their "
            f"frozen weights alone {frozen:.0f}), lm_head and loss {head:.0f}, attention, norms, other linears and the "
            f"optimizer {rest:.0f}. With adapters for nothing it would be {lora / (frozen + head + rest):.2f} × as "
            f"fast as PEFT's, with adapted linears for nothing {lora / (head + rest):.2f} ×."
        )
    return "\n".join(lines)


def providers(device: str) -> dict[str, str | None]:
    names = (LORA, AUTHORS, ACCELERATED, OURS, AT_LABELS, BUDGET)
    found: dict[str, str | None] = dict.fromkeys((*names, CHECKPOINTED) if device == "cuda" else names)
    return found | {LIGER: why_no_liger(device)}


def part_of(setting: Setting, device: str) -> list[Part]:
    """On a GPU come after the single layers: this has a model of its own, of which every provider takes seconds."""
    return [Part(stage=2, least=60.0) if device == "cuda" else Part()]


def plot(rows: list[Row], where: str, path: Path) -> Path:
    return plots.draw_steps([row for row in rows if "mode" in row], where, path)


SPEC = OpSpec(
    "ist_step", "whole training steps: LoRA and IST on PEFT and on ours", (STEP,), cases, providers, measure, COLUMNS,
    summary, plot, share=4.0, parts=part_of,
)  # fmt: skip
