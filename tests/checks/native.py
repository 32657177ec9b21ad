"""Plain PyTorch in place of the native CUDA kernels, so that what puts them together is tested without a GPU: it takes
what they take, and refuses what they refuse. `csrc/selftest` proves the kernels themselves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from peft_kernels import _native, backends

HALVES = (torch.bfloat16, torch.float16)


@contextmanager
def standing_in(*kernels: Callable) -> Iterator[None]:
    """The backend "cuda" on CPU tensors, by these in place of the native ops of their names."""
    assert _native.load(), _native.why_not()
    library = torch.library.Library("peft_kernels_native", "IMPL")
    for kernel in kernels:
        library.impl(kernel.__name__, kernel, "CPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "_why_not", lambda *_: "")  # on CPU tensors
        yield
    library._destroy()


def taken(matrix, height, width, dtype):
    """As `check_operand` of csrc/common/operands.h."""
    assert matrix.shape == (height, width) and matrix.dtype == dtype and dtype in HALVES
    if matrix.numel():
        assert matrix.data_ptr() % 16 == 0 and (width == 1 or matrix.stride(1) == 1)
        assert height == 1 or (matrix.stride(0) % 8 == 0 and matrix.stride(0) >= width)
    return matrix.float()


def parts(left, right, count):
    """left·right in `count` partial sums over the depth, float32."""
    pieces = zip(left.tensor_split(count, dim=1), right.tensor_split(count, dim=0))
    return torch.stack([one @ other for one, other in pieces])


def split_reduce(partials, row_scale, scale, out_dtype):
    _, M, R = partials.shape
    assert partials.dtype == torch.float32
    assert not partials.numel() or ((R == 1 or partials.stride(2) == 1) and (M == 1 or partials.stride(1) == R))
    total = partials.sum(0) * scale
    if row_scale is not None:
        assert row_scale.shape == (M,) and row_scale.is_contiguous() and row_scale.dtype == torch.float32
        total = total * row_scale[:, None]
    return total.to(out_dtype)
