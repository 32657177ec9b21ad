"""One launch for all deltas of a model: AdamW on their values, and the weights written."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import configs
from .layout import SparseLayout
from .triton_write import KINDS, described, position

#: Columns of the table that the kernel reads, int64: addresses first.
_FIELDS = 17


class Stepped(NamedTuple):
    """The tensors that a step reads and writes of one delta; all contiguous but the weight.

    Attributes:
        values, grad, exp_avg, exp_avg_sq: [nnz], float32. step: [], float32, the number of this step, from 1.
        base: [nnz] in the weight's dtype. weight: [N, K].
    """

    values: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor
    base: torch.Tensor
    weight: torch.Tensor
    layout: SparseLayout


@dataclass
class Tables:
    """Addresses that steps have used, on the device: by what they are, the last of them; and those that captured CUDA
    graphs read in their replays."""

    known: dict[tuple, tuple] = field(default_factory=dict)
    captured: list[tuple] = field(default_factory=list)


@triton.jit
def adamw_kernel(
    table_ptr, chunks_ptr, lr, lr_ptr, log_beta1, log_beta2, rest1, rest2, eps, weight_decay,
    FIELDS: tl.constexpr, KIND: tl.constexpr, WEIGHT: tl.constexpr, STARTS: tl.constexpr, COLUMNS: tl.constexpr,
    DECAYS_WEIGHT: tl.constexpr, MAXIMIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A chunk of one delta a program: (delta, chunk) are its line of `chunks_ptr`. rest = 1 − β; the bias corrections
    1 − βᵗ are taken from log β in float64, as float32 would lose the first steps'."""
    delta = tl.load(chunks_ptr + 2 * tl.program_id(0))
    chunk = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64)
    row = table_ptr + delta * FIELDS
    values_ptr = tl.load(row).to(tl.pointer_type(tl.float32))
    grad_ptr = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    average_ptr = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    square_ptr = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    step_ptr = tl.load(row + 4).to(tl.pointer_type(tl.float32))
    base_ptr = tl.load(row + 5).to(tl.pointer_type(WEIGHT))
    weight_ptr = tl.load(row + 6).to(tl.pointer_type(WEIGHT))
    first_ptr = tl.load(row + 7).to(tl.pointer_type(STARTS))
    second_ptr = tl.load(row + 8).to(tl.pointer_type(COLUMNS))
    nnz, K, count = tl.load(row + 9), tl.load(row + 10), tl.load(row + 11)
    tile_rows, tile_columns, steps = tl.load(row + 12), tl.load(row + 13), tl.load(row + 14)
    stride_n, stride_k = tl.load(row + 15), tl.load(row + 16)

    i = chunk * BLOCK + tl.arange(0, BLOCK)
    inside = i < nnz
    value = tl.load(values_ptr + i, mask=inside, other=0.0)
    grad = tl.load(grad_ptr + i, mask=inside, other=0.0)
    average = tl.load(average_ptr + i, mask=inside, other=0.0)
    square = tl.load(square_ptr + i, mask=inside, other=0.0)
    base = tl.load(base_ptr + i, mask=inside, other=0.0).to(tl.float32)
    rate = lr if lr_ptr is None else tl.load(lr_ptr).to(tl.float32)
    if MAXIMIZE:
        grad = -grad
    value -= rate * weight_decay * (value + base if DECAYS_WEIGHT else value)
    average += (grad - average) * rest1
    square += (grad * grad - square) * rest2
    number = tl.load(step_ptr).to(tl.float64)
    correction1 = (1.0 - tl.exp(number * log_beta1)).to(tl.float32)
    correction2 = (1.0 - tl.exp(number * log_beta2)).to(tl.float32)
    value -= rate / correction1 * average / (tl.sqrt(square) / tl.sqrt(correction2) + eps)
    tl.store(values_ptr + i, value, mask=inside)
    tl.store(average_ptr + i, average, mask=inside)
    tl.store(square_ptr + i, square, mask=inside)
    n, k = position(i, inside, first_ptr, second_ptr, K, count, tile_rows, tile_columns, steps, KIND)
    tl.store(weight_ptr + n * stride_n + k * stride_k, (value + base).to(WEIGHT), mask=inside)


def adamw(
    stepped: list[Stepped],
    lr: float | torch.Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decays_weight: bool,
    maximize: bool,
    tables: Tables,
) -> None:
    """A step of AdamW on every delta, and W₀ + Δ into its weight: one launch for all of one kind, weight dtype and
    width of indices, which is most often all of them.

    Args:
        lr: a float, or a tensor of one element on the device.
        tables: kept by the caller between steps.
    """
    groups: dict[tuple, list[Stepped]] = {}
    for one in stepped:
        held = list(one.layout.tensors.values())
        kinds = (one.weight.device, one.weight.dtype, one.layout.kind, held[0].dtype, held[-1].dtype)
        groups.setdefault(kinds, []).append(one)
    for (device, dtype, kind, starts, columns), members in groups.items():
        table, chunks, _ = _table(members, device, tables)
        is_tensor = isinstance(lr, torch.Tensor) and lr.device == device
        lr = lr if is_tensor else float(lr)
        logs = [math.log(beta) for beta in betas]
        with torch.cuda.device_of(table):
            adamw_kernel[(len(chunks),)](
                table, chunks, 0.0 if is_tensor else lr, lr if is_tensor else None, *logs, 1 - betas[0], 1 - betas[1],
                eps, weight_decay, FIELDS=_FIELDS, KIND=KINDS[kind], WEIGHT=_TYPES[dtype], STARTS=_TYPES[starts],
                COLUMNS=_TYPES[columns], DECAYS_WEIGHT=decays_weight, MAXIMIZE=maximize, BLOCK=configs.WRITTEN,
                num_warps=8,
            )  # fmt: skip


_TYPES = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
    torch.int64: tl.int64, torch.int32: tl.int32, torch.int16: tl.int16, torch.int8: tl.int8,
}  # fmt: skip


def _table(members: list[Stepped], device: torch.device, tables: Tables) -> tuple[torch.Tensor, torch.Tensor, tuple]:
    """Addresses and sizes of every delta, int64 [deltas, 17]; which chunk of which delta a program takes, int32
    [programs, 2]; and what both were copied from, which a captured CUDA graph copies again in each replay. Gradients
    are new tensors in every step, most often at the same addresses."""
    rows = []
    for one in members:
        first, second, *sizes = described(one.layout)
        pointers = [tensor.data_ptr() for tensor in (*one[:7], first, second)]
        rows.append((*pointers, *sizes, *one.weight.stride()))
    rows = tuple(rows)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if capturing or rows not in tables.known:
        counts = [triton.cdiv(one.layout.nnz, configs.WRITTEN) for one in members]
        chunks = [(delta, chunk) for delta, count in enumerate(counts) for chunk in range(count)]
        host = torch.tensor(rows, dtype=torch.int64), torch.tensor(chunks, dtype=torch.int32)
        host = tuple(tensor.pin_memory() for tensor in host) if device.type == "cuda" else host
        made = (*(tensor.to(device, non_blocking=True) for tensor in host), host)
        if capturing:  # filled in replays only, and for them to keep
            tables.captured.append(made)
            return made
        while len(tables.known) >= _MOST_TABLES:
            del tables.known[next(iter(tables.known))]
        tables.known[rows] = made
    return tables.known[rows]


_MOST_TABLES = 64
