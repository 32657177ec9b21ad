"""The public op `scaled_linear`: the function, its checks, and its declaration."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ... import backends
from ..core.checks import check_devices, check_linear
from ..core.messages import describe
from ..core.op import OpFunction, needs_of, register
from ..core.tensors import autocast, autocasts
from ..core.transforms import compose, is_transformed, over_values
from . import reference


def scaled_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    scale_input: bool = False,
) -> torch.Tensor:
    """y = (x·Wᵀ + bias) ⊙ l, or with `scale_input` y = (x ⊙ l)·Wᵀ + bias: a linear layer whose features are scaled by a
    learned vector (Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
    Learning", NeurIPS 2022, §3.3: (IA)³).

    Args:
        x: [..., K], float32, bfloat16, float16 (or float64, by the reference backend).
        weight: [N, K] in x's dtype; any strides.
        scale: l, [N], or [K] with `scale_input`; in x's dtype, or float32 beside a 16-bit x.
        bias: [N] in x's dtype.
        scale_input: scale x instead of the output.

    Returns:
        [..., N] in x's dtype; under autocast in autocast's, as `F.linear` (a float32 scale stays float32).

    Gradients flow to x, weight, scale and bias, each in its own dtype; sums are accumulated in float32, and what is not
    needed is neither computed nor saved. Saved for backward: x where weight trains, or scale with `scale_input`; the
    unscaled output z = x·Wᵀ + bias where scale trains without `scale_input`, as dl = Σ dy ⊙ z; weight and scale
    themselves where they are read. Forward and backward are deterministic. Differentiable once; under `torch.func` and
    in forward mode any number of times, by torch's own operations. A nested x gives a nested y.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, in one line.
        RuntimeError: if the backend asked for cannot run here.
    """
    if x.is_nested:
        return over_values(
            "scaled_linear", lambda rows: scaled_linear(rows, weight, scale, bias, scale_input=scale_input), x
        )
    if autocasts(x):  # as `F.linear`, but a float32 scale stays: it multiplies before the result is rounded
        scale = scale if scale.dtype == torch.float32 else autocast(scale, x.device.type)
        x, weight, bias = (autocast(tensor, x.device.type) for tensor in (x, weight, bias))
    if is_transformed():
        return compose("scaled_linear", _check, reference.composition, x, weight, scale, bias, scale_input)
    _check(x, weight, scale, bias, scale_input)
    backend, needs = backends.choose("scaled_linear", x), needs_of(x, weight, scale, bias)
    return ScaledLinearFunction.call(Options(scale_input, scale.dtype, backend, needs), x, weight, scale, bias)


def _check(x, weight, scale, bias, scale_input) -> None:
    check_linear("scaled_linear", x, weight, bias)
    features = weight.shape[1 if scale_input else 0]
    if scale.shape != (features,) or (scale.dtype != x.dtype and (scale.dtype, x.dtype.itemsize) != (torch.float32, 2)):
        dtypes = f"x's dtype {x.dtype}" + " or float32" * (x.dtype.itemsize == 2)
        raise ValueError(f"scaled_linear: expected scale [{features}] in {dtypes}, got {describe(scale)}")
    check_devices("scaled_linear", x, scale)


class Options(NamedTuple):
    scale_input: bool
    scale_dtype: torch.dtype
    backend: str
    needs: list[bool]  #: of x, weight, scale and bias


class ScaledLinearFunction(OpFunction):
    """`apply(options, x, weight, scale, bias)` returns y."""

    op = "scaled_linear"

    @staticmethod
    def run(options, x, weight, scale, bias):
        scale_input, _, backend, (needs_x, needs_weight, needs_scale, needs_bias) = options
        keep_z = needs_scale and not scale_input
        y, *kept = _forward(x, weight, scale, bias, scale_input, keep_z, backend)
        saved = (
            x if needs_weight or (needs_scale and scale_input) else None,
            weight if needs_x or (needs_scale and scale_input) else None,
            scale if needs_x or needs_weight or (needs_bias and not scale_input) else None,
            kept[0] if keep_z else None,
        )
        return y, saved

    @staticmethod
    def gradients(options, saved, dy):
        scale_input, scale_dtype, backend, needs = options
        return _backward(dy, *saved, scale_input, needs, scale_dtype, backend)


def _fake_forward(x, weight, scale, bias, scale_input, keep_z, backend):
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for _ in range(1 + keep_z)]


def _fake_backward(dy, x, weight, scale, z, scale_input, needs, scale_dtype, backend):
    N, K = dy.shape[-1], next((one.shape[-1] for one in (x, weight) if one is not None), 0)
    features = (K if scale_input else N,)
    like = ((*dy.shape[:-1], K), dy.dtype), ((N, K), dy.dtype), (features, scale_dtype), ((N,), dy.dtype)
    return [dy.new_empty(shape, dtype=dtype) for (shape, dtype), needed in zip(like, needs) if needed]


_forward = register(
    __package__,
    "scaled_linear_forward(Tensor x, Tensor weight, Tensor scale, Tensor? bias, bool scale_input, bool keep_z, "
    "str backend) -> Tensor[]",
    fake=_fake_forward,
    flops=reference.forward_flops,
)
_backward = register(
    __package__,
    "scaled_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? scale, Tensor? z, bool scale_input, "
    "bool[] needs, ScalarType scale_dtype, str backend) -> Tensor[]",
    fake=_fake_backward,
    flops=reference.backward_flops,
)
