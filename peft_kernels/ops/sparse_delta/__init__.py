"""The linear layer with a sparse delta, y = x·(W + Δ)ᵀ + bias with Δ non-zero at fixed positions."""

from .composition import written
from .delta import SparseDelta
from .layout import SparseLayout
from .op import (
    SparseDeltaLinearFunction,
    SparseGradientFunction,
    sparse_delta_linear,
    with_sparse_gradient_,
    write_delta,
)

__all__ = [
    "SparseDelta",
    "SparseDeltaLinearFunction",
    "SparseGradientFunction",
    "SparseLayout",
    "sparse_delta_linear",
    "with_sparse_gradient_",
    "write_delta",
    "written",
]
