"""The benchmark's own arithmetic, and that it catches what is wrong."""

import csv
import json
from dataclasses import replace

import pytest
import torch

from benchmarks import plots, run
from benchmarks.measure import check, interleaved, quantile
from benchmarks.registry import (
    OPS,
    Shape,
    base_flops,
    bytes_moved,
    flops,
    launches_and_bytes,
    make_inputs,
    ours,
    providers,
)

REFERENCE = Shape(8192, 4096, (4096,), 16, torch.bfloat16)
SMALL = Shape(12, 24, (16,), 4, torch.float32)


def test_flops_and_bytes_by_hand():
    gemm = 2 * 8192 * 4096 * 4096
    low_rank = 2 * 8192 * 4096 * 16
    assert base_flops(REFERENCE, backward=False) == gemm == 274877906944
    assert flops(REFERENCE, backward=False) == gemm + 2 * low_rank
    assert flops(REFERENCE, backward=True) == 2 * gemm + 6 * low_rank
    matrix, weight, adapter, s = 8192 * 4096 * 2, 4096 * 4096 * 2, 4096 * 16 * 2, 8192 * 16 * 2
    forward = 2 * matrix + weight + 2 * adapter
    assert matrix == 67108864
    assert bytes_moved(REFERENCE, backward=False) == forward
    backward = 2 * s + 3 * matrix + weight + 4 * adapter
    assert bytes_moved(REFERENCE, backward=True) == forward + backward
    mask = 8192 * 4096 // 8
    assert bytes_moved(replace(REFERENCE, p=0.1), backward=True) == forward + backward + 2 * mask


def test_sharing_reads_x_once():
    counted = launches_and_bytes(replace(REFERENCE, Ns=(4096, 1024, 1024)))
    assert counted["together"]["sums of dx"] == 0
    assert counted["one by one"]["sums of dx"] == 2
    for key in ("launches", "passes over x and dx (bytes)"):
        assert counted["together"][key] < counted["one by one"][key]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("op", OPS)
def test_shapes_are_distinct(op, device):
    shapes = OPS[op].shapes(device)
    assert len(set(map(str, shapes))) == len(shapes) > 4


def test_every_provider_is_right():
    for shape in (SMALL, replace(SMALL, Ns=(16, 8), p=0.25), replace(SMALL, dtype=torch.bfloat16)):
        case = make_inputs(shape, "cpu")
        for provider in providers(shape, "cpu"):
            if provider.name != "torch.compile":
                assert check(provider, shape, case) is None, provider.name


def test_a_wrong_provider_is_caught():
    (right,) = (p for p in providers(SMALL, "cpu") if p.ours)

    def wrong(case):
        scaled = [p._replace(scaling=p.scaling * 1.001) for p in case.projections]
        return ours(replace(case, projections=scaled), "reference")

    case = make_inputs(SMALL, "cpu")
    assert check(right, SMALL, case) is None
    assert "error" in check(replace(right, build=wrong), SMALL, case)


def test_interleaving():
    called = []
    calls = {name: lambda name=name: called.append(name) for name in "ab"}
    times = interleaved(calls, lambda call, repeats: call() or 1e6, seconds=0.0, least=3)
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert called == ["a", "a", "b", "b", "b", "b", "a", "a"] * 2 + ["a", "a", "b", "b"]
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0


def test_results_are_written(tmp_path):
    rows = [
        {"op": "lora_linear", "shape": "s", "provider": name, "direction": "forward+backward", "error": None,
         "of_linear": 1.0 + number, "of_floor": 2.0}
        for number, name in enumerate(("nn.Linear", "PEFT", "ours"))
    ]  # fmt: skip
    facts = {"cpu": "a processor"}
    run.save(rows, facts, {"bytes": 1.0}, tmp_path)
    document = json.loads((tmp_path / "lora_linear_cpu.json").read_text())
    assert document["rows"] == rows
    assert document["machine"] == facts
    with open(tmp_path / "lora_linear_cpu.csv") as file:
        assert [row["provider"] for row in csv.DictReader(file)] == ["nn.Linear", "PEFT", "ours"]
    for path in plots.draw(rows, facts, tmp_path):
        assert path.read_bytes().startswith(b"\x89PNG")
