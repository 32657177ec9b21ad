"""Masked sparse deltas: which entries of a weight train."""

from .layout import SparseLayout

__all__ = ["SparseLayout"]
