"""What the op packages share."""

import pytest
import torch

from peft_kernels.ops.core.tensors import mm_over_rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [0, 5, 2048])
def test_mm_over_rows(rows, dtype):
    """Narrow results are as exact as they are as part of a wide one."""
    generator = torch.Generator().manual_seed(0)
    wide_left, wide_right = (torch.randn(rows, 96, generator=generator).to(dtype) for _ in range(2))
    exact, wide = wide_left.double().t() @ wide_right.double(), wide_left.t() @ wide_right
    for n, k in ((1, 1), (1, 96), (96, 1), (2, 7), (3, 16), (6, 96), (96, 6), (96, 2), (16, 15), (13, 40), (96, 96)):
        found = mm_over_rows(wide_left[:, :n], wide_right[:, :k])
        assert found.shape == (n, k) and found.dtype == dtype and found.is_contiguous()
        rms, usual = (e.square().mean().sqrt() for e in (found - exact[:n, :k], wide - exact))
        assert rms <= (1.25 + 4 / (n * k) ** 0.5) * usual
