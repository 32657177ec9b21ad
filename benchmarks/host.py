"""The op `host`: the CPU overhead of a call, at shapes so tiny that its arithmetic takes no time. One thread.

A case is a kind of call: a module's, an op's, a layer's that trains a few entries. On a GPU nothing waits for the
device, so that CPU overhead is measured there too.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

import peft_kernels as pk
from peft_kernels.testing.timing import Timer, interleaved, whole

from . import plots
from .guard import failures
from .measure import rows_of
from .registry import BOTH, FORWARD, OpSpec, Request
from .resultfile import Row

LINEAR = "nn.Linear"
M, K, N, R, ALPHA = 2, 8, 8, 2, 4
REPEATS = 50  # calls a measurement


class Calls(NamedTuple):
    """A kind of call."""

    name: str
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return self.name


LAYER, OP, SHARED = Calls("LoRA layer"), Calls("LoRA op"), Calls("LoRA op, three projections that share x")
SPARSE, MASKED = Calls("layer with a sparse delta"), Calls("weight masked by scores")


def cases(device: str) -> list[Calls]:
    return [LAYER, OP, SHARED, SPARSE, MASKED]


def makers(calls: Calls, device: str) -> dict[str, Callable[[], Callable[[torch.Tensor], torch.Tensor]]]:
    """Map names to functions that make a function of x [M, K]."""
    return {LAYER: layers, OP: ops, SHARED: shared, SPARSE: sparse, MASKED: masked}[calls](device)


def layers(device: str) -> dict[str, Callable]:
    def linear() -> torch.nn.Module:
        return torch.nn.Linear(K, N, device=device)

    def peft(accelerate: bool) -> torch.nn.Module:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(torch.nn.Sequential(linear()), LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"]))
        if accelerate:
            pk.integrations.peft.accelerate(model)
        return model.base_model.model[0]

    return {
        LINEAR: linear,
        "PEFT": lambda: peft(False),
        "PEFT, accelerated": lambda: peft(True),
        "ours, nn.LoRALinear": lambda: pk.nn.LoRALinear(K, N, R, ALPHA, device=device),
    }


def ops(device: str) -> dict[str, Callable]:
    weight, lora_A, lora_B = (torch.randn(size, device=device) for size in ((N, K), (R, K), (N, R)))
    lora_A.requires_grad_()
    lora_B.requires_grad_()
    return {
        LINEAR: lambda: lambda x: F.linear(x, weight),
        "eager": lambda: lambda x: F.linear(x, weight) + F.linear(F.linear(x, lora_A), lora_B) * 2.0,
        "ours": lambda: lambda x: pk.lora_linear(x, weight, lora_A, lora_B, 2.0),
    }


def shared(device: str) -> dict[str, Callable]:
    projections = [
        pk.Projection(
            torch.randn(N, K, device=device), torch.randn(R, K, device=device).requires_grad_(),
            torch.randn(N, R, device=device).requires_grad_(), 2.0, None,
        )
        for _ in range(3)
    ]  # fmt: skip

    def eager(x: torch.Tensor) -> torch.Tensor:
        low_rank = (F.linear(F.linear(x, p.lora_A), p.lora_B) * p.scaling for p in projections)
        return torch.stack([F.linear(x, p.weight) + added for p, added in zip(projections, low_rank)])

    return {
        LINEAR: lambda: lambda x: torch.stack([F.linear(x, p.weight) for p in projections]),
        "eager": lambda: eager,
        "ours": lambda: lambda x: torch.stack(pk.lora_linear_shared_input(x, projections)),
    }


def masked(device: str) -> dict[str, Callable]:
    weight, scores = torch.randn(N, K, device=device), torch.randn(N, K, device=device).requires_grad_()

    def eager(x: torch.Tensor) -> torch.Tensor:
        mask = (scores.detach() >= 0.0).to(weight.dtype)
        return F.linear(x, weight * (mask - scores.detach() + scores))  # straight through

    return {
        LINEAR: lambda: lambda x: F.linear(x, weight),
        "eager": lambda: eager,
        "ours": lambda: lambda x: pk.masked_linear(x, weight, scores, 0.0),
    }


def sparse(device: str) -> dict[str, Callable]:
    layout = pk.SparseLayout.from_indices((N, K), torch.arange(0, N * K, 3)).to(device)

    def linear() -> torch.nn.Module:
        return torch.nn.Linear(K, N, device=device)

    def scatter() -> Callable:
        weight, flat = torch.randn(N, K, device=device), layout.indices()
        values = torch.zeros(layout.nnz, device=device, requires_grad=True)
        return lambda x: F.linear(x, weight.flatten().index_add(0, flat, values).view(N, K))

    def apart() -> Callable:
        weight, values = torch.randn(N, K, device=device), torch.zeros(layout.nnz, device=device, requires_grad=True)
        return lambda x: pk.sparse_delta_linear(x, weight, values, layout)

    return {
        LINEAR: linear,
        "clone + scatter": scatter,
        "ours, nn.SparseDeltaLinear": lambda: pk.nn.SparseDeltaLinear.from_linear(linear(), layout),
        "ours, sparse_delta_linear": apart,
    }


def measure(calls: Calls, request: Request) -> list[Row]:
    threads, guard = torch.get_num_threads(), request.guard
    torch.set_num_threads(1)
    try:
        made = {}
        for name, make in makers(calls, request.device).items():
            if (request.wants(name) or name == LINEAR) and name not in guard.without:
                with guard(name):
                    made[name] = make()
        x = torch.randn(M, K, device=request.device, requires_grad=True)
        rows = []
        for mode in (FORWARD, BOTH):
            repeated = {
                name: whole(_repeated(call, x, mode)) for name, call in made.items() if name not in guard.failed
            }
            times = interleaved(repeated, Timer("cpu"), min(request.seconds / 2, 10.0), guard=guard)
            times = {name: [(us / REPEATS,) for (us,) in column] for name, column in times.items()}
            rows += rows_of(times, (mode,), {"linear": LINEAR, "peft": "PEFT", "eager": "eager"})
    finally:
        torch.set_num_threads(threads)
    rows = [row for row in rows if not request.modes or row["mode"] in request.modes]
    rows += [{"provider": name, "skipped": why} for name, why in guard.without.items()]
    return [{"dtype": "float32"} | row for row in [*rows, *failures(guard)]]


def _repeated(call: Callable, x: torch.Tensor, mode: str) -> Callable[[], None]:
    def forward() -> None:
        for _ in range(REPEATS):
            call(x)

    def both() -> None:
        for _ in range(REPEATS):
            call(x).sum().backward()

    return forward if mode == FORWARD else both


COLUMNS = {"×\nnn.Linear": "of_linear", "×\nPEFT": "of_peft",
           "×\neager": "of_eager"}  # fmt: skip


def summary(rows: list[Row]) -> str:
    """Compare with the bar: a module's forward takes at most 0.8 × PEFT's."""
    found = [row for row in rows if row["provider"].startswith(("ours", "PEFT, acc")) and row.get("of_peft")]
    lines = [f"  {row['of_peft']:.2f} × PEFT's {row['mode']}: {row['provider']}" for row in found]
    return "\n".join(["CPU overhead of a module, at most 0.80 × PEFT's forward:", *lines])


def providers(device: str) -> dict[str, str | None]:
    return {f"{calls}: {name}": None for calls in cases(device) for name in makers(calls, "cpu")}


def plot(rows: list[Row], where: str, path: Path) -> Path:
    return plots.draw_hosts(rows, where, path)


SPEC = OpSpec(
    "host", "the CPU overhead of a call, at tiny shapes", (FORWARD, BOTH), cases, providers, measure, COLUMNS,
    summary, plot, share=0.3,
)  # fmt: skip
