"""What holds for the masked linear op on every backend and device: called by the suites of the CPU (`tests/ops`), the
interpreter (`tests/interpret`) and the GPU."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch

import peft_kernels as pk
from peft_kernels.ops.masked_linear import reference
from peft_kernels.testing import masked_linear as cases
from peft_kernels.testing import saved_tensors
from peft_kernels.testing.masked_linear import NAMES, make_case, ours, run
from tests.checks.common import record_calls, strided, subsets, within_eager

#: Leading dims, K, N: off every tile, on it, a single row, none, a dimension of size 0.
SHAPES = {
    "one-row": {"batch": (1,), "in_features": 24, "out_features": 16},
    "no-leading-dims": {"batch": (), "in_features": 24, "out_features": 16},
    "odd": {"batch": (3, 17), "in_features": 71, "out_features": 53},
    "tiles": {"batch": (2, 64), "in_features": 128, "out_features": 128},
    "wide": {"batch": (70,), "in_features": 40, "out_features": 136},
    "no-rows": {"batch": (2, 0), "in_features": 24, "out_features": 16},
    "no-inputs": {"batch": (2, 3), "in_features": 0, "out_features": 16},
    "no-outputs": {"batch": (2, 3), "in_features": 24, "out_features": 0},
}
SETTINGS = {
    "plain": {},
    "no-bias": {"bias": False},
    "tensor-threshold": {"tensor_threshold": True, "threshold": -0.3},
}

check_within_eager = functools.partial(within_eager, cases)


def check_subsets(backend: str, **case_arguments) -> None:
    """Every subset of what takes a gradient: the same numbers as with all of them, and nothing saved that the subset
    does not need. Weight and scores saved are the parameters themselves, which cost nothing: no masked copy."""
    arguments = {"batch": (5, 4), "in_features": 40, "out_features": 24, "tensor_threshold": True} | case_arguments
    everything = None
    for frozen in subsets(NAMES):
        case = make_case(**arguments, frozen=frozen)
        leaves = case.leaves()
        with pk.use_backend(backend), saved_tensors() as saved:
            y = ours(case, leaves)
        wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
        if not wanted:
            assert not saved
            continue
        grads = dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), case.grad_y)))
        everything = everything or grads
        for name, value in grads.items():
            torch.testing.assert_close(value, everything[name], rtol=0, atol=0, msg=f"{name}, frozen: {frozen}")
        x, weight, scores = ("x" in wanted, "weight" in wanted, "scores" in wanted)
        expected = {
            "x": (leaves["x"], weight or scores),
            "weight": (leaves["weight"], x or scores),
            "scores": (leaves["scores"], x or weight),
            "threshold": (case.threshold, x or weight),
        }
        found = {tensor.data_ptr() for tensor in saved}
        assert found == {tensor.data_ptr() for tensor, needed in expected.values() if needed}, f"frozen: {frozen}"


def check_runs(backend: str, device: str, monkeypatch) -> None:
    """The backend asked for is the one that runs, backward included, also outside of the block."""
    modules = [reference]
    if backend != "reference":
        from peft_kernels.ops.masked_linear import triton_backward, triton_forward

        modules = [triton_forward, triton_backward]
    calls = record_calls(monkeypatch, modules)
    case = make_case(device=device)
    leaves = case.leaves()
    with pk.use_backend(backend):
        y = ours(case, leaves)
    y.sum().backward()
    assert [(direction, arguments[-1]) for direction, *arguments in calls] == [
        ("forward", backend),
        ("backward", backend),
    ]


def check_layouts(backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Strided x, a transposed weight (Conv1D), scores and a bias that are views, a gradient of strides (0, 0)."""
    case = make_case((6, 10), 48, 32, dtype=dtype, device=device)

    def results(**tensors):
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
        with pk.use_backend(backend):
            y = ours(case, leaves)
        return [y, *torch.autograd.grad(y.sum(), list(leaves.values()))]

    dense = results(x=case.x, weight=case.weight, scores=case.scores, bias=case.bias)
    x = strided(case.x).transpose(0, 1).contiguous().transpose(0, 1)
    weight, scores, bias = case.weight.t().contiguous().t(), strided(case.scores), strided(case.bias)
    for views in (
        results(x=x, weight=weight, scores=scores, bias=bias),
        results(x=x, weight=strided(case.weight), scores=case.scores.t().contiguous().t(), bias=bias),
    ):
        for one, other in zip(dense, views):
            torch.testing.assert_close(one, other)


def check_mask(backend: str, device: str = "cpu", dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    """With x that lets the weight through, y and the gradients show the mask, bit for bit: scores on the threshold
    and next to it, infinite ones and NaN; a weight of infinity or NaN under the mask takes no part; the same for a
    number and a tensor, also where τ lies between two numbers of the scores' dtype."""
    for dtype in dtypes:
        eye = torch.eye(32, dtype=dtype, device=device)
        for tau in (0.0, 0.1, -1.0 / 3.0):
            on = torch.tensor(tau, dtype=torch.float64).to(dtype)
            special = torch.stack([
                on, torch.nextafter(on, on + 1), torch.nextafter(on, on - 1), -on,
                *(torch.tensor(value).to(dtype) for value in (math.inf, -math.inf, math.nan, -0.0)),
            ])  # fmt: skip
            scores = special.repeat(64, 4).to(device)  # [64, 32]
            kept = scores >= on.to(device)
            assert kept.any() and not kept.all()
            weight = torch.where(kept, torch.randn(64, 32, device=device).to(dtype), math.nan)
            expected = torch.where(kept, weight, 0)
            double = torch.tensor(tau, dtype=torch.float64, device=device)
            for threshold in (tau, double, double.to(dtype)):
                leaves = [t.clone().requires_grad_() for t in (eye, weight, scores)]
                with pk.use_backend(backend):
                    y = pk.masked_linear(*leaves, threshold)
                assert torch.equal(y, expected.t()), f"{dtype} {threshold}"
                grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
                torch.testing.assert_close(grads[0], expected.sum(0, dtype=torch.float64).to(dtype).expand(32, 32))
                assert torch.equal(grads[1], kept.to(dtype))
                torch.testing.assert_close(grads[2], weight, rtol=0, atol=0, equal_nan=True)


def check_float32_scores_beside(backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Scores that differ in float32 but not in 16 bits keep their mask, and their gradient its float32 numbers."""
    case = make_case((40,), 32, 24, dtype, torch.float32, device=device, threshold=1.0)
    scores = torch.where(torch.rand_like(case.scores) < 0.5, 1.0, 1.0 - 2.0**-24)
    case = replace(case, scores=scores)
    with pk.use_backend(backend):
        results = run(case)
    assert results["grad of scores"].dtype == torch.float32
    assert torch.equal(results["grad of weight"] != 0, scores == 1.0)
