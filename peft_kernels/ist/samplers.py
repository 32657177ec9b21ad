"""Chooses the layers that train in a step: one small interface, and the samplers of the literature behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class LayerSampler:
    """Chooses the layers of a step. Write your own by overriding `sample`, as a function of its arguments alone: a run
    that is resumed then goes on as it would have."""

    #: Whether `unimportance` has to be estimated, which costs forwards.
    needs_importance = False
    #: Whether it knows layers by their unimportance alone, and so can be given some of them: then it draws among those
    #: that take part in the loss. Other samplers draw again until some layer of the set takes part.
    draws_among = False

    def sample(self, step: int, count: int, unimportance: torch.Tensor, generator: torch.Generator) -> Sequence[int]:
        """The indices of the layers that train.

        Args:
            step: number of the optimizer step, from 0.
            count: layers that the configuration asks for.
            unimportance: float32 [L] on the CPU, I of the algorithm; zeros where nothing is estimated.
            generator: of the CPU; every draw comes from it.

        Returns:
            At least one index in [0, L), none twice.
        """
        raise NotImplementedError

    def odds(self, unimportance: torch.Tensor) -> torch.Tensor | None:
        """Return the odds of each layer, float32 [L], if every step draws without replacement by them, as a backward
        budget wants it; None for other samplers."""
        return None


class ImportanceSampler(LayerSampler):
    """Draws as IST does: without replacement, with odds σ(−I)."""

    needs_importance = True
    draws_among = True

    def sample(self, step, count, unimportance, generator):
        return torch.multinomial(self.odds(unimportance), count, generator=generator).tolist()

    def odds(self, unimportance):
        return torch.sigmoid(-unimportance)


class Uniform(LayerSampler):
    """Draws every set of layers as likely as any other: RST, IST's ablation."""

    draws_among = True

    def sample(self, step, count, unimportance, generator):
        return torch.multinomial(self.odds(unimportance), count, generator=generator).tolist()

    def odds(self, unimportance):
        return torch.ones(len(unimportance))


class _Periodic(LayerSampler):
    """Keeps its layers for `period` steps."""

    draws_among = True

    def __init__(self, period: int) -> None:
        if period < 1:
            raise ValueError(f"{type(self).__name__}: expected a period of at least 1, got {period}")
        self.period = period


class Lisa(_Periodic):
    """Draws a uniform set anew every `period` steps: LISA (Pan et al., 2024). What it always trains, embeddings
    and head, is for the user to leave trainable.

    Args:
        period: optimizer steps between two draws.
    """

    def __init__(self, period: int = 20) -> None:
        super().__init__(period)

    def sample(self, step, count, unimportance, generator):
        # Drawn from the seed and the number of the period alone: no state has to be saved.
        own = torch.Generator().manual_seed((generator.initial_seed() + step // self.period) % 2**63)
        return torch.randperm(len(unimportance), generator=own)[:count].tolist()


class BlockCyclic(_Periodic):
    """Takes blocks of neighbouring layers in turn, from the top down, as BAdam sweeps them (Luo et al., 2024).

    Args:
        period: optimizer steps on a block.
    """

    def __init__(self, period: int = 1) -> None:
        super().__init__(period)

    def sample(self, step, count, unimportance, generator):
        layers = len(unimportance)
        blocks = -(-layers // count)
        top = layers - (step // self.period) % blocks * count
        return range(max(top - count, 0), top)


class Fixed(LayerSampler):
    """Takes the same layers always.

    Args:
        layers: their indices.
    """

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = list(layers)

    def sample(self, step, count, unimportance, generator):
        return self.layers


NAMED = {"ist": ImportanceSampler, "rst": Uniform, "lisa": Lisa, "cyclic": BlockCyclic}


def make_sampler(sampler: str | LayerSampler) -> LayerSampler:
    if isinstance(sampler, str):
        if sampler not in NAMED:
            raise ValueError(f"IST: expected a sampler among {', '.join(NAMED)}, or a LayerSampler, got {sampler!r}")
        return NAMED[sampler]()
    if not isinstance(sampler, LayerSampler):
        raise ValueError(f"IST: expected a sampler's name or a LayerSampler, got {type(sampler).__name__}")
    return sampler


def checked(chosen: Sequence[int], layers: int) -> list[int]:
    """Return what a sampler returned, sorted; raise ValueError unless it is a set of layers."""
    indices = sorted(int(index) for index in chosen)
    if not indices or len(set(indices)) < len(indices) or indices[0] < 0 or indices[-1] >= layers:
        raise ValueError(f"IST: expected at least one layer of 0 … {layers - 1}, none twice, got {list(chosen)}")
    return indices
