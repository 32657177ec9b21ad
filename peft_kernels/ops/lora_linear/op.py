"""The public ops `lora_linear` and `lora_linear_shared_input`, their autograd, and their registration.

From top to bottom: the public functions; the checks; the autograd Function that both use; the two ops that it
calls, registered with torch.library so that torch.compile and opcheck see them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch._C import _is_any_autocast_enabled
from torch.compiler import is_dynamo_compiling

from ... import backends
from ..core import dropout
from ..core.library import LIBRARY, on_device_of, register
from ..core.machine import architecture
from ..core.tensors import autocast
from ..core.transforms import backward_of, compose, is_transformed, over_values
from . import composition, configs, cuda, reference
from .checks import check


class Projection(NamedTuple):
    """One of several LoRA linear layers that read the same x.

    Attributes:
        weight: [N, K], the base weight, in x's dtype.
        lora_A: [R, K], in x's dtype or float32.
        lora_B: [N, R], in lora_A's dtype.
        scaling: alpha / r as a float, a 0-dim tensor, or one value a row of x, as :func:`lora_linear` has it.
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
        scaling: alpha / r: a float, a 0-dim tensor, or one value a row: shape `x.shape[:-1]`, with 1 in place of
            what rows share ([B, 1] for one value a sequence). Takes no gradient.
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
    lora_A trains or x takes a gradient. Forward and backward are deterministic. Differentiable once; under
    `torch.func` and in forward mode any number of times, by torch's own operations. A nested x gives a nested y.

    Raises:
        ValueError: for shapes, dtypes, devices, a dropout or a precision that do not fit, in one line.
        RuntimeError: if the backend asked for cannot run here.
    """
    projection = weight, lora_A, lora_B, scaling, bias  # plain: a `Projection` costs the host more than a check
    return _run("lora_linear", x, (projection,), dropout_p, training, False, adapter_precision)[0]


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
    if x.is_nested:
        options = dropout_p, training, shared_dropout, adapter_precision
        return over_values(op, lambda rows: _run(op, rows, projections, *options), x)
    if _is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        x, projections = _autocast(x, projections)
    p = dropout_p if training else 0.0
    if is_transformed():
        return compose(
            op, lambda: check(op, x, projections, dropout_p, adapter_precision),
            composition.forward, x, projections, p, shared_dropout, adapter_precision == "high",
        )  # fmt: skip
    check(op, x, projections, dropout_p, adapter_precision)
    high = adapter_precision == "high" and projections[0][1].dtype != x.dtype
    backend = backends.choose(op, x, "high" if high else "default")
    seed = dropout.draw_seed(x.device) if p > 0.0 else None

    flat: list[torch.Tensor | None] = []
    scalings: list[float] = []
    ranks: list[int] = []
    needs: list[bool] = []
    for weight, lora_A, lora_B, scaling, bias in projections:
        row_scaling = None
        if not isinstance(scaling, (float, int)):
            row_scaling, scaling = scaling.expand(x.shape[:-1]) if scaling.dim() else scaling, 1.0
        flat += (weight, bias, lora_A, lora_B, row_scaling)
        scalings.append(float(scaling))
        ranks.append(lora_A.shape[0])
        trains_bias = bias is not None and bias.requires_grad
        needs += (weight.requires_grad, trains_bias, lora_A.requires_grad, lora_B.requires_grad)
    needs_x = x.requires_grad
    if torch.is_grad_enabled() and (needs_x or True in needs):
        options = scalings, ranks, p, shared_dropout, high, projections[0][1].dtype, backend, needs_x, needs
        apply = LoRALinearFunction.apply if is_dynamo_compiling() else _apply_eagerly
        return apply(options, seed, x, *flat)
    keep_nothing = [False] * len(projections)
    return tuple(_forward_op(x, flat, scalings, seed, p, shared_dropout, keep_nothing, False, high, backend))


def _autocast(x: torch.Tensor, projections: tuple[Projection, ...]) -> tuple[torch.Tensor, tuple[Projection, ...]]:
    """What `F.linear` does under autocast, except that float32 adapters stay as they are: kernels cast them."""

    def cast(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return autocast(tensor, x.device.type)

    def cast_adapter(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.dtype == torch.float32 else cast(tensor)

    return cast(x), tuple(
        Projection(cast(weight), cast_adapter(lora_A), cast_adapter(lora_B), scaling, cast(bias))
        for weight, lora_A, lora_B, scaling, bias in projections
    )


#: What one application of the op is given beside tensors: scalings, ranks, dropout_p, shared_dropout, high_precision,
#: the adapters' dtype, backend, needs_x and needs, which holds four answers a projection (weight, bias, lora_A, lora_B)
#: and is read outside of the Function, whose `needs_input_grad` ignores grad mode. Plain, as above.
Options = tuple[list[float], list[int], float, bool, bool, torch.dtype, str, bool, list[bool]]


class LoRALinearFunction(torch.autograd.Function):
    """`apply(options, seed, x, *tensors)`, five tensors a projection (weight, bias, lora_A, lora_B and a scaling
    that is a tensor, or None), returns one y a projection."""

    @staticmethod
    def forward(ctx, options, seed, x, *flat):
        outputs = _call_forward(options, seed, x, flat)
        count = len(options[0])
        _save_for_backward(ctx, options, x, flat, outputs[count:])
        return tuple(outputs[:count])

    @staticmethod
    def backward(ctx, *grad_ys):
        return _call_backward(ctx, *grad_ys)


# What `LoRALinearFunction.apply` calls in the end. The Python around it asks of every argument whether it escaped from
# a torch.func transform, which costs the host as much as a product; no transform is active where this is called.
_apply_eagerly = super(torch.autograd.Function, LoRALinearFunction).apply


def _call_forward(options: Options, seed: torch.Tensor | None, x: torch.Tensor, flat) -> list[torch.Tensor]:
    """The ys; then S if a lora_B trains; then the masks if there is dropout and a gradient needs them."""
    scalings, _, dropout_p, shared_dropout, high_precision, _, backend, needs_x, needs = options
    save_mask = seed is not None and (needs_x or True in needs[2::4])
    return _forward_op(
        x, flat, scalings, seed, dropout_p, shared_dropout, needs[3::4], save_mask, high_precision, backend
    )


def _save_for_backward(ctx, options: Options, x: torch.Tensor, flat, kept) -> None:
    _, _, dropout_p, _, _, _, _, needs_x, needs = options
    needs_A = True in needs[2::4]
    needs_h = needs_x or needs_A
    saved = [
        x if needs_A or True in needs[0::4] else None,
        kept[0] if True in needs[3::4] else None,
        kept[-1] if needs_h and dropout_p > 0.0 else None,
    ]
    for j in range(0, len(flat), 5):
        saved += (flat[j], flat[j + 2]) if needs_x else (None, None)  # weight, lora_A
        saved += flat[j + 3 : j + 5] if needs_h else (None, None)  # lora_B, row_scaling
    ctx.save_for_backward(*saved)
    ctx.set_materialize_grads(False)
    ctx.options = options


@backward_of("lora_linear")
def _call_backward(ctx, *grad_ys: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    scalings, ranks, dropout_p, _, high_precision, adapter_dtype, backend, needs_x, needs = ctx.options
    count = len(grad_ys)
    result: list[torch.Tensor | None] = [None] * (3 + 5 * count)
    used = [j for j, grad_y in enumerate(grad_ys) if grad_y is not None]
    if not used:
        return tuple(result)
    x, s, masks, *flat = ctx.saved_tensors
    if len(used) < count:  # an output that took no part in the loss: its projection gets no gradient, not zeros
        if s is not None:
            columns = iter(s.split([rank for rank, needed in zip(ranks, needs[3::4]) if needed], dim=1))
            pieces = [next(columns) if needed else None for needed in needs[3::4]]
            pieces = [pieces[j] for j in used if pieces[j] is not None]
            s = torch.cat(pieces, dim=1) if pieces else None
        if masks is not None and len(masks) > 1:
            masks = torch.stack([masks[j] for j in used])  # an index from the host could not be captured in a graph
        grad_ys, scalings, ranks = ([values[j] for j in used] for values in (grad_ys, scalings, ranks))
        flat = [tensor for j in used for tensor in flat[4 * j : 4 * j + 4]]
        needs = [needed for j in used for needed in needs[4 * j : 4 * j + 4]]
    grads = iter(
        _backward_op(
            grad_ys, x, s, masks, flat, scalings, ranks, dropout_p, needs_x, needs, adapter_dtype, high_precision,
            backend,
        )
    )  # fmt: skip
    if needs_x:
        result[2] = next(grads)
    for number, j in enumerate(used):
        for position in range(4):  # weight, bias, lora_A, lora_B; a scaling takes no gradient
            if needs[4 * number + position]:
                result[3 + 5 * j + position] = next(grads)
    return tuple(result)


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


def _forward(x, projections, scalings, seed, *rest):
    *options, high_precision, backend = rest
    if backend == "auto":
        features = sum(weight.shape[0] for weight in projections[0::5])
        backend = _fastest(x, features, x.shape[-1], seed is not None, high_precision)
    arguments = x, projections, scalings, seed, *options, high_precision, backend
    if backend == "reference":
        return reference.forward(*arguments)
    with on_device_of(x):
        if backend.startswith("cuda"):
            return cuda.forward(*arguments)
        from . import triton_forward  # needs Triton, which the package does not

        return triton_forward.forward(*arguments)


def _backward(grad_ys, x, s, masks, projections, *rest):
    *options, high_precision, backend = rest
    if backend == "auto":  # what is saved has the same form, whichever ran forward
        features = sum(dy.shape[-1] for dy in grad_ys)
        wide = next((one for one in (x, *projections[0::4], *projections[1::4]) if one is not None), None)
        in_features = features if wide is None else wide.shape[-1]  # for dB alone nothing has them
        backend = _fastest(grad_ys[0], features, in_features, masks is not None, high_precision)
    arguments = grad_ys, x, s, masks, projections, *options, high_precision, backend
    if backend == "reference":
        return reference.backward(*arguments)
    with on_device_of(grad_ys[0]):
        if backend.startswith("cuda"):
            return cuda.backward(*arguments)
        from . import triton_backward

        return triton_backward.backward(*arguments)


def _fastest(rows: torch.Tensor, features: int, in_features: int, dropping: bool, high_precision: bool) -> str:
    """Of "reference", "triton" and "cuda", by sizes (`configs.gpu_backend`)."""
    M, device = math.prod(rows.shape[:-1]), rows.device
    arch, table = architecture(device), configs.tuned(device)
    chosen = configs.gpu_backend(M, features, in_features, rows.dtype, arch, table, dropping)
    takes_cuda = backends.takes("lora_linear", "cuda", device.type, rows.dtype, "high" if high_precision else "default")
    return "triton" if chosen == "cuda" and not takes_cuda else chosen


_forward_op = register("lora_linear_forward", _forward, composition.forward_flops)
_backward_op = register("lora_linear_backward", _backward, composition.backward_flops)


@torch.library.register_fake("peft_kernels::lora_linear_forward", lib=LIBRARY)
def _(x, projections, scalings, seed, dropout_p, shared_dropout, save_s, save_mask, high_precision, backend):
    rows = math.prod(x.shape[:-1])
    ys = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in projections[0::5]]
    kept = []
    if any(save_s):
        rank = sum(lora_A.shape[0] for lora_A, kept_s in zip(projections[2::5], save_s) if kept_s)
        kept.append(x.new_empty(rows, rank, dtype=torch.float32 if high_precision else None))
    if save_mask and seed is not None:
        num_masks = 1 if shared_dropout else len(scalings)
        kept.append(x.new_empty(num_masks, rows, dropout.mask_bytes(x.shape[-1]), dtype=torch.uint8))
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
