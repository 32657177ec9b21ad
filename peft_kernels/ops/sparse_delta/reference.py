"""Linear layers with a sparse delta in plain PyTorch: any dtype, any device, forward and explicit backward.

This is the definition that the kernels are tested against, and the path of a CPU for all that `cpu.py` leaves. Where a
delta has no structure that a thin product could use, a band of the weight at a time is copied and patched: no copy of
the whole.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator

import torch

from ..core.tensors import mm_over_rows, slices
from .layout import SparseLayout

#: Bytes of a patched or gathered piece: small enough for a cache where there is one.
PIECE_BYTES = 4 << 20
#: Up to this density the gradient of entries is sampled on a CPU, one dot product each, by bytes of an element; from
#: there on the product that fills all of dW is faster. Sampling is float32 throughout, products of 16 bits are not.
SAMPLED_UP_TO = {2: 0.05, 4: 0.15, 8: 0.15}
#: Tokens that are sampled at a time: what is transposed of both operands stays small beside a weight, and in the cache.
SAMPLED_TOKENS = 64
#: Smallest side of a block that has a product of its own.
SMALLEST_BLOCK = 16

Patched = Callable[[torch.Tensor, torch.Tensor, SparseLayout, int], Iterator[tuple[slice, torch.Tensor]]]


def patched_bands(
    weight: torch.Tensor, values: torch.Tensor, layout: SparseLayout, dim: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Rows or columns of the weight, a band at a time, with Δ in a copy of them."""
    step = band_step(layout, dim, weight.element_size(), PIECE_BYTES)
    if layout.kind == "entries" and dim == 0 and values.dtype == weight.dtype:  # what torch adds without positions
        (N, K), starts, columns = layout.shape, layout.tensors["row_starts"], layout.tensors["columns"]
        ends = [*starts[::step].tolist(), layout.nnz]
        for band, first, last in zip(slices(N, step), ends, ends[1:]):
            counts, part = starts[band.start : band.stop + 1] - first, slice(first, last)
            yield band, torch.add(weight[band], _csr(counts, columns[part], values[part], K))
        return
    delta = _shaped(values, layout)
    for band, chosen, place in layout.split(dim, step):
        patched, flat = copy_of_band(weight, dim, band)
        flat.put_(place, add_delta(flat.take(place), delta[chosen].flatten()))
        yield band, patched


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    values: torch.Tensor,
    bias: torch.Tensor | None,
    layout: SparseLayout,
    patched_bands: Patched = patched_bands,
) -> torch.Tensor:
    """y = x·(W + Δ)ᵀ + bias, [M, N]; x [M, K]. `patched_bands`: another way to make them, such as Triton's."""
    if layout.kind == "columns":
        delta = _shaped(values, layout, x.dtype)
        return torch.nn.functional.linear(gather_columns(x, layout), delta, bias).addmm_(x, weight.t())
    if layout.kind == "rows":
        index = layout.tensors["index"]
        patched = add_delta(weight[index], _shaped(values, layout))
        return torch.nn.functional.linear(x, weight, bias).index_copy_(
            1, index, torch.nn.functional.linear(x, patched, None if bias is None else bias[index])
        )
    y = x.new_empty(x.shape[0], weight.shape[0])
    for band, patched in patched_bands(weight, values, layout, dim=0):
        if bias is None:
            torch.mm(x, patched.t(), out=y[:, band])
        else:  # before the result is rounded
            torch.addmm(bias[band], x, patched.t(), out=y[:, band])
    return y


def grad_x(
    dy: torch.Tensor,
    weight: torch.Tensor,
    values: torch.Tensor,
    layout: SparseLayout,
    patched_bands: Patched = patched_bands,
) -> torch.Tensor:
    """dx = dy·(W + Δ), [M, K]."""
    if layout.kind == "rows":
        dx = dy[:, layout.tensors["index"]].mm(_shaped(values, layout, dy.dtype))
        return dx.addmm_(dy, weight)
    if layout.kind == "columns":
        index = layout.tensors["index"]
        patched = add_delta(weight[:, index], _shaped(values, layout))
        return dy.mm(weight).index_copy_(1, index, dy.mm(patched))
    if dy.element_size() == 2:  # by columns, since a sum in parts would round each of them to 16 bits
        dx = dy.new_empty(dy.shape[0], weight.shape[1])
        for band, patched in patched_bands(weight, values, layout, dim=1):
            torch.mm(dy, patched, out=dx[:, band])
        return dx
    dx = None
    for band, patched in patched_bands(weight, values, layout, dim=0):  # positions ascend by rows: nothing to search
        dx = dy[:, band].mm(patched) if dx is None else dx.addmm_(dy[:, band], patched)
    return dy.new_zeros(dy.shape[0], weight.shape[1]) if dx is None else dx


def grad_values(dy: torch.Tensor, x: torch.Tensor, layout: SparseLayout, dtype: torch.dtype) -> torch.Tensor:
    """dvalues = dyᵀ·x at the layout's positions, [nnz], `dtype`. For columns x may be gathered."""
    return _grad_values(dy, x, layout).to(dtype)


def _grad_values(dy: torch.Tensor, x: torch.Tensor, layout: SparseLayout) -> torch.Tensor:
    if layout.kind == "rows":
        return mm_over_rows(dy[:, layout.tensors["index"]], x).flatten()
    if layout.kind == "columns":
        gathered = x if x.shape[1] != layout.shape[1] else gather_columns(x, layout)
        return mm_over_rows(dy, gathered).flatten()
    if layout.kind == "blocks" and min(layout.tile) >= SMALLEST_BLOCK:
        return _grad_blocks(dy, x, layout)
    few = layout.kind == "entries" and layout.density <= SAMPLED_UP_TO[dy.element_size()]
    if few and dy.is_cpu and torch.backends.mkl.is_available():
        return _sampled(dy, x, layout)
    return _gathered_from_bands(dy, x, layout)


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor | None,
    values: torch.Tensor | None,
    layout: SparseLayout,
    needs: list[bool],
    values_dtype: torch.dtype,
    grad_x: Callable[..., torch.Tensor] = grad_x,
    grad_values: Callable[..., torch.Tensor] = grad_values,
) -> list[torch.Tensor]:
    """The gradients that are needed, in this order: x, weight, values, bias.

    Args:
        dy: [M, N]. x: [M, K]; for columns it may be what `gather_columns` made of it, if the weight needs no gradient.
        needs: four answers, in the order of the result.
        grad_x, grad_values: other ways to compute them, such as Triton's.
    """
    needs_x, needs_weight, needs_values, needs_bias = needs
    if 0 in dy.stride():  # as of a sum: each product would copy it, and a kernel's loads all go to one place
        dy = dy.contiguous()
    grads = []
    if needs_x:
        grads.append(grad_x(dy, weight, values, layout))
    if needs_weight:
        grads.append(dy.t().mm(x))
    if needs_values:
        grads.append(grad_values(dy, x, layout, values_dtype))
    if needs_bias:
        grads.append(dy.sum(0))
    return grads


def gather_columns(x: torch.Tensor, layout: SparseLayout) -> torch.Tensor:
    """x[:, index], [M, count]: all that the gradient of columns reads of x."""
    return x.index_select(1, layout.tensors["index"])


def _shaped(values: torch.Tensor, layout: SparseLayout, dtype: torch.dtype | None = None) -> torch.Tensor:
    return values.to(dtype or values.dtype).view(layout.values_shape)


def add_delta(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """W + Δ, added in the wider dtype and rounded once to the weight's."""
    return (weight + delta).to(weight.dtype)


def band_step(layout: SparseLayout, dim: int, element_size: int, piece_bytes: int) -> int:
    """How many rows (dim 0) or columns (dim 1) of the weight make a band: half of them at most, and such that none cuts
    a block or a group apart."""
    size, across = layout.shape[dim], layout.shape[1 - dim]
    whole = {"blocks": layout.tile, "n_of_m": (1, *layout.tile[1:])}.get(layout.kind, (1, 1))[dim]
    fitting = min(piece_bytes // max(1, across * element_size), -(-size // 2))
    return max(1, fitting // whole) * whole


def copy_of_band(weight: torch.Tensor, dim: int, band: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (dim 0) or columns (dim 1) of the weight, contiguous; and the same flat, with one element behind them."""
    part = weight[band] if dim == 0 else weight[:, band]
    flat = torch.empty(part.numel() + 1, dtype=part.dtype, device=part.device)
    return flat[:-1].view(part.shape).copy_(part), flat


def _gathered_from_bands(dy: torch.Tensor, x: torch.Tensor, layout: SparseLayout) -> torch.Tensor:
    """dW by bands of rows, of each of which only the positions are kept."""
    result = dy.new_empty(layout.values_shape)
    for band, chosen, place in layout.split(0, band_step(layout, 0, dy.element_size(), PIECE_BYTES)):
        result[chosen] = mm_over_rows(dy[:, band], x).take(place).view(-1, *result.shape[1:])
    return result.flatten()


def _grad_blocks(dy: torch.Tensor, x: torch.Tensor, layout: SparseLayout) -> torch.Tensor:
    """A product for each block, as many at a time as fit a piece when they are gathered."""
    (height, width), index, M = layout.tile, layout.tensors["index"], dy.shape[0]
    across = max(1, layout.shape[1] // width)
    dy_blocks, x_blocks = dy.unflatten(1, (-1, height)), x.unflatten(1, (-1, width))
    step = max(1, PIECE_BYTES // max(1, M * (height + width) * dy.element_size()))
    result = dy.new_empty(layout.values_shape)
    for start in range(0, len(index), step):
        some = index[start : start + step]
        left = dy_blocks[:, some // across].permute(1, 2, 0)  # [blocks, height, M]
        torch.bmm(left, x_blocks[:, some % across].transpose(0, 1), out=result[start : start + step])
    return result.flatten()


def _sampled(dy: torch.Tensor, x: torch.Tensor, layout: SparseLayout) -> torch.Tensor:
    """One dot product an entry, in float32 at least (SDDMM); each has one owner, so that the sum's order is fixed."""
    wide = torch.promote_types(dy.dtype, torch.float32)
    zeros = dy.new_zeros(layout.nnz, dtype=wide)
    result = _csr(layout.tensors["row_starts"], layout.tensors["columns"], zeros, layout.shape[1])
    at_once = SAMPLED_TOKENS if dy.dtype != wide else 2 * SAMPLED_TOKENS  # what is widened takes as much room again
    for tokens in slices(len(dy), at_once):
        for left, right in zip(_transposed(dy[tokens].to(wide)), _transposed(x[tokens].to(wide))):
            torch.sparse.sampled_addmm(result, left, right.t(), out=result)
    return result.values()


def _transposed(rows: torch.Tensor) -> torch.Tensor:
    """[M, C] by pieces of SAMPLED_TOKENS, each transposed: [pieces, C, tokens]; all of it one piece if that does not
    divide M. To shuffle channels is to transpose them, and torch does that in vectors and by several threads, which it
    does not do in a copy: ten times as fast."""
    pieces, rest = divmod(len(rows), SAMPLED_TOKENS)
    pieces = 1 if rest else pieces
    tokens = len(rows) // pieces
    channels_last = rows.reshape(pieces, 1, 1, -1).permute(0, 3, 1, 2)
    return torch.nn.functional.channel_shuffle(channels_last, tokens).reshape(pieces, rows.shape[1], tokens)


def _csr(starts: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, K: int) -> torch.Tensor:
    """Entries in torch's own form; of a layout they are in it but for the columns' dtype."""
    _quiet_about_csr()
    shape = (len(starts) - 1, K)
    return torch.sparse_csr_tensor(starts, columns.to(starts.dtype), values, shape, check_invariants=False)


@functools.cache
def _quiet_about_csr() -> None:
    """torch warns once a process that CSR tensors are in beta: here, where nobody reads it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.sparse_csr_tensor([0, 0], [], [], (1, 1), check_invariants=False)


def write(weight: torch.Tensor, base: torch.Tensor, values: torch.Tensor, layout: SparseLayout) -> None:
    """base + values, added in the wider dtype and rounded once, to the layout's positions of `weight`."""
    layout.put_(weight, base + values)
