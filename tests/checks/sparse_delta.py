"""What holds for the linear layer with a sparse delta on every backend and device: called by the suites of the CPU
(`tests/ops`), the interpreter (`tests/interpret`) and the GPU."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import peft_kernels as pk
from peft_kernels import backends
from peft_kernels.ops.sparse_delta import cpu, cuda, reference, write_delta
from peft_kernels.testing import assert_within_eager, poisoned_allocations, saved_tensors
from peft_kernels.testing.sparse_delta import (
    LEAVES,
    eager,
    float64_reference,
    make_case,
    make_layout,
    ours,
    ours_in_weight,
    run,
    sums,
)
from tests.checks.common import record_calls, strided, subsets

#: Leading dims, K, N: off every tile, on it, a single row, none; blocks of 4 × 8 fill all of them.
SHAPES = {
    "one-row": {"batch": (1,), "in_features": 24, "out_features": 16},
    "no-leading-dims": {"batch": (), "in_features": 24, "out_features": 16},
    "odd": {"batch": (3, 17), "in_features": 72, "out_features": 52},
    "tiles": {"batch": (2, 64), "in_features": 128, "out_features": 128},
    "wide": {"batch": (40,), "in_features": 264, "out_features": 36},
}
LAYOUTS = {
    "entries-2%": {"kind": "entries", "density": 0.02},
    "entries-30%": {"kind": "entries", "density": 0.3},
    "rows": {"kind": "rows", "density": 0.15},
    "columns": {"kind": "columns", "density": 0.15},
    "blocks": {"kind": "blocks", "density": 0.2, "tile": (4, 8)},
    "n-of-m": {"kind": "n_of_m"},
}
KINDS = ("entries", "rows", "columns", "blocks", "n_of_m")


def kinds_of(backend: str) -> tuple[str, ...]:
    """The kinds of layout that a backend takes; it refuses all others."""
    return backends.OPS["sparse_delta_linear"].backends[backend].options or KINDS


def layouts_of(backend: str) -> dict[str, dict]:
    return {name: layout for name, layout in LAYOUTS.items() if layout["kind"] in kinds_of(backend)}


EXPRESSIONS = {"sparse_delta_linear": ours, "in weight": ours_in_weight}
SAMPLES = 64  # a case with fewer elements is drawn several times and judged as a whole


def check_within_eager(backend: str, autocast: torch.dtype | None = None, **case_arguments) -> None:
    """Output and every gradient against float64, at most twice the error of clone + scatter; no element of any output
    left unwritten; the same bits from a second run of the first draw."""
    case = make_case(**case_arguments)
    sizes = [value.numel() for name in (*LEAVES, "dy") if (value := getattr(case, name)) is not None]
    draws = math.ceil(SAMPLES / max(1, min(sizes)))
    collected: dict[str, list[tuple[torch.Tensor, ...]]] = {}
    for draw in range(draws):
        case = make_case(**case_arguments, draw=draw)
        exact, plain = float64_reference(case), eager(case, autocast)
        for how, expression in EXPRESSIONS.items():
            frozen = ("weight",) if expression is ours_in_weight else ()
            case.frozen = frozen
            with pk.use_backend(backend), poisoned_allocations():
                first = run(case, expression, autocast)
                second = first if draw else run(case, expression, autocast)
            for name, value in first.items():
                assert torch.equal(value, second[name]), f"{backend} {how} {name} differs between two runs"
                collected.setdefault(f"{how}: {name}", []).append((value, plain[name], exact[name]))
            assert len(first) == len(exact) - len(frozen)
    behind = sums(case)
    for name, results in collected.items():  # of both expressions, how and what
        of = behind.get(name.partition(": ")[2])
        assert_within_eager(f"{backend} {name}", *map(torch.stack, zip(*results)), sums=of)


def check_subsets(backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Every subset of what takes a gradient: the same numbers as with all of them, and nothing saved that the subset
    does not need. The weight and the values saved are the parameters themselves, which cost nothing."""
    for layout in layouts_of(backend).values():
        arguments = {"batch": (5, 4), "in_features": 40, "out_features": 24, "dtype": dtype, "device": device} | layout
        everything = None
        for frozen in subsets(LEAVES):
            case = make_case(**arguments, frozen=frozen)
            with pk.use_backend(backend), saved_tensors() as saved:
                results = run(case)
            everything = everything or results
            for name, value in results.items():
                torch.testing.assert_close(value, everything[name], rtol=0, atol=0, msg=f"{name}, frozen: {frozen}")
            trains = {name: name not in frozen for name in LEAVES}
            expected = []
            if trains["weight"] or trains["values"]:
                thin = layout["kind"] == "columns" and not trains["weight"]
                expected.append(20 * (len(case.layout.tensors["index"]) if thin else 40))
            if trains["x"]:
                expected += [case.weight.numel(), case.values.numel()]
            assert sorted(tensor.numel() for tensor in saved) == sorted(expected), f"{layout}, frozen: {frozen}"


def check_strides(backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Strided x, a transposed weight, values and a bias that are views, a gradient of strides (0, 0)."""
    for layout in layouts_of(backend).values():
        case = make_case(
            **({"batch": (6, 10), "in_features": 48, "out_features": 32} | layout), dtype=dtype, device=device
        )

        def results(*leaves, layout=case.layout):
            leaves = [leaf.detach().requires_grad_() for leaf in leaves]
            with pk.use_backend(backend):
                y = pk.sparse_delta_linear(*leaves[:3], layout, leaves[3])
            return [y, *torch.autograd.grad(y.sum(), leaves)]

        dense = results(case.x, case.weight, case.values, case.bias)
        views = results(
            strided(case.x).transpose(0, 1).contiguous().transpose(0, 1), case.weight.t().contiguous().t(),
            strided(case.values), strided(case.bias),
        )  # fmt: skip
        for one, other in zip(dense, views):
            torch.testing.assert_close(one, other)


def check_empty(backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """M = 0 and nnz = 0: empty outputs, zero gradients, the bare product."""
    of = {"device": device, "dtype": dtype}
    for layout in layouts_of(backend).values():
        case = make_case(**({"batch": (0,), "in_features": 48, "out_features": 32} | layout), **of)
        with pk.use_backend(backend):
            results = run(case)
        assert results["y"].shape == (0, 32) and results["grad of x"].shape == (0, 48)
        for name, value in results.items():
            assert not value.any(), name
    nothing = torch.tensor([], dtype=torch.long)
    empty = (
        pk.SparseLayout.from_indices((32, 48), nothing), pk.SparseLayout.rows((32, 48), nothing),
        pk.SparseLayout.columns((32, 48), nothing), pk.SparseLayout.blocks((32, 48), (4, 8), nothing),
    )  # fmt: skip
    for layout in (one for one in empty if one.kind in kinds_of(backend)):
        case = make_case(batch=(5,), in_features=48, out_features=32, **of)
        case.layout, case.values = layout.to(device), case.values[:0]
        with pk.use_backend(backend):
            results = run(case)
        torch.testing.assert_close(results["y"], torch.nn.functional.linear(case.x, case.weight, case.bias))
        torch.testing.assert_close(results["grad of x"], case.dy @ case.weight)
        assert results["grad of values"].shape == (0,)


def check_refusals(backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Kinds that the backend has no kernel for are refused in one line, and nothing is written."""
    for kind in set(KINDS) - set(kinds_of(backend)):
        case = make_case(kind, device=device, dtype=dtype)
        weight, base = case.weight.clone(), case.layout.take(case.weight)
        x, values, y = case.x, case.values.requires_grad_(), case.x @ case.weight.t()
        calls = (
            lambda x=x, case=case: pk.sparse_delta_linear(x, case.weight, case.values, case.layout),
            lambda x=x, y=y, case=case: pk.with_sparse_gradient_(y, x, case.values, case.layout),
            lambda base=base, values=values, case=case: write_delta(case.weight, base, values.detach(), case.layout),
        )
        for call in calls:
            with pk.use_backend(backend), pytest.raises(RuntimeError, match=f"expected layout .*, got {kind}$"):
                call()
        assert torch.equal(case.weight, weight)


def check_runs(backend: str, device: str, monkeypatch, dtype: torch.dtype = torch.float32) -> None:
    """The backend asked for is the one that runs, backward included, also outside of the block."""
    modules = [{"cpu": cpu, "cuda": cuda}.get(backend, reference)]
    if backend == "triton":
        from peft_kernels.ops.sparse_delta import triton_backward, triton_forward

        modules = [triton_forward, triton_backward]
    calls = record_calls(monkeypatch, modules)
    case = make_case(device=device, dtype=dtype)
    with pk.use_backend(backend):
        y = pk.sparse_delta_linear(case.x.requires_grad_(), case.weight, case.values, case.layout)
    y.sum().backward()
    assert [direction for direction, *_ in calls] == ["forward", "backward"]


def check_writing(backend: str, kind: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """W₀ + Δ at the positions, in float32 rounded once, and nothing elsewhere; also into a transposed weight."""
    torch.manual_seed(0)
    _check_writing(backend, make_layout(kind, 64, 96, 0.1, tile=(8, 16)).to(device), device, dtype)
    if kind == "blocks":
        _check_writing(backend, make_layout(kind, 64, 96, 0.1, tile=(1, 16)).to(device), device, dtype)


def _check_writing(backend: str, layout: pk.SparseLayout, device: str, dtype: torch.dtype) -> None:
    values = torch.randn(layout.nnz, device=device)
    for transposed in (False, True):
        weight = torch.randn(64, 96, device=device).to(dtype)
        weight = weight.t().contiguous().t() if transposed else weight
        base = layout.take(weight)
        expected = layout.put_(weight.clone(), (base.double() + values.double()).to(dtype))
        with pk.use_backend(backend):
            write_delta(weight, base, values, layout)
        assert torch.equal(weight, expected)


def check_step(backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32, decay: str = "delta") -> None:
    """SparseAdamW of a model with layers of every kind, beside torch's AdamW on the same gradients; and the weights."""
    torch.manual_seed(0)
    layouts = [make_layout(kind, 64, 96, 0.1, seed) for seed in (0, 1) for kind in KINDS]
    linears = [torch.nn.Linear(96, 64, device=device, dtype=dtype) for _ in layouts]
    model = torch.nn.ModuleList(map(pk.nn.SparseDeltaLinear.from_linear, linears, [lay.to(device) for lay in layouts]))
    model.append(torch.nn.Linear(3, 3, device=device))
    reference = copy.deepcopy(model)
    optimizers = [
        pk.optim.SparseAdamW([*m[:-1], *m[-1].parameters()], lr=1e-2, weight_decay=0.1, decay=decay)
        for m in (model, reference)
    ]
    schedules = [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9) for optimizer in optimizers]
    for _ in range(10):
        for one, other in zip(model.parameters(), reference.parameters()):
            if one.requires_grad:
                one.grad = torch.randn_like(one)
                other.grad = one.grad.clone()
        for name, optimizer, schedule in zip((backend, "reference"), optimizers, schedules):
            with pk.use_backend(name):
                optimizer.step()
            schedule.step()
    for one, other in zip(model[:-1], reference[:-1]):
        torch.testing.assert_close(one.values, other.values, rtol=1e-5, atol=1e-6)
        base, values = one.base.to(one.values.dtype), one.values.detach()
        assert torch.equal(one.layout.take(one.weight), (base + values).to(dtype))
        for name in ("exp_avg", "exp_avg_sq", "step"):
            mine, theirs = (o.state[layer.values][name] for o, layer in zip(optimizers, (one, other)))
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    assert torch.equal(model[-1].weight, reference[-1].weight)
