"""The error rule that every op is held to: at most twice the error of eager PyTorch in the same dtype."""

from __future__ import annotations

import math

import torch


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of `dtype` around `value`."""
    if value == 0.0:
        return torch.finfo(dtype).smallest_normal
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(abs(value)))


def assert_within_eager(
    name: str, actual: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, samples: int | None = None
) -> None:
    """Compare a kernel's result with eager PyTorch's, both against the truth.

    max error ≤ 2 · eager's + one ulp of max |truth|; rms error ≤ 1.25 · eager's, where eager's is taken as no
    less than that of the truth rounded once (ulp / √12). The ratio of two rms errors over n samples is itself
    known to 1/√n only: four such deviations are granted (a suite makes thousands of comparisons), which is nothing
    for a large tensor.

    Args:
        actual, eager: results in the same dtype and shape.
        truth: float64, the same shape.
        samples: how many independent roundings stand behind the elements, if fewer than there are elements: all of
            a gradient of lora_B share the M·R roundings of S.

    Raises:
        AssertionError: naming the tensor, both errors and the bound.
    """
    if actual.shape != truth.shape or actual.dtype != eager.dtype:
        raise AssertionError(
            f"{name}: expected {list(truth.shape)} {eager.dtype}, got {list(actual.shape)} {actual.dtype}"
        )
    if truth.numel() == 0:
        return
    if not bool(torch.isfinite(actual).all()):
        raise AssertionError(f"{name}: {int((~torch.isfinite(actual)).sum())} elements are not finite")
    truth = truth.to(actual.device)
    error, eager_error = (actual.double() - truth).abs(), (eager.double() - truth).abs()
    bound = 2.0 * eager_error.max().item() + ulp(truth.abs().max().item(), actual.dtype)
    if error.max().item() > bound:
        raise AssertionError(
            f"{name}: max error {error.max().item():.3e} > {bound:.3e} "
            f"(2 × eager's {eager_error.max().item():.3e} + one ulp of max |truth|)"
        )
    rms, eager_rms, size = (t.square().mean().sqrt().item() for t in (error, eager_error, truth))
    slack = 4.0 / math.sqrt(min(samples or truth.numel(), truth.numel()))
    bound = (1.25 + slack) * max(eager_rms, ulp(size, actual.dtype) / math.sqrt(12.0))
    if rms > bound:
        raise AssertionError(f"{name}: rms error {rms:.3e} > {bound:.3e} (1.25 × eager's {eager_rms:.3e})")
