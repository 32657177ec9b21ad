"""What the checks of every op do with tensors, backends and CUDA graphs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch


def subsets(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [c for size in range(len(names) + 1) for c in itertools.combinations(names, size)]


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
