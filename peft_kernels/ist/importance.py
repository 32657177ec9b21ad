"""The estimate of layer importance: which layers to damp, and what their losses say."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import nn

#: Draws after which a further different set is no longer looked for: odds that are nearly 0 and 1 give the same one.
MOST_DRAWS = 100


def draw_suppress_sets(
    unimportance: torch.Tensor, size: int, candidates: int, generator: torch.Generator
) -> list[list[int]]:
    """Up to `candidates` different sets of `size` layers, each without replacement with odds σ(I)."""
    odds = torch.sigmoid(unimportance)
    wanted = min(candidates, math.comb(len(unimportance), size))
    sets: list[list[int]] = []
    for _ in range(MOST_DRAWS):
        drawn = sorted(torch.multinomial(odds, size, generator=generator).tolist())
        if drawn not in sets:
            sets.append(drawn)
        if len(sets) == wanted:
            break
    return sets


def rewards_of(losses: Sequence[float]) -> torch.Tensor:
    """exp(−loss), float32; infinite for losses below −88."""
    return torch.tensor(losses, dtype=torch.float64).neg().exp().float()


def updated(
    unimportance: torch.Tensor, sets: Sequence[Sequence[int]], losses: Sequence[float], rate: float
) -> tuple[torch.Tensor, list[float]]:
    """I and the rewards, after one estimate: r_k = exp(−loss_k), and for every layer i of set k
    I_i += rate · (r_k − mean r) · p_i·(1 − p_i), with p = σ(I) as it was before."""
    rewards = rewards_of(losses)
    p = torch.sigmoid(unimportance)
    step = rate * p * (1.0 - p)
    result = unimportance.clone()
    for chosen, advantage in zip(sets, rewards - rewards.mean()):
        result[list(chosen)] += advantage * step[list(chosen)]
    return result, rewards.tolist()


def same_random_state(model: nn.Module) -> contextlib.AbstractContextManager:
    """Draws inside leave torch's generators, on the CPU and the model's devices, as they were."""
    return torch.random.fork_rng(devices={p.device for p in model.parameters() if p.is_cuda})


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no autograd graph, the random state of training untouched; all as before afterwards, whatever
    happens inside."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with same_random_state(model), torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
