"""The public ops `lora_linear` and `lora_linear_shared_input`, their autograd, and their registration.

From top to bottom: the public functions; the checks; the autograd Function that both use; the two ops that it
calls, registered with torch.library so that torch.compile and opcheck see them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ... import backends
from ..common import dropout
from ..common.library import LIBRARY, eager_or_traced, without_autocast
from . import reference


class Projection(NamedTuple):
    """One of several LoRA linear layers that read the same x.

    Attributes:
        weight: [N, K], the base weight, in x's dtype.
        lora_A: [R, K], in x's dtype or float32.
        lora_B: [N, R], in lora_A's dtype.
        scaling: alpha / r as a float, a 0-dim tensor, or one value a row of x (shape `x.shape[:-1]`).
        bias: [N] in x's dtype, or None.
    """

    weight: torch.Tensor
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scaling: float | torch.Tensor
    bias: torch.Tensor | None = None


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float | torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    adapter_precision: str = "default",
) -> torch.Tensor:
    """y = x·Wᵀ + bias + scaling · (D(x)·Aᵀ)·Bᵀ: a linear layer with a low-rank adapter (Hu et al., "LoRA",
    2021, eq. 3), with D dropout.

    Args:
        x: [..., K], float32, bfloat16, float16 (or float64, by the reference backend).
        weight: [N, K] in x's dtype; any strides.
        lora_A: [R, K] in x's dtype, or float32 beside a 16-bit x; R from 1 up.
        lora_B: [N, R] in lora_A's dtype.
        scaling: alpha / r: a float, a 0-dim tensor, or one value a row (shape `x.shape[:-1]`). Takes no
            gradient.
        bias: [N] in x's dtype.
        dropout_p: probability of dropping an element of x before the adapter, in [0, 1]; quantised to 1/65536.
        training: dropout is applied only where this is True.
        adapter_precision: with float32 adapters beside a 16-bit x, "default" computes their products on 16-bit
            operands with float32 accumulation, as PEFT does under autocast; "high" keeps float32 accuracy
            for the adapters' operands, as PEFT does without autocast. No difference elsewhere.

    Returns:
        [..., N] in x's dtype; under autocast in autocast's, as `F.linear`.

    Gradients flow to x, weight, lora_A, lora_B and bias, each in its own dtype, accumulated in float32 inside
    each product; what is not needed is neither computed nor saved. Saved for backward: x where lora_A or
    weight trains, S = scaling·D(x)·Aᵀ [M, R] where lora_B trains, 1 bit an element of x with dropout where
    lora_A trains or x takes a gradient. Forward and backward are deterministic. Differentiable once.

    Raises:
        ValueError: for shapes, dtypes, devices, a dropout or a precision that do not fit, in one line.
        RuntimeError: if the backend asked for cannot run here.
    """
    return _run("lora_linear", x, (Projection(weight, lora_A, lora_B, scaling, bias),), dropout_p, training,
                False, adapter_precision)[0]  # fmt: skip


def lora_linear_shared_input(
    x: torch.Tensor,
    projections: list[Projection] | tuple[Projection, ...],
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    shared_dropout: bool = False,
    adapter_precision: str = "default",
) -> tuple[torch.Tensor, ...]:
    """Several LoRA linear layers of one x (query/key/value, gate/up): x is read once for all low-rank products,
    saved once, and takes one gradient.

    Args:
        x: [..., K].
        projections: at least one :class:`Projection`; their N and R may differ, K and dtypes may not.
        shared_dropout: draw one mask for all projections; by default each has its own, as in PEFT.
        dropout_p, training, adapter_precision: as in :func:`lora_linear`.

    Returns:
        One tensor [..., N_j] a projection.

    Saved tensors, gradients and errors are those of :func:`lora_linear`.
    """
    return _run("lora_linear_shared_input", x, tuple(projections), dropout_p, training, shared_dropout,
                adapter_precision)  # fmt: skip


def _run(
    op: str,
    x: torch.Tensor,
    projections: tuple[Projection, ...],
    dropout_p: float,
    training: bool,
    shared_dropout: bool,
    adapter_precision: str,
) -> tuple[torch.Tensor, ...]:
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        x, projections = _autocast(x, projections)
    _check(op, x, projections, dropout_p, adapter_precision)
    backend = backends.choose(op, x)
    p = dropout_p if training else 0.0
    seed = dropout.draw_seed(x.device) if p > 0.0 else None
    high = adapter_precision == "high" and projections[0].lora_A.dtype != x.dtype

    flat: list[torch.Tensor | None] = []
    scalings: list[float] = []
    needs: list[bool] = []
    for weight, lora_A, lora_B, scaling, bias in projections:
        row_scaling = scaling if isinstance(scaling, torch.Tensor) else None
        flat += (weight, bias, lora_A, lora_B, row_scaling)
        scalings.append(float(scaling) if row_scaling is None else 1.0)
        needs += (
            weight.requires_grad, bias is not None and bias.requires_grad, lora_A.requires_grad, lora_B.requires_grad,
        )  # fmt: skip
    if torch.is_grad_enabled() and (x.requires_grad or True in needs):
        options = Options(scalings, p, shared_dropout, high, backend, x.requires_grad, needs)
        if torch._C._are_functorch_transforms_active():
            return TransformableLoRALinearFunction.apply(options, seed, x, *flat)[: len(projections)]
        return LoRALinearFunction.apply(options, seed, x, *flat)
    keep_nothing = [False] * len(projections)
    return tuple(_forward_op(x, flat, scalings, seed, p, shared_dropout, keep_nothing, False, high, backend))


def _autocast(x: torch.Tensor, projections: tuple[Projection, ...]) -> tuple[torch.Tensor, tuple[Projection, ...]]:
    """What `F.linear` does under autocast, except that float32 adapters stay as they are: kernels cast them."""
    dtype = torch.get_autocast_dtype(x.device.type)

    def cast(tensor: torch.Tensor | None) -> torch.Tensor | None:
        eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible else tensor

    def cast_adapter(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.dtype == torch.float32 else cast(tensor)

    return cast(x), tuple(
        Projection(cast(p.weight), cast_adapter(p.lora_A), cast_adapter(p.lora_B), p.scaling, cast(p.bias))
        for p in projections
    )


def _check(
    op: str, x: torch.Tensor, projections: tuple[Projection, ...], dropout_p: float, adapter_precision: str
) -> None:
    if not projections:
        raise ValueError(f"{op}: expected at least one projection, got none")
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"{op}: expected dropout_p between 0 and 1, got {dropout_p}")
    if adapter_precision not in ("default", "high"):
        raise ValueError(f"{op}: expected adapter_precision 'default' or 'high', got {adapter_precision!r}")
    if x.dim() < 1 or not x.is_floating_point():
        raise ValueError(f"{op}: expected a floating-point x of shape [..., K], got {_describe(x)}")
    shape, dtype, device = x.shape, x.dtype, x.device
    adapter_dtype = projections[0].lora_A.dtype
    if adapter_dtype != dtype and (adapter_dtype != torch.float32 or dtype == torch.float64):
        raise ValueError(f"{op}: expected lora_A in x's dtype {dtype} or float32, got {adapter_dtype}")
    for weight, lora_A, lora_B, scaling, bias in projections:
        if weight.dim() != 2 or weight.shape[1] != shape[-1] or weight.dtype != dtype:
            raise ValueError(f"{op}: expected weight [N, {shape[-1]}] in x's dtype {dtype}, got {_describe(weight)}")
        if lora_A.dim() != 2 or lora_A.shape[1] != shape[-1] or lora_A.shape[0] < 1:
            raise ValueError(f"{op}: expected lora_A [R, {shape[-1]}] with R ≥ 1, got {_describe(lora_A)}")
        if lora_B.shape != (weight.shape[0], lora_A.shape[0]):
            raise ValueError(f"{op}: expected lora_B [{weight.shape[0]}, {lora_A.shape[0]}], got {_describe(lora_B)}")
        if lora_A.dtype != adapter_dtype or lora_B.dtype != adapter_dtype:
            raise ValueError(f"{op}: expected adapters of one dtype, got {_describe(lora_A)} and {_describe(lora_B)}")
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != dtype):
            raise ValueError(f"{op}: expected bias [{weight.shape[0]}] in x's dtype {dtype}, got {_describe(bias)}")
        if isinstance(scaling, torch.Tensor):
            _check_scaling(op, x, scaling)
        elif not isinstance(scaling, (float, int)):
            raise ValueError(f"{op}: expected scaling as a float or a tensor, got {type(scaling).__name__}")
        if not (weight.device == lora_A.device == lora_B.device == device) or bias is not None and bias.device != device:
            raise ValueError(f"{op}: expected every tensor on x's device {device}, got {_describe(weight)}, "
                             f"{_describe(lora_A)}, {_describe(lora_B)}")  # fmt: skip


def _check_scaling(op: str, x: torch.Tensor, scaling: torch.Tensor) -> None:
    if scaling.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: expected a scaling that takes no gradient, got one that requires it")
    if scaling.dim() and scaling.shape != x.shape[:-1]:
        raise ValueError(f"{op}: expected scaling of shape [] or {list(x.shape[:-1])}, got {_describe(scaling)}")
    if scaling.device != x.device or not scaling.is_floating_point():
        raise ValueError(f"{op}: expected a floating-point scaling on x's device {x.device}, got {_describe(scaling)}")


def _describe(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


class Options(NamedTuple):
    """What one application of the op is given beside tensors. `needs` holds four answers a projection (weight,
    bias, lora_A, lora_B); it is read outside of the Function, whose `needs_input_grad` ignores grad mode."""

    scalings: list[float]
    dropout_p: float
    shared_dropout: bool
    high_precision: bool
    backend: str
    needs_x: bool
    needs: list[bool]


class LoRALinearFunction(torch.autograd.Function):
    """`apply(options, seed, x, *tensors)`, five tensors a projection (weight, bias, lora_A, lora_B and a scaling
    that is a tensor, or None), returns one y a projection."""

    @staticmethod
    def forward(ctx, options, seed, x, *flat):
        outputs = _call_forward(options, seed, x, flat)
        n = len(options.scalings)
        _save_for_backward(ctx, options, x, flat, outputs[n:])
        return tuple(outputs[:n])

    @staticmethod
    def backward(ctx, *grad_ys):
        if torch.is_grad_enabled():  # create_graph=True: a second derivative is refused when it is asked for
            return _backward_once(ctx, *grad_ys)
        return _call_backward(ctx, grad_ys)


class TransformableLoRALinearFunction(torch.autograd.Function):
    """The same for `torch.func`, which wants `setup_context` and all that is kept among the outputs. Not used
    elsewhere: torch then binds the arguments by `inspect` at every call, which costs more than the op itself."""

    @staticmethod
    def forward(options, seed, x, *flat):
        return tuple(_call_forward(options, seed, x, flat))

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        options, _, x, *flat = inputs
        kept = outputs[len(options.scalings) :]
        ctx.mark_non_differentiable(*kept)
        _save_for_backward(ctx, options, x, flat, kept)

    @staticmethod
    def backward(ctx, *grads):
        return _backward_once(ctx, *grads[: len(ctx.options.scalings)])


def _call_forward(options: Options, seed: torch.Tensor | None, x: torch.Tensor, flat) -> list[torch.Tensor]:
    """The ys; then S if a lora_B trains; then the masks if there is dropout and a gradient needs them."""
    scalings, dropout_p, shared_dropout, high_precision, backend, needs_x, needs = options
    save_mask = needs_x or True in needs[2::4]
    return _forward_op(
        x, flat, scalings, seed, dropout_p, shared_dropout, needs[3::4], save_mask, high_precision, backend
    )


def _save_for_backward(ctx, options: Options, x: torch.Tensor, flat, kept) -> None:
    needs_x, needs = options.needs_x, options.needs
    needs_A, needs_B = True in needs[2::4], True in needs[3::4]
    saved = [
        x if needs_A or True in needs[0::4] else None,
        kept[0] if needs_B else None,
        kept[-1] if options.dropout_p > 0.0 and (needs_x or needs_A) else None,
    ]
    for j in range(0, len(flat), 5):
        weight, _, lora_A, lora_B, row_scaling = flat[j : j + 5]
        saved += (weight, lora_A) if needs_x else (None, None)
        saved += (lora_B, row_scaling) if needs_x or needs_A else (None, None)
    ctx.save_for_backward(*saved)
    ctx.set_materialize_grads(False)
    ctx.options = options
    ctx.shapes = [lora_B.shape for lora_B in flat[3::5]]
    ctx.adapter_dtype = flat[2].dtype


def _call_backward(ctx, grad_ys: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
    options: Options = ctx.options
    given = [grad for grad in grad_ys if grad is not None]
    if not given:
        return (None,) * (3 + 5 * len(grad_ys))
    if len(given) < len(grad_ys):
        batch = given[0].shape[:-1]
        given = [
            given[0].new_zeros(*batch, shape[0]) if grad is None else grad
            for grad, shape in zip(grad_ys, ctx.shapes)
        ]
    x, s, mask, *flat = ctx.saved_tensors
    grads = iter(
        _backward_op(
            given, x, s, mask, flat, options.scalings, [shape[1] for shape in ctx.shapes], options.dropout_p,
            options.needs_x, options.needs, ctx.adapter_dtype, options.high_precision, options.backend,
        )  # fmt: skip
    )
    result = [None, None, next(grads) if options.needs_x else None]
    for position, needed in enumerate(options.needs):
        result.append(next(grads) if needed else None)
        if position % 4 == 3:
            result.append(None)  # scaling takes no gradient
    return tuple(result)


@torch.autograd.function.once_differentiable
def _backward_once(ctx, *grad_ys):
    return _call_backward(ctx, grad_ys)


# `projections` of forward: five tensors each (weight, bias, lora_A, lora_B, row_scaling); of backward: four
# (weight, lora_A, lora_B, row_scaling), None where no needed gradient reads it. `needs`: four answers each.
LIBRARY.define(
    "lora_linear_forward(Tensor x, Tensor?[] projections, float[] scalings, Tensor? seed, float dropout_p, "
    "bool shared_dropout, bool[] save_s, bool save_mask, bool high_precision, str backend) -> Tensor[]"
)
LIBRARY.define(
    "lora_linear_backward(Tensor[] grad_ys, Tensor? x, Tensor? s, Tensor? masks, Tensor?[] projections, "
    "float[] scalings, SymInt[] ranks, float dropout_p, bool needs_x, bool[] needs, ScalarType adapter_dtype, "
    "bool high_precision, str backend) -> Tensor[]"
)


@without_autocast
def _forward(*args):
    *given, backend = args
    if backend == "reference":
        return reference.forward(*given)
    from . import triton_forward  # needs Triton, which the package does not

    return triton_forward.forward(*given, backend)


@without_autocast
def _backward(*args):
    *given, backend = args
    if backend == "reference":
        return reference.backward(*given)
    from . import triton_backward

    return triton_backward.backward(*given, backend)


LIBRARY.impl("lora_linear_forward", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("lora_linear_backward", _backward, "CompositeExplicitAutograd")
_forward_op = eager_or_traced(_forward, torch.ops.peft_kernels.lora_linear_forward.default)
_backward_op = eager_or_traced(_backward, torch.ops.peft_kernels.lora_linear_backward.default)


@torch.library.register_fake("peft_kernels::lora_linear_forward", lib=LIBRARY)
def _(x, projections, scalings, seed, dropout_p, shared_dropout, save_s, save_mask, high_precision, backend):
    rows = math.prod(x.shape[:-1])
    ys = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in projections[0::5]]
    kept = []
    if any(save_s):
        rank = sum(lora_A.shape[0] for lora_A, kept_s in zip(projections[2::5], save_s) if kept_s)
        kept.append(x.new_empty(rows, rank, dtype=torch.float32 if high_precision else None))
    if save_mask and seed is not None:
        streams = 1 if shared_dropout else len(scalings)
        kept.append(x.new_empty(streams, rows, dropout.mask_bytes(x.shape[-1]), dtype=torch.uint8))
    return ys + kept


@torch.library.register_fake("peft_kernels::lora_linear_backward", lib=LIBRARY)
def _(grad_ys, x, s, masks, projections, scalings, ranks, dropout_p, needs_x, needs, adapter_dtype,
      high_precision, backend):  # fmt: skip
    dy = grad_ys[0]
    grads = [dy.new_empty(*dy.shape[:-1], projections[0].shape[1])] if needs_x else []
    for j, grad_y in enumerate(grad_ys):
        needs_weight, needs_bias, needs_A, needs_B = needs[4 * j : 4 * j + 4]
        features = grad_y.shape[-1]
        if needs_weight:
            grads.append(dy.new_empty(features, x.shape[-1]))
        if needs_bias:
            grads.append(dy.new_empty(features))
        if needs_A:
            grads.append(dy.new_empty(ranks[j], x.shape[-1], dtype=adapter_dtype))
        if needs_B:
            grads.append(dy.new_empty(features, ranks[j], dtype=adapter_dtype))
    return grads
