"""Dropping and growing entries while a sparse delta trains, as SpIEL does (Ansell, Vulić, Sterz, Korhonen, Ponti:
"Scaling Sparse Fine-Tuning to Large Language Models", 2024)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..nn import SparseDeltaLinear
from ..ops.core.messages import describe
from ..ops.sparse_delta import SparseLayout
from .select import largest


class Regrown(NamedTuple):
    """The result of `drop_grow`.

    Attributes:
        layout: the new one, with as many entries as the old.
        source: int64 [nnz], for each value of the new layout where it stood among those of the old one, or -1 - j if it
            grew from candidate j.
    """

    layout: SparseLayout
    source: torch.Tensor

    def carry(self, old: torch.Tensor, grown: torch.Tensor | float = 0.0) -> torch.Tensor:
        """Return values, moments or the like for the new layout.

        Args:
            old: [nnz] in the order of the old layout.
            grown: for those that grew: one number, or one for each candidate, [c] in the order `drop_grow` had them.
                SpIEL starts Adam's moments with the mean and the mean square of a candidate's gradients.

        Returns:
            [nnz] in the dtype of `old`, a new tensor without history.

        Raises:
            ValueError: `old` or `grown` has another shape.
        """
        if old.shape != self.source.shape:
            raise ValueError(f"expected what to carry as {list(self.source.shape)}, got {describe(old)}")
        kept = self.source >= 0
        carried = old.detach()[self.source.clamp(min=0)]
        if not isinstance(grown, torch.Tensor):
            return carried.masked_fill_(~kept, grown)
        place = (-1 - self.source)[~kept]
        if grown.dim() != 1 or (len(place) and len(grown) <= int(place.max())):
            raise ValueError(f"expected a number for each candidate, got {describe(grown)}")
        carried[~kept] = grown.detach()[place].to(carried.dtype)
        return carried


@torch.no_grad()
def drop_grow(
    layout: SparseLayout,
    values: torch.Tensor,
    candidates: torch.Tensor,
    candidate_scores: torch.Tensor,
    count: int,
) -> Regrown:
    """Drops the `count` values nearest to zero and grows the `count` candidates with the largest scores.

    Of equal |values| the earlier stay, of equal scores those with the lower positions grow. What is dropped does not
    come back in the same step: candidates are positions outside of the layout.

    Args:
        layout: of entries.
        values: [nnz], the delta: not the weight plus the delta.
        candidates: int64 [c], flat positions in any order.
        candidate_scores: [c], SpIEL's are |Σ gradient|.
        count: from 0 to the smaller of nnz and c.

    Raises:
        ValueError: a shape or the count does not fit, a value or score is NaN, a candidate is out of range, there
            twice, or in the layout.
    """
    if layout.kind != "entries":
        raise ValueError(f"expected a layout of entries, got {layout}")
    if values.shape != (layout.nnz,):
        raise ValueError(f"expected values [{layout.nnz}], got {describe(values)}")
    if candidates.dim() != 1 or candidates.dtype != torch.int64:
        raise ValueError(f"expected candidates as int64 [c], got {describe(candidates)}")
    if candidate_scores.shape != candidates.shape:
        raise ValueError(f"expected a score for each of {len(candidates)} candidates, got {describe(candidate_scores)}")
    most = min(layout.nnz, len(candidates))
    if not 0 <= count <= most:
        raise ValueError(f"expected to drop and grow from 0 to {most} entries, got {count}")
    for what, numbers in (("values", values), ("candidate_scores", candidate_scores)):
        if bool(numbers.isnan().any()):
            raise ValueError(f"expected numbers, got NaN in {what}")
    old = layout.indices()
    ordered, order = candidates.sort()
    _check_candidates(ordered, old, layout.shape)

    kept = _first(values.abs(), len(old) - count)
    chosen = _first(candidate_scores[order], count)
    stay, grow = old[kept], ordered[chosen]
    # A merge: the place of each is its own rank and how many of the other list are before it.
    flat, source = torch.empty_like(old), torch.empty_like(old)
    places = _ranks(kept) + torch.searchsorted(grow, stay), _ranks(chosen) + torch.searchsorted(stay, grow)
    for place, positions, origin in zip(places, (stay, grow), (kept, -1 - order[chosen])):
        flat[place], source[place] = positions, origin
    return Regrown(SparseLayout._of_sorted(layout.shape, flat), source)


@torch.no_grad()
def candidates(gradient: torch.Tensor, layout: SparseLayout, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the largest |gradient| outside of a layout, of equals the first: what may grow in `drop_grow`.

    Args:
        gradient: [N, K].
        layout: of entries, [N, K].
        count: from 0 to N · K - nnz.

    Returns:
        Flat positions, int64 [count], ascending; their gradients [count].

    Raises:
        ValueError: shapes or the count do not fit, a gradient is NaN.
    """
    if layout.kind != "entries":
        raise ValueError(f"expected a layout of entries, got {layout}")
    if tuple(gradient.shape) != layout.shape or gradient.device != layout.device:
        raise ValueError(f"expected a gradient {list(layout.shape)} on {layout.device}, got {describe(gradient)}")
    outside = gradient.numel() - layout.nnz
    if not 0 <= count <= outside:
        raise ValueError(f"expected from 0 to {outside} candidates, got {count}")
    # At most nnz of the largest count + nnz are in the layout: what else there is among them are the largest outside.
    ((in_rows, columns),) = largest([gradient], [[0]], [count + layout.nnz], [1], ["gradient"], absolute=True)
    flat = SparseLayout._of_entries(layout.shape, in_rows, columns).indices()
    flat = flat[~_contains(layout.indices(), flat)]
    width = max(1, layout.shape[1])
    found = gradient[flat // width, flat % width]
    best = _first(found.abs(), count)
    return flat[best], found[best]


@torch.no_grad()
def regrow(
    layer: SparseDeltaLinear,
    regrown: Regrown,
    optimizer: torch.optim.Optimizer | None = None,
    mean: torch.Tensor | float = 0.0,
    square: torch.Tensor | float = 0.0,
) -> None:
    """Moves a layer's delta to the new layout, and Adam's moments with it. Parameter and optimizer stay as they are.

    Args:
        regrown: of the layer's layout and values.
        optimizer: one of Adam's kind that holds `layer.values`.
        mean, square: with which the moments of what grew start, a number or [c] as in `Regrown.carry`.

    Raises:
        ValueError: `regrown` is not of the layer's layout, or a moment's start has another shape. Nothing is changed
            then.
    """
    values = layer.values
    state = optimizer.state.get(values, {}) if optimizer is not None else {}
    moments = [name for name in ("exp_avg", "exp_avg_sq") if name in state]
    starts = {"exp_avg": mean, "exp_avg_sq": square}
    carried = [regrown.carry(state[name], starts[name]) for name in moments]  # before anything is changed
    layer.move_delta(regrown.layout, regrown.carry(values))
    for name, moment in zip(moments, carried):
        state[name].copy_(moment)


def _first(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Return the places of the `count` largest, ascending; of equals the first."""
    return scores.sort(descending=True, stable=True).indices[:count].sort().values


def _ranks(tensor: torch.Tensor) -> torch.Tensor:
    return torch.arange(len(tensor), device=tensor.device)


def _contains(ordered: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return, bool like `wanted`, which of them are in `ordered`, which ascends."""
    if not len(ordered):
        return torch.zeros_like(wanted, dtype=torch.bool)
    return ordered[torch.searchsorted(ordered, wanted).clamp(max=len(ordered) - 1)] == wanted


def _check_candidates(ordered: torch.Tensor, old: torch.Tensor, shape: tuple[int, int]) -> None:
    if not len(ordered):
        return
    end = shape[0] * shape[1]
    if not 0 <= int(ordered[0]) <= int(ordered[-1]) < end:
        raise ValueError(f"expected candidates from 0 to {end - 1}, got {int(ordered[0])} to {int(ordered[-1])}")
    twice = ordered[1:][ordered.diff() == 0]
    if len(twice):
        raise ValueError(f"expected each candidate once, got {int(twice[0])} more than once")
    inside = ordered[_contains(old, ordered)]
    if len(inside):
        raise ValueError(f"expected candidates outside of the layout, got {int(inside[0])}, which is in it")
