"""The error rule that every op is held to: at most twice the error of eager PyTorch in the same dtype."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


def ulp(value: float, dtype: torch.dtype) -> float:
    """The distance between neighbouring numbers of `dtype` around `value`."""
    if value == 0.0:
        return torch.finfo(dtype).smallest_normal
    return torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(abs(value)))


class Sums(NamedTuple):
    """How a GPU kernel adds up float32 products, where cuBLAS, which eager takes, may do better and both are right.

    *One after the other*, by FMA. Each partial sum is rounded to the nearest: of v by at most 2⁻²³·|v|/√12, rms. After
    k of n independent terms the partial sum has √(k/n) of the whole's rms, and the roundings are independent of each
    other: √(Σₖ (2⁻²³/√12)²·k/n) = 2⁻²³·√(n/24) of the whole's rms. cuBLAS splits a deep sum into s of n/s terms, which
    leaves 1/√s of that: at s = 16 an rms error of four times eager's is right.

    *On tensor cores*, as "bf16x6": six products of bfloat16 pieces for one. What does not fit beside a partial sum is
    cut off, 8 products at a time (16 on some), so that errors have the sign of the partial sum and add up: half an ulp
    of it each, 6·n/8 of them: Σⱼ 2⁻²⁴·√(j/J) over J = 3·n/4 is 2⁻²³·J/3 = 2⁻²³·n/4. The three products that are left
    out are below 2⁻²³ of each term, of either sign, and do not count beside it. Operands rounded to bfloat16 would err
    by 2⁻⁹ and to tf32 by 2⁻¹², whatever n is: far more at every n that is tested.

    Attributes:
        terms: the products behind an element: of a product of products those of both, whose errors are independent.
        tensor_cores: the second of these.
    """

    terms: int
    tensor_cores: bool = False

    @property
    def error(self) -> float:
        """Rms error over the rms of the sum."""
        return 2.0**-23 * (self.terms / 4 if self.tensor_cores else math.sqrt(self.terms / 24))


def assert_within_eager(
    name: str,
    actual: torch.Tensor,
    eager: torch.Tensor,
    float64_reference: torch.Tensor,
    samples: int | None = None,
    sums: Sums | None = None,
) -> None:
    """Compare a kernel's result with eager PyTorch's, both against the float64 reference.

    max error ≤ 2 · eager's + one ulp of max |reference|; rms error ≤ 1.25 · eager's, where eager's is taken as no
    less than that of the float64 reference rounded once (ulp / √12). The ratio of two rms errors over n samples is
    itself known to 1/√n only: four such deviations are granted (a suite makes thousands of comparisons), which is
    nothing for a large tensor.

    Args:
        actual, eager: results in the same dtype and shape.
        float64_reference: float64, the same shape.
        samples: how many independent roundings stand behind the elements, if fewer than there are elements: all of
            a gradient of lora_B share the M·R roundings of S.
        sums: for float32 results of a GPU, what lies behind an element: eager's errors are taken as no less than what
            follows from it, of the reference's rms and maximum.

    Raises:
        AssertionError: naming the tensor, both errors and the bound.
    """
    if actual.shape != float64_reference.shape or actual.dtype != eager.dtype:
        raise AssertionError(
            f"{name}: expected {list(float64_reference.shape)} {eager.dtype}, got {list(actual.shape)} {actual.dtype}"
        )
    if float64_reference.numel() == 0:
        return
    if not bool(torch.isfinite(actual).all()):
        raise AssertionError(f"{name}: {int((~torch.isfinite(actual)).sum())} elements are not finite")
    float64_reference = float64_reference.to(actual.device)
    error, eager_error = (actual.double() - float64_reference).abs(), (eager.double() - float64_reference).abs()
    largest, summed = float64_reference.abs().max().item(), sums.error if sums else 0.0
    eager_max = max(eager_error.max().item(), summed * largest)
    bound = 2.0 * eager_max + ulp(largest, actual.dtype)
    if error.max().item() > bound:
        raise AssertionError(
            f"{name}: max error {error.max().item():.3e} > {bound:.3e} "
            f"(2 × eager's {eager_max:.3e} + one ulp of max |reference|)"
        )
    rms, eager_rms, size = (t.square().mean().sqrt().item() for t in (error, eager_error, float64_reference))
    eager_rms = max(eager_rms, summed * size)
    slack = 4.0 / math.sqrt(min(samples or float64_reference.numel(), float64_reference.numel()))
    bound = (1.25 + slack) * max(eager_rms, ulp(size, actual.dtype) / math.sqrt(12.0))
    if rms > bound:
        raise AssertionError(f"{name}: rms error {rms:.3e} > {bound:.3e} (1.25 × eager's {eager_rms:.3e})")
