"""The public op `masked_linear`: the function, its checks, and its declaration."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ... import backends
from ..core.checks import check_devices, check_linear, check_number
from ..core.messages import describe
from ..core.op import OpFunction, needs_of, register
from ..core.tensors import autocast, autocasts
from ..core.transforms import compose, is_transformed, over_values
from . import composition


def masked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scores: torch.Tensor,
    threshold: float | torch.Tensor = 0.0,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x·(W ⊙ 1[S ≥ τ])ᵀ + bias: a linear layer with the weights whose scores reach a threshold (Zhao et al.,
    "Masking as an Efficient Alternative to Finetuning for Pretrained Language Models", EMNLP 2020; Mallya et al.,
    "Piggyback", ECCV 2018).

    Args:
        x: [..., K], float32, bfloat16, float16 (or float64, by the reference backend).
        weight: [N, K] in x's dtype; any strides.
        scores: [N, K] in x's dtype or float32; any strides.
        threshold: τ, a float or a 0-dim tensor on x's device, rounded to the scores' dtype before it is compared. A
            score that is NaN masks its weight. Takes no gradient.
        bias: [N] in x's dtype.

    Returns:
        [..., N] in x's dtype; under autocast in autocast's, as `F.linear` (float32 scores stay float32).

    Gradients are straight-through, the derivative of the indicator taken as 1. With G = dyᵀ·x: dscores = G ⊙ W for
    every score, dweight = G ⊙ 1[S ≥ τ], dx = dy·(W ⊙ 1[S ≥ τ]), dbias = Σ dy, each in its parameter's dtype; what is
    not needed is neither computed nor saved. Saved for backward: x where scores or weight train; weight and scores
    themselves where they are needed, never a masked copy. A masked weight takes no part, also where it is infinite
    or NaN. Forward and backward are deterministic. Differentiable once; under `torch.func` and in forward mode any
    number of times, by torch's own operations. A nested x gives a nested y.

    Raises:
        ValueError: for shapes, dtypes, devices or a threshold that do not fit, in one line.
        RuntimeError: if the backend asked for cannot run here.
    """
    if x.is_nested:
        return over_values("masked_linear", lambda rows: masked_linear(rows, weight, scores, threshold, bias), x)
    if autocasts(x):  # as `F.linear`, but float32 scores stay: they are only compared
        scores = scores if scores.dtype == torch.float32 else autocast(scores, x.device.type)
        x, weight, bias = (autocast(tensor, x.device.type) for tensor in (x, weight, bias))
    if is_transformed():
        return compose("masked_linear", _check, composition.forward, x, weight, scores, threshold, bias)
    _check(x, weight, scores, threshold, bias)
    tau, number = (threshold, 0.0) if isinstance(threshold, torch.Tensor) else (None, float(threshold))
    backend, needs = backends.choose("masked_linear", x), needs_of(x, weight, scores, bias)
    return MaskedLinearFunction.call(Options(number, scores.dtype, backend, needs), x, weight, scores, bias, tau)


def _check(
    x: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor, threshold: object, bias: torch.Tensor | None
) -> None:
    op = "masked_linear"
    check_linear(op, x, weight, bias)
    if scores.shape != weight.shape or scores.dtype not in (x.dtype, torch.float32):
        expected = f"expected scores {list(weight.shape)} in x's dtype {x.dtype} or float32"
        raise ValueError(f"{op}: {expected}, got {describe(scores)}")
    check_devices(op, x, scores, threshold)
    check_number(op, "threshold", threshold)


class Options(NamedTuple):
    threshold: float  #: read where no tensor is given in its place
    scores_dtype: torch.dtype
    backend: str
    needs: list[bool]  #: of x, weight, scores and bias


class MaskedLinearFunction(OpFunction):
    """`apply(options, x, weight, scores, bias, tau)` returns y; tau is a threshold that is a tensor, or None."""

    op = "masked_linear"
    tensors = "x", "weight", "scores", "bias", "tau"
    # dscores = G ⊙ W does not read the mask.
    saved = ("x", "weight scores"), ("weight", "x scores"), ("scores", "x weight"), ("tau", "x weight")

    @staticmethod
    def run(options, x, weight, scores, bias, tau):
        return _forward(x, weight, scores, bias, tau, options.threshold, options.backend), None

    @staticmethod
    def gradients(options, saved, dy):
        threshold, scores_dtype, backend, needs = options
        return _backward(dy, *saved, threshold, needs, scores_dtype, backend)


def _fake_backward(dy, x, weight, scores, tau, threshold, needs, scores_dtype, backend):
    N, K = dy.shape[-1], next((one.shape[-1] for one in (x, weight) if one is not None), 0)
    like = ((*dy.shape[:-1], K), dy.dtype), ((N, K), dy.dtype), ((N, K), scores_dtype), ((N,), dy.dtype)
    return [dy.new_empty(shape, dtype=dtype) for (shape, dtype), needed in zip(like, needs) if needed]


_forward = register(
    __package__,
    "masked_linear_forward(Tensor x, Tensor weight, Tensor scores, Tensor? bias, Tensor? tau, float threshold, "
    "str backend) -> Tensor",
    fake=lambda x, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]),
    flops=composition.forward_flops,
)
_backward = register(
    __package__,
    "masked_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? scores, Tensor? tau, float threshold, "
    "bool[] needs, ScalarType scores_dtype, str backend) -> Tensor[]",
    fake=_fake_backward,
    flops=composition.backward_flops,
)
