"""The quantities of the algorithm, with the paper's values."""

from __future__ import annotations

from dataclasses import dataclass

from .samplers import LayerSampler


@dataclass(frozen=True)
class ISTConfig:
    """What IST does and how often. The defaults are those of Yao et al. (2024) as their code runs.

    Attributes:
        update_fraction: of L layers, max(1, int(update_fraction·L)) train in a step; in (0, 1].
        suppress_fraction: max(1, int(suppress_fraction·L)) layers are damped in a candidate; in (0, 1].
        damping: what a damped adapter's scaling is multiplied by; in [0, 1).
        candidates: sets of damped layers that one estimate compares; at least 2, and fewer are drawn where there are
            no more different ones.
        interval: optimizer steps between two estimates; the first comes before step number `interval`.
        rate: of the update of importance.
        examples: training examples that an estimate uses, in all.
        sampler: "ist", "rst" (uniform), "lisa", "cyclic", or a :class:`LayerSampler`, such as `Fixed([0, 5])`.
        seed: of everything that is drawn here.

    Raises:
        ValueError: for a value outside of its range.
    """

    update_fraction: float = 0.25
    suppress_fraction: float = 0.5
    damping: float = 0.25
    candidates: int = 3
    interval: int = 10
    rate: float = 10.0
    examples: int = 16
    sampler: str | LayerSampler = "ist"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("update_fraction", "suppress_fraction"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(f"ISTConfig: expected {name} in (0, 1], got {getattr(self, name)}")
        if not 0.0 <= self.damping < 1.0:
            raise ValueError(f"ISTConfig: expected damping in [0, 1), got {self.damping}")
        for name, least in (("candidates", 2), ("interval", 1), ("examples", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"ISTConfig: expected {name} of at least {least}, got {getattr(self, name)}")
        if not self.rate > 0.0:
            raise ValueError(f"ISTConfig: expected a positive rate, got {self.rate}")
