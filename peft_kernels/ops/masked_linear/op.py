"""The public op `masked_linear`, its autograd, and its registration.

From top to bottom: the public function; the checks; the autograd Function; the two ops that it calls, registered
with torch.library so that torch.compile and opcheck see them.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch._C import _is_any_autocast_enabled
from torch.compiler import is_dynamo_compiling

from ... import backends
from ..core.library import LIBRARY, on_device_of, register
from ..core.messages import describe
from ..core.tensors import autocast
from ..core.transforms import backward_of, compose, is_transformed, over_values
from . import composition, reference


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
    or NaN. Forward and backward are deterministic. Differentiable once;
    under `torch.func` and in forward mode any number of times, by torch's own operations. A nested x gives a nested y.

    Raises:
        ValueError: for shapes, dtypes, devices or a threshold that do not fit, in one line.
        RuntimeError: if the backend asked for cannot run here.
    """
    if x.is_nested:
        return over_values("masked_linear", lambda rows: masked_linear(rows, weight, scores, threshold, bias), x)
    if _is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        x, weight, scores, bias = _autocast(x, weight, scores, bias)
    is_tensor = isinstance(threshold, torch.Tensor)
    tensors = (x, weight, scores, bias, threshold if is_tensor else None)
    if is_transformed():
        given = (*tensors[:4], 0.0 if is_tensor else threshold, tensors[4])
        check = functools.partial(_check, x, weight, scores, threshold, bias)
        return compose("masked_linear", check, composition.forward, *given)
    _check(x, weight, scores, threshold, bias)
    backend = backends.choose("masked_linear", x)
    needs = [tensor is not None and tensor.requires_grad for tensor in tensors[:4]]
    options = Options(0.0 if is_tensor else float(threshold), backend, needs)
    if not (torch.is_grad_enabled() and True in needs):
        return _call_forward(options, *tensors)
    apply = MaskedLinearFunction.apply if is_dynamo_compiling() else _apply_eagerly
    return apply(options, *tensors)


def _autocast(
    x: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    """What `F.linear` does under autocast, except that float32 scores stay as they are: they are only compared."""
    kind = x.device.type
    scores = scores if scores.dtype == torch.float32 else autocast(scores, kind)
    return autocast(x, kind), autocast(weight, kind), scores, autocast(bias, kind)


def _check(
    x: torch.Tensor, weight: torch.Tensor, scores: torch.Tensor, threshold: object, bias: torch.Tensor | None
) -> None:
    """Raise ValueError unless the arguments fit together: one line that says what was expected and what came."""
    if not x.dim() or not x.dtype.is_floating_point:
        raise ValueError(f"masked_linear: expected a floating-point x of shape [..., K], got {describe(x)}")
    K, dtype = x.shape[-1], x.dtype
    if weight.dim() != 2 or weight.shape[1] != K or weight.dtype != dtype:
        raise ValueError(f"masked_linear: expected weight [N, {K}] in x's dtype {dtype}, got {describe(weight)}")
    N = weight.shape[0]
    if scores.shape != weight.shape or scores.dtype not in (dtype, torch.float32):
        raise ValueError(
            f"masked_linear: expected scores [{N}, {K}] in x's dtype {dtype} or float32, got {describe(scores)}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != dtype):
        raise ValueError(f"masked_linear: expected bias [{N}] in x's dtype {dtype}, got {describe(bias)}")
    if not isinstance(threshold, (float, int)):
        _check_threshold(threshold)
    for tensor in (weight, scores, bias, threshold):
        if isinstance(tensor, torch.Tensor) and tensor.device != x.device:
            raise ValueError(f"masked_linear: expected every tensor on x's device {x.device}, got {describe(tensor)}")


def _check_threshold(threshold: object) -> None:
    if not isinstance(threshold, torch.Tensor):
        kind = type(threshold).__name__
        raise ValueError(f"masked_linear: expected threshold as a float or a tensor, got {kind}")
    if threshold.dim() or not threshold.is_floating_point():
        given = describe(threshold)
        raise ValueError(f"masked_linear: expected a floating-point threshold of shape [], got {given}")
    if threshold.requires_grad and torch.is_grad_enabled():
        raise ValueError("masked_linear: expected a threshold that takes no gradient, got one that requires it")


class Options(NamedTuple):
    """What one application of the op is given beside tensors. `threshold` is read where no tensor is given in its
    place. `needs` holds the answers of x, weight, scores and bias; it is read outside of the Function, whose
    `needs_input_grad` ignores grad mode."""

    threshold: float
    backend: str
    needs: list[bool]


class MaskedLinearFunction(torch.autograd.Function):
    """`apply(options, x, weight, scores, bias, threshold)`, with a threshold that is a tensor, or None; returns y."""

    @staticmethod
    def forward(ctx, options, *tensors):
        _save_for_backward(ctx, options, tensors)
        return _call_forward(options, *tensors)

    @staticmethod
    def backward(ctx, grad_y):
        return _call_backward(ctx, grad_y)


# What `MaskedLinearFunction.apply` calls in the end. The Python around it asks of every argument whether it escaped
# from a torch.func transform, a cost for the host; no transform is active where this is called.
_apply_eagerly = super(torch.autograd.Function, MaskedLinearFunction).apply


def _call_forward(options: Options, x, weight, scores, bias, threshold) -> torch.Tensor:
    return _forward_op(x, weight, scores, bias, options.threshold, threshold, options.backend)


def _save_for_backward(ctx, options: Options, tensors: tuple[torch.Tensor | None, ...]) -> None:
    x, weight, scores, _, threshold = tensors
    needs_x, needs_weight, needs_scores, _ = options.needs
    masks = needs_x or needs_weight  # dscores = G ⊙ W does not ask for the mask
    ctx.save_for_backward(
        x if needs_weight or needs_scores else None,
        weight if needs_x or needs_scores else None,
        scores if masks else None,
        threshold if masks else None,
    )
    ctx.set_materialize_grads(False)
    ctx.options = options
    ctx.scores_dtype = scores.dtype


@backward_of("masked_linear")
def _call_backward(ctx, grad_y: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 6
    (threshold, backend, needs), tensors = ctx.options, ctx.saved_tensors
    grads = iter(_backward_op(grad_y, *tensors[:3], threshold, tensors[3], needs, ctx.scores_dtype, backend))
    return None, *(next(grads) if needed else None for needed in needs), None


# `needs`: the answers of x, weight, scores and bias; backward returns the gradients that are needed, in this order.
# Of x, weight and scores it is given what these read.
LIBRARY.define(
    "masked_linear_forward(Tensor x, Tensor weight, Tensor scores, Tensor? bias, float threshold, "
    "Tensor? threshold_tensor, str backend) -> Tensor"
)
LIBRARY.define(
    "masked_linear_backward(Tensor grad_y, Tensor? x, Tensor? weight, Tensor? scores, float threshold, "
    "Tensor? threshold_tensor, bool[] needs, ScalarType scores_dtype, str backend) -> Tensor[]"
)


def _forward(*args):
    if args[-1] == "reference":
        return reference.forward(*args)
    from . import triton_forward  # needs Triton, which the package does not

    with on_device_of(args[0]):
        return triton_forward.forward(*args)


def _backward(*args):
    if args[-1] == "reference":
        return reference.backward(*args)
    from . import triton_backward

    with on_device_of(args[0]):
        return triton_backward.backward(*args)


_forward_op = register("masked_linear_forward", _forward, composition.forward_flops)
_backward_op = register("masked_linear_backward", _backward, composition.backward_flops)


@torch.library.register_fake("peft_kernels::masked_linear_forward", lib=LIBRARY)
def _(x, weight, scores, bias, threshold, threshold_tensor, backend):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("peft_kernels::masked_linear_backward", lib=LIBRARY)
def _(grad_y, x, weight, scores, threshold, threshold_tensor, needs, scores_dtype, backend):
    needs_x, needs_weight, needs_scores, needs_bias = needs
    N = grad_y.shape[-1]
    grads = []
    if needs_x:
        grads.append(grad_y.new_empty(*grad_y.shape[:-1], weight.shape[1]))
    if needs_weight:
        grads.append(grad_y.new_empty(N, x.shape[-1]))
    if needs_scores:
        grads.append(grad_y.new_empty(N, x.shape[-1], dtype=scores_dtype))
    if needs_bias:
        grads.append(grad_y.new_empty(N))
    return grads
