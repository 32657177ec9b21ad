"""A linear layer whose weight is masked by learned scores, y = x·(W ⊙ 1[S ≥ τ])ᵀ + bias (Threshold-Mask)."""

from .op import MaskedLinearFunction, masked_linear

__all__ = ["MaskedLinearFunction", "masked_linear"]
