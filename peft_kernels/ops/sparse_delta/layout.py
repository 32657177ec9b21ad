"""Which entries of a weight a sparse delta may change, and in what order its values stand."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from os import PathLike

import torch

from ..core.messages import describe
from ..core.tensors import slices

#: The names of what each kind of layout holds.
INDEX_TENSORS = {
    "entries": ("row_starts", "columns"),
    "rows": ("index",),
    "columns": ("index",),
    "blocks": ("index",),
    "n_of_m": ("offsets",),
}
#: In a file's metadata, so that no other file is mistaken for one of these.
FORMAT = "peft_kernels.SparseLayout"


class SparseLayout:
    """A set of positions in a weight [N, K]. It never changes; `to` makes another one.

    Made by `from_mask`, `from_indices`, `from_sparse`, `rows`, `columns`, `blocks` or `n_of_m`. Values [nnz] stand in
    the order of `indices()`: by flat row-major position, ascending; those of blocks block by block.

    It is as compact as its kind allows. Entries without any structure are kept row by row, as columns of 16 or 32 bits
    and where each row begins: 2.1 bytes a value at 1 % of [4096, 4096].

    Attributes:
        kind: "entries", "rows", "columns", "blocks" or "n_of_m".
        shape: (N, K) of the weight.
        tile: (rows, columns) of a block, (n, m) of n_of_m, else ().
        tensors: what it holds, by name (`INDEX_TENSORS`); not to be written to.
        values_shape: of the values before they are flattened: [count, K] of rows, [N, count] of columns, [count, rows,
            columns] of blocks, [N, K / m, n] of n_of_m.
        nnz: number of positions.
    """

    def __init__(
        self, kind: str, shape: tuple[int, int], tensors: dict[str, torch.Tensor], tile: tuple[int, ...] = ()
    ) -> None:
        """For the constructors below, which check what they are given."""
        self.kind, self.shape, self.tensors, self.tile = kind, shape, tensors, tile
        (N, K), held = shape, tensors[INDEX_TENSORS[kind][-1]]
        shapes = {"rows": (len(held), K), "columns": (N, len(held)), "blocks": (len(held), *tile)}
        self.values_shape: tuple[int, ...] = shapes.get(kind, tuple(held.shape))
        self.nnz = math.prod(self.values_shape)

    @classmethod
    def of_tensors(
        cls, kind: str, shape: tuple[int, int], tensors: list[torch.Tensor], tile: tuple[int, ...]
    ) -> SparseLayout:
        """From what `tensors` of another one holds, in that order; nothing is checked."""
        return cls(kind, shape, dict(zip(INDEX_TENSORS[kind], tensors)), tile)

    @classmethod
    def from_mask(cls, mask: torch.Tensor) -> SparseLayout:
        """The entries where `mask`, bool [N, K], is True."""
        _check_mask(mask)
        return cls._of_entries(tuple(mask.shape), mask.sum(1), mask.nonzero()[:, 1])

    @classmethod
    def from_indices(cls, shape: tuple[int, int], flat_indices: torch.Tensor) -> SparseLayout:
        """Entries by their flat row-major positions, integers [nnz] in any order.

        Raises:
            ValueError: one is out of range, or there twice.
        """
        N, K = _checked_shape(shape)
        flat = _sorted(flat_indices, N * K, f"flat positions in {[N, K]}")
        rows, columns = flat // K if K else flat, flat % K if K else flat
        return cls._of_entries((N, K), torch.bincount(rows, minlength=N), columns)

    @classmethod
    def from_sparse(cls, tensor: torch.Tensor) -> SparseLayout:
        """The entries that a COO or CSR tensor [N, K] holds, zeros among them too."""
        if tensor.layout == torch.sparse_csr and tensor.dim() == 2:
            starts, columns = tensor.crow_indices().long(), tensor.col_indices().long()
            rows = torch.repeat_interleave(torch.arange(tensor.shape[0], device=columns.device), starts.diff())
        elif tensor.layout == torch.sparse_coo and tensor.dim() == tensor.sparse_dim() == 2:
            rows, columns = tensor.coalesce().indices()
        else:
            raise ValueError(f"expected a COO or CSR tensor [N, K], got {describe(tensor)}, {tensor.layout}")
        return cls.from_indices(tuple(tensor.shape), rows * tensor.shape[1] + columns)

    @classmethod
    def rows(cls, shape: tuple[int, int], index: torch.Tensor) -> SparseLayout:
        """Whole rows of the weight, which are outputs of the layer; index: integers [count] in any order."""
        N, K = _checked_shape(shape)
        return cls("rows", (N, K), {"index": _sorted(index, N, f"rows of {[N, K]}")})

    @classmethod
    def columns(cls, shape: tuple[int, int], index: torch.Tensor) -> SparseLayout:
        """Whole columns of the weight, which are inputs of the layer; index: integers [count] in any order."""
        N, K = _checked_shape(shape)
        return cls("columns", (N, K), {"index": _sorted(index, K, f"columns of {[N, K]}")})

    @classmethod
    def blocks(cls, shape: tuple[int, int], block: tuple[int, int], index: torch.Tensor) -> SparseLayout:
        """Blocks of `block` = (rows, columns) entries, numbered row by row; index: integers [count] in any order.

        Raises:
            ValueError: blocks of this size do not fill the shape; a number is out of range, or there twice.
        """
        (N, K), (height, width) = _checked_shape(shape), block
        if height < 1 or width < 1 or N % height or K % width:
            raise ValueError(f"expected blocks that fill {[N, K]}, got {[height, width]}")
        count = N // height * (K // width)
        what = f"blocks of {[height, width]} in {[N, K]}"
        return cls("blocks", (N, K), {"index": _sorted(index, count, what)}, (height, width))

    @classmethod
    def n_of_m(cls, mask: torch.Tensor, n: int, m: int) -> SparseLayout:
        """The entries where `mask`, bool [N, K], is True: n among every m neighbours of a row, m up to 128.

        Raises:
            ValueError: m does not divide K, or some m neighbours have more or fewer than n.
        """
        _check_mask(mask)
        N, K = mask.shape
        if not 1 <= n <= m <= 128 or K % m:
            raise ValueError(f"expected 1 ≤ n ≤ m ≤ 128 where m divides {K} columns, got {n} of {m}")
        groups = mask.unflatten(1, (K // m, m))
        if bool((groups.sum(2) != n).any()):
            raise ValueError(f"expected {n} entries among every {m} of a row, got more or fewer")
        offsets = groups.nonzero()[:, 2].view(N, K // m, n).to(torch.int8)
        return cls("n_of_m", (N, K), {"offsets": offsets}, (n, m))

    @classmethod
    def _of_entries(cls, shape: tuple[int, int], counts: torch.Tensor, columns: torch.Tensor) -> SparseLayout:
        """A layout of `counts` entries in each row, int64 [N], whose columns, int64 [nnz], ascend in it."""
        row_starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        tensors = {
            "row_starts": row_starts.to(torch.int32 if len(columns) < 1 << 31 else torch.int64),
            "columns": columns.to(torch.int16 if shape[1] <= 1 << 15 else torch.int32),
        }
        return cls("entries", shape, tensors)

    @classmethod
    def _of_sorted(cls, shape: tuple[int, int], flat: torch.Tensor) -> SparseLayout:
        """A layout of flat positions, int64 [nnz], that ascend and are in range: nothing is checked or awaited."""
        N, K = shape
        starts = torch.searchsorted(flat, K * torch.arange(N + 1, device=flat.device))
        return cls._of_entries((N, K), starts.diff(), flat % max(1, K))

    @property
    def density(self) -> float:
        return self.nnz / max(1, math.prod(self.shape))

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def device(self) -> torch.device:
        return next(iter(self.tensors.values())).device

    def to(self, device: torch.device | str | int) -> SparseLayout:
        moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return SparseLayout(self.kind, self.shape, moved, self.tile)

    def indices(self) -> torch.Tensor:
        """Flat row-major positions in the order of the values, int64 [nnz]."""
        (N, K), held = self.shape, self.tensors[INDEX_TENSORS[self.kind][-1]]

        def count(end: int, step: int = 1) -> torch.Tensor:
            return step * torch.arange(end, device=held.device)

        if self.kind == "rows":
            flat = held[:, None] * K + count(K)
        elif self.kind == "columns":
            flat = count(N, K)[:, None] + held
        elif self.kind == "blocks":
            height, width = self.tile
            across = max(1, K // width)
            first = held // across * (height * K) + held % across * width
            flat = first[:, None, None] + count(height, K)[:, None] + count(width)
        elif self.kind == "n_of_m":
            m = self.tile[1]
            flat = count(N, K)[:, None, None] + count(K // m, m)[:, None] + held
        else:
            counts = self.tensors["row_starts"].diff().long()
            flat = torch.repeat_interleave(counts, output_size=self.nnz).mul_(K).add_(held)
        return flat.flatten()

    def mask(self) -> torch.Tensor:
        """bool [N, K], True at the positions."""
        return self.put_(torch.zeros(self.shape, dtype=torch.bool, device=self.device), True)

    def take(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy of what `weight` [N, K] holds at the positions, [nnz]."""
        view, place = self._place(weight)
        return view[place].flatten()

    def put_(self, weight: torch.Tensor, values: torch.Tensor | float) -> torch.Tensor:
        """Writes values [nnz], or one number, to the positions of `weight` [N, K], and returns it."""
        view, place = self._place(weight)
        if isinstance(values, torch.Tensor):
            if values.shape != (self.nnz,):
                raise ValueError(f"expected values [{self.nnz}], got {describe(values)}")
            values = values.to(weight.dtype).view(self.values_shape)
        view[place] = values
        return weight

    def _place(self, weight: torch.Tensor) -> tuple[torch.Tensor, tuple]:
        """A view of the weight, and what it is indexed with for the values in `values_shape`."""
        if tuple(weight.shape) != self.shape or weight.device != self.device:
            raise ValueError(f"expected a weight {list(self.shape)} on {self.device}, got {describe(weight)}")
        if self.kind == "rows":
            return weight, (self.tensors["index"],)
        if self.kind == "columns":
            return weight, (slice(None), self.tensors["index"])
        if self.kind == "blocks":
            (height, width), index = self.tile, self.tensors["index"]
            across = max(1, self.shape[1] // width)
            blocks = weight.unflatten(0, (-1, height)).unflatten(2, (-1, width)).transpose(1, 2)
            return blocks, (index // across, index % across)
        flat = self.indices().view(self.values_shape)
        if weight.is_contiguous():
            return weight.view(-1), (flat,)
        K = max(1, self.shape[1])
        return weight, (flat // K, flat % K)

    def split(self, dim: int, step: int) -> Iterator[tuple[slice, slice | torch.Tensor | tuple, torch.Tensor]]:
        """The entries in each band of `step` rows (dim 0) or columns (dim 1), which cut no block and no group of n_of_m
        apart. Not for rows and columns, which take no bands.

        Yields:
            The band; what to index values in `values_shape` with; where each of them stands in the band, flat, int64:
            one behind its end for those that are in no part of it, which is sooner done than to find them out.
        """
        (N, K), held = self.shape, self.tensors[INDEX_TENSORS[self.kind][-1]]
        bands = list(slices(self.shape[dim], step))

        def count(end: int, step: int = 1) -> torch.Tensor:
            return step * torch.arange(end, device=held.device)

        if self.kind == "entries" and dim == 0:  # ascending: what is in a band are neighbours
            flat, starts = self.indices(), self.tensors["row_starts"][::step].tolist() + [self.nnz]
            for band, first, last in zip(bands, starts, starts[1:]):
                yield band, slice(first, last), flat[first:last] - band.start * K
        elif self.kind == "entries":
            rows = torch.repeat_interleave(count(N), self.tensors["row_starts"].diff(), output_size=self.nnz)
            for band in bands:
                width = band.stop - band.start
                inside = (held >= band.start) & (held < band.stop)
                yield band, slice(None), torch.where(inside, rows * width + (held - band.start), N * width)
        elif self.kind == "n_of_m":
            m = self.tile[1]
            for band in bands:
                chosen = (band,) if dim == 0 else (slice(None), slice(band.start // m, band.stop // m))
                offsets = held[chosen].flatten(0, 1)
                yield band, chosen, (count(len(offsets), m)[:, None] + offsets).flatten()
        else:
            (height, width), across = self.tile, max(1, K // self.tile[1])
            corner = held // across * height, held % across * width
            for band in bands:
                chosen = ((corner[dim] >= band.start) & (corner[dim] < band.stop)).nonzero().squeeze(1)
                columns = K if dim == 0 else band.stop - band.start
                first = corner[0][chosen] * columns + corner[1][chosen] - band.start * (columns if dim == 0 else 1)
                yield band, chosen, (first[:, None, None] + count(height, columns)[:, None] + count(width)).flatten()

    def save(self, path: str | PathLike) -> None:
        """Writes a safetensors file."""
        from safetensors.torch import save_file

        facts = {"kind": self.kind, "shape": self.shape, "tile": self.tile}
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        save_file(tensors, path, {"format": FORMAT, "layout": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | PathLike, device: torch.device | str = "cpu") -> SparseLayout:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file is another one, or damaged.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"expected a SparseLayout in {path}, got a file without the mark of one")
                facts = json.loads(metadata["layout"])
                tensors = {name: file.get_tensor(name) for name in INDEX_TENSORS[facts["kind"]]}
            layout = cls(facts["kind"], tuple(facts["shape"]), tensors, tuple(facts["tile"]))
            layout.check_range()
        except (SafetensorError, KeyError, TypeError, RuntimeError, IndexError, json.JSONDecodeError) as error:
            raise ValueError(f"expected a SparseLayout in {path}, got a damaged file ({error})") from error
        return layout

    def check_range(self) -> None:
        """Raise IndexError if a position is outside of the weight, as in a file that is damaged."""
        flat, end = self.indices(), math.prod(self.shape)
        if self.nnz and not 0 <= int(flat.min()) <= int(flat.max()) < end:
            raise IndexError(f"expected positions from 0 to {end - 1}, got others")

    def __eq__(self, other: object) -> bool:
        """Whether both are of one kind and have the same positions, on whatever devices."""
        if not isinstance(other, SparseLayout):
            return NotImplemented
        same = (self.kind, self.shape, self.tile) == (other.kind, other.shape, other.tile)
        return same and all(torch.equal(held.cpu(), other.tensors[name].cpu()) for name, held in self.tensors.items())

    __hash__ = None

    def __repr__(self) -> str:
        tile = {"blocks": " of {} × {}", "n_of_m": ", {} of {}"}.get(self.kind, "").format(*self.tile)
        return (
            f"SparseLayout({self.kind.replace('_', ' ')}{tile} in {list(self.shape)}: {self.nnz:,} values, density "
            f"{self.density:.3%}, {self.nbytes:,} bytes of indices on {self.device})"
        )


def _check_mask(mask: torch.Tensor) -> None:
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise ValueError(f"expected a mask, bool [N, K], got {describe(mask)}")


def _checked_shape(shape: tuple[int, int]) -> tuple[int, int]:
    if len(shape) != 2 or min(shape) < 0:
        given = describe(shape) if isinstance(shape, torch.Tensor) else tuple(shape)
        raise ValueError(f"expected the shape (N, K) of a weight, got {given}")
    return int(shape[0]), int(shape[1])


def _sorted(index: torch.Tensor, end: int, what: str) -> torch.Tensor:
    """int64, ascending; refused unless all are different and in [0, end)."""
    if index.dim() != 1 or index.dtype.is_floating_point or index.dtype.is_complex or index.dtype == torch.bool:
        raise ValueError(f"expected {what} as integers [count], got {describe(index)}")
    index = index.long().sort().values
    if len(index) and not 0 <= int(index[0]) <= int(index[-1]) < end:
        raise ValueError(f"expected {what} from 0 to {end - 1}, got {int(index[0])} to {int(index[-1])}")
    twice = index[1:][index.diff() == 0]
    if len(twice):
        raise ValueError(f"expected each of the {what} once, got {int(twice[0])} more than once")
    return index
