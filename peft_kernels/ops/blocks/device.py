"""Device functions that Triton kernels of several ops call: dropout masks, products, tile order."""

from __future__ import annotations

import triton
import triton.language as tl

from ..core.dropout import ROUNDS

_ROUNDS = tl.constexpr(ROUNDS)


@triton.jit
def divisible(n, DIVISOR: tl.constexpr):
    """n, a size or a stride that DIVISOR divides, in a form that shows the compiler so. Of arguments Triton itself
    tells only multiples of 16 (and 1) from others, and `tl.multiple_of` has no effect on them: with strides of 8, as of
    rank 8, every element would be loaded by itself. DIVISOR comes from `triton_host.divisor`."""
    return n // DIVISOR * DIVISOR


@triton.jit
def draw_mask_bytes(seed, rows, groups, mask_index, threshold):
    """The packed mask of `rows` [BM] (int64) × `groups` of eight columns [BG] (int32) as the dropout contract has
    it (`dropout.py`): int32 [BM, BG], bit i set where column 8·group + i is kept."""
    row_low = (rows & 0xFFFFFFFF).to(tl.uint32)[:, None]
    row_high = (rows >> 32).to(tl.uint32)[:, None]
    group = groups.to(tl.uint32)[None, :]
    words = tl.philox(seed, row_low, group, row_high, tl.zeros_like(group) + mask_index.to(tl.uint32), n_rounds=_ROUNDS)
    kept = tl.zeros((rows.shape[0], groups.shape[0]), tl.int32)
    for i in tl.static_range(4):
        word = words[i].to(tl.int32, bitcast=True)
        kept |= ((word << 16) >> 16 >= threshold).to(tl.int32) << (2 * i)  # the low half, sign extended
        kept |= (word >> 16 >= threshold).to(tl.int32) << (2 * i + 1)
    return kept


@triton.jit
def spread_mask_bytes(kept, BLOCK: tl.constexpr):
    """bool [BM, BLOCK] from packed bytes, int32 [BM, BLOCK / 8]."""
    bits = (kept[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bits, (kept.shape[0], BLOCK)) != 0


@triton.jit
def load_mask(mask_ptr, rows, first_column, M, bytes_per_row, BLOCK: tl.constexpr):
    """bool [BM, BLOCK] of one packed mask at int64 `rows` [BM], from a column that is a multiple of 8 on.
    Bytes are loaded, and spread in registers: a pointer for every bit would spill."""
    groups = first_column // 8 + tl.arange(0, BLOCK // 8)
    inside = (rows < M)[:, None] & (groups < bytes_per_row)[None, :]
    kept = tl.load(mask_ptr + rows[:, None] * bytes_per_row + groups[None, :], mask=inside, other=0)
    return spread_mask_bytes(kept.to(tl.int32), BLOCK)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b in a's dtype: `b` is rounded to it, as autocast rounds a float32 adapter to 16 bits."""
    return tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION)


@triton.jit
def dot_high(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b of operands widened to float32; PRECISION as `triton_host.high_precision` says."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def tile_of(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(m, n) of the tile number `index`, running down GROUP_M rows of tiles before the next column, so that what
    runs at one time shares its operands in L2."""
    group = index // (GROUP_M * tiles_n)
    first_m = group * GROUP_M
    rows = min(tiles_m - first_m, GROUP_M)
    within = index % (GROUP_M * tiles_n)
    return first_m + within % rows, within // rows
