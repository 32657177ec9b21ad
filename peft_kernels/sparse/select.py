"""Makes layouts of the entries with the best scores, and layouts drawn at random.

The best of a billion entries are found without sorting them. The bits of a float32, read as an integer, are in the
order of the numbers once those of negative ones are turned around. Two histograms, of the upper 16 bits and of the
lower 16 among the entries that share the right upper ones, give the score of the last entry that is taken, exactly. A
third pass counts what is above it and what equals it; a fourth writes the positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from random import Random

import torch

from ..ops.core.messages import describe
from ..ops.sparse_delta import SparseLayout

#: Entries that are looked at in one go. Beside scores and result it takes up to 40 bytes for each of these.
PIECE = 1 << 21
#: Bins of a histogram: 16 bits.
BINS = 1 << 16


@torch.no_grad()
def select(
    scores: Mapping[str, torch.Tensor],
    *,
    density: float | None = None,
    count: int | None = None,
    scope: str = "global",
    structure: str = "entries",
    block: tuple[int, int] | None = None,
) -> dict[str, SparseLayout]:
    """Select the entries with the largest scores, or the rows, columns or blocks with the largest mean score.

    Of equal scores the first are taken, by the order of the tensors, then by flat position. Scores are compared in
    float32, means too; they may be negative or infinite. On a GPU the CPU waits once, for the counts of each
    piece of the scores, before the results are allocated.

    Args:
        scores: by name, floating point [N, K], on one device or several.
        density: share of the entries, 0 to 1: round(density · units) entries, rows, columns or blocks are taken. Where
            those of different size compete, so many that the number of entries is nearest to its share.
        count: instead of density: how many entries, rows, columns or blocks.
        scope: "global": of all tensors together, so that one may get none; "tensor": in each of them.
        structure: "entries", "rows", "columns" or "blocks".
        block: (rows, columns) of a block.

    Returns:
        A layout for every name, on the device of its scores.

    Raises:
        ValueError: a score is NaN, or an argument makes no sense.
    """
    for name, tensor in scores.items():
        if tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(f"expected scores [N, K] in floating point, got {describe(tensor)} for {name!r}")
    shapes = {name: tuple(tensor.shape) for name, tensor in scores.items()}
    tiles = _tiles(shapes, structure, block)
    units = [_units(shape, tile) for shape, tile in zip(shapes.values(), tiles)]
    sizes = [1 if count is not None else max(1, math.prod(tile)) for tile in tiles]
    groups, targets = [], []
    for group, where in _groups(list(scores), scope):
        # Sizes count in their greatest common divisor: where they are equal, in units.
        common = math.gcd(*(sizes[i] for i in group if units[i])) or 1
        for i in group:
            sizes[i] //= common
        groups.append(group)
        targets.append(_target(sum(sizes[i] * units[i] for i in group), density, count, f"{structure} of {where}"))
    tensors = list(scores.values())
    if structure != "entries":
        tensors = [_unit_means(tensor, tile) for tensor, tile in zip(tensors, tiles)]
    found = largest(tensors, groups, targets, sizes, list(scores))
    if structure == "entries":
        return {name: SparseLayout._of_entries(shapes[name], *each) for name, each in zip(scores, found)}
    return {name: _layout(shapes[name], structure, block, columns.long()) for name, (_, columns) in zip(scores, found)}


def random(
    shapes: Mapping[str, tuple[int, int] | torch.Tensor],
    *,
    density: float | None = None,
    count: int | None = None,
    seed: int = 0,
    scope: str = "tensor",
    structure: str = "entries",
    block: tuple[int, int] | None = None,
    device: torch.device | str | None = None,
) -> dict[str, SparseLayout]:
    """Draw entries, rows, columns or blocks without replacement, each as likely as any other.

    Everything is drawn on the CPU, from the seed and the number of the tensor: the same on every device. Memory goes by
    what is drawn, not by the weights: up to 64 bytes for each.

    Args:
        shapes: by name (N, K), or tensors of these shapes.
        density: share of the entries, 0 to 1; what is drawn is round(density · units). Where units of different size
            compete, that is the share of entries on average only.
        count: instead of density: how many entries, rows, columns or blocks.
        seed: any integer.
        scope: "tensor": in each of them; "global": of all tensors together, so that one may get none.
        structure: "entries", "rows", "columns" or "blocks".
        block: (rows, columns) of a block.
        device: of the layouts; by default that of the tensor, or the CPU.

    Raises:
        ValueError: an argument makes no sense.
    """
    devices = [device or getattr(shape, "device", "cpu") for shape in shapes.values()]
    shapes = {name: tuple(getattr(shape, "shape", shape)) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if len(shape) != 2 or min(shape) < 0:
            raise ValueError(f"expected the shape (N, K) of a weight, got {shape} for {name!r}")
    tiles = _tiles(shapes, structure, block)
    units = [_units(shape, tile) for shape, tile in zip(shapes.values(), tiles)]
    flats = []
    for number, (group, where) in enumerate(_groups(list(shapes), scope)):
        # Seed and number as text, which `Random` hashes: seed 0's second tensor is not seed 1's first.
        generator = torch.Generator().manual_seed(Random(f"{seed}, {number}").getrandbits(32))
        total = sum(units[i] for i in group)
        drawn = _distinct(total, _target(total, density, count, f"{structure} of {where}"), generator)
        ends = torch.tensor([units[i] for i in group], dtype=torch.int64).cumsum(0)
        parts = drawn.tensor_split(torch.searchsorted(drawn, ends[:-1]))
        flats += [part - (end - units[i]) for part, end, i in zip(parts, ends, group)]
    return {
        name: _layout(shape, structure, block, flat.to(device))
        for (name, shape), flat, device in zip(shapes.items(), flats, devices)
    }


def largest(
    scores: Sequence[torch.Tensor],
    groups: Sequence[Sequence[int]],
    targets: Sequence[int],
    sizes: Sequence[int],
    names: Sequence[str],
    absolute: bool = False,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Find the largest of some tensors [N, K], or the largest by absolute value; of equals the first.

    Args:
        groups: which tensors compete with each other, by their numbers; each tensor is in one group.
        targets: of each group, what the sizes of its taken ones should add up to, at most that of all of them.
        sizes: what each tensor's entries count for. The sum comes as near to the target as it can, and rather stays
            below it.
        names: of the tensors, for the message about a NaN.

    Returns:
        For each tensor how many are taken in every row, int64 [N], and their columns in turn, int32.
    """
    thresholds = _thresholds(scores, groups, targets, sizes, absolute)
    numbers = [sum(1 for _ in _pieces(tensor)) for tensor in scores]
    # One tensor for all: small ones between large ones that come and go would break the heap of a CPU into bits.
    facts = torch.zeros(sum(numbers), 3, dtype=torch.int64, device=scores[0].device if scores else None)
    place = iter(facts)
    for tensor, threshold in zip(scores, thresholds):
        for _, _, piece in _pieces(tensor):
            next(place).copy_(_facts(piece, threshold, absolute))
    # The one transfer to the CPU, of three numbers a piece: from here on every size is known.
    of_pieces = iter(facts.tolist())
    pieces = [[next(of_pieces) for _ in range(number)] for number in numbers]
    for name, of_tensor in zip(names, pieces):
        if sum(nans for _, _, nans in of_tensor):
            raise ValueError(f"expected numbers, got NaN in {name!r}")
    taken: dict[int, list[int]] = {}
    for group, target in zip(groups, targets):
        taken.update(_ties_taken(group, target, sizes, pieces))
    return [
        _positions(tensor, threshold, [above for above, _, _ in pieces[i]], taken[i], absolute)
        for i, (tensor, threshold) in enumerate(zip(scores, thresholds))
    ]


def _thresholds(scores, groups, targets, sizes, absolute: bool) -> list[torch.Tensor]:
    """Return for each tensor the key of the last entry that its group takes, int32 [1] on its device."""
    thresholds = {}
    for group, target in zip(groups, targets):
        if not group:
            continue
        members = [(scores[i], sizes[i]) for i in group]
        need = torch.full((1,), target, device=scores[group[0]].device)
        high, above = _locate(_histogram(members, absolute, None), need)
        high = (high - BINS // 2).to(torch.int32)
        low, _ = _locate(_histogram(members, absolute, high), need - above)
        threshold = (high * BINS + low).to(torch.int32)
        thresholds.update({i: threshold.to(scores[i].device) for i in group})
    return [thresholds[i] for i in range(len(scores))]


def _histogram(members: Sequence[tuple[torch.Tensor, int]], absolute: bool, high: torch.Tensor | None) -> torch.Tensor:
    """Sum the sizes of all entries by the upper 16 bits of their keys, or, of those whose upper bits are `high`, by the
    lower: int64 [BINS]."""
    total = 0
    for tensor, size in members:
        bins = torch.zeros(BINS, dtype=torch.int64, device=tensor.device)
        for _, _, piece in _pieces(tensor):
            keys = _keys(piece, absolute).flatten()
            upper = keys >> 16
            if high is None:
                bins.index_add_(0, upper.add_(BINS // 2), bins.new_ones(1).expand(len(keys)))
            else:
                bins.index_add_(0, keys.bitwise_and_(BINS - 1), (upper == high.to(tensor.device)).long())
        total = (size * bins).to(members[0][0].device) + total
    return total


def _locate(histogram: torch.Tensor, need: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the bin in which `need` [1] is reached, counted from the last bin downwards, and the sum of those above it;
    int64 [1] each. The index is a tensor [1], not a scalar, which would make the CPU wait."""
    downwards = histogram.flip(0)
    reached = downwards.cumsum(0)
    place = torch.searchsorted(reached, need)
    return BINS - 1 - place, reached[place] - downwards[place]


def _ties_taken(group, target: int, sizes, pieces) -> dict[int, list[int]]:
    """Return how many entries equal to the threshold each piece gives: the first ones, until the target is reached."""
    left = target - sum(sizes[i] * above for i in group for above, _, _ in pieces[i])
    taken: dict[int, list[int]] = {}
    for i in group:
        taken[i] = []
        for _, ties, _ in pieces[i]:
            number = min(ties, -(-left // sizes[i]))
            left -= number * sizes[i]
            if left < 0:
                if -left >= left + sizes[i]:  # without the last it is as near, or nearer
                    number -= 1
                left = 0
            taken[i].append(number)
    return taken


def _positions(tensor, threshold, above: list[int], ties: list[int], absolute: bool):
    """Return what `largest` gives for a tensor: from each piece the `above` entries beyond the threshold, and the first
    `ties` that equal it."""
    counts = torch.zeros(tensor.shape[0], dtype=torch.int64, device=tensor.device)
    columns = torch.empty(sum(above) + sum(ties), dtype=torch.int32, device=tensor.device)
    end = 0
    for (row, column, piece), more, equal in zip(_pieces(tensor), above, ties):
        if more + equal:
            chosen = _chosen(piece, threshold, equal, absolute)
            counts[row : row + len(piece)] += chosen.sum(1)
            start, end = end, end + more + equal
            columns[start:end] = torch.nonzero_static(chosen, size=more + equal)[:, 1] + column
    return counts, columns


def _facts(piece: torch.Tensor, threshold: torch.Tensor, absolute: bool) -> torch.Tensor:
    """Count the entries above the threshold, equal to it, and NaN: int64 [3]."""
    keys = _keys(piece, absolute)
    return torch.stack([fact.count_nonzero() for fact in (keys > threshold, keys == threshold, piece.isnan())])


def _chosen(piece: torch.Tensor, threshold: torch.Tensor, ties: int, absolute: bool) -> torch.Tensor:
    """Choose what is above the threshold, and the first `ties` of those that equal it: bool like the piece."""
    keys = _keys(piece, absolute)
    chosen = keys > threshold
    if ties:
        tied = keys == threshold
        chosen |= tied & (tied.flatten().cumsum(0, dtype=torch.int32).view_as(tied) <= ties)
    return chosen


def _keys(piece: torch.Tensor, absolute: bool) -> torch.Tensor:
    """Map numbers to int32 keys in their order, or in that of their absolute values."""
    numbers = piece.abs() if absolute else piece
    bits = (numbers.float() + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0, so that they are equal
    return bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF))


def _pieces(tensor: torch.Tensor, tile: tuple[int, int] = (1, 1)) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Yield pieces of whole tiles, each with its first row and column, of at most PIECE entries unless a tile has more.
    Where a tile is an entry, they are whole rows or parts of one: positions ascend from piece to piece."""
    (N, K), (height, width) = tensor.shape, tile
    rows = max(height, PIECE // max(1, K) // max(1, height) * height, 1)
    columns = max(width, PIECE // rows // max(1, width) * width, 1)
    for row in range(0, N, rows):
        for column in range(0, K, columns):
            yield row, column, tensor[row : row + rows, column : column + columns]


def _unit_means(scores: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """Return the mean score of each tile, row by row: float32 [1, units]. It is summed in float64, so that the order in
    which a device adds mostly vanishes in rounding."""
    height, width = tile
    units = _units(scores.shape, tile)
    means = torch.empty(units and len(scores) // height, units and scores.shape[1] // width, device=scores.device)
    for row, column, piece in _pieces(scores, tile):
        sums = piece.unflatten(0, (-1, height)).unflatten(2, (-1, width)).sum((1, 3), dtype=torch.float64)
        row, column = row // height, column // width
        means[row : row + sums.shape[0], column : column + sums.shape[1]] = sums / (height * width)
    return means.view(1, units)


def _tiles(shapes: Mapping[str, tuple[int, int]], structure: str, block) -> list[tuple[int, int]]:
    """Return (rows, columns) of what is taken as a whole in each weight."""
    if structure not in ("entries", "rows", "columns", "blocks"):
        raise ValueError(f"expected a structure among entries, rows, columns, blocks, got {structure!r}")
    if (block is not None) != (structure == "blocks"):
        raise ValueError(f"expected a block for blocks and for nothing else, got {block} for {structure}")
    tiles = []
    for name, (N, K) in shapes.items():
        tile = {"entries": (1, 1), "rows": (1, K), "columns": (N, 1)}.get(structure, block)
        if structure == "blocks" and (len(block) != 2 or min(block) < 1 or N % block[0] or K % block[1]):
            raise ValueError(f"expected blocks (rows, columns) that fill {[N, K]} of {name!r}, got {block}")
        tiles.append(tuple(tile))
    return tiles


def _units(shape: Sequence[int], tile: tuple[int, int]) -> int:
    return shape[0] * shape[1] // math.prod(tile) if math.prod(shape) else 0


def _groups(names: Sequence[str], scope: str) -> list[tuple[list[int], str]]:
    """Return the numbers of the tensors that compete with each other, and what a message calls them."""
    if scope not in ("global", "tensor"):
        raise ValueError(f"expected the scope global or tensor, got {scope!r}")
    if scope == "global":
        return [(list(range(len(names))), "all")]
    return [([i], repr(name)) for i, name in enumerate(names)]


def _target(total: int, density: float | None, count: int | None, what: str) -> int:
    """Return how many of `total` are taken."""
    if (density is None) == (count is None):
        raise ValueError(f"expected either a density or a count, got {'both' if count is not None else 'neither'}")
    if count is not None:
        if not isinstance(count, int) or not 0 <= count <= total:
            raise ValueError(f"expected a count from 0 to the {total} {what}, got {count}")
        return count
    if not 0 <= density <= 1:
        raise ValueError(f"expected a density from 0 to 1, got {density}")
    return round(density * total)


def _layout(shape: tuple[int, int], structure: str, block, flat: torch.Tensor) -> SparseLayout:
    """Make a layout of the numbers of its units, int64, which ascend and are in range."""
    if structure == "entries":
        return SparseLayout._of_sorted(shape, flat)
    return SparseLayout(structure, shape, {"index": flat}, tuple(block or ()))


def _distinct(end: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Draw `count` numbers of [0, end), ascending: any set of so many is as likely as any other."""
    if count > end // 2:
        # Draw the others instead. The i-th number that is not among them stands behind as many of them as have at most
        # i such numbers before them.
        others = _distinct(end, end - count, generator) if count < end else torch.empty(0, dtype=torch.int64)
        i = torch.arange(count)
        return i + torch.searchsorted(others - torch.arange(len(others)), i, right=True)
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        # So many bring the missing different ones on average, and three standard deviations more. They have 63 bits:
        # `randint` takes 32 for small ranges, and their remainder would favour the first numbers by up to 6 %.
        draws = end * math.log((end - len(found)) / (end - count)) + 3 * math.sqrt(count) + 1
        numbers = torch.empty(int(draws), dtype=torch.int64).random_(generator=generator) % end
        found = torch.cat([found, numbers]).unique()
    # The surplus to drop is drawn too: dropping the largest would leave the end of the weight thinner.
    keep = torch.ones(len(found), dtype=torch.bool)
    keep[torch.randperm(len(found), generator=generator)[count:]] = False
    return found[keep]
