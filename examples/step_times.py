"""Step times of the demo's three trainings, interleaved: a round is one step of each, in an order drawn anew, so that
a slow spell of the machine meets all; ratios are taken within a round. And what others took of the machine
meanwhile."""

from __future__ import annotations

import copy
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

import peft_kernels as pk

PLAIN, ACCELERATED, IST = "PEFT", "accelerated", "IST"
LR = 1e-4  # so that what trains does not stay at zero
ESTIMATE_EVERY = 3  # rounds
#: A share of the CPUs, or of the time in which our threads would run, from which on times are not to be trusted.
BUSY = 0.05


class StepTimes(NamedTuple):
    """Seconds.

    Attributes:
        steps: by training, of each round; IST's without estimates.
        estimates: of importance, a batch each.
        interval: steps between two estimates.
        machine: what others took meanwhile.
    """

    steps: dict[str, list[float]]
    estimates: list[float]
    interval: int
    machine: Load

    def seconds(self, name: str) -> float:
        return statistics.median(self.steps[name])

    def ratios(self, name: str) -> list[float]:
        """To PEFT's step of the same round."""
        return [one / other for one, other in zip(self.steps[name], self.steps[PLAIN])]

    @property
    def with_estimates(self) -> float:
        """IST's step and its part of an estimate, over PEFT's step."""
        return statistics.median(self.ratios(IST)) + self.estimate_ratio / self.interval

    @property
    def estimate_ratio(self) -> float:
        return statistics.median(self.estimates) / self.seconds(PLAIN)


def step_times(
    base: nn.Module,
    with_adapter: Callable[[nn.Module], nn.Module],
    batch: Mapping[str, torch.Tensor],
    rounds: int,
    config: pk.ist.ISTConfig,
    autocast: Callable[[], torch.autocast],
) -> StepTimes:
    """Of three models with adapters, gradients and optimizers of their own, on the frozen weights of `base`."""
    shared = {id(parameter): parameter for parameter in base.parameters()}
    models = {name: with_adapter(copy.deepcopy(base, dict(shared))).train() for name in (PLAIN, ACCELERATED, IST)}
    for name in (ACCELERATED, IST):
        pk.integrations.peft.accelerate(models[name])
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
        for name, model in models.items()
    }
    ist = pk.ist.IST(models[IST], replace(config, interval=sys.maxsize))  # estimates are timed apart

    def step(name: str) -> float:
        began = time.perf_counter()
        if name == IST:
            ist.before_step()
        with autocast():
            loss = models[name](**batch).loss
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()
        loss.item()  # waits for a GPU
        return time.perf_counter() - began

    def estimate() -> float:
        began = time.perf_counter()
        with autocast():
            ist.estimate(batch)
        return time.perf_counter() - began

    for name in models:
        step(name)  # kernels compile, memory is allocated
    estimate()  # the first looks for a cheap way
    while ist.estimator.together is None:  # a GPU is still being timed
        estimate()
    order, load = random.Random(0), LoadMeter()
    steps: dict[str, list[float]] = {name: [] for name in models}
    estimates = []
    for number in tqdm(range(rounds), desc="a step of each in turn", unit="round"):
        for name in order.sample(list(models), len(models)):
            steps[name].append(step(name))
        if number % ESTIMATE_EVERY == 0:
            estimates.append(estimate())
    ist.close()
    return StepTimes(steps, estimates, config.interval, load.read())


# --- The machine ---------------------------------------------------------------------------------------------


class Load(NamedTuple):
    """What others took.

    Attributes:
        waited: share of the time in which our threads could have run that they waited for a CPU; None where the system
            does not say.
        stolen: share of the CPUs' time that the hypervisor gave to other machines; None likewise.
    """

    waited: float | None
    stolen: float | None

    @property
    def busy(self) -> bool:
        return max(self.waited or 0.0, self.stolen or 0.0) > BUSY

    def __str__(self) -> str:
        known = {
            "our threads waited {:.0%} of their time for a CPU": self.waited,
            "{:.0%} of the CPUs' time was stolen": self.stolen,
        }
        words = ", ".join(text.format(share) for text, share in known.items() if share is not None)
        if not words:
            return "what others took of the machine meanwhile is not known on this system"
        return ("BUSY MACHINE, these times say little: " if self.busy else "the machine meanwhile: ") + words


class LoadMeter:
    """What others take from now on to `read()`."""

    def __init__(self) -> None:
        self._threads, self._cpus = _threads(), _cpus()

    def read(self) -> Load:
        (ran, waited), (total, stolen) = _difference(_threads(), self._threads), _difference(_cpus(), self._cpus)
        return Load(waited / (ran + waited) if ran > 0 else None, stolen / total if total > 0 else None)


def busy_before() -> str:
    """A line if the machine has work of others already; empty if not. Two processes of as many threads as there are
    CPUs slow each other by far more than two: each waits for threads that do not run."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load <= 0.25 * cores:
        return ""
    return (
        f"BUSY MACHINE: expected one at rest, got a load average of {load:.1f} on {cores} CPUs: times will say little"
    )


def _threads() -> tuple[int, int]:
    """Nanoseconds that this process's threads ran, and waited for a CPU."""
    found = [0, 0]
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            ran, waited, *_ = path.read_text().split()
        except OSError:  # the thread has ended
            continue
        found[0] += int(ran)
        found[1] += int(waited)
    return found[0], found[1]


def _cpus() -> tuple[int, int]:
    """Ticks of all CPUs, and those stolen."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0, 0
    ticks = [int(word) for word in path.read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks), ticks[7] if len(ticks) > 7 else 0


def _difference(now: tuple[int, int], before: tuple[int, int]) -> tuple[int, int]:
    return now[0] - before[0], now[1] - before[1]
