"""A launch: one kernel by its FLOPs and bytes; what launches are made of, and the time that they should take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

#: Of a machine: FLOP/s a dtype ("torch.bfloat16") and bytes/s ("bytes"), as result files have them. A GPU's also has
#: what `ceilings.py` adds: "gap_us" between two launches, "l2" in bytes, "sms", and "draws" of 32 random bits a second.
Ceilings = dict[str, float]

F32, INDEX, SECTOR = 4, 8, 32  # bytes: of a float32, of an int64, and the least that memory moves at once


class Launch(NamedTuple):
    """One kernel, or several that run beside each other: FLOPs of products, bytes read and written, draws of 32 random
    bits."""

    name: str
    flops: int = 0
    read: int = 0
    written: int = 0
    draws: int = 0
    kernels: int = 1


class Passes(NamedTuple):
    """The launches of one layer: forward, backward, the optimizer's; and in how many parts they leave dx, which
    autograd adds up."""

    forward: Sequence[Launch]
    backward: Sequence[Launch]
    update: Sequence[Launch] = ()
    parts_of_dx: int = 1


def gemm(name: str, M: int, N: int, K: int, size: int, beta: int = 0) -> Launch:
    """[M, N] = [M, K]·[K, N], elements of `size` bytes; with beta = 1 it is added onto what is there."""
    return Launch(name, 2 * M * N * K, (M * K + K * N + beta * M * N) * size, M * N * size)


def elementwise(name: str, read: int, written: int, draws: int = 0) -> Launch:
    """Whatever only moves bytes: a sum, a factor, a cast, a copy."""
    return Launch(name, 0, read, written, draws)


def cast(name: str, read: int, written: int) -> list[Launch]:
    """Nothing where the dtypes are the same."""
    return [elementwise(f"cast {name}", read, written)] if read != written else []


def in_one(one: Launch, other: Launch, shared: int = 0, kept: int = 0) -> Launch:
    """Two products by one kernel: `shared` bytes that both read come once, `kept` bytes stay in registers that one
    would write and the other read or write again."""
    return Launch(
        f"{one.name}, {other.name}", one.flops + other.flops, one.read + other.read - shared,
        one.written + other.written - kept, one.draws + other.draws,
    )  # fmt: skip


def beside(one: Launch, other: Launch) -> Launch:
    """Two kernels at the same time, the one on what the other leaves idle."""
    return in_one(one, other)._replace(kernels=one.kernels + other.kernels)


def limits(launch: Launch, dtype: torch.dtype, ceilings: Ceilings, left_in_l2: int = 0) -> dict[str, float]:
    """µs by what may limit a launch; the gap to the next one comes on top.

    Args:
        left_in_l2: bytes that the launch before has written. They do not come back from memory if they fit into the L2
            cache beside what this one writes.
    """
    fits = left_in_l2 + launch.written <= ceilings.get("l2", 0)
    moved = launch.read + launch.written - (min(launch.read, left_in_l2) if fits else 0)
    return {
        "FLOPs": 1e6 * launch.flops / ceilings[str(dtype)], "bytes": 1e6 * moved / ceilings["bytes"],
        "draws": 1e6 * launch.draws / ceilings.get("draws", math.inf),
    }  # fmt: skip


def timed(launches: Sequence[Launch], dtype: torch.dtype, ceilings: Ceilings) -> list[tuple[Launch, str, float]]:
    """Launches in a row: each with what limits it and its predicted µs, the gap among them."""
    found, left_in_l2 = [], 0
    for launch in launches:
        limit, least = max(limits(launch, dtype, ceilings, left_in_l2).items(), key=lambda item: item[1])
        found.append((launch, limit, least + ceilings.get("gap_us", 0.0)))
        left_in_l2 = launch.written
    return found


def native_parts(blocks: int, length: int, processors: int) -> int:
    """How many parts the native kernels read a length in: up to two blocks an SM, four stages of 64 at least."""
    return max(1, min(2 * processors // blocks, length // 256, 32))
