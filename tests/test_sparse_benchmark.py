"""The benchmark of sparse deltas at its shortest: its arithmetic, and that it catches what is wrong."""

import pytest
import torch
from rich.console import Console

from benchmarks import plots, sparse_delta, tables
from benchmarks.measure import peak_bytes, saved_bytes
from benchmarks.registry import BACKWARD, BOTH, FORWARD, STEP, Request
from benchmarks.sparse_delta import PATTERNS, Pattern, Shape, Work, bytes_moved, flops, make_case, make_layout, shapes
from benchmarks.sparse_providers import (
    ACCELERATED,
    BARE,
    DENSE,
    SCATTER,
    SHIRA,
    Apart,
    CloneScatter,
    DenseMasked,
    Ours,
    check,
    makers,
    right_results,
)
from peft_kernels.integrations.peft.shira import FusedShiraLinear
from peft_kernels.testing.timing import interleaved

OURS, APART = (f"{kind.name}, auto" for kind in (Ours, Apart))
TINY = Shape(8, 128, 96, torch.float32)
ENTRIES, COLUMNS, RANK = Pattern("entries", 1.0), Pattern("columns", 5.0), Pattern("entries", r=4)


def lanes_of(shape, pattern):
    case = make_case(shape, pattern, "cpu")
    found = makers("cpu", pattern.r > 0, shape.dtype, case.layout.kind)
    return case, {name: make(case) for name, make in found.items()}


def test_flops_and_bytes_by_hand():
    shape = Shape(8192, 4096, 4096, torch.bfloat16)
    gemm, matrix, weight, nnz = 2 * 8192 * 4096 * 4096, 8192 * 4096 * 2, 4096 * 4096 * 2, 41 * 4096
    assert flops(shape, nnz, FORWARD) == gemm == 274877906944
    assert flops(shape, nnz, BACKWARD) == gemm + 2 * 8192 * nnz
    assert flops(shape, nnz, BOTH) == flops(shape, nnz, STEP) == 2 * gemm + 2 * 8192 * nnz
    layout = make_layout(Pattern("columns", 1.0), 4096, 4096, "cpu")
    assert layout.nnz == nnz
    forward = 2 * matrix + weight
    backward = 2 * matrix + weight + 8192 * 41 * 2 + 41 * 8 + 4 * nnz
    assert bytes_moved(shape, layout, FORWARD) == forward == 167772160
    assert bytes_moved(shape, layout, BOTH) == forward + backward
    assert bytes_moved(shape, layout, STEP) == forward + backward + 28 * nnz + 2 * 2 * nnz


def test_layouts_are_what_they_are_called():
    N, K = 96, 128
    densities = {str(pattern): make_layout(pattern, N, K, "cpu").density for pattern in PATTERNS}
    assert len(densities) == len(PATTERNS) == 14
    assert densities["entries r=4"] == 4 * (N + K) / (N * K)
    assert densities["entries 10 %"] == pytest.approx(0.1, abs=1e-3)
    assert densities["2:4"] == 0.5
    assert densities["columns 1 %"] == 1 / K
    for device in ("cpu", "cuda"):
        assert len(set(map(str, shapes(device)))) == len(shapes(device)) >= 4


@pytest.mark.parametrize("pattern", [ENTRIES, COLUMNS, RANK, *PATTERNS[4:6], PATTERNS[-1]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_provider_is_right(pattern, dtype):
    case, lanes = lanes_of(TINY._replace(dtype=dtype), pattern)
    expected = [BARE, DENSE, SCATTER, SHIRA, ACCELERATED, OURS, APART]
    assert list(lanes) == [name for name in expected if pattern.r or "SHiRA" not in name]
    results = right_results(case)
    for name, lane in lanes.items():
        assert check(lane, *results) is None, name


class LearnsTooMuch(CloneScatter):
    def __init__(self, case):
        super().__init__(case)
        self.optimizer.param_groups[0]["lr"] *= 1.05


class ForgetsTheMask(DenseMasked):
    def backward(self, y, dy):
        y.backward(dy)


class ForgetsDelta(CloneScatter):
    def forward(self):
        return super().forward() - torch.nn.functional.linear(self.x, self.weight() - self.case.weight)


class Scales(Ours):
    def backward(self, y, dy):
        super().backward(y, dy)
        self.trained.grad *= 1.001


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (LearnsTooMuch, "weight: max error"),
        (ForgetsTheMask, "weight: entries outside"),
        (ForgetsDelta, "y: max error"),
        (lambda case: Scales(case, "reference"), "grad of values: max error"),
    ],
)
def test_a_wrong_provider_is_caught(make, what):
    case = make_case(TINY, ENTRIES, "cpu")
    assert what in check(make(case), *right_results(case))


def test_what_a_step_keeps_and_takes():
    case, lanes = lanes_of(TINY, RANK)
    (M, K, N, _), nnz, layout = TINY, case.layout.nnz, case.layout.nbytes
    weight, moments = 4 * N * K, 8 * nnz + 4  # and a count of steps
    for lane in lanes.values():
        lane.step()
    assert {name: lane.held_bytes() - weight for name, lane in lanes.items()} == {
        BARE: 0,
        DENSE: 2 * weight + 4 + N * K,
        SCATTER: 4 * nnz + moments + 8 * nnz,
        SHIRA: 4 * nnz + moments + 2 * 4 * nnz,
        ACCELERATED: 4 * nnz + moments + 2 * 4 * nnz + layout,
        OURS: 4 * nnz + moments + 4 * nnz + layout,
        APART: 4 * nnz + moments + layout,
    }
    x, y = 4 * M * K, 4 * M * N
    saved = {name: saved_bytes(lane.forward, lane.kept) for name, lane in lanes.items()}
    assert (saved[BARE], saved[DENSE], saved[OURS], saved[ACCELERATED]) == (0, x, x, x)
    assert saved[SCATTER] == x + weight  # the clone
    assert saved[SHIRA] > x + weight
    assert peak_bytes(lanes[BARE].step, "cpu") == y + x
    assert peak_bytes(lanes[DENSE].step, "cpu") == y + x + weight
    _, lanes = lanes_of(TINY, COLUMNS)
    ours = lanes[OURS]
    assert saved_bytes(ours.forward, ours.kept) == 4 * M * 6


def test_accelerated_is_accelerated():
    _, lanes = lanes_of(TINY, RANK)
    assert type(lanes[ACCELERATED].layer) is FusedShiraLinear
    assert type(lanes[SHIRA].layer) is not FusedShiraLinear


def test_a_backend_is_forced():
    case = make_case(TINY, ENTRIES, "cpu")
    assert Ours(case, "triton").name == "ours, triton"
    with pytest.raises(RuntimeError, match="triton"):
        Apart(case, "triton").forward()
    assert Apart(case, "reference").forward().shape == (8, 96)


def test_a_tiny_run(tmp_path, monkeypatch):
    class Wrong(LearnsTooMuch):
        name = "wrong on purpose"

    class Raises(CloneScatter):
        def backward(self, y, dy):
            raise ZeroDivisionError("on purpose")

    more = {"wrong on purpose": Wrong, "raises on purpose": Raises}
    monkeypatch.setattr(sparse_delta, "makers", lambda *where, **which: makers(*where, **which) | more)
    monkeypatch.setattr(sparse_delta, "interleaved", lambda *a, **k: interleaved(*a, **(k | {"most": 3})))
    request = Request("cpu", {"torch.float32": 1e11, "bytes": 1e10}, 100.0)
    rows = []
    for pattern in (ENTRIES, Pattern("columns", 1.0), RANK):
        work = Work(TINY, pattern)
        rows += [{"op": "sparse_delta", "case": str(work)} | row for row in sparse_delta.measure(work, request)]
    console = Console(width=100, record=True)
    console.print(tables.terminal(rows[-30:], sparse_delta.COLUMNS))
    printed = " ".join(console.export_text().split())
    for words in (
        "entries r=4", "wrong on purpose: wrong, not timed: weight: max error",
        "raises on purpose: failed: ZeroDivisionError: on purpose",
    ):  # fmt: skip
        assert words in printed
    assert "at most 0.50 of the memory of dense, masked" in sparse_delta.summary(rows)
    timed = {(row["pattern"], row["provider"], row["mode"]): row for row in rows if "mode" in row}
    assert len(timed) == 4 * (2 * 5 + 7)
    wrong = [row for row in rows if row.get("error")]
    assert [row["provider"] for row in wrong] == ["wrong on purpose"] * 3
    assert "weight: max error" in wrong[0]["error"]
    assert [row["provider"] for row in rows if row.get("failed")] == ["raises on purpose"] * 3
    for (pattern, provider, mode), row in timed.items():
        assert row["rounds"] == 3
        assert row["p50_us"] > 0
        if mode == STEP:
            assert timed[pattern, provider, FORWARD]["p50_us"] < row["p50_us"]
            assert row["memory_bytes"] == row["held_bytes"] + row["peak_bytes"]
    dense = timed["entries 1 %", DENSE, STEP]
    assert timed["entries 1 %", BARE, STEP]["of_bare"] == dense["memory_of_dense"] == 1.0
    assert timed["entries r=4", ACCELERATED, STEP]["of_shira"] > 0
    floor = 1e6 * bytes_moved(TINY, make_layout(ENTRIES, 96, 128, "cpu"), STEP) / 1e10
    assert dense["of_floor"] == pytest.approx(dense["p50_us"] / floor)
    assert plots.draw_sparse(rows, "here", tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
