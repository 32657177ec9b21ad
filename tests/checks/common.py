"""What the checks of every op do with tensors, backends and CUDA graphs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

import peft_kernels as pk
from peft_kernels.testing import assert_within_eager, poisoned_allocations

SAMPLES = 64  # a case with fewer elements is drawn several times and judged as a whole


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [c for size in range(len(names) + 1) for c in itertools.combinations(names, size)]


def within_eager(cases: ModuleType, backend: str, autocast: torch.dtype | None = None, **case_arguments: Any) -> None:
    """Output and every gradient of an op against float64, at most twice the error of the eager expression; no element
    of any output left unwritten; the same bits from a second run of the first draw.

    Args:
        cases: a module of `peft_kernels.testing` whose cases are `LinearCase` s.
    """
    case = cases.make_case(**case_arguments)
    sizes = [size for one in (*case.operands().values(), case.grad_y) if one is not None and (size := one.numel())]
    collected: dict[str, list[tuple[torch.Tensor, ...]]] = {}
    for draw in range(math.ceil(SAMPLES / min(sizes))):
        case = cases.make_case(**case_arguments, draw=draw)
        exact, plain = cases.float64_reference(case), cases.eager(case, autocast)
        with pk.use_backend(backend), poisoned_allocations():
            first = cases.run(case, autocast=autocast)
            second = first if draw else cases.run(case, autocast=autocast)
        assert first.keys() == exact.keys()
        for name, value in exact.items():
            assert torch.equal(first[name], second[name]), f"{backend} {name} differs between two runs"
            collected.setdefault(name, []).append((first[name], plain[name], value))
    behind = cases.sums(case, backend)
    for name, results in collected.items():
        assert_within_eager(f"{backend} {name}", *map(torch.stack, zip(*results)), sums=behind.get(name))


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers as every other column of a tensor that has NaN between them."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"))
    wide[..., ::2] = tensor
    return wide[..., ::2]


def record_calls(monkeypatch, modules: list) -> list[tuple]:
    """Watch `forward` and `backward` of the modules. The list grows by (direction, *arguments) of every call."""
    calls = []
    for module in modules:
        for direction in ("forward", "backward"):
            if hasattr(module, direction):
                original = getattr(module, direction)

                def spy(*args, original=original, direction=direction):
                    calls.append((direction, *args))
                    return original(*args)

                monkeypatch.setattr(module, direction, spy)
    return calls


def captured(step: Callable[[], Any], warm_up: int = 1) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of one step, after `warm_up` steps on a stream of their own; and what the captured step returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result
