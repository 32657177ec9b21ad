"""The op `linear_ops`: every op with one x and one y. What such an op needs here is its entry in `OPS`, and a file in
`peft_kernels/testing` whose `make_case`, `ours` and `eager_expression` are what its tests run.

The roofline is the larger of FLOPs over the machine's measured matmul rate and bytes over its measured copy bandwidth:
x, W and dy are read, y and dx written, once each, and beside these what the op's entry says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from peft_kernels.testing import assert_within_eager, masked_linear, scaled_linear
from peft_kernels.testing.linear import LinearCase
from peft_kernels.testing.timing import Timer, interleaved

from . import plots
from .guard import failures
from .lora import in_parts, summary
from .measure import peak_bytes, rows_of, saved_bytes
from .providers import BARE, EAGER, Ready
from .registry import BACKWARD, BOTH, FORWARD, OpSpec, Request
from .resultfile import Row

OURS = "ours"


class LinearOp(NamedTuple):
    """An op.

    Attributes:
        testing: the module with its cases.
        options: name → what `make_case` is given beside sizes and dtype: the kinds of calls that are measured.
        frozen: the operands that take no gradient.
        products: of M·N·K multiply-adds, in backward beside dx's.
        elements: of (M, K, N, options), the elements read or written in forward and in backward beside x, W, y, dy, dx.
    """

    testing: ModuleType
    options: Mapping[str, dict[str, Any]]
    frozen: tuple[str, ...]
    products: int
    elements: Callable[[int, int, int, dict[str, Any]], tuple[int, int]]


OPS = {
    "masked_linear": LinearOp(
        masked_linear,
        {"": {}},
        frozen=("weight", "bias"),
        products=1,
        elements=lambda M, K, N, options: (N * K, M * K + 2 * N * K),  # S; x, S again, and dS written
    ),
    "scaled_linear": LinearOp(
        scaled_linear,
        {"output": {}, "input": {"scale_input": True}},
        frozen=("weight", "bias"),
        products=0,
        elements=lambda M, K, N, options: (0, M * K) if options else (M * N, M * N),  # x again; z written and read
    ),
}


class Shape(NamedTuple):
    """M tokens, K in_features, N out_features of an op, and which kind of call."""

    M: int
    K: int
    N: int
    dtype: torch.dtype
    op: str
    kind: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")
        return f"M={self.M} {self.K}→{self.N} {dtype}, {self.op}{', ' * bool(self.kind)}{self.kind}"


def cases(device: str) -> list[Shape]:
    if device == "cpu":
        sizes = [(512, 576, 1536), (512, 1536, 576), (512, 2048, 2048), (8, 576, 1536)]
        dtypes = (torch.float32, torch.bfloat16)
    else:
        sizes = [(8192, 4096, 4096), (8192, 4096, 14336), (8192, 14336, 4096), (256, 4096, 4096), (16, 4096, 4096)]
        dtypes = (torch.bfloat16,)
    calls = [(name, kind) for name, op in OPS.items() for kind in op.options]
    return [Shape(*size, dtype, *call) for dtype in dtypes for size in sizes for call in calls]


def roofline_us(shape: Shape, mode: str, ceilings: dict[str, float]) -> float:
    (M, K, N, dtype, _, kind), op = shape, OPS[shape.op]
    forward, backward = op.elements(M, K, N, op.options[kind])
    product, moved = 2 * M * N * K, M * K + N * K + M * N
    flops = {FORWARD: product, BACKWARD: product * (1 + op.products), BOTH: product * (2 + op.products)}[mode]
    elements = {FORWARD: moved + forward, BACKWARD: moved + backward, BOTH: 2 * moved + forward + backward}[mode]
    return 1e6 * max(flops / ceilings[str(dtype)], elements * dtype.itemsize / ceilings["bytes"])


def make_case(shape: Shape, device: str) -> LinearCase:
    (M, K, N, dtype, _, kind), op = shape, OPS[shape.op]
    return op.testing.make_case((M,), K, N, dtype, bias=False, device=device, frozen=op.frozen, **op.options[kind])


def ready(case: LinearCase, expression: Callable) -> Ready:
    leaves = case.leaves()
    trained = [leaf for leaf in leaves.values() if leaf is not None and leaf.requires_grad]
    kept = [leaf for name, leaf in leaves.items() if leaf is not None and name != "x"]
    return Ready(lambda: (expression(case, leaves),), trained, [case.grad_y], kept)


def bare(case: LinearCase) -> Ready:
    x, weight = case.x.clone().requires_grad_(), case.weight
    return Ready(lambda: (F.linear(x, weight),), [x], [case.grad_y], [weight])


def check(op: LinearOp, case: LinearCase) -> str | None:
    """Say what is wrong, or None where y and gradients are within twice eager's error against float64."""
    found, eager, exact = op.testing.run(case), op.testing.eager(case), op.testing.float64_reference(case)
    try:
        for name, value in found.items():
            assert_within_eager(name, value, eager[name], exact[name])
    except AssertionError as error:
        return str(error)
    return None


def measure(shape: Shape, request: Request) -> list[Row]:
    op, guard = OPS[shape.op], request.guard
    began, case = time.perf_counter(), make_case(shape, request.device)
    makers = {BARE: bare, EAGER: partial(ready, expression=op.testing.eager_expression),
              OURS: partial(ready, expression=op.testing.ours)}  # fmt: skip
    facts = shape._asdict() | {"dtype": str(shape.dtype).removeprefix("torch.")}
    lanes: dict[str, Ready] = {}
    rows: list[Row] = [{"provider": name, "skipped": why} for name, why in guard.without.items()]
    for name, make in makers.items():
        if (request.wants(name) or name != OURS) and name not in guard.without:
            with guard(name):
                error = check(op, case) if name == OURS else None
                if error:
                    rows.append({"provider": name, "error": error})
                else:
                    lanes[name] = make(case)
    calls = {name: partial(in_parts, lane, (FORWARD, BOTH)) for name, lane in lanes.items()}
    seconds = request.seconds - (time.perf_counter() - began)
    times = interleaved(calls, Timer(request.device), seconds, guard=guard)
    for row in rows_of(times, (FORWARD, BOTH), {"bare": BARE, "eager": EAGER}):
        lane, mode = lanes[row["provider"]], row["mode"]
        if request.modes and mode not in request.modes:
            continue
        row["of_floor"] = row["p50_us"] / roofline_us(shape, mode, request.ceilings)
        if mode == BOTH:
            with guard(row["provider"]):
                row["saved_bytes"] = saved_bytes(lane.forward, lane.kept)
                row["peak_bytes"] = peak_bytes(lane.both, request.device)
        rows.append(row)
    return [facts | row for row in [*rows, *failures(guard)]]


COLUMNS = {
    "×\nbare": "of_bare", "×\neager": "of_eager",
    "×\nfloor": "of_floor", "saved\nMiB": "saved_bytes", "peak\nMiB": "peak_bytes",
}  # fmt: skip


def plot(rows: list[Row], device: str, path: Path) -> Path:
    return plots.draw_ratios(rows, f"ops with one x and one y, forward + backward\n{device}", path)


SPEC = OpSpec(
    "linear_ops", "a linear layer whose weight is masked by scores, or whose features are scaled: (IA)³",
    (FORWARD, BACKWARD, BOTH), cases, lambda device: dict.fromkeys((BARE, EAGER, OURS)), measure, COLUMNS, summary,
    plot,
)  # fmt: skip
