"""What the ops of every room do with their tensors before and after a product."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch


def flatten(x: torch.Tensor) -> torch.Tensor:
    """[..., K] as [M, K], K = 0 too."""
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def unflatten(y: torch.Tensor, batch: torch.Size) -> torch.Tensor:
    """y [M, N] as [*batch, N]. A view that a Function returns could not be written to in place by what follows."""
    return y if len(batch) == 1 else torch.ops.aten._unsafe_view.default(y, (*batch, y.shape[1]))


def autocast(tensor: torch.Tensor | None, device_type: str) -> torch.Tensor | None:
    """The tensor as `F.linear` casts it under autocast: in autocast's dtype, float64 and None as they are."""
    eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(device_type)) if eligible else tensor


def slices(length: int, step: int) -> Iterator[slice]:
    """[0, length) in slices of `step`; the last may be shorter."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))


@functools.lru_cache(maxsize=256)
def constant(value: float, dtype: torch.dtype) -> torch.Tensor:
    """A number as a 0-dim tensor on the CPU, which goes beside tensors of any device without a copy. Not to be written
    to. torch makes one of a Python number at every operation, 7 µs at 16 bits."""
    return torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype)
