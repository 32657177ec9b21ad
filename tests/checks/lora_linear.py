"""What holds for the LoRA linear op on every backend and device: called by the suites of the CPU (`tests/ops`), the
interpreter (`tests/interpret`) and the GPU."""

from __future__ import annotations

import math

import torch

import peft_kernels as pk
from peft_kernels.ops.lora_linear import cuda, reference
from peft_kernels.testing import (
    assert_within_eager,
    eager,
    float64_reference,
    make_case,
    poisoned_allocations,
    run,
    saved_tensors,
)
from peft_kernels.testing.lora_linear import sums
from tests.checks.common import record_calls, strided, subsets

#: Leading dims, K, N of each projection, R: off every tile, on it, a single row, none, a rank beyond a block.
SHAPES = {
    "one-row": {"batch": (1,), "in_features": 24, "out_features": (16,), "rank": 4},
    "no-leading-dims": {"batch": (), "in_features": 24, "out_features": (16,), "rank": 4},
    "odd": {"batch": (3, 17), "in_features": 71, "out_features": (53,), "rank": 5},
    "rank-1": {"batch": (20,), "in_features": 40, "out_features": (33,), "rank": 1},
    "large-rank": {"batch": (40,), "in_features": 136, "out_features": (72,), "rank": 129},
    "tiles": {"batch": (2, 64), "in_features": 128, "out_features": (128,), "rank": 16},
    "qkv": {"batch": (2, 33), "in_features": 72, "out_features": (64, 24, 24), "rank": 8},
    "gate-up": {"batch": (70,), "in_features": 48, "out_features": (136, 136), "rank": 12},
}
SETTINGS = {
    "plain": {},
    "no-bias": {"bias": False},
    "dropout": {"dropout_p": 0.25},
    "shared-dropout": {"dropout_p": 0.25, "shared_dropout": True},
    "row-scaling": {"row_scaling": True, "dropout_p": 0.1},
}


SAMPLES = 64  # a case with fewer elements or roundings of S is drawn several times and judged as a whole


def check_within_eager(backend: str, autocast: torch.dtype | None = None, **case_arguments) -> None:
    """Output and every gradient against float64, at most twice the error of PEFT's expression; no element of any
    output left unwritten; the same bits from a second run of the first draw."""
    case = make_case(**case_arguments)
    roundings = max(case.x.numel() // case.x.shape[-1], 1) * min(len(p.lora_A) for p in case.projections)
    collected: dict[str, list[tuple[torch.Tensor, ...]]] = {}
    smallest = min(case.x.numel(), *(y.numel() for y in case.grad_ys), roundings)
    draws = math.ceil(SAMPLES / max(smallest, 1))
    for draw in range(draws):
        case = make_case(**case_arguments, draw=draw)
        exact, plain = float64_reference(case), eager(case, autocast)
        with pk.use_backend(backend), poisoned_allocations():
            first = run(case, autocast=autocast)
            second = first if draw else run(case, autocast=autocast)
        assert first.keys() == exact.keys()
        for name, value in exact.items():
            assert torch.equal(first[name], second[name]), f"{backend} {name} differs between two runs"
            collected.setdefault(name, []).append((first[name], plain[name], value))
    behind = sums(case, backend)
    for name, results in collected.items():
        assert_within_eager(
            f"{backend} {name}", *map(torch.stack, zip(*results)), samples=draws * roundings, sums=behind.get(name)
        )


#: Of projections that share x: small ones, one beyond a block, several beyond.
RANKS = ((8, 40, 3), (70, 8, 16), (8, 100, 130))


def check_ranks(backend: str, rank: tuple[int, ...], **case_arguments) -> None:
    """Projections that share x, each with a rank of its own."""
    for dropout_p, shared_dropout in ((0.0, False), (0.25, False), (0.25, True)):
        check_within_eager(
            backend, batch=(50,), in_features=72, out_features=(48, 24, 24), rank=rank, dropout_p=dropout_p,
            shared_dropout=shared_dropout, **case_arguments,
        )  # fmt: skip


def check_subsets(backend: str, dropout_p: float = 0.25, **case_arguments) -> None:
    """Every subset of what takes a gradient: the same numbers as with all of them, and nothing saved that the
    subset does not need. Adapters and bases saved are the parameters themselves, which cost nothing."""
    arguments = {"batch": (5, 4), "in_features": 40, "out_features": (24, 16), "rank": 3} | case_arguments
    everything = None
    for frozen in subsets(("x", "weight", "bias", "lora_A", "lora_B")):
        case = make_case(**arguments, dropout_p=dropout_p, frozen=frozen)
        with pk.use_backend(backend), saved_tensors() as saved:
            results = run(case)
        everything = everything or results
        for name, value in results.items():
            torch.testing.assert_close(value, everything[name], rtol=0, atol=0, msg=f"{name}, frozen: {frozen}")
        trains = {name: name not in frozen for name in ("x", "weight", "bias", "lora_A", "lora_B")}
        if not any(trains.values()):
            assert not saved
            continue
        rows, K, R, n = 20, 40, arguments["rank"], len(case.projections)
        element = case.x.element_size()
        expected = []
        if trains["lora_A"] or trains["weight"]:
            expected.append(rows * K * element)  # x, once for all projections
        if trains["lora_B"]:
            expected.append(rows * n * R * element)  # S
        if dropout_p and (trains["x"] or trains["lora_A"]):
            expected.append(n * rows * ((K + 7) // 8))  # one bit an element and projection
        if trains["x"]:
            expected += [p.weight.numel() * element for p in case.projections]
            expected += [p.lora_A.numel() * element for p in case.projections]
        if trains["x"] or trains["lora_A"]:
            expected += [p.lora_B.numel() * element for p in case.projections]
        found = [tensor.numel() * tensor.element_size() for tensor in saved]
        assert sorted(found) == sorted(expected), f"frozen: {frozen}"


def check_runs(backend: str, device: str, monkeypatch, dtype: torch.dtype = torch.float32) -> None:
    """The backend asked for is the one that runs, backward included, also outside of the block."""
    modules = [reference]
    if backend.startswith("cuda"):
        modules = [cuda]
    elif backend != "reference":
        from peft_kernels.ops.lora_linear import triton_backward, triton_forward

        modules = [triton_forward, triton_backward]
    calls = record_calls(monkeypatch, modules)
    case = make_case(device=device, dtype=dtype)
    x = case.x.requires_grad_()
    with pk.use_backend(backend):
        (y,) = pk.lora_linear_shared_input(x, case.projections)
    y.sum().backward()
    assert [direction for direction, *_ in calls] == ["forward", "backward"]
    if backend != "reference":
        assert {arguments[-1] for arguments in calls} == {backend}


def check_layouts(
    backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32, dropout_p: float = 0.2
) -> None:
    """Strided x, a transposed weight (Conv1D), a bias and adapters that are views, a gradient of strides (0, 0)."""
    case = make_case((6, 10), 48, (32,), 8, dtype=dtype, device=device, dropout_p=dropout_p)
    (weight, lora_A, lora_B, scaling, bias) = case.projections[0]

    def results(x, weight, lora_A, lora_B, bias):
        leaves = [t.detach().requires_grad_() for t in (x, weight, lora_A, lora_B, bias)]
        torch.manual_seed(case.seed)
        with pk.use_backend(backend):
            y = pk.lora_linear(
                *leaves[:4], scaling, leaves[4], dropout_p=case.dropout_p, training=True
            )  # fmt: skip
        return [y, *torch.autograd.grad(y.sum(), leaves)]

    dense = results(case.x, weight, lora_A, lora_B, bias)
    views = results(
        strided(case.x).transpose(0, 1).contiguous().transpose(0, 1), weight.t().contiguous().t(),
        strided(lora_A), lora_B.t().contiguous().t(), strided(bias),
    )  # fmt: skip
    for one, other in zip(dense, views):
        torch.testing.assert_close(one, other)


def check_empty(backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """M = 0: empty outputs, zero gradients."""
    case = make_case((0,), 24, (16, 8), 4, dtype=dtype, device=device, dropout_p=0.5)
    with pk.use_backend(backend):
        results = run(case)
    assert results["y0"].shape == (0, 16)
    assert results["grad of x"].shape == (0, 24)
    for name, value in results.items():
        assert not value.any(), name


def check_same_mask(backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """With A and B that let x through, what the op drops is what the dropout contract says, forward and backward."""
    rows, features = 37, 72
    options = {"device": device, "dtype": dtype}
    x = torch.ones(rows, features, requires_grad=True, **options)
    zero, eye = torch.zeros(features, features, **options), torch.eye(features, **options)
    for p in (0.001, 0.5, 0.999):
        torch.manual_seed(5)
        with pk.use_backend(backend):
            y = pk.lora_linear(x, zero, eye, eye, 1.0, dropout_p=p, training=True)
        (grad,) = torch.autograd.grad(y.sum(), x)
        case = make_case((rows,), features, dropout_p=p, seed=5, device=device)
        (kept,) = case.masks()
        expected = (kept.float() / (1.0 - p)).to(dtype)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(grad, expected)
    with pk.use_backend(backend):
        y = pk.lora_linear(x, zero, eye, eye, 1.0, dropout_p=1.0, training=True)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert not y.any()
    assert not grad.any()
