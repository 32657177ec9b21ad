"""The launches of `sparse_delta` by provider. Each function is to be read beside its class in
`benchmarks/sparse_providers.py`: a line here is a call there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from peft_kernels.ops.sparse_delta import configs

from ..sparse_providers import ACCELERATED, BARE, DENSE, SCATTER, SHIRA
from .launches import F32, INDEX, SECTOR, Ceilings, Launch, Passes, cast, elementwise, gemm, native_parts


class Layer(NamedTuple):
    """M tokens, K in_features, N out_features, bytes of an element of x and W; nnz entries of W train, in a layout of
    that kind, blocks of side × side. Values are float32."""

    M: int
    K: int
    N: int
    size: int
    kind: str
    nnz: int
    side: int = 64

    # Bytes of x or dx, y or dy, W, values, int64 positions.
    x = property(lambda self: self.M * self.K * self.size)
    y = property(lambda self: self.M * self.N * self.size)
    W = property(lambda self: self.N * self.K * self.size)
    values = property(lambda self: F32 * self.nnz)
    positions = property(lambda self: INDEX * self.nnz)

    @property
    def count(self) -> int:
        """Of the rows, columns or blocks that train."""
        return self.nnz // {"rows": self.K, "columns": self.N, "blocks": self.side**2}.get(self.kind, 1)

    @property
    def layout(self) -> int:
        """Bytes of a `SparseLayout`."""
        entries = (2 if self.K <= 32768 else 4) * self.nnz + 4 * (self.N + 1)
        return {"entries": entries, "n_of_m": self.nnz}.get(self.kind, INDEX * self.count)

    def touched(self, size: int = 0) -> int:
        """Bytes that go through memory where the entries of a matrix [N, K] are read or written."""
        size = size or self.size
        return size * self.nnz if self.kind in ("rows", "blocks") else min(SECTOR * self.nnz, size * self.N * self.K)

    def base(self, beta: int = 0) -> Launch:
        return gemm("x·Wᵀ", self.M, self.N, self.K, self.size, beta)

    def dx(self, beta: int = 0) -> Launch:
        return gemm("dy·W", self.M, self.K, self.N, self.size, beta)

    def dW(self) -> Launch:
        return gemm("dW = dyᵀ·x", self.N, self.K, self.M, self.size)


def bare(l: Layer, ceilings: Ceilings) -> Passes:
    return Passes([l.base()], [l.dx()])


def dense(l: Layer, ceilings: Ceilings) -> Passes:
    masked = elementwise("masked_fill_", l.W + l.N * l.K, l.W)
    return Passes([l.base()], [l.dx(), l.dW(), masked], adamw(l.W))


def adamw(trained: int) -> list[Launch]:
    """torch's, fused, of `trained` bytes: reads them, the gradient and both moments, writes all but the gradient."""
    return [elementwise("step + 1", F32, F32), elementwise("AdamW", 4 * trained, 3 * trained)]


def clone_scatter(l: Layer, ceilings: Ceilings) -> Passes:
    values = l.size * l.nnz
    forward = [
        *cast("values", l.values, values), elementwise("clone W", l.W, l.W),
        elementwise("index_add_", l.positions + values + l.touched(), l.touched()), l.base(),
    ]  # fmt: skip
    gather = elementwise("index_select", l.positions + l.touched(), values)
    return Passes(forward, [l.dx(), l.dW(), gather, *cast("dvalues", values, l.values)], adamw(l.values))


def shira(l: Layer, ceilings: Ceilings) -> Passes:
    """Values are float32 and positions two int32. torch makes int64 of these, adds the values to a float32 copy of a
    float32 copy of a 16-bit W's clone, and casts dW to float32."""
    wide = F32 * l.N * l.K
    flatten = elementwise("flatten positions", 2 * l.positions, l.positions)
    copies = [*cast("W", l.W, wide), elementwise("copy", wide, wide)] if l.size < F32 else []
    added = elementwise("index_add_", l.positions + l.values + l.touched(F32), l.touched(F32))
    forward = [
        elementwise("clone W", l.W, l.W), elementwise("values · scaling", l.values, l.values),
        *cast("positions", l.positions, 2 * l.positions), *copies, flatten, added, *cast("W + Δ", wide, l.W), l.base(),
    ]  # fmt: skip
    backward = [
        l.dx(), l.dW(), *cast("dW", l.W, wide), flatten,
        elementwise("index_select", l.positions + l.touched(F32), l.values),
        elementwise("dvalues · scaling", l.values, l.values),
    ]  # fmt: skip
    return Passes(forward, backward, adamw(l.values))


# --- Ours, by Triton -----------------------------------------------------------------------------------------


def ours(l: Layer, ceilings: Ceilings) -> Passes:
    """Δ in the weight: forward and dx are the bare linear's, and one launch steps and writes the weight."""
    kept = [_gather("x[:, columns]", l.M, l.count, l.K, l.size)] if l.kind == "columns" else []
    read = 4 * l.values + l.size * l.nnz + l.layout  # values, gradient, both moments; W₀ at the positions
    step = elementwise("AdamW", read, 3 * l.values + l.touched())
    return Passes([l.base(), *kept], [l.dx(), *_dvalues(l, ceilings)], [elementwise("step + 1", F32, F32), step])


def apart(l: Layer, ceilings: Ceilings) -> Passes:
    """Δ beside the weight, AdamW by torch."""
    return Passes(_patched_forward(l), [*_patched_dx(l), *_dvalues(l, ceilings)], adamw(l.values))


def accelerated_shira(l: Layer, ceilings: Ceilings) -> Passes | None:
    """The same op on a GPU. On a CPU it samples the gradient, which is no matter of a matmul rate: no model."""
    return apart(l, ceilings) if "sms" in ceilings else None


def _gather(name: str, rows: int, count: int, across: int, size: int) -> Launch:
    """`count` columns of a matrix [rows, across], whose sectors are read whole."""
    return elementwise(name, rows * min(across * size, SECTOR * count), rows * count * size)


def _patched_forward(l: Layer) -> list[Launch]:
    if l.kind == "columns":
        gather = _gather("x[:, columns]", l.M, l.count, l.K, l.size)  # for y, and once more for backward
        thin = gemm("x[:, columns]·Δᵀ", l.M, l.N, l.count, l.size)
        return [gather, *cast("Δ", l.values, l.size * l.nnz), thin, l.base(beta=1), gather]
    if l.kind == "rows":
        patched = gemm("x·(W + Δ)[rows]ᵀ", l.M, l.count, l.K, l.size)
        return [*_patch(l), l.base(), patched, _put("y[:, rows]", l.M, l.count, l.N, l.size)]
    return _bands(l, l.N, l.K, l.base())


def _patched_dx(l: Layer) -> list[Launch]:
    if l.kind == "columns":
        patched = gemm("dy·(W + Δ)[:, columns]", l.M, l.count, l.N, l.size)
        return [*_patch(l), l.dx(), patched, _put("dx[:, columns]", l.M, l.count, l.K, l.size)]
    if l.kind == "rows":
        thin = gemm("dy[:, rows]·Δ", l.M, l.K, l.count, l.size)
        gather = _gather("dy[:, rows]", l.M, l.count, l.N, l.size)
        return [gather, *cast("Δ", l.values, l.size * l.nnz), thin, l.dx(beta=1)]
    return _bands(l, l.K, l.N, l.dx())


def _patch(l: Layer) -> list[Launch]:
    """(W + Δ) at rows or columns: gathered, added in float32, rounded."""
    W = l.size * l.nnz
    add = elementwise("W + Δ", W + l.values, l.values)
    return [elementwise("W at the positions", l.touched(), W), add, *cast("W + Δ", l.values, W)]


def _put(name: str, rows: int, count: int, across: int, size: int) -> Launch:
    gather = _gather(name, rows, count, across, size)
    return gather._replace(read=gather.written, written=gather.read)


def _bands(l: Layer, length: int, across: int, product: Launch) -> list[Launch]:
    """A band of W at a time is copied, patched and multiplied; `length` is what bands are cut of."""
    step = max(1, min(configs.BAND_BYTES // (across * l.size), math.ceil(length / 2)))
    bands = math.ceil(length / step)
    shared = l.y if product.written == l.x else l.x  # what every band is multiplied with
    part = product._replace(flops=product.flops // bands, read=shared + l.W // bands, written=product.written // bands)
    copy = elementwise("copy a band of W", l.W // bands, l.W // bands)
    write = elementwise("write Δ", l.layout + (l.values + 2 * l.touched()) // bands, l.touched() // bands)
    return [copy, write, part] * bands


def _dvalues(l: Layer, ceilings: Ceilings) -> list[Launch]:
    if l.kind == "entries" and l.nnz <= configs.sampled_up_to(l.size) * l.N * l.K:
        transposes = [elementwise("dyᵀ", l.y, l.y), elementwise("xᵀ", l.x, l.x)]
        return [*transposes, elementwise("sampled", 2 * l.M * l.size * l.nnz + l.layout, l.values)]
    if l.kind in ("entries", "n_of_m"):  # tiles of dW, of which only the entries are written
        return [Launch("tiles of dW", l.dW().flops, l.x + l.y + l.layout, l.values)]
    before = [_gather("dy[:, rows]", l.M, l.count, l.N, l.size)] if l.kind == "rows" else []
    if l.kind != "blocks" and l.count % 16:  # filled up with zeros
        before.append(elementwise("pad", l.M * l.count * l.size, l.M * (l.count + -l.count % 16) * l.size))
    rows, columns, read, batch = {
        "rows": (l.count, l.K, l.M * l.count * l.size + l.x, 1),
        "columns": (l.N, l.count, l.y + l.M * l.count * l.size, 1),
        "blocks": (l.side, l.side, sum(min(side, l.M * l.count * l.side * l.size) for side in (l.x, l.y)), l.count),
    }[l.kind]
    programs = 2 * int(ceilings.get("sms", 132))
    splits = configs.token_splits(configs.thin_tile(rows, columns, l.size), rows, columns, l.M, batch, programs)
    thin = Launch("thin products", 2 * l.M * l.nnz, read + l.layout, splits * l.values)
    return [*before, thin, *([elementwise("reduce", splits * l.values, l.values)] if splits > 1 else [])]


# --- Ours, by the native kernels, as `cuda.py` calls them ----------------------------------------------------


def native(l: Layer, ceilings: Ceilings) -> Passes | None:
    """Δ in the weight. Of rows, columns and blocks, and in float32, it is our reference."""
    if l.kind not in ("entries", "n_of_m") or l.size == F32:
        return None
    write = [*_native_patch(l), elementwise("put W₀ + Δ", l.positions + l.size * l.nnz, l.touched())]
    return Passes([l.base()], [l.dx(), *_native_dvalues(l, ceilings)], [*adamw(l.values), *write])


def native_apart(l: Layer, ceilings: Ceilings) -> Passes | None:
    """Δ beside the weight, in a copy of all of it; AdamW by torch."""
    if l.kind not in ("entries", "n_of_m") or l.size == F32:
        return None
    patched = [
        elementwise("W at the positions", l.positions + l.touched(), l.size * l.nnz), *_native_patch(l),
        elementwise("clone W", l.W, l.W), elementwise("put W + Δ", l.positions + l.size * l.nnz, l.touched()),
    ]  # fmt: skip
    backward = [*patched, l.dx(), *_native_dvalues(l, ceilings)]
    return Passes([*patched, l.base()], backward, adamw(l.values))


def _native_patch(l: Layer) -> list[Launch]:
    W = l.size * l.nnz
    add = elementwise("W + Δ", W + l.values, l.values)
    return [elementwise("positions", l.layout, l.positions), add, *cast("W + Δ", l.values, W)]


def _native_dvalues(l: Layer, ceilings: Ceilings) -> list[Launch]:
    begins = INDEX // 2 * l.N * (math.ceil(l.K / 64) + 1) if l.kind == "entries" else 0
    parts = native_parts(2 * math.ceil(l.N / 256) * math.ceil(l.K / 256), l.M, int(ceilings.get("sms", 132)) // 2)
    tiles = Launch("tiles of dW", l.dW().flops, l.x + l.y + l.layout + begins, parts * l.values)
    found = [elementwise("where chunks begin", l.layout, begins)] if begins else []
    return [*found, tiles, *([elementwise("reduce", parts * l.values, l.values)] if parts > 1 else [])]


#: None where it cannot be said what a provider launches, as of our reference: that is many small calls of torch.
PROVIDERS: dict[str, Callable[[Layer, Ceilings], Passes | None]] = {
    BARE: bare,
    DENSE: dense,
    SCATTER: clone_scatter,
    SHIRA: shira,
    ACCELERATED: accelerated_shira,
    "ours, triton": ours,
    "ours, Δ apart, triton": apart,
    "ours, cuda": native,
    "ours, Δ apart, cuda": native_apart,
}
