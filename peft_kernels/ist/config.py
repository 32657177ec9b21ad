"""The quantities of the algorithm, with the paper's values."""

from __future__ import annotations

from dataclasses import dataclass

from .samplers import LayerSampler

ESTIMATORS = ("auto", "one-by-one")
FROZEN_STATES = ("keep", "offload", "drop")


@dataclass(frozen=True)
class ISTConfig:
    """Says what IST does and how often. The defaults are those of Yao et al. (2024) as their code runs.

    Attributes:
        update_fraction: of L layers, max(1, int(update_fraction·L)) train in a step; in (0, 1].
        suppress_fraction: max(1, int(suppress_fraction·L)) layers are damped in a candidate; in (0, 1].
        damping: what a damped adapter's scaling is multiplied by; in [0, 1).
        candidates: sets of damped layers that one estimate compares; at least 2, and fewer are drawn where there are
            no more different ones.
        interval: optimizer steps between two estimates; the first comes before step number `interval`.
        rate: of the update of importance.
        examples: training examples that an estimate uses, in all processes together; at least one in each.
        sampler: "ist", "rst" (uniform), "lisa", "cyclic", or a :class:`LayerSampler`, such as `Fixed([0, 5])`.
        seed: of everything that is drawn here.
        estimator: "auto" computes logits only where there are labels and lets candidates share forwards, wherever that
            is seen to give the model's own loss; "one-by-one" takes the model's own loss, a forward a candidate.
        candidates_per_forward: how many candidates share a forward in "auto"; by default one on the CPU, where sharing
            saves nothing, and on a GPU what its first estimates measure to be faster.
        backward_budget: bound on the expected depth of backward, as a fraction of the layers, in (0, 1]; see the README
            of this folder. None draws as the paper does.
        checkpoint_beyond_budget: in steps deeper than the budget, checkpoint the activations of the layers in excess,
            so that the budget bounds memory as well.
        frozen_state: what becomes of the optimizer's state of layers that do not train: "keep" it, "offload" it to
            CPU memory until they do, or "drop" it: they start anew.

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
    estimator: str = "auto"
    candidates_per_forward: int | None = None
    backward_budget: float | None = None
    checkpoint_beyond_budget: bool = False
    frozen_state: str = "keep"

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
        for name, known in (("estimator", ESTIMATORS), ("frozen_state", FROZEN_STATES)):
            if getattr(self, name) not in known:
                raise ValueError(f"ISTConfig: expected {name} among {', '.join(known)}, got {getattr(self, name)!r}")
        if self.candidates_per_forward is not None and self.candidates_per_forward < 1:
            raise ValueError(
                f"ISTConfig: expected candidates_per_forward of at least 1, got {self.candidates_per_forward}"
            )
        if self.backward_budget is not None and not 0.0 < self.backward_budget <= 1.0:
            raise ValueError(f"ISTConfig: expected backward_budget in (0, 1], got {self.backward_budget}")
        if self.checkpoint_beyond_budget and self.backward_budget is None:
            raise ValueError("ISTConfig: expected a backward_budget for checkpoint_beyond_budget, got None")
