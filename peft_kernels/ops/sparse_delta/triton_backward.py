"""The gradient of the values by Triton: from tiles of dW that never leave the registers (entries, n of m), by thin
products (rows, columns, blocks), or one dot product an entry where there are few. No atomics: the same bits every
time."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from ..blocks.device import divisible, dot, tile_of
from ..blocks.reduce import SplitKPartials, reduce_partials
from ..core.machine import architecture, sm_count
from ..core.triton_host import divisor, dot_precision
from . import configs, reference
from .layout import SparseLayout
from .triton_forward import grad_x
from .triton_write import row_of


@triton.jit
def first_at_least(columns_ptr, low, high, wanted, steps):
    """The first place in [low, high) of ascending columns whose column is at least `wanted`; int64, one a row."""
    for _ in range(steps):
        searching = low < high
        middle = (low + high) // 2
        below = tl.load(columns_ptr + middle, mask=searching, other=0).to(tl.int64) < wanted
        low = tl.where(searching & below, middle + 1, low)
        high = tl.where(searching & (below == 0), middle, high)
    return low


@triton.jit(do_not_specialize=["M", "steps"])
def gathered_tile_kernel(
    dy_ptr, x_ptr, out_ptr, starts_ptr, columns_ptr, M, N, K, n, m, steps,
    stride_dym, stride_dyn, stride_xm, stride_xk,
    ENTRIES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
    GATHERED: tl.constexpr, GROUP_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of dW = dyᵀ·x a program, in float32 registers; only what the layout holds of it is written.

    ENTRIES: a row's entries in the tile are neighbours among its ascending columns, found by two searches. Else n of m:
    `columns_ptr` are offsets in groups of m, and a tile has as many of a row as the next.
    """
    tile_n, tile_k = tile_of(tl.program_id(0), tl.cdiv(N, BLOCK_N), tl.cdiv(K, BLOCK_K), GROUP_N)
    first_column = tile_k.to(tl.int64) * BLOCK_K
    rows = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = first_column + tl.arange(0, BLOCK_K)
    tokens = tl.arange(0, BLOCK_M)
    dy = dy_ptr + rows[:, None] * stride_dyn + tokens.to(tl.int64)[None, :] * stride_dym
    x = x_ptr + tokens.to(tl.int64)[:, None] * stride_xm + columns[None, :] * stride_xk
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(0, M, BLOCK_M):
        dy_tile = tl.load(dy, mask=(rows < N)[:, None] & (start + tokens < M)[None, :], other=0.0)
        x_tile = tl.load(x, mask=(start + tokens < M)[:, None] & (columns < K)[None, :], other=0.0)
        acc = dot(dy_tile, x_tile, acc, PRECISION)
        dy += tl.full((), BLOCK_M, tl.int64) * stride_dym
        x += tl.full((), BLOCK_M, tl.int64) * stride_xm
    if ENTRIES:
        row_first = tl.load(starts_ptr + rows, mask=rows < N, other=0).to(tl.int64)
        row_last = tl.load(starts_ptr + rows + 1, mask=rows < N, other=0).to(tl.int64)
        first = first_at_least(columns_ptr, row_first, row_last, first_column, steps)
        last = first_at_least(columns_ptr, first, row_last, first_column + BLOCK_K, steps)
    else:  # groups that the tile's edges cut apart as well
        row_first = rows * (K // m * n)
        first = row_first + first_column // m * n
        last = row_first + tl.minimum((first_column + BLOCK_K + m - 1) // m, K // m) * n
        last = tl.where(rows < N, last, first)
    origin = (first_column % m).to(tl.int32)
    for start in range(0, tl.max(last - first).to(tl.int32), GATHERED):
        step = start + tl.arange(0, GATHERED)[None, :]
        number = first[:, None] + step
        inside = number < last[:, None]
        column = tl.load(columns_ptr + number, mask=inside, other=0).to(tl.int32)
        if ENTRIES:
            local = column - first_column.to(tl.int32)
        else:
            local = step // n * m - origin + column
            inside &= (local >= 0) & (local < BLOCK_K)
        gathered = tl.gather(acc, tl.where(inside, local, 0), 1)
        tl.store(out_ptr + number, gathered.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "tokens_per_split"])
def thin_kernel(
    dy_ptr, x_ptr, out_ptr, index_ptr, M, N, K, n_readable, k_readable, across, tokens_per_split,
    stride_dym, stride_dyn, stride_xm, stride_xk, stride_split,
    BLOCKS: tl.constexpr, N_DIVISOR: tl.constexpr, K_DIVISOR: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[split, batch, N, K] = Σ of a split's tokens of dy[m, row]·x[m, column], a tile a program.

    BLOCKS: the batch are blocks of N × K, their numbers in index, `across` in a row of blocks. Else rows and columns as
    they are; beyond N and K, columns of dy up to n_readable and of x up to k_readable may be read as well.
    """
    N, K = divisible(N, N_DIVISOR), divisible(K, K_DIVISOR)
    tiles_k = tl.cdiv(K, BLOCK_K)
    tiles = tl.cdiv(N, BLOCK_N) * tiles_k
    batch, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    tile_n, tile_k, split = tile // tiles_k, tile % tiles_k, tl.program_id(1).to(tl.int64)
    n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile_k.to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    rows, columns = n, k
    if BLOCKS:
        n_readable, k_readable = N, K
        block = tl.load(index_ptr + batch)
        rows, columns = block // across * N + n, block % across * K + k
    tokens = split * tokens_per_split + tl.arange(0, BLOCK_M)  # whole blocks a split
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    tl.assume(tokens_per_split > 0)  # a sum that may have no step makes ptxas serialise wgmma (C7515; sm_90)
    for _ in range(0, tokens_per_split, BLOCK_M):
        dy = dy_ptr + rows[:, None] * stride_dyn + tokens[None, :] * stride_dym
        x = x_ptr + tokens[:, None] * stride_xm + columns[None, :] * stride_xk
        dy_tile = tl.load(dy, mask=(n < n_readable)[:, None] & (tokens < M)[None, :], other=0.0)
        x_tile = tl.load(x, mask=(tokens < M)[:, None] & (k < k_readable)[None, :], other=0.0)
        acc = dot(dy_tile, x_tile, acc, PRECISION)
        tokens += BLOCK_M
    out = out_ptr + split * stride_split + batch * N * K + n[:, None] * K + k[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["tokens_stored", "nnz", "N", "steps"])
def sampled_kernel(
    dyt_ptr, xt_ptr, out_ptr, starts_ptr, columns_ptr, tokens_stored, N, nnz, steps,
    ENTRIES: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """out[i] = Σ_m dyᵀ[row, m]·xᵀ[column, m] for ENTRIES neighbours among the values; both operands contiguous, with
    zeros up to a multiple of 16 tokens."""
    tokens_stored = divisible(tokens_stored, 16)
    i = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = i < nnz
    row = row_of(i, inside, starts_ptr, N, steps)
    column = tl.load(columns_ptr + i, mask=inside, other=0).to(tl.int64)
    tokens = tl.arange(0, BLOCK_M)
    acc = tl.zeros((ENTRIES, BLOCK_M), tl.float32)
    dy_rows, x_rows = dyt_ptr + row[:, None] * tokens_stored, xt_ptr + column[:, None] * tokens_stored
    for start in range(0, tokens_stored, BLOCK_M):
        read = inside[:, None] & (start + tokens < tokens_stored)[None, :]
        dy = tl.load(dy_rows + (start + tokens)[None, :], mask=read, other=0.0).to(tl.float32)
        x = tl.load(x_rows + (start + tokens)[None, :], mask=read, other=0.0).to(tl.float32)
        acc += dy * x
    tl.store(out_ptr + i, tl.sum(acc, 1).to(out_ptr.dtype.element_ty), mask=inside)


def grad_values(dy: torch.Tensor, x: torch.Tensor, layout: SparseLayout, dtype: torch.dtype) -> torch.Tensor:
    """dvalues = dyᵀ·x at the layout's positions, [nnz], `dtype`. For columns x may be gathered."""
    if layout.nnz == 0 or dy.shape[0] == 0:
        return dy.new_zeros(layout.nnz, dtype=dtype)
    sampled_up_to = configs.sampled_up_to(dy.element_size(), configs.tuned(dy.device))
    if layout.kind == "entries" and layout.density <= sampled_up_to:
        return sampled_grad(dy, x, layout, dtype)
    if layout.kind in ("entries", "n_of_m"):
        return gathered_grad(dy, x, layout, dtype)
    if layout.kind == "columns" and x.shape[1] == layout.shape[1]:
        x = reference.gather_columns(x, layout)
    return thin_grad(dy, x, layout, dtype)


#: As `reference.backward`; the values' gradient is written in its own dtype from float32 sums.
backward = functools.partial(reference.backward, grad_x=grad_x, grad_values=grad_values)


def gathered_grad(
    dy: torch.Tensor, x: torch.Tensor, layout: SparseLayout, dtype: torch.dtype, tile: configs.GradTile | None = None
) -> torch.Tensor:
    """The gradient of entries and of n of m, by tiles of dW. `tile`: another than `configs` takes."""
    (N, K), M, entries = layout.shape, dy.shape[0], layout.kind == "entries"
    out = dy.new_empty(layout.nnz, dtype=dtype)
    n, m = layout.tile or (1, 1)  # of entries neither is read
    held = list(layout.tensors.values())
    tile = tile or configs.grad_tile(
        N,
        K,
        layout.density,
        dy.element_size(),
        architecture(dy.device),
        table=configs.tuned(dy.device),
    )
    gathered_tile_kernel[(triton.cdiv(N, tile.block_n) * triton.cdiv(K, tile.block_k),)](
        dy, x, out, held[0], held[-1], M, N, K, n, m, K.bit_length(), *dy.stride(), *x.stride(),
        ENTRIES=entries, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_M=tile.block_m, GATHERED=tile.gathered,
        GROUP_N=tile.group_n, PRECISION=dot_precision(dy.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def thin_grad(
    dy: torch.Tensor, x: torch.Tensor, layout: SparseLayout, dtype: torch.dtype, tile: configs.ThinTile | None = None
) -> torch.Tensor:
    """The gradient of rows, of columns (x gathered), of blocks. `tile`: another than `configs` takes."""
    index, M = layout.tensors["index"], dy.shape[0]
    blocks = layout.kind == "blocks"
    if layout.kind == "rows":  # gathered once: each tile of x would gather them again, two bytes at a time
        dy = _in_sixteens(dy.index_select(1, index))
    elif layout.kind == "columns":
        x = _in_sixteens(x)
    batch = len(index) if blocks else 1
    N, K = layout.values_shape[-2:]
    tile = tile or configs.thin_tile(N, K, dy.element_size(), table=configs.tuned(dy.device))
    splits = configs.token_splits(tile, N, K, M, batch, 2 * sm_count(dy.device))
    out = dy.new_empty(layout.nnz, dtype=dtype)
    split = splits > 1
    partials = dy.new_empty(splits, layout.nnz, dtype=torch.float32) if split else out
    per_split = triton.cdiv(triton.cdiv(M, splits), tile.block_m) * tile.block_m
    thin_kernel[(batch * triton.cdiv(N, tile.block_n) * triton.cdiv(K, tile.block_k), splits)](
        dy, x, partials, index, M, N, K, dy.shape[1], x.shape[1], layout.shape[1] // K if blocks else 0, per_split,
        *dy.stride(), *x.stride(), layout.nnz if split else 0, BLOCKS=blocks, N_DIVISOR=divisor(N),
        K_DIVISOR=divisor(K), BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, BLOCK_M=tile.block_m,
        PRECISION=dot_precision(dy.dtype), num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    if split:
        reduce_partials([SplitKPartials(partials.view(splits, -1, K), out.view(-1, K), M, per_split)], M)
    return out


def _in_sixteens(gathered: torch.Tensor) -> torch.Tensor:
    """[M, count] with zeros up to a multiple of 16 columns, so that 16 bytes can be loaded at once."""
    missing = -gathered.shape[1] % 16
    return torch.nn.functional.pad(gathered, (0, missing)) if missing else gathered


def sampled_grad(
    dy: torch.Tensor, x: torch.Tensor, layout: SparseLayout, dtype: torch.dtype, tile: configs.SampledTile | None = None
) -> torch.Tensor:
    """The gradient of entries, one dot product each. `tile`: another than `configs` takes."""
    out = dy.new_empty(layout.nnz, dtype=dtype)
    tile, N = tile or configs.sampled_tile(dy.element_size(), table=configs.tuned(dy.device)), layout.shape[0]
    starts, columns = layout.tensors["row_starts"], layout.tensors["columns"]
    dyt, xt = _in_sixteens(dy.t()).contiguous(), _in_sixteens(x.t()).contiguous()
    sampled_kernel[(triton.cdiv(layout.nnz, tile.entries),)](
        dyt, xt, out, starts, columns, dyt.shape[1], N, layout.nnz, N.bit_length(),
        ENTRIES=tile.entries, BLOCK_M=tile.block_m, num_warps=tile.num_warps,
    )  # fmt: skip
    return out
