"""Optimizers of sparse deltas: torch's own, which also write the weight."""

from .sparse import SparseAdamW, SparseSGD

__all__ = ["SparseAdamW", "SparseSGD"]
