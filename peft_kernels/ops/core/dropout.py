"""The dropout contract that every backend keeps: which element is dropped is a pure function of a seed.

Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11, table 2: the
fewest rounds that pass BigCrush with a margin) gives 128 bits a call, that is eight draws of 16 bits: one
call decides eight neighbours in a row, and one byte of the mask holds them.

    element (m, k) of mask j
    key      (seed mod 2³², seed div 2³²)
    counter  (m mod 2³², k div 8, m div 2³², j)
    draw     the 16 bits number k mod 8, lowest first, of the four words; read as a signed integer
    kept     draw ≥ threshold(p), so P(dropped) = round(65536·p) / 65536
    bit      k mod 8 of byte k div 8 of row m; set where the element is kept

The masks are those of the projections that share one x, numbered by mask index. The seed is a tensor drawn by torch
outside of any op, so checkpointing and CUDA graphs replay it. Kept elements are multiplied by 1/(1−p), by whoever uses
the mask.
"""

from __future__ import annotations

import math

import torch
from torch.jit import is_tracing

from ... import _native
from .op import register

ROUNDS = 7
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_BYTES_PER_CHUNK = 1 << 16  # mask bytes generated at once: the int64 temporaries then stay in the L2 cache
_PACK = 0x0102040810204080  # gathers the lowest bit of eight bytes in the highest byte, first byte lowest


def draw_seed(device: torch.device) -> torch.Tensor:
    """A seed from torch's generator of this device, int64 [1]; `torch.manual_seed` governs it."""
    return torch.randint(2**63 - 1, (1,), device=device, dtype=torch.int64)


def threshold(p: float) -> int:
    """The draw from which on an element is kept, in [−32768, 32768]; 0 < p < 1 never becomes 0 or 1."""
    dropped = min(max(round(p * 65536), 1), 65535) if 0.0 < p < 1.0 else int(p) * 65536
    return dropped - 32768


def rescale(p: float) -> float:
    """1/(1−p), and 0 where everything is dropped."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def mask_bytes(columns: int) -> int:
    """Bytes of one row of the mask."""
    return (columns + 7) // 8


def draw_mask(seed: torch.Tensor, rows: int, columns: int, p: float, num_masks: int) -> torch.Tensor:
    """The packed mask, uint8 [num_masks, rows, ceil(columns / 8)], on the seed's device: on a CPU by the native library
    where there is one, which is an order of magnitude faster than plain PyTorch and draws the same bits.

    Bits beyond the last column are drawn like the others; nobody reads them.
    """
    if seed.is_cpu and _native.load():
        return torch.ops.peft_kernels_native.draw_mask(seed, rows, columns, threshold(p), num_masks)
    return draw_mask_by_torch(seed, rows, columns, p, num_masks)


def draw_mask_by_torch(seed: torch.Tensor, rows: int, columns: int, p: float, num_masks: int) -> torch.Tensor:
    """The same in plain PyTorch: the definition."""
    groups = mask_bytes(columns)
    mask = torch.empty(num_masks, rows, groups, dtype=torch.uint8, device=seed.device)
    if p >= 1.0:  # the threshold lies beyond 16 bits
        return mask.zero_()
    step = max(1, _BYTES_PER_CHUNK // max(groups, 1))
    group = torch.arange(groups, device=seed.device)
    for mask_index in range(num_masks):
        for start in range(0, rows, step):
            row = torch.arange(start, min(start + step, rows), device=seed.device)[:, None]
            words = _philox(seed, (row & _LOW, group, row >> 32, torch.full_like(seed, mask_index)))
            kept = torch.empty(len(row), groups, 4, dtype=torch.int32, device=seed.device)
            for i, word in enumerate(words):
                kept[..., i] = word
            kept = kept.view(torch.int16) >= threshold(p)  # [rows, groups, 8]
            mask[mask_index, start : start + step] = _pack(kept)
    return mask


def unpack_mask(mask: torch.Tensor, columns: int, dtype: torch.dtype = torch.bool) -> torch.Tensor:
    """1 where an element is kept, else 0, [rows, columns], from one mask, uint8 [rows, ceil(columns / 8)].

    A table gives the eight numbers of a byte: four times faster on a CPU than shifts and a cast, to 16 bits above all.
    It is made where the mask lies: a copy from the CPU could not be captured in a CUDA graph.
    """
    byte, bit = (torch.arange(size, dtype=torch.uint8, device=mask.device) for size in (256, 8))
    table = ((byte[:, None] >> bit) & 1).to(dtype)
    eights = table.index_select(0, mask.reshape(-1).to(torch.int32))
    return eights.view(mask.shape[0], 8 * mask.shape[1])[:, :columns]


def _pack(kept: torch.Tensor) -> torch.Tensor:
    eight = kept.view(torch.int64).squeeze(-1)  # a bool is a byte, 0 or 1
    return (eight * _PACK).bitwise_right_shift_(56).to(torch.uint8)


def _philox(seed: torch.Tensor, counter: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Philox4x32 on int64 tensors that hold 32 bits each. Operands stay unbroadcast as long as they can:
    the first rounds mix rows and columns only little by little."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1  # wrap modulo 2⁶⁴, as they should
        c0 = ((product_1 >> 32) ^ (c1 ^ k0)) & _LOW
        c2 = ((product_0 >> 32) ^ (c3 ^ k1)) & _LOW
        c1, c3 = product_1 & _LOW, product_0 & _LOW
        k0, k1 = (k0 + _WEYL_0) & _LOW, (k1 + _WEYL_1) & _LOW
    return [c0, c1, c2, c3]


def _fake_mask(seed, rows, columns, p, num_masks):
    return seed.new_empty(num_masks, rows, mask_bytes(columns), dtype=torch.uint8)


_mask_op = register(
    __package__,
    "dropout_mask(Tensor seed, SymInt rows, SymInt columns, float p, int num_masks) -> Tensor",
    _fake_mask,
    implementation=draw_mask,
)


def dropped(x: torch.Tensor, p: float, num_masks: int) -> list[torch.Tensor]:
    """D_j(x) of x [..., K] for each mask j, by operations that torch may differentiate, batch and trace.

    The mask is that of the kernels, from a seed drawn as theirs; under vmap the seed is drawn, or refused, as its flag
    `randomness` says. A traced graph draws by torch's own dropout at each run: it is to hold nothing but torch's ops.
    """
    if is_tracing():
        return [torch.dropout(x, p, True) for _ in range(num_masks)]
    columns = x.shape[-1]
    masks = _mask_op(draw_seed(x.device), math.prod(x.shape[:-1]), columns, p, num_masks)
    kept = (unpack_mask(mask, columns, x.dtype) for mask in masks.unbind())
    return [x * one.reshape(x.shape) * rescale(p) for one in kept]
