"""Training a few entries of one linear layer's weight: ours, the peers' ways, and the bare linear.

    python -m benchmarks.sparse_delta            # the CPU grid, or the GPU's where there is a GPU
    python -m benchmarks.sparse_delta --tiny     # a layer of nothing: does it run?

A step is forward, backward (values' gradient and dx), AdamW and zero_grad. It is clocked at the end of each part, so
that one step gives three times: forward, forward + backward, whole. In every round each provider makes one step, right
after one that is not clocked, in an order drawn anew. Times are medians over rounds; ratios are medians over rounds of
values of the same round. The bare linear trains nothing: its step is forward and dx, and no layer can undercut it.

FLOPs: two a multiply-add of y, dx and the values' gradient, of the trained entries alone. Bytes, forward: x, W, y once;
backward: dy and W once, of x the columns with a trained entry, dx, the gradient and the layout; AdamW: the gradient
once, values and both moments read and written, W at the trained entries read and written. The floor is the larger of
FLOPs over the machine's measured matmul rate and bytes over its measured copy bandwidth.

Memory of training is W, what trains, the optimizer's state and what says which entries train (held between steps), and
what one step takes at its peak beyond that: gradients, output, temporaries. The inputs x and dy are a model's, and not
counted; what forward keeps for backward is counted apart, x among it.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import peft_kernels as pk
from peft_kernels.testing.sparse_delta import SparseCase

from . import plots
from .measure import Timer, ceilings, machine, quantile, write
from .sparse_providers import (
    ACCELERATED,
    BARE,
    DENSE,
    SHIRA,
    Lane,
    check,
    makers,
    peak_bytes,
    right_results,
    saved_bytes,
)

PARTS = ("forward", "forward_backward", "step")
COMPARED = {"bare": BARE, "dense": DENSE, "shira": SHIRA}
WARM_UP, LEAST = 1, 3  # rounds


class Shape(NamedTuple):
    """M tokens, K in_features, N out_features, dtype of x and W."""

    M: int
    K: int
    N: int
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")
        return f"M={self.M} {self.K}→{self.N} {dtype}"


@dataclass(frozen=True)
class Pattern:
    """Which entries train: a kind of layout and a density, or as many entries as SHiRA's rank r has: r·(K + N)."""

    kind: str
    density: float = 0.0
    r: int = 0

    def __str__(self) -> str:
        share = f"r={self.r}" if self.r else f"{self.density:.2g} %"
        return "2:4" if self.kind == "n_of_m" else f"{self.kind} {share}"


#: What the bars are about comes first, in case that time runs out.
PATTERNS = (
    Pattern("entries", 1.0), Pattern("columns", 1.0), Pattern("entries", r=4), Pattern("entries", r=32),
    Pattern("rows", 1.0), Pattern("blocks", 1.0), Pattern("entries", 0.1), Pattern("entries", 0.5),
    Pattern("entries", 5.0), Pattern("entries", 10.0), Pattern("rows", 5.0), Pattern("columns", 5.0),
    Pattern("blocks", 5.0), Pattern("n_of_m", 50.0),
)  # fmt: skip


def shapes(device: str) -> list[Shape]:
    if device == "cpu":
        features = [(576, 1536), (1536, 576), (2048, 2048)]
        return [*(Shape(512, K, N, torch.float32) for K, N in features), Shape(512, *features[0], torch.bfloat16)]
    features = [(4096, 4096), (4096, 14336), (14336, 4096)]
    large = [Shape(8192, K, N, torch.bfloat16) for K, N in features]
    return large + [Shape(M, *features[0], torch.bfloat16) for M in (16, 256)]


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    warnings.filterwarnings("ignore", message="Sparse invariant checks")  # of torch, about PEFT's tensors
    began, console = time.perf_counter(), Console(width=100)
    deadline, facts = began + 60 * options.minutes, machine(options.device)
    console.print(f"training a part of one weight, PEFT {facts['peft']}, {facts.get('gpu', facts['cpu'])}")
    found = [Shape(8, 128, 96, torch.float32)] if options.tiny else shapes(options.device)
    peaks = ceilings(options.device, {shape.dtype for shape in found})
    planned, rows = [(shape, pattern) for pattern in PATTERNS for shape in found], []
    stem = f"sparse_delta_{facts.get('gpu', 'cpu').replace(' ', '_')}"
    for index, (shape, pattern) in enumerate(tqdm(planned, unit="case")):
        seconds = (deadline - time.perf_counter()) / (len(planned) - index)
        if seconds <= 0:
            console.print(f"out of time: {len(planned) - index} cases left out, from {shape} {pattern} on")
            break
        rows += measure(shape, pattern, options.device, peaks, seconds, options.rounds)
        here = [row for row in rows if (row["shape"], row["pattern"]) == (str(shape), str(pattern))]
        with console.capture() as capture:
            console.print(table(f"{shape}, {pattern}, {here[0]['nnz']:,} values", here))
        tqdm.write(capture.get())
        write({"machine": facts, "ceilings": peaks, "rows": rows}, options.out, stem)
    console.print(summary(rows))
    plot = plots.draw_sparse(rows, facts.get("gpu", facts["cpu"]), options.out / f"{stem}.png")
    console.print(f"{len(rows)} rows and their plot: {plot}, {time.perf_counter() - began:.0f} s")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.add_argument("--minutes", type=float, default=5.0, help="time budget")
    parser.add_argument("--rounds", type=int, default=30, help="at most so many for each case; three are made anyway")
    parser.add_argument("--tiny", action="store_true", help="a tiny layer")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output")
    options = parser.parse_args(arguments)
    options.device = "cuda" if torch.cuda.is_available() and not options.cpu else "cpu"
    return options


def make_case(shape: Shape, pattern: Pattern, device: str, seed: int = 0) -> SparseCase:
    """Operands of order one and Δ as large as W, in float32 as every provider but one trains it."""
    M, K, N, dtype = shape
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device).mul_(scale).to(dtype)

    layout = make_layout(pattern, N, K, device, seed)
    values = normal(layout.nnz, scale=K**-0.5, dtype=torch.float32)
    weight, frozen = normal(N, K, scale=K**-0.5), ("weight", "bias")
    return SparseCase(normal(M, K), weight, values, layout, None, normal(M, N), frozen)


def make_layout(pattern: Pattern, N: int, K: int, device: str, seed: int = 0) -> pk.SparseLayout:
    if pattern.kind == "n_of_m":
        scores = torch.rand(N, K // 4, 4, generator=torch.Generator(device).manual_seed(seed), device=device)
        mask = torch.zeros_like(scores, dtype=torch.bool).scatter_(2, scores.topk(2).indices, True)
        return pk.SparseLayout.n_of_m(mask.view(N, K), 2, 4)
    side = 64 if device == "cuda" else 32
    units = {"entries": N * K, "rows": N, "columns": K, "blocks": N * K // side**2}[pattern.kind]
    return pk.sparse.random(
        {"weight": (N, K)}, count=pattern.r * (N + K) or max(1, round(pattern.density / 100 * units)), seed=seed,
        structure=pattern.kind, block=(side, side) if pattern.kind == "blocks" else None, device=device,
    )["weight"]  # fmt: skip


def flops(shape: Shape, nnz: int, part: str) -> int:
    M, K, N, _ = shape
    return 2 * M * N * K if part == "forward" else 4 * M * N * K + 2 * M * nnz


def bytes_moved(shape: Shape, layout: pk.SparseLayout, part: str) -> int:
    """The fewest, by the rules at the top; values, their gradient and moments are float32."""
    (M, K, N, dtype), nnz = shape, layout.nnz
    total = (M * K + N * K + M * N) * dtype.itemsize
    if part != "forward":
        columns = int(layout.mask().any(0).sum())
        total += (M * N + N * K + M * columns + M * K) * dtype.itemsize + layout.nbytes + 4 * nnz
    if part == "step":
        total += (1 + 2 * 3) * 4 * nnz + 2 * dtype.itemsize * nnz
    return total


def measure(
    shape: Shape, pattern: Pattern, device: str, peaks: dict[str, float], seconds: float, most: int
) -> list[dict]:
    """A row for each provider."""
    began, case = time.perf_counter(), make_case(shape, pattern, device)
    layout, dtype = case.layout, str(shape.dtype).removeprefix("torch.")
    facts = {
        "shape": str(shape), "pattern": str(pattern), **shape._asdict(), "dtype": dtype, "kind": layout.kind,
        "r": pattern.r, "density": layout.density, "nnz": layout.nnz,
    }  # fmt: skip
    lanes, wrong, results = [], [], right_results(case)
    for make in makers(device, shira=pattern.r > 0):
        lane = make(case)
        error = check(lane, *results)
        if error is None:
            lanes.append(make(case))
        else:
            wrong.append(facts | {"provider": lane.name, "error": error})
    del results
    rounds = interleave(lanes, device, seconds - (time.perf_counter() - began), most)
    floors = [
        1e3 * max(flops(shape, layout.nnz, part) / peaks[str(shape.dtype)],
                  bytes_moved(shape, layout, part) / peaks["bytes"])
        for part in PARTS
    ]  # fmt: skip
    rows = []
    for lane in lanes:
        row, times = facts | {"provider": lane.name, "error": None}, [took[lane.name] for took in rounds]
        for index, part in enumerate(PARTS):
            column = [clocked[index] for clocked in times]
            row |= {f"{part}_{q}_ms": quantile(column, int(q[1:]) / 100) for q in ("p20", "p50", "p80")}
            for key, other in COMPARED.items():
                pairs = [took[lane.name][index] / took[other][index] for took in rounds if other in took]
                row[f"{part}_of_{key}"] = statistics.median(pairs) if pairs else None
            row[f"{part}_of_floor"] = row[f"{part}_p50_ms"] / floors[index]
        weight, held, peak = case.weight.nbytes, lane.held_bytes(), peak_bytes(lane.step, device)
        row |= {
            "bytes_per_value": (held - weight) / layout.nnz if lane.optimizer else None,
            "saved_bytes": saved_bytes(lane), "held_bytes": held, "peak_bytes": peak, "memory_bytes": held + peak,
            "memory_without_weight_bytes": held + peak - weight, "rounds": len(rounds),
        }  # fmt: skip
        rows.append(row)
    memory = {row["provider"]: row for row in rows}
    for row in rows:
        for key in ("memory", "memory_without_weight"):
            dense = memory[DENSE][f"{key}_bytes"] if DENSE in memory else None
            row[f"{key}_of_dense"] = row[f"{key}_bytes"] / dense if dense else None
    return rows + wrong


def interleave(lanes: list[Lane], device: str, seconds: float, most: int) -> list[dict[str, list[float]]]:
    """What `clock` gives of each lane, for about `seconds`, at least `LEAST` rounds; the first warms up."""
    order, began, rounds = random.Random(0), time.perf_counter(), []
    flush = Timer(device).flush
    while len(rounds) < WARM_UP + most:
        if len(rounds) >= WARM_UP + LEAST and time.perf_counter() - began > seconds:
            break
        took = {}
        for lane in order.sample(lanes, len(lanes)):
            lane.step()  # what ran before is felt in a step, but not its concern
            took[lane.name] = clock(lane, flush)
        rounds.append(took)
    return rounds[WARM_UP:]


def clock(lane: Lane, flush: torch.Tensor | None) -> list[float]:
    """Milliseconds from the start of a step to the end of each part; on a GPU the device's, after `flush` has taken the
    place of all else in its L2."""
    marks: list = []

    def mark() -> None:
        if flush is None:
            marks.append(time.perf_counter())
        else:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()

    if flush is not None:
        flush.random_(0, 255)
    mark()
    y = lane.forward()
    mark()
    lane.backward(y, lane.case.dy)
    mark()
    lane.update()
    mark()
    if flush is None:
        return [1e3 * (end - marks[0]) for end in marks[1:]]
    marks[-1].synchronize()
    return [marks[0].elapsed_time(end) for end in marks[1:]]


def table(title: str, rows: list[dict]) -> Table:
    result = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    headings = (
        "", "fwd\nms", "+ bwd\nms", "step\nms", "×\nbare", "×\ndense", "×\nfloor", "bytes/\nvalue", "saved\nMiB",
        "memory\nMiB", "less W\nMiB",
    )  # fmt: skip
    for heading in headings:
        result.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for row in rows:
        if row["error"]:
            result.add_row(row["provider"], "[bold red]wrong[/]")
            result.caption = f"{row['provider']}: {row['error']}"
            continue
        numbers = [row[f"{part}_p50_ms"] for part in PARTS]
        numbers += [row[f"step_of_{key}"] for key in ("bare", "dense", "floor")] + [row["bytes_per_value"]]
        numbers += [row[f"{key}_bytes"] / 2**20 for key in ("saved", "memory", "memory_without_weight")]
        result.add_row(row["provider"], *map(_short, numbers))
    return result


def _short(value: float | None) -> str:
    """Three digits, two of them decimals at most."""
    return "–" if value is None else f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def summary(rows: list[dict]) -> str:
    """The bars, and how every shape stands to them."""
    rows = [row for row in rows if not row["error"]]
    ours = "ours, triton" if any(row["provider"] == "ours, triton" for row in rows) else "ours, reference"
    bars = (
        (ours, "entries 1 %", "step_of_dense", 1.0, f"step of {DENSE}"),
        (ours, "entries 1 %", "memory_of_dense", 0.5, f"memory of {DENSE}"),
        (ours, "columns 1 %", "step_of_dense", 1 / 1.3, f"step of {DENSE}"),
        (ACCELERATED, "entries r=", "forward_backward_of_shira", 1 / 1.3, f"forward + backward of {SHIRA}"),
        (ACCELERATED, "entries r=", "step_of_shira", 1 / 1.3, f"step of {SHIRA}"),
    )
    lines = []
    for provider, pattern, key, bar, what in bars:
        found = [row for row in rows if row["provider"] == provider and row["pattern"].startswith(pattern) and row[key]]
        lines += [f"{provider}, {pattern}: at most {bar:.2f} of the {what}"] if found else []
        for row in found:
            verdict = "met   " if row[key] <= bar else "MISSED"
            lines.append(f"  {row[key]:.3f}  {verdict}  {row['shape']}, {row['pattern']}")
    return "\n".join(lines) or "nothing of ours to hold to the bars"


if __name__ == "__main__":
    main()
