"""One training loop for every way of spreading it: what a single process on the joined batch does, all have to do."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from peft_kernels.ist import IST, ISTConfig
from tests.ist.test_ist import batch_for, llama

STEPS = 13  # with two estimates
ROWS = 8  # of a joined batch
EVERYTHING = {"accumulate": 2, "clip": 0.05, "norms": True}


class Trace(NamedTuple):
    """Of every step the layers and the gradients after clipping; in the end the weights and the importance."""

    active: list[tuple[int, ...]]
    gradients: list[dict[str, torch.Tensor]]
    weights: dict[str, torch.Tensor]
    unimportance: torch.Tensor


def tiny(norms: bool = False) -> nn.Module:
    model = llama().double()  # sums in another order then differ in digits that nobody looks at
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad or (norms and "norm" in name))
    return model


def part(batch: dict[str, torch.Tensor], rank: int, world: int) -> dict[str, torch.Tensor]:
    return {name: value[rank::world] for name, value in batch.items()}


def for_estimate(number: int, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Rows with unlike numbers of labels, so that the mean of the processes' means is not the joined mean."""
    batch = batch_for(1000 + number, ROWS)
    labels = batch["labels"].clone()
    labels[::2, 3:] = -100
    return part({**batch, "labels": labels}, rank, world)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Of what trains. Not Adam: it would blow up roundings of gradients that are nearly 0."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0, momentum=0.9)


def train(
    model: nn.Module, ist: IST, *, rank: int = 0, world: int = 1, accumulate: int = 1, clip: float | None = None
) -> Trace:
    optimizer = ist.optimizer or optimizer_of(model)
    parameters = optimizer.param_groups[0]["params"]
    inner = ist.model
    active, gradients = [], []
    for step in range(STEPS):
        active.append(tuple(ist.before_step(lambda: for_estimate(len(ist.history), rank, world))))
        for micro in range(accumulate):
            last = micro == accumulate - 1
            with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
                loss = model(**part(batch_for(2 * step + micro, ROWS), rank, world)).loss
                (loss / accumulate).backward()
        if clip is not None:
            assert whole(torch.nn.utils.clip_grad_norm_(parameters, clip)) > clip
        gradients.append({n: whole(p.grad).clone() for n, p in inner.named_parameters() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
    weights = {name: whole(parameter.detach()).clone() for name, parameter in inner.named_parameters()}
    return Trace(active, gradients, weights, ist.unimportance)


@functools.cache
def alone(norms: bool = False, **how) -> Trace:
    """In this process, on the joined batch."""
    model = tiny(norms)
    return train(model, IST(model, ISTConfig(interval=5)), **how)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_same(traces: list[Trace], expected: Trace) -> None:
    assert len(set(expected.active)) > 2
    for trace in traces:
        assert trace.active == expected.active
        torch.testing.assert_close(trace.unimportance, expected.unimportance, rtol=1e-4, atol=1e-6)
        for found, wanted in zip(trace.gradients, expected.gradients, strict=True):
            assert found.keys() == wanted.keys()
            for name in wanted:
                torch.testing.assert_close(found[name], wanted[name], rtol=1e-6, atol=1e-9, msg=lambda m, n=name: n + m)
        for name in expected.weights:
            torch.testing.assert_close(trace.weights[name], expected.weights[name], rtol=1e-6, atol=1e-9)


def sent(work: Callable[[], None]) -> int:
    """Elements that `work` has the gloo group sum up; it scatters reduced tensors by reducing them everywhere."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        work()
    reduced = [event.input_shapes[0] for event in profiled.events() if event.name == "gloo:all_reduce"]
    return sum(torch.Size(shape).numel() for shape in reduced)
