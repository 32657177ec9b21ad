"""The public ops `lora_linear` and `lora_linear_shared_input`: the functions, and the declaration of what both call."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ... import backends
from ..core import dropout
from ..core.machine import architecture
from ..core.op import OpFunction, register
from ..core.tensors import autocast, autocasts, by_field
from ..core.transforms import compose, is_transformed, over_values
from . import composition, configs
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
    projection = weight, lora_A, lora_B, scaling, bias  # plain: a `Projection` costs the CPU more than a check
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
    if autocasts(x):
        x, projections = _autocast(x, projections)
    if is_transformed():
        p = dropout_p if training else 0.0
        return compose(op, functools.partial(check, op), composition.forward, x, projections, p, adapter_precision,
                       shared_dropout)  # fmt: skip
    check(op, x, projections, dropout_p, adapter_precision)
    high = adapter_precision == "high" and projections[0][1].dtype != x.dtype
    backend = backends.choose(op, x, "high" if high else "default")
    p = dropout_p if training else 0.0
    seed = dropout.draw_seed(x.device) if p > 0.0 else None

    weights, lora_As, lora_Bs, scalings, biases = zip(*projections)
    row_scalings = (None,) * len(weights)
    for scaling in scalings:
        if type(scaling) is not float:
            scalings, row_scalings = _split(scalings, x)
            break
    if torch.is_grad_enabled():
        trained = x, *weights, *biases, *lora_As, *lora_Bs
        needs = [tensor is not None and tensor.requires_grad for tensor in trained]
        if True in needs:
            ranks = [lora_A.shape[0] for lora_A in lora_As]
            options = scalings, ranks, p, shared_dropout, high, lora_As[0].dtype, backend, needs
            return LoRALinearFunction.call(options, *trained, *row_scalings, seed)
    ys = _forward(x, weights, biases, lora_As, lora_Bs, row_scalings, scalings, seed, p, shared_dropout,
                  [False] * len(weights), False, high, backend)  # fmt: skip
    return tuple(ys)


def _split(scalings: tuple[float | torch.Tensor, ...], x: torch.Tensor) -> tuple[list, list]:
    """The scalings as floats, 1.0 for those that are tensors; and those, one value a row of x or none, with None for
    the others."""
    numbers, tensors = [], []
    for scaling in scalings:
        is_number = isinstance(scaling, (float, int))
        numbers.append(float(scaling) if is_number else 1.0)
        tensors.append(None if is_number else scaling.expand(x.shape[:-1]) if scaling.dim() else scaling)
    return numbers, tensors


def _autocast(x: torch.Tensor, projections: tuple[Projection, ...]) -> tuple[torch.Tensor, tuple[Projection, ...]]:
    """Cast as `F.linear` does under autocast, except that float32 adapters stay as they are: kernels cast them."""

    def cast(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return autocast(tensor, x.device.type)

    def cast_adapter(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.dtype == torch.float32 else cast(tensor)

    return cast(x), tuple(
        Projection(cast(weight), cast_adapter(lora_A), cast_adapter(lora_B), scaling, cast(bias))
        for weight, lora_A, lora_B, scaling, bias in projections
    )


#: What one call is given beside tensors: scalings (a float a projection, 1.0 beside a tensor), ranks, dropout_p,
#: shared_dropout, high_precision, the adapters' dtype, the backend, and needs (of x, the weights, the biases, the
#: lora_As, the lora_Bs). A NamedTuple would cost the CPU half a microsecond a call.
Options = tuple[Sequence[float], list[int], float, bool, bool, torch.dtype, str, list[bool]]


class LoRALinearFunction(OpFunction):
    """`apply(options, x, *weights, *biases, *lora_As, *lora_Bs, *row_scalings, seed)` returns one y a projection. A
    scaling that is a tensor is among the row_scalings, where None stands for one that is a float."""

    op = "lora_linear"

    @staticmethod
    def run(options, x, *tensors):
        """Saves S where a lora_B trains, the masks where there is dropout and dx or dA needs them."""
        scalings, _, dropout_p, shared_dropout, high_precision, _, backend, needs = options
        num, seed, needs_x = len(scalings), tensors[-1], needs[0]
        weights, biases, lora_As, lora_Bs, row_scalings = by_field(tensors, num, 5)
        needs_A, needs_B = needs[1 + 2 * num : 1 + 3 * num], needs[1 + 3 * num :]
        needs_h = needs_x or True in needs_A
        save_mask = needs_h and seed is not None
        found = _forward(x, weights, biases, lora_As, lora_Bs, row_scalings, scalings, seed, dropout_p, shared_dropout,
                         needs_B, save_mask, high_precision, backend)  # fmt: skip
        nothing = (None,) * num
        saved = [
            x if True in needs_A or True in needs[1 : 1 + num] else None,
            found[num] if True in needs_B else None,
            found[-1] if save_mask else None,
        ]
        saved += weights if needs_x else nothing
        saved += lora_As if needs_x else nothing
        saved += lora_Bs if needs_h else nothing
        saved += row_scalings if needs_h else nothing
        return tuple(found[:num]), saved

    @staticmethod
    def gradients(options, saved, *dys):
        scalings, ranks, dropout_p, _, high_precision, adapter_dtype, backend, needs = options
        for dy in dys:
            if dy is None:
                return _gradients_of_some(options, saved, dys)
        x, s, masks, *fields = saved
        return _backward(
            dys, x, s, masks, *by_field(fields, len(dys), 4), scalings, ranks, dropout_p, needs, adapter_dtype,
            high_precision, backend,
        )  # fmt: skip


def _gradients_of_some(options: Options, saved, dys: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
    """An output took no part in the loss: its projection gets no gradient, not zeros."""
    scalings, ranks, dropout_p, _, high_precision, adapter_dtype, backend, needs = options
    x, s, masks, *fields = saved
    num, used = len(dys), [j for j, dy in enumerate(dys) if dy is not None]
    needs_x, each = needs[0], by_field(needs[1:], num, 4)
    if s is not None:
        s = _columns_of(s, ranks, each[-1], used)
    if masks is not None and len(masks) > 1:
        masks = torch.stack([masks[j] for j in used])  # an index from the CPU could not be captured in a graph
    of_used = [[one[j] for j in used] for one in (dys, *by_field(fields, num, 4), scalings, ranks, *each)]
    dys, *fields, scalings, ranks = of_used[:-4]
    needs = [needs_x, *itertools.chain(*of_used[-4:])]
    found = iter(
        _backward(dys, x, s, masks, *fields, scalings, ranks, dropout_p, needs, adapter_dtype, high_precision, backend)
    )
    grad_x = [next(found)] if needs_x else []
    return [*grad_x, *(next(found) if j in used else None for one in each for j, needed in enumerate(one) if needed)]


def _columns_of(s: torch.Tensor, ranks: list[int], kept: list[bool], used: list[int]) -> torch.Tensor | None:
    """S of those used projections of which there are columns."""
    columns = iter(s.split([rank for rank, needed in zip(ranks, kept) if needed], dim=1))
    pieces = [next(columns) if needed else None for needed in kept]
    pieces = [pieces[j] for j in used if pieces[j] is not None]
    return torch.cat(pieces, dim=1) if pieces else None


def _forward_by_sizes(x, weights, biases, lora_As, lora_Bs, row_scalings, scalings, seed, *options) -> str:
    features, high_precision = sum([weight.shape[0] for weight in weights]), options[-2]
    return _fastest(x, features, x.shape[-1], seed is not None, high_precision)


def _backward_by_sizes(dys, x, s, masks, weights, lora_As, *rest) -> str:
    """The saved tensors have the same form, whichever backend ran forward."""
    features = sum([dy.shape[-1] for dy in dys])
    with_columns = next((one for one in (x, *weights, *lora_As) if one is not None), None)
    in_features = features if with_columns is None else with_columns.shape[-1]  # for dB alone nothing has them
    return _fastest(dys[0], features, in_features, masks is not None, rest[-2])


def _fastest(rows: torch.Tensor, features: int, in_features: int, dropping: bool, high_precision: bool) -> str:
    """One of "reference", "triton" and "cuda", by sizes (`configs.gpu_backend`)."""
    M, device = math.prod(rows.shape[:-1]), rows.device
    arch, table = architecture(device), configs.tuned(device)
    chosen = configs.gpu_backend(M, features, in_features, rows.dtype, arch, table, dropping)
    takes_cuda = backends.takes("lora_linear", "cuda", device.type, rows.dtype, "high" if high_precision else "default")
    return "triton" if chosen == "cuda" and not takes_cuda else chosen


def _fake_forward(x, weights, biases, lora_As, lora_Bs, row_scalings, scalings, seed, dropout_p, shared_dropout,
                  save_s, save_mask, high_precision, backend):  # fmt: skip
    rows = math.prod(x.shape[:-1])
    ys = [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights]
    kept = []
    if any(save_s):
        rank = sum(lora_A.shape[0] for lora_A, needed in zip(lora_As, save_s) if needed)
        kept.append(x.new_empty(rows, rank, dtype=torch.float32 if high_precision else None))
    if save_mask and seed is not None:
        num_masks = 1 if shared_dropout else len(scalings)
        kept.append(x.new_empty(num_masks, rows, dropout.mask_bytes(x.shape[-1]), dtype=torch.uint8))
    return ys + kept


def _fake_backward(dys, x, s, masks, weights, lora_As, lora_Bs, row_scalings, scalings, ranks, dropout_p, needs,
                   adapter_dtype, high_precision, backend):  # fmt: skip
    needs_weight, needs_bias, needs_A, needs_B = by_field(needs[1:], len(dys), 4)
    dy, features = dys[0], [dy.shape[-1] for dy in dys]
    K = next((one.shape[-1] for one in (x, *weights) if one is not None), 0)
    grads = [dy.new_empty(*dy.shape[:-1], K)] if needs[0] else []
    grads += [dy.new_empty(N, K) for N, needed in zip(features, needs_weight) if needed]
    grads += [dy.new_empty(N) for N, needed in zip(features, needs_bias) if needed]
    grads += [dy.new_empty(R, K, dtype=adapter_dtype) for R, needed in zip(ranks, needs_A) if needed]
    grads += [dy.new_empty(N, R, dtype=adapter_dtype) for N, R, needed in zip(features, ranks, needs_B) if needed]
    return grads


_forward = register(
    __package__,
    "lora_linear_forward(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_As, Tensor[] lora_Bs, "
    "Tensor?[] row_scalings, float[] scalings, Tensor? seed, float dropout_p, bool shared_dropout, bool[] save_s, "
    "bool save_mask, bool high_precision, str backend) -> Tensor[]",
    fake=_fake_forward,
    flops=composition.forward_flops,
    by_sizes=_forward_by_sizes,
)
# Returns the gradients that are needed, in the order of `needs`. A tensor is None where none of them reads it.
_backward = register(
    __package__,
    "lora_linear_backward(Tensor[] dys, Tensor? x, Tensor? s, Tensor? masks, Tensor?[] weights, Tensor?[] lora_As, "
    "Tensor?[] lora_Bs, Tensor?[] row_scalings, float[] scalings, SymInt[] ranks, float dropout_p, bool[] needs, "
    "ScalarType adapter_dtype, bool high_precision, str backend) -> Tensor[]",
    fake=_fake_backward,
    flops=composition.backward_flops,
    by_sizes=_backward_by_sizes,
)
