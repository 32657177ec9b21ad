"""Operations on tensors before and after a product, for every op package."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch._C import _is_any_autocast_enabled
from torch.nn.functional import pad


def flatten(x: torch.Tensor) -> torch.Tensor:
    """[..., K] as [M, K], K = 0 too."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def unflatten(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """y [M, N] as [..., N] for x [..., K]. A view that a Function returns could not be written to in place by what
    follows."""
    return y if x.dim() == 2 else torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1]))


def mm_over_rows(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """leftᵀ·right [n, k], contiguous, of left [M, n] and right [M, k]: a weight's gradient, of which n or k are few.

    MKL takes a path of its own for fewer than 16 columns and for what 4 rows leave over: slow, and in one long chain of
    sums. At M = 4096 and in float32 [1536, 6] takes 5 × as long as [6, 1536], and errs 4 × as much as it does with two
    zeros beside the six. So narrow results are computed transposed, and what is few is filled up with zeros.
    """
    n, k = left.shape[1], right.shape[1]
    if len(left) < 128 or not left.is_cpu:
        return left.t().mm(right)
    if n >= 16 and (k < 16 or n >= 48 * k):
        return mm_over_rows(right, left).t().contiguous()
    if n < 16 and left.dtype.itemsize > 2:
        return _filled(left, n + -n % 4).t().mm(_filled(right, 16))[:n, :k].contiguous()
    return left.t().mm(right)


def _filled(x: torch.Tensor, columns: int) -> torch.Tensor:
    return x if x.shape[1] >= columns else pad(x, (0, columns - x.shape[1]))


def matmul_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left·right accumulated and returned in float32."""
    if left.is_cuda and left.dtype != torch.float32 and torch.version.hip is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float().mm(right.float())


def autocasts(x: torch.Tensor) -> bool:
    """Whether autocast is on for x's device."""
    return _is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)


def autocast(tensor: torch.Tensor | None, device_type: str) -> torch.Tensor | None:
    """The tensor as `F.linear` casts it under autocast: in autocast's dtype, float64 and None as they are."""
    eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device_type)) if eligible else tensor


def by_field(values: Sequence, num: int, fields: int) -> list[Sequence]:
    """The first values, `num` a field, as one sequence a field."""
    if num == 1:
        return list(zip(values[:fields]))
    return [values[first : first + num] for first in range(0, fields * num, num)]


def slices(length: int, step: int) -> Iterator[slice]:
    """[0, length) in slices of `step`; the last may be shorter."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


@functools.lru_cache(maxsize=256)
def constant(value: float, dtype: torch.dtype) -> torch.Tensor:
    """A number as a 0-dim tensor on the CPU, which goes beside tensors of any device without a copy. Not to be written
    to. torch makes one of a Python number at every operation, 7 µs at 16 bits."""
    return torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype)
