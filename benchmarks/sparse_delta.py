"""The op `sparse_delta`: training a few entries of one linear layer's weight, by ours, the peers and the bare linear.

A step is forward, backward (values' gradient and dx), AdamW and zero_grad. It is clocked at the end of each part, so
that one step gives forward, forward + backward, and the whole. The bare linear trains nothing: its step is forward and
dx, and no layer can undercut it.

FLOPs: two a multiply-add of y, dx and the values' gradient, of the trained entries alone. Bytes, forward: x, W, y once;
backward: dy and W once, of x the columns with a trained entry, dx, the gradient and the layout; AdamW: the gradient
once, values and both moments read and written, W at the trained entries read and written. The roofline is the larger of
FLOPs over the machine's measured matmul rate and bytes over its measured copy bandwidth.

Memory of training is W, what trains, the optimizer's state and what says which entries train (held between steps), and
what one step takes at its peak beyond that: gradients, output, temporaries. The inputs x and dy are a model's, and not
counted; what forward saves for backward is counted apart, x among it.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import peft_kernels as pk
from peft_kernels.testing.sparse_delta import SparseCase
from peft_kernels.testing.timing import Timer, interleaved

from . import plots
from .guard import failures
from .measure import peak_bytes, rows_of, saved_bytes
from .registry import BACKWARD, BOTH, FORWARD, STEP, OpSpec, Request
from .resultfile import Row
from .sparse_providers import ACCELERATED, BARE, DENSE, SHIRA, Lane, absent, check, makers, of_ours, right_results

PARTS = (FORWARD, BOTH, STEP)
REFERENCES = {"bare": BARE, "dense": DENSE, "shira": SHIRA}


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
    """Says which entries train: a kind of layout and a density, or as many entries as SHiRA's rank r has: r·(K + N)."""

    kind: str
    density: float = 0.0
    r: int = 0

    def __str__(self) -> str:
        share = f"r={self.r}" if self.r else f"{self.density:.2g} %"
        return "2:4" if self.kind == "n_of_m" else f"{self.kind} {share}"


#: The patterns of the bars come first, in case that time runs out.
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


class Work(NamedTuple):
    """A layer, and which of its entries train."""

    shape: Shape
    pattern: Pattern

    @property
    def dtype(self) -> torch.dtype:
        return self.shape.dtype

    def __str__(self) -> str:
        return f"{self.shape}, {self.pattern}"


def cases(device: str) -> list[Work]:
    return [Work(shape, pattern) for pattern in PATTERNS for shape in shapes(device)]


def make_case(shape: Shape, pattern: Pattern, device: str, seed: int = 0) -> SparseCase:
    """Draw operands of order one and Δ as large as W, in float32 as every provider but one trains it."""
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


def flops(shape: Shape, nnz: int, mode: str) -> int:
    M, K, N, _ = shape
    backward = 2 * M * N * K + 2 * M * nnz
    return {FORWARD: 2 * M * N * K, BACKWARD: backward}.get(mode, 2 * M * N * K + backward)


def bytes_moved(shape: Shape, layout: pk.SparseLayout, mode: str) -> int:
    """Count the fewest bytes, by the rules at the top; values, their gradient and moments are float32."""
    (M, K, N, dtype), nnz = shape, layout.nnz
    columns = int(layout.mask().any(0).sum())
    forward = (M * K + N * K + M * N) * dtype.itemsize
    backward = (M * N + N * K + M * columns + M * K) * dtype.itemsize + layout.nbytes + 4 * nnz
    update = (1 + 2 * 3) * 4 * nnz + 2 * dtype.itemsize * nnz
    both = forward + backward
    return {FORWARD: forward, BACKWARD: backward, BOTH: both, STEP: both + update}[mode]


def measure(work: Work, request: Request) -> list[Row]:
    """Measure rows of every provider and mode; what a step holds and takes stands with the whole step."""
    warnings.filterwarnings("ignore", message="Sparse invariant checks")  # torch's, about PEFT's tensors
    began, (shape, pattern) = time.perf_counter(), work
    case = make_case(shape, pattern, request.device)
    layout = case.layout
    facts = {
        "shape": str(shape), "pattern": str(pattern), **shape._asdict(), "kind": layout.kind, "r": pattern.r,
        "density": layout.density, "nnz": layout.nnz, "dtype": str(shape.dtype).removeprefix("torch."),
    }  # fmt: skip
    lanes: dict[str, Lane] = {}
    rows: list[Row] = []
    results = right_results(case)
    guard, skipped = request.guard, absent(request.device) | request.guard.without
    for name, make in makers(request.device, pattern.r > 0, shape.dtype, layout.kind).items():
        if not request.wants(name) and name not in REFERENCES.values():
            continue
        if name in skipped:
            rows.append({"provider": name, "skipped": skipped[name]})
            continue
        with guard(name):
            error = check(make(case), *results)
            if error:
                rows.append({"provider": name, "error": error})
            else:
                lanes[name] = make(case)
    del results
    seconds = request.seconds - (time.perf_counter() - began)
    calls = {name: lane.step for name, lane in lanes.items()}
    times = interleaved(calls, Timer(request.device), seconds, least=3, most=30, guard=guard)
    for row in rows_of(times, PARTS, REFERENCES):
        lane, mode = lanes[row["provider"]], row["mode"]
        if request.modes and mode not in request.modes:
            continue
        rate, bandwidth = request.ceilings[str(shape.dtype)], request.ceilings["bytes"]
        roofline = max(flops(shape, layout.nnz, mode) / rate, bytes_moved(shape, layout, mode) / bandwidth)
        row["of_floor"] = row["p50_us"] / (1e6 * roofline)
        if mode == STEP:
            with guard(lane.name):
                row |= memory(lane, case, request.device)
        rows.append(row)
    steps = {row["provider"]: row for row in rows if row.get("mode") == STEP and "memory_bytes" in row}
    for row in steps.values():
        for key in ("memory", "memory_without_weight"):
            row[f"{key}_of_dense"] = row[f"{key}_bytes"] / steps[DENSE][f"{key}_bytes"] if DENSE in steps else None
    return [facts | row for row in [*rows, *failures(guard)]]


def memory(lane: Lane, case: SparseCase, device: str) -> Row:
    """Return the bytes that a lane holds after a step, and those that its next one takes."""
    held, peak = lane.held_bytes(), peak_bytes(lane.step, device)
    return {
        "bytes_per_value": (held - case.weight.nbytes) / case.layout.nnz if lane.optimizer else None,
        "saved_bytes": saved_bytes(lane.forward, lane.kept), "held_bytes": held, "peak_bytes": peak,
        "memory_bytes": held + peak, "memory_without_weight_bytes": held + peak - case.weight.nbytes,
    }  # fmt: skip


COLUMNS = {
    "×\nbare": "of_bare", "×\ndense": "of_dense", "×\nSHiRA": "of_shira", "×\nfloor": "of_floor",
    "bytes/\nvalue": "bytes_per_value", "saved\nMiB": "saved_bytes", "memory\nMiB": "memory_bytes",
}  # fmt: skip


def summary(rows: list[Row]) -> str:
    """State the bars, and how every shape stands to them."""
    timed = [row for row in rows if "mode" in row]
    ours = of_ours(row["provider"] for row in timed)
    bars = (
        (ours, STEP, "entries 1 %", "of_dense", 1.0, f"step of {DENSE}"),
        (ours, STEP, "entries 1 %", "memory_of_dense", 0.5, f"memory of {DENSE}"),
        (ours, STEP, "columns 1 %", "of_dense", 1 / 1.3, f"step of {DENSE}"),
        (ACCELERATED, BOTH, "entries r=", "of_shira", 1 / 1.3, f"forward + backward of {SHIRA}"),
        (ACCELERATED, STEP, "entries r=", "of_shira", 1 / 1.3, f"step of {SHIRA}"),
    )
    lines = []
    for provider, mode, pattern, key, bar, what in bars:
        found = [
            row for row in timed
            if (row["provider"], row["mode"]) == (provider, mode)
            and row["pattern"].startswith(pattern) and row.get(key)
        ]  # fmt: skip
        lines += [f"{provider}, {pattern}: at most {bar:.2f} of the {what}"] if found else []
        for row in found:
            verdict = "met   " if row[key] <= bar else "MISSED"
            lines.append(f"  {row[key]:.3f}  {verdict}  {row['case']}")
    return "\n".join(lines) or "nothing of ours to hold to the bars"


def providers(device: str) -> dict[str, str | None]:
    why = absent(device)
    return {name: why.get(name) for name in makers(device, True, torch.bfloat16)}


def plot(rows: list[Row], where: str, path: Path) -> Path:
    return plots.draw_sparse(rows, where, path)


SPEC = OpSpec(
    "sparse_delta", "a linear layer of whose weight a few entries train", (FORWARD, BACKWARD, BOTH, STEP), cases,
    providers, measure, COLUMNS, summary, plot, share=3.0,
)  # fmt: skip
