"""What holds for the scaled linear op on every backend and device: called by the suites of the CPU (`tests/ops`), the
interpreter (`tests/interpret`) and the GPU."""

from __future__ import annotations

import functools

import torch

import peft_kernels as pk
from peft_kernels.ops.scaled_linear import reference
from peft_kernels.testing import saved_tensors
from peft_kernels.testing import scaled_linear as cases
from peft_kernels.testing.scaled_linear import NAMES, make_case, ours
from tests.checks.common import record_calls, strided, subsets, within_eager

#: Leading dims, K, N: off every tile, on it, several chunks of rows, a single row, none, a dimension of size 0.
SHAPES = {
    "one-row": {"batch": (1,), "in_features": 24, "out_features": 16},
    "no-leading-dims": {"batch": (), "in_features": 24, "out_features": 16},
    "odd": {"batch": (3, 17), "in_features": 71, "out_features": 53},
    "tiles": {"batch": (2, 64), "in_features": 128, "out_features": 128},
    "wide": {"batch": (70,), "in_features": 260, "out_features": 136},
    "no-rows": {"batch": (2, 0), "in_features": 24, "out_features": 16},
    "no-inputs": {"batch": (2, 3), "in_features": 0, "out_features": 16},
    "no-outputs": {"batch": (2, 3), "in_features": 24, "out_features": 0},
}
SETTINGS = {
    "output": {},
    "input": {"scale_input": True},
    "output, no bias": {"bias": False},
    "input, no bias": {"scale_input": True, "bias": False},
}

check_within_eager = functools.partial(within_eager, cases)


def check_subsets(backend: str, **case_arguments) -> None:
    """Every subset of what takes a gradient: the same numbers as with all of them, and nothing saved that the subset
    does not need: z [M, N] only where the scale of the output trains, x only where the weight or the scale of the input
    does."""
    arguments = {"batch": (5, 4), "in_features": 40, "out_features": 24} | case_arguments
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
        x, weight, scale, bias = (name in wanted for name in NAMES)
        of_input, of_output = scale and case.scale_input, scale and not case.scale_input
        expected = {
            "x": weight or of_input,
            "weight": x or of_input,
            "scale": x or weight or (bias and not case.scale_input),
        }
        found = {tensor.data_ptr(): tensor for tensor in saved}
        for name, needed in expected.items():
            assert (found.pop(leaves[name].data_ptr(), None) is not None) == needed, f"{name}, frozen: {frozen}"
        assert [tensor.shape for tensor in found.values()] == [y.shape] * of_output, f"frozen: {frozen}"


def check_runs(backend: str, device: str, monkeypatch) -> None:
    """The backend asked for is the one that runs, backward included, also outside of the block."""
    modules = [reference]
    if backend != "reference":
        from peft_kernels.ops.scaled_linear import triton_backward, triton_forward

        modules = [triton_forward, triton_backward]
    calls = record_calls(monkeypatch, modules)
    case = make_case(device=device)
    with pk.use_backend(backend):
        y = ours(case, case.leaves())
    y.sum().backward()
    assert [(direction, arguments[-1]) for direction, *arguments in calls] == [
        ("forward", backend),
        ("backward", backend),
    ]


def check_layouts(backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Strided x, a transposed weight (Conv1D), a scale and a bias that are views, a gradient of strides (0, 0)."""
    for scale_input in (False, True):
        case = make_case((6, 10), 48, 32, dtype=dtype, device=device, scale_input=scale_input)

        def results(case=case, **tensors):
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
            with pk.use_backend(backend):
                y = ours(case, leaves)
            return [y, *torch.autograd.grad(y.sum(), list(leaves.values()))]

        dense = results(x=case.x, weight=case.weight, scale=case.scale, bias=case.bias)
        x = strided(case.x).transpose(0, 1).contiguous().transpose(0, 1)
        weight, scale, bias = case.weight.t().contiguous().t(), strided(case.scale), strided(case.bias)
        for one, other in zip(dense, results(x=x, weight=weight, scale=scale, bias=bias)):
            torch.testing.assert_close(one, other)
