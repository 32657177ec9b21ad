"""A sparse delta: positions and their values, to scale, add and keep in a file."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..core.messages import describe
from .layout import SparseLayout


@dataclass(frozen=True, eq=False)
class SparseDelta:
    """Δ of a weight [N, K]. Deltas of one shape are added and scaled as vectors are: `language + 0.5 * task` is the
    composition of Ansell et al., "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", 2022, eq. 3.

    Attributes:
        layout: positions.
        values: [nnz] in the order of `layout.indices()`, on the layout's device.

    Raises:
        ValueError: the values are not one for each position, on their device.
    """

    layout: SparseLayout
    values: torch.Tensor

    def __post_init__(self) -> None:
        expected = f"values [{self.layout.nnz}] on {self.layout.device}"
        if self.values.shape != (self.layout.nnz,) or self.values.device != self.layout.device:
            raise ValueError(f"SparseDelta: expected {expected}, got {describe(self.values)}")

    def __mul__(self, factor: float) -> SparseDelta:
        return SparseDelta(self.layout, self.values.detach() * factor)

    __rmul__ = __mul__

    def __add__(self, other: SparseDelta) -> SparseDelta:
        """At the positions of both. Of one layout the sum keeps it; of two it is by entries.

        Raises:
            ValueError: the other is of another shape or device.
        """
        mine, theirs = self.layout, other.layout
        if mine.shape != theirs.shape or mine.device != theirs.device:
            expected = f"a delta of {list(mine.shape)} on {mine.device}"
            raise ValueError(f"SparseDelta: expected {expected} to add, got {theirs}")
        if mine == theirs:
            return SparseDelta(mine, self.values.detach() + other.values.detach())
        dtype = torch.promote_types(self.values.dtype, other.values.dtype)
        flat, where = torch.cat([mine.indices(), theirs.indices()]).unique(return_inverse=True)
        values = torch.cat([self.values.detach().to(dtype), other.values.detach().to(dtype)])
        total = torch.zeros(len(flat), dtype=dtype, device=mine.device).index_add_(0, where, values)
        return SparseDelta(SparseLayout.from_indices(mine.shape, flat), total)

    def __sub__(self, other: SparseDelta) -> SparseDelta:
        return self + -1.0 * other

    def to_dense(self) -> torch.Tensor:
        """[N, K], zero elsewhere."""
        layout = self.layout
        dense = torch.zeros(layout.shape, dtype=self.values.dtype, device=layout.device)
        return layout.put_(dense, self.values.detach())

    def to(self, device: torch.device | str | int) -> SparseDelta:
        return SparseDelta(self.layout.to(device), self.values.detach().to(device))

    def __repr__(self) -> str:
        return f"SparseDelta({self.layout}, {str(self.values.dtype).removeprefix('torch.')})"
