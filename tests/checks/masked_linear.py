"""What is special to the masked linear op, on every backend and device: called by the suites of the CPU (`tests/ops`),
the interpreter (`tests/interpret`) and the GPU."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

import peft_kernels as pk
from peft_kernels.testing.masked_linear import make_case, run


def check_mask(backend: str, device: str = "cpu", dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> None:
    """With x that lets the weight through, y and the gradients show the mask, bit for bit: scores on the threshold
    and next to it, infinite ones and NaN; a weight of infinity or NaN under the mask takes no part; the same for a
    number and a tensor, also where τ lies between two numbers of the scores' dtype."""
    for dtype in dtypes:
        eye = torch.eye(32, dtype=dtype, device=device)
        for tau in (0.0, 0.1, -1.0 / 3.0):
            on = torch.tensor(tau, dtype=torch.float64).to(dtype)
            special = torch.stack([
                on, torch.nextafter(on, on + 1), torch.nextafter(on, on - 1), -on,
                *(torch.tensor(value).to(dtype) for value in (math.inf, -math.inf, math.nan, -0.0)),
            ])  # fmt: skip
            scores = special.repeat(64, 4).to(device)  # [64, 32]
            kept = scores >= on.to(device)
            assert kept.any() and not kept.all()
            weight = torch.where(kept, torch.randn(64, 32, device=device).to(dtype), math.nan)
            expected = torch.where(kept, weight, 0)
            double = torch.tensor(tau, dtype=torch.float64, device=device)
            for threshold in (tau, double, double.to(dtype)):
                leaves = [t.clone().requires_grad_() for t in (eye, weight, scores)]
                with pk.use_backend(backend):
                    y = pk.masked_linear(*leaves, threshold)
                assert torch.equal(y, expected.t()), f"{dtype} {threshold}"
                grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
                torch.testing.assert_close(grads[0], expected.sum(0, dtype=torch.float64).to(dtype).expand(32, 32))
                assert torch.equal(grads[1], kept.to(dtype))
                torch.testing.assert_close(grads[2], weight, rtol=0, atol=0, equal_nan=True)


def check_float32_scores_beside(backend: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """Scores that differ in float32 but not in 16 bits keep their mask, and their gradient its float32 numbers."""
    case = make_case((40,), 32, 24, dtype, torch.float32, device=device, threshold=1.0)
    scores = torch.where(torch.rand_like(case.scores) < 0.5, 1.0, 1.0 - 2.0**-24)
    case = replace(case, scores=scores)
    with pk.use_backend(backend):
        results = run(case)
    assert results["grad of scores"].dtype == torch.float32
    assert torch.equal(results["grad of weight"] != 0, scores == 1.0)
