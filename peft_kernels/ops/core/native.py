"""The operands of the native library's CUDA kernels: 16-bit matrices whose rows have adjacent elements and start on 16
bytes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch.nn.functional import pad


def native():
    """The library's ops."""
    return torch.ops.peft_kernels_native


@functools.cache
def has_boxes(device: torch.device) -> bool:
    """Whether the kernels for sm_90a run there: compute capability 9.0, and a library built for it."""
    return device.type == "cuda" and native().has_boxes(device.index)


def takes(matrix: torch.Tensor) -> bool:
    """Whether rows have adjacent elements and start on 16 bytes."""
    (height, width), (pitch, step) = matrix.shape, matrix.stride()
    aligned_start = matrix.data_ptr() % 16 == 0 and (width == 1 or step == 1)
    return aligned_start and (height == 1 or (pitch % 8 == 0 and pitch >= width))


def aligned(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, in a copy where the kernels could not take it."""
    return matrix if takes(matrix) else with_columns(matrix, padded(matrix.shape[1]))[:, : matrix.shape[1]]


def with_columns(matrix: torch.Tensor, width: int) -> torch.Tensor:
    """[height, width], filled up with zeros."""
    if matrix.shape[1] == width and takes(matrix):
        return matrix
    return pad(matrix, (0, width - matrix.shape[1])).contiguous(memory_format=torch.contiguous_format)


def with_rows(matrix: torch.Tensor, height: int) -> torch.Tensor:
    """[height, width], filled up with zeros."""
    return matrix if matrix.shape[0] == height else pad(matrix, (0, 0, 0, height - matrix.shape[0]))


def padded(size: int) -> int:
    """Up to a multiple of 8, the elements in 16 bytes."""
    return -(-size // 8) * 8


class Sum(NamedTuple):
    """scale · row_scaling · Σ_p partials[p] [M, R] in `dtype`, of float32 partials [P, M, R]."""

    partials: torch.Tensor
    dtype: torch.dtype
    row_scaling: torch.Tensor | None = None
    scale: float = 1.0


def reduced(sums: list[Sum | None]) -> list[torch.Tensor | None]:
    """Each, rounded once, None for None; those of a dtype by one launch."""
    found: dict[int, torch.Tensor] = {}
    for dtype in dict.fromkeys(one.dtype for one in sums if one is not None):
        numbers = [number for number, one in enumerate(sums) if one is not None and one.dtype == dtype]
        some = [sums[number] for number in numbers]
        row_scalings = [by_row(one.row_scaling, one.partials.shape[1]) for one in some]
        partials, scales = [one.partials for one in some], [one.scale for one in some]
        found.update(zip(numbers, native().reduce_partials(partials, row_scalings, scales, dtype)))
    return [found.get(number) for number in range(len(sums))]


def by_row(row_scaling: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """float32 [rows], of one number or of a number a row."""
    return None if row_scaling is None else row_scaling.reshape(-1).expand(rows).float().contiguous()
