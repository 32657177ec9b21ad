"""What holds for every op with one x and one y, on every backend and device. An op joins by its entry in `CONTRACTS`.

Called by the suites of the CPU (`tests/ops/test_contract.py`), of the interpreter (`tests/interpret/test_contract.py`)
and of a GPU (`tests/ops/test_contract_gpu.py`); what is special to an op is in files of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import peft_kernels as pk
from peft_kernels.testing import masked_linear, saved_tensors, scaled_linear
from peft_kernels.testing.linear import LinearCase
from tests.checks.common import record_calls, strided, subsets, within_eager


class Contract(NamedTuple):
    """An op.

    Attributes:
        function: the public one.
        cases: its module in `peft_kernels.testing`, whose `ours` calls the function.
        operand: beside x, weight and bias.
        settings: name → arguments of `make_case`.
        drawn: argument of `make_case` → what hypothesis draws it from.
        saved: of a case, its leaves and the names of those that take a gradient, the tensors that forward saves.
        made: of the same, the shapes of those that it makes to save them.
        bad_input: name → arguments instead of a good call's, and a part of the line that they get.
    """

    function: Callable[..., torch.Tensor]
    cases: ModuleType
    operand: str
    settings: dict[str, dict[str, Any]]
    drawn: dict[str, st.SearchStrategy]
    saved: Callable[[LinearCase, dict[str, torch.Tensor], set[str]], list[torch.Tensor]]
    made: Callable[[LinearCase, set[str]], list[tuple[int, ...]]]
    bad_input: dict[str, tuple[dict[str, Any], str]]

    @property
    def name(self) -> str:
        return self.function.__name__

    def package(self, module: str) -> ModuleType:
        return importlib.import_module(f"peft_kernels.ops.{self.name}.{module}")

    def dtypes(self, *dtypes: torch.dtype) -> dict[str, dict[str, torch.dtype]]:
        """Arguments of `make_case`: all in one dtype; and the operand in float32 beside the first."""
        alone = {str(dtype).removeprefix("torch."): {"dtype": dtype} for dtype in dtypes}
        return alone | {"float32-operand": {"dtype": dtypes[0], f"{self.operand}_dtype": torch.float32}}


def _saved_by_masked(case, leaves, wanted) -> list[torch.Tensor]:
    """The parameters themselves, which cost nothing: no masked copy."""
    x, weight, scores = (name in wanted for name in ("x", "weight", "scores"))
    needed = [weight or scores, x or scores, x or weight]
    tensors = [leaves[name] for name, one in zip(("x", "weight", "scores"), needed) if one]
    return [*tensors, case.threshold] if (x or weight) and isinstance(case.threshold, torch.Tensor) else tensors


def _saved_by_scaled(case, leaves, wanted) -> list[torch.Tensor]:
    x, weight, scale, bias = (name in wanted for name in ("x", "weight", "scale", "bias"))
    of_input = scale and case.scale_input
    needed = [weight or of_input, x or of_input, x or weight or (bias and not case.scale_input)]
    return [leaves[name] for name, one in zip(("x", "weight", "scale"), needed) if one]


def _z_of_scaled(case, wanted) -> list[tuple[int, ...]]:
    """The unscaled output, where the scale of the output trains."""
    return [tuple(case.grad_y.shape)] if "scale" in wanted and not case.scale_input else []


def _bad_linear(operand: str) -> dict[str, tuple[dict[str, Any], str]]:
    """Of x [6, 24], weight [16, 24] and bias [16] in float32."""
    return {
        "x of another width": ({"x": torch.ones(6, 23)}, "expected weight [N, 23] in x's dtype torch.float32, got [16"),
        "integer x": ({"x": torch.ones(6, 24).long()}, "expected a floating-point x of shape [..., K], got [6, 24] in"),
        "scalar x": ({"x": torch.tensor(1.0)}, "expected a floating-point x of shape [..., K], got [] float32 on cpu"),
        "1-D weight": ({"weight": torch.ones(24)}, "expected weight [N, 24] in x's dtype torch.float32, got [24]"),
        "transposed weight": ({"weight": torch.ones(24, 16)}, "expected weight [N, 24] in x's dtype torch.float32"),
        "weight dtype": ({"weight": torch.ones(16, 24).double()}, "in x's dtype torch.float32, got [16, 24] float64"),
        "weight device": (
            {"weight": torch.ones(16, 24, device="meta")},
            "on x's device cpu, got [16, 24] float32",
        ),
        "bias shape": ({"bias": torch.ones(15)}, "expected bias [16] in x's dtype torch.float32, got [15] float32"),
        "bias dtype": ({"bias": torch.ones(16).double()}, "expected bias [16] in x's dtype torch.float32, got [16] fl"),
        "bias device": ({"bias": torch.ones(16, device="meta")}, "on x's device cpu, got [16] float32 on meta"),
        "16-bit operand": ({operand: torch.ones(16, 24).bfloat16()}, f"expected {operand} ["),
    }


MASKED = Contract(
    pk.masked_linear,
    masked_linear,
    "scores",
    settings={
        "plain": {},
        "no-bias": {"bias": False},
        "tensor-threshold": {"tensor_threshold": True, "threshold": -0.3},
    },
    drawn={"threshold": st.floats(-2.0, 2.0), "bias": st.booleans()},
    saved=_saved_by_masked,
    made=lambda case, wanted: [],
    bad_input=_bad_linear("scores")
    | {
        "scores shape": ({"scores": torch.ones(16, 23)}, "expected scores [16, 24] in x's dtype torch.float32"),
        "transposed scores": ({"scores": torch.ones(24, 16)}, "expected scores [16, 24] in x's dtype torch.float32"),
        "scores dtype": ({"scores": torch.ones(16, 24).bfloat16()}, "torch.float32 or float32, got [16, 24] bfloat16"),
        "a mask for scores": ({"scores": torch.ones(16, 24).bool()}, "torch.float32 or float32, got [16, 24] bool"),
        "scores device": (
            {"scores": torch.ones(16, 24, device="meta")},
            "on x's device cpu, got [16, 24] float32",
        ),
        "threshold type": ({"threshold": "0"}, "expected threshold as a float or a tensor, got str"),
        "threshold shape": ({"threshold": torch.ones(1)}, "floating-point threshold of shape [], got [1]"),
        "integer threshold": ({"threshold": torch.tensor(1)}, "floating-point threshold of shape [], got [] int64"),
        "threshold with gradient": ({"threshold": torch.tensor(1.0, requires_grad=True)}, "that takes no gradient"),
        "threshold device": ({"threshold": torch.ones((), device="meta")}, "on x's device cpu, got [] float32 on meta"),
    },
)
SCALED = Contract(
    pk.scaled_linear,
    scaled_linear,
    "scale",
    settings={
        "output": {},
        "input": {"scale_input": True},
        "output, no bias": {"bias": False},
        "input, no bias": {"scale_input": True, "bias": False},
    },
    drawn={"scale_input": st.booleans(), "bias": st.booleans()},
    saved=_saved_by_scaled,
    made=_z_of_scaled,
    bad_input=_bad_linear("scale")
    | {
        "scale shape": ({"scale": torch.ones(24)}, "expected scale [16] in x's dtype torch.float32, got [24] float32"),
        "scale of x": ({"scale_input": True}, "expected scale [24] in x's dtype torch.float32, got [16] float32"),
        "2-D scale": ({"scale": torch.ones(16, 1)}, "expected scale [16] in x's dtype torch.float32, got [16, 1]"),
        "scale dtype": (
            {"scale": torch.ones(16).double()},
            "expected scale [16] in x's dtype torch.float32, got [16]",
        ),
        "scale device": ({"scale": torch.ones(16, device="meta")}, "on x's device cpu, got [16] float32 on meta"),
    },
)
CONTRACTS = {contract.name: contract for contract in (MASKED, SCALED)}
SETTINGS = [(name, setting) for name, contract in CONTRACTS.items() for setting in contract.settings]

#: Leading dims, K, N: off every tile, on it, several chunks, a single row, none, a dimension of size 0.
SHAPES = {
    "one-row": {"batch": (1,), "in_features": 24, "out_features": 16},
    "no-leading-dims": {"batch": (), "in_features": 24, "out_features": 16},
    "odd": {"batch": (3, 17), "in_features": 71, "out_features": 53},
    "tiles": {"batch": (2, 64), "in_features": 128, "out_features": 128},
    "wide": {"batch": (70,), "in_features": 40, "out_features": 136},
    "deep": {"batch": (70,), "in_features": 260, "out_features": 136},
    "no-rows": {"batch": (2, 0), "in_features": 24, "out_features": 16},
    "no-inputs": {"batch": (2, 3), "in_features": 0, "out_features": 16},
    "no-outputs": {"batch": (2, 3), "in_features": 24, "out_features": 0},
}


def check_within_eager(contract: Contract, backend: str, autocast: torch.dtype | None = None, **arguments) -> None:
    within_eager(contract.cases, backend, autocast, **arguments)


def check_subsets(contract: Contract, backend: str, **arguments) -> None:
    """Every subset of what takes a gradient: the same numbers as with all of them, and nothing saved that the subset
    does not need."""
    arguments = {"batch": (5, 4), "in_features": 40, "out_features": 24} | arguments
    everything = None
    for frozen in subsets(contract.cases.NAMES):
        case = contract.cases.make_case(**arguments, frozen=frozen)
        leaves = case.leaves()
        with pk.use_backend(backend), saved_tensors() as saved:
            y = contract.cases.ours(case, leaves)
        wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
        if not wanted:
            assert not saved
            continue
        grads = dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), case.grad_y)))
        everything = everything or grads
        for name, value in grads.items():
            torch.testing.assert_close(value, everything[name], rtol=0, atol=0, msg=f"{name}, frozen: {frozen}")
        found = {tensor.data_ptr(): tensor for tensor in saved}
        for tensor in contract.saved(case, leaves, set(wanted)):
            assert found.pop(tensor.data_ptr(), None) is not None, f"frozen: {frozen}"
        made = [tuple(tensor.shape) for tensor in found.values()]
        assert made == contract.made(case, set(wanted)), f"frozen: {frozen}"


def check_runs(contract: Contract, backend: str, device: str, monkeypatch) -> None:
    """The backend asked for is the one that runs, backward included, also outside of the block."""
    names = ["reference"] if backend == "reference" else [f"{backend}_forward", f"{backend}_backward"]
    calls = record_calls(monkeypatch, [contract.package(name) for name in names])
    case = contract.cases.make_case(device=device)
    with pk.use_backend(backend):
        y = contract.cases.ours(case, case.leaves())
    y.sum().backward()
    assert [(direction, arguments[-1]) for direction, *arguments in calls] == [
        ("forward", backend),
        ("backward", backend),
    ]


def check_layouts(contract: Contract, backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Strided x, a transposed weight (Conv1D), an operand and a bias that are views, a gradient of strides (0, 0)."""
    for setting in contract.settings.values():
        case = contract.cases.make_case((6, 10), 48, 32, dtype=dtype, device=device, **setting)

        def results(case=case, **views):
            leaves = {
                name: tensor if tensor is None else views.get(name, tensor).detach().requires_grad_()
                for name, tensor in case.operands().items()
            }
            with pk.use_backend(backend):
                y = contract.cases.ours(case, leaves)
            return [y, *torch.autograd.grad(y.sum(), [leaf for leaf in leaves.values() if leaf is not None])]

        operand = getattr(case, contract.operand)
        views = {"x": strided(case.x).transpose(0, 1).contiguous().transpose(0, 1)}
        views |= {} if case.bias is None else {"bias": strided(case.bias)}
        dense = results()
        for weight, other in (
            (case.weight.t().contiguous().t(), strided(operand)),
            (strided(case.weight), operand.t().contiguous().t() if operand.dim() == 2 else strided(operand)),
        ):
            found = results(**views, weight=weight, **{contract.operand: other})
            for one, expected in zip(found, dense, strict=True):
                torch.testing.assert_close(one, expected)


class RegisteredOps(TorchDispatchMode):
    """Inside the block `calls` fills with the registered ops of this package that run, and their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "peft_kernels":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


def check_registration(contract: Contract, backend: str = "reference", device: str = "cpu", **arguments) -> None:
    """`opcheck` of forward and backward, with the arguments that the op gives them, for all gradients and for each
    alone."""
    given = contract.cases.make_case(**arguments).operands()
    names = [name for name, tensor in given.items() if tensor is not None]
    for frozen in [(), *(tuple(other for other in names if other != name) for name in names)]:
        case = contract.cases.make_case((4, 5), 24, 16, device=device, frozen=frozen, **arguments)
        leaves = case.leaves()
        wanted = [leaf for leaf in leaves.values() if leaf is not None and leaf.requires_grad]
        with pk.use_backend(backend), RegisteredOps() as recorded:
            torch.autograd.grad(contract.cases.ours(case, leaves), wanted, case.grad_y)
        assert [op.name() for op, _ in recorded.calls] == [
            f"peft_kernels::{contract.name}_{direction}" for direction in ("forward", "backward")
        ]
        for op, inputs in recorded.calls:
            torch.library.opcheck(op, torch.utils._pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, inputs))
