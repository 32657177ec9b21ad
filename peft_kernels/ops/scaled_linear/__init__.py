"""A linear layer whose output or input is scaled by a learned vector, y = (x·Wᵀ + bias) ⊙ l ((IA)³)."""

from .op import ScaledLinearFunction, scaled_linear

__all__ = ["ScaledLinearFunction", "scaled_linear"]
