"""Bounds the expected depth of backward, at unchanged odds of each layer to train.

Which layers train in a step decides how far backward goes: down to the lowest of them, m. The share π_i of steps in
which layer i trains is one thing, which layers train together another. Here π is what the sampler would give, and the
company is chosen so that few steps are deep; the README of this folder has the derivation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .samplers import LayerSampler

#: A step may train up to this many times the layers that the configuration asks for, which is the mean.
MOST = 2
#: Draws of the sampler that its shares are counted from: an error of at most 0.004, and the same every time.
DRAWS = 1 << 14


class Plan(NamedTuple):
    """A distribution of sets of layers: layer m is the lowest that trains with probability `lowest[m]`, and layer i
    trains with it in `together[m, i]` of all steps. `depth`: the expected depth of backward, as a fraction of the
    layers."""

    lowest: torch.Tensor
    together: torch.Tensor
    depth: float


class Budgeted(LayerSampler):
    """Draws as `sampler` does in some of the steps, and in the others the same shares at the least depth, so that the
    expected depth meets the budget, or comes as near as it can.

    Args:
        sampler: one with `odds`.
        budget: bound on the expected depth, as a fraction of the layers.

    Raises:
        ValueError: if the sampler has no odds.
    """

    draws_among = True

    def __init__(self, sampler: LayerSampler, budget: float) -> None:
        if sampler.odds(torch.zeros(1)) is None:
            kind = type(sampler).__name__
            raise ValueError(f"IST: expected a sampler with odds for a backward_budget ('ist', 'rst'), got {kind}")
        self.sampler, self.budget = sampler, budget
        self.needs_importance = sampler.needs_importance
        self._planned: tuple[tuple, tuple[Plan, float, float]] | None = None  # for the odds last asked for

    def sample(self, step, count, unimportance, generator):
        plan, _, share = self.plan(count, unimportance)
        if torch.rand((), generator=generator) >= share:
            return self.sampler.sample(step, count, unimportance, generator)
        lowest = torch.multinomial(plan.lowest, 1, generator=generator).item()
        return systematic(plan.together[lowest] / plan.lowest[lowest], generator)

    def plan(self, count: int, unimportance: torch.Tensor) -> tuple[Plan, float, float]:
        """Return the plan of least depth, the depth of the sampler's draws, the share of steps drawn by the plan."""
        odds = self.sampler.odds(unimportance)
        asked = count, tuple(odds.tolist())
        if self._planned is None or self._planned[0] != asked:
            shares, own_depth = shares_and_depth(odds, count)
            plan = least_depth(shares, MOST * count)
            saving = own_depth - plan.depth
            share = min(1.0, max(0.0, own_depth - self.budget) / saving) if saving > 1e-9 else 0.0
            self._planned = asked, (plan, own_depth, share)
        return self._planned[1]

    def expected_depth(self, count: int, unimportance: torch.Tensor) -> float:
        plan, own_depth, share = self.plan(count, unimportance)
        return share * plan.depth + (1.0 - share) * own_depth


def shares_and_depth(odds: torch.Tensor, count: int) -> tuple[torch.Tensor, float]:
    """Estimate each layer's share, float64 [L], and the mean depth in draws of `count` layers without replacement."""
    layers = len(odds)
    drawn = torch.multinomial(odds.expand(DRAWS, layers), count, generator=torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn.flatten(), minlength=layers).double() / DRAWS
    return shares, 1.0 - drawn.amin(1).double().mean().item() / layers


def least_depth(shares: torch.Tensor, most: int) -> Plan:
    """Find the sets of 1 to `most` layers with these shares whose expected depth is least, by a linear program.

    Over t[m, i], the probability that m is the lowest layer of a step in which i ≥ m trains too: minimise
    Σ_m t[m, m]·(L − m) with Σ_m t[m, i] = π_i, Σ_m t[m, m] = 1, t[m, i] ≤ t[m, m] and Σ_i t[m, i] ≤ most·t[m, m].
    """
    try:
        from scipy.optimize import linprog
        from scipy.sparse import coo_array
    except ImportError as error:
        raise RuntimeError("IST: expected scipy for a backward_budget (pip install peft_kernels[ist])") from error

    layers = len(shares)
    lowest, layer = torch.triu_indices(layers, layers).tolist()
    count = len(lowest)
    own = {m: number for number, (m, i) in enumerate(zip(lowest, layer)) if m == i}  # where t[m, m] stands

    def matrix(entries: list[tuple[int, int, float]], rows: int):
        row, column, value = zip(*entries)
        return coo_array((value, (row, column)), shape=(rows, count)).tocsr()

    is_share = [(i, number, 1.0) for number, i in enumerate(layer)] + [(layers, own[m], 1.0) for m in range(layers)]
    off = [number for number in range(count) if lowest[number] != layer[number]]
    at_most_lowest = [e for row, n in enumerate(off) for e in ((row, n, 1.0), (row, own[lowest[n]], -1.0))]
    first = len(off)
    at_most_most = [(first + lowest[n], n, 1.0 - most * (n == own[lowest[n]])) for n in range(count)]
    cost = [float(layers - m) if m == i else 0.0 for m, i in zip(lowest, layer)]
    found = linprog(
        cost, A_ub=matrix(at_most_lowest + at_most_most, first + layers), b_ub=[0.0] * (first + layers),
        A_eq=matrix(is_share, layers + 1), b_eq=[*shares.tolist(), 1.0], bounds=(0.0, 1.0), method="highs",
    )  # fmt: skip
    if not found.success:
        raise RuntimeError(f"IST: expected a plan for the shares {shares.tolist()}, got: {found.message}")
    together = torch.zeros(layers, layers, dtype=torch.float64)
    together[lowest, layer] = torch.from_numpy(found.x).clamp_(0.0, 1.0)
    return Plan(together.diagonal().clone(), together, found.fun / layers)


def systematic(chances: torch.Tensor, generator: torch.Generator) -> Sequence[int]:
    """Draw ⌊Σ⌋ or ⌈Σ⌉ members, i with probability chances[i] (Madow, 1949), and return them in random order."""
    order = torch.randperm(len(chances), generator=generator)
    ends = chances[order].cumsum(0) + torch.rand((), generator=generator, dtype=torch.float64)
    marks = torch.floor(ends)
    hit = torch.diff(marks, prepend=torch.zeros(1, dtype=marks.dtype)) > 0
    chosen = set(order[hit].tolist()) | set(torch.nonzero(chances > 1.0 - 1e-9).flatten().tolist())
    return sorted(chosen)
