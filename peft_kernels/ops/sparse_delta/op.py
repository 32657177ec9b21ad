"""The public ops `sparse_delta_linear` and `with_sparse_gradient_`, their autograd, and their registration.

From top to bottom: the public functions; the checks; the autograd Functions; the two ops that these call, registered
with torch.library so that torch.compile and opcheck see them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled
from torch.compiler import is_dynamo_compiling

from ... import backends
from ..core.library import LIBRARY, on_device_of, register
from ..core.messages import describe
from ..core.tensors import autocast, flatten, unflatten
from ..core.transforms import backward_of, compose, is_transformed, over_values
from . import composition, cpu, cuda, reference
from .layout import SparseLayout


def sparse_delta_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    values: torch.Tensor,
    layout: SparseLayout,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = x·(W + Δ)ᵀ + bias, where Δ is zero outside of `layout` (Ansell et al., "Composable Sparse Fine-Tuning for
    Cross-Lingual Transfer", 2022, §3; Bhardwaj et al., "Sparse High Rank Adapters", 2024, §3).

    Args:
        x: [..., K], float32, bfloat16, float16 (or float64, by the reference backend).
        weight: [N, K] in x's dtype, any strides; without Δ, and never written to.
        values: [nnz], Δ in the order of `layout.indices()`, in x's dtype, or float32 beside a 16-bit x.
        layout: positions in a weight [N, K].
        bias: [N] in x's dtype.

    Returns:
        [..., N] in x's dtype; under autocast in autocast's, as `F.linear`.

    Gradients flow to x, weight, values and bias, each in its own dtype; what is not needed is neither computed nor
    saved. Saved for backward: x where weight or values train (of a layout of columns only x[:, columns], where the
    weight does not); weight and values by reference where x takes a gradient. Forward and backward are deterministic.
    Differentiable once;
    under `torch.func` and in forward mode any number of times, by torch's own operations. A nested x gives a nested y.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, in one line.
        RuntimeError: if the backend asked for cannot run here.
    """
    if x.is_nested:
        return over_values(
            "sparse_delta_linear", lambda rows: sparse_delta_linear(rows, weight, values, layout, bias), x
        )
    if _is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type):
        x, weight, bias = (autocast(tensor, x.device.type) for tensor in (x, weight, bias))
    if is_transformed():
        given = x, weight, values, bias, layout
        return compose("sparse_delta_linear", lambda: _check_linear(*given), composition.forward, *given)
    _check_linear(x, weight, values, bias, layout)
    backend = backends.choose("sparse_delta_linear", x, layout.kind)
    tensors = (x, weight, values, bias)
    needs = [tensor is not None and tensor.requires_grad for tensor in tensors]
    if torch.is_grad_enabled() and True in needs:
        options = Options(layout, backend, needs)
        apply = SparseDeltaLinearFunction.apply if is_dynamo_compiling() else _apply_eagerly
        return apply(options, *tensors)
    return _forward_op(x, weight, values, bias, *_flat(layout), backend)


def with_sparse_gradient_(y: torch.Tensor, x: torch.Tensor, values: torch.Tensor, layout: SparseLayout) -> torch.Tensor:
    """y, its numbers untouched; in backward, `values` receive dyᵀ·x at the positions of `layout`.

    For y = x·Wᵀ + … where W holds Δ already: forward and dx are those of the bare product, whichever made y
    (`F.linear`, `lora_linear`), and only the gradient of the values is added to it, without the dense dW.

    Args:
        y: [..., N], becomes part of the graph of `values`, as by an operation in place. No view, best: of one torch
            copies the gradient. Nested tensors are refused: give it what is made of their values.
        x: [..., K], of which y was made, in y's dtype.
        values, layout: as in :func:`sparse_delta_linear`; the values take part by their gradient only.

    Returns:
        y itself; under `torch.func` a new tensor, since what a transform did not make cannot be written to.

    Saved for backward: x, of a layout of columns only x[:, columns]. The gradient comes in values' dtype.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, in one line.
        RuntimeError: if the backend asked for cannot run here.
    """
    if is_transformed():
        given = y, x, values, layout
        result = compose("with_sparse_gradient_", lambda: _check_gradient(*given), composition.with_gradient, *given)
        return result if _are_functorch_transforms_active() else y.copy_(result)
    _check_gradient(y, x, values, layout)
    if not (torch.is_grad_enabled() and values.requires_grad):
        return y
    options = Options(layout, backends.choose("sparse_delta_linear", x, layout.kind), [False, False, True, False])
    apply = SparseGradientFunction.apply if is_dynamo_compiling() else _attach_eagerly
    return apply(options, y, x, values)


def write_delta(weight: torch.Tensor, base: torch.Tensor, values: torch.Tensor, layout: SparseLayout) -> None:
    """Writes base + values, added in the wider dtype and rounded once, to the layout's positions of `weight` [N, K].

    Args:
        base: [nnz], what the weight held there before Δ. values: [nnz], Δ.
    """
    backend = backends.choose("sparse_delta_linear", weight, layout.kind)
    _write_op(weight, base, values, *_flat(layout), backend)


def _check_linear(
    x: torch.Tensor, weight: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None, layout: SparseLayout
) -> None:
    _check("sparse_delta_linear", x, values, layout)
    if weight.shape != layout.shape or weight.dtype != x.dtype or weight.device != x.device:
        expected = f"weight {list(layout.shape)}, as the layout's, in x's dtype {x.dtype} on {x.device}"
        raise ValueError(f"sparse_delta_linear: expected {expected}, got {describe(weight)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype or bias.device != x.device):
        expected = f"bias [{layout.shape[0]}] in x's dtype {x.dtype} on {x.device}"
        raise ValueError(f"sparse_delta_linear: expected {expected}, got {describe(bias)}")


def _check_gradient(y: torch.Tensor, x: torch.Tensor, values: torch.Tensor, layout: SparseLayout) -> None:
    if x.is_nested or y.is_nested:  # torch cannot write to what is nested
        raise ValueError("with_sparse_gradient_: expected a y made of x.values(), got nested tensors")
    _check("with_sparse_gradient_", x, values, layout)
    if y.shape != (*x.shape[:-1], layout.shape[0]) or y.dtype != x.dtype or y.device != x.device:
        expected = f"y {[*x.shape[:-1], layout.shape[0]]} in x's dtype {x.dtype} on {x.device}"
        raise ValueError(f"with_sparse_gradient_: expected {expected}, got {describe(y)}")


def _check(op: str, x: torch.Tensor, values: torch.Tensor, layout: SparseLayout) -> None:
    if not isinstance(layout, SparseLayout):
        raise ValueError(f"{op}: expected a SparseLayout, got {type(layout).__name__}")
    if x.dim() == 0 or not x.is_floating_point() or x.shape[-1] != layout.shape[1]:
        raise ValueError(f"{op}: expected a floating-point x [..., {layout.shape[1]}], got {describe(x)}")
    fits = values.dtype == x.dtype or (values.dtype == torch.float32 and x.dtype.itemsize == 2)
    if values.shape != (layout.nnz,) or not fits:
        dtypes = f"x's dtype {x.dtype}" + " or float32" * (x.dtype.itemsize == 2)
        raise ValueError(f"{op}: expected values [{layout.nnz}] in {dtypes}, got {describe(values)}")
    if values.device != x.device or layout.device != x.device:
        raise ValueError(
            f"{op}: expected values and layout on x's device {x.device}, got {values.device} and {layout.device}"
        )


class Options(NamedTuple):
    """What one application is given beside tensors. `needs`: of x, weight, values, bias; read outside of the Function,
    whose `needs_input_grad` ignores grad mode."""

    layout: SparseLayout
    backend: str
    needs: list[bool]


class SparseDeltaLinearFunction(torch.autograd.Function):
    """`apply(options, x, weight, values, bias)` returns y."""

    @staticmethod
    def forward(ctx, options, x, weight, values, bias):
        _save_for_backward(ctx, options, x, weight, values)
        return _forward_op(x, weight, values, bias, *_flat(options.layout), options.backend)

    @staticmethod
    def backward(ctx, dy):
        return _backward(ctx, dy)


class SparseGradientFunction(torch.autograd.Function):
    """`apply(options, y, x, values)` returns y. A view of y instead could not be written to by what follows."""

    @staticmethod
    def forward(ctx, options, y, x, values):
        ctx.mark_dirty(y)
        _save_for_backward(ctx, options, x, None, values)
        return y

    @staticmethod
    def backward(ctx, dy):
        *_, grad_values, _ = _backward(ctx, dy)
        return None, dy, None, grad_values


# What `apply` calls in the end. The Python around it asks of every argument whether it escaped from a torch.func
# transform, a cost for the host; no transform is active where these are called.
_apply_eagerly = super(torch.autograd.Function, SparseDeltaLinearFunction).apply
_attach_eagerly = super(torch.autograd.Function, SparseGradientFunction).apply


def _save_for_backward(ctx, options: Options, x, weight, values) -> None:
    needs_x, needs_weight, needs_values, _ = options.needs
    kept = x if needs_weight or needs_values else None
    if kept is not None and not needs_weight and options.layout.kind == "columns":
        kept = reference.gather_columns(flatten(x), options.layout)
    ctx.save_for_backward(kept, weight if needs_x else None, values if needs_x else None)
    ctx.options = options
    ctx.values_dtype = values.dtype
    ctx.shape = x.shape


@backward_of("sparse_delta_linear")
def _backward(ctx, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    layout, backend, needs = ctx.options
    x, weight, values = ctx.saved_tensors
    x, rows = x if x is None else flatten(x), flatten(dy)
    grads = iter(_backward_op(rows, x, weight, values, *_flat(layout), layout.shape, needs, ctx.values_dtype, backend))
    result = [next(grads) if needed else None for needed in needs]
    if needs[0]:
        result[0] = result[0].view(ctx.shape)
    return (None, *result)


# A layout goes through the dispatcher as its tensors, its kind and its tile. `needs`: of x, weight, values and bias.
LIBRARY.define(
    "sparse_delta_linear_forward(Tensor x, Tensor weight, Tensor values, Tensor? bias, Tensor[] layout, str kind, "
    "int[] tile, str backend) -> Tensor"
)
LIBRARY.define(
    "sparse_delta_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? values, Tensor[] layout, str kind, "
    "int[] tile, SymInt[] shape, bool[] needs, ScalarType values_dtype, str backend) -> Tensor[]"
)
LIBRARY.define(
    "sparse_delta_write(Tensor(a!) weight, Tensor base, Tensor values, Tensor[] layout, str kind, int[] tile, "
    "str backend) -> ()"
)


def _flat(layout: SparseLayout) -> tuple[list[torch.Tensor], str, tuple[int, ...]]:
    return list(layout.tensors.values()), layout.kind, layout.tile


#: The backends that need no Triton.
_MODULES = {"reference": reference, "cpu": cpu, "cuda": cuda}


def _forward(x, weight, values, bias, layout, kind, tile, backend):
    layout = SparseLayout.of_tensors(kind, tuple(weight.shape), layout, tuple(tile))
    if backend == "triton":
        from . import triton_forward as module  # needs Triton, which the package does not
    else:
        module = _MODULES[backend]
    with on_device_of(x):
        return unflatten(module.forward(flatten(x), weight, values, bias, layout), x)


def _backward_of(dy, x, weight, values, layout, kind, tile, shape, needs, values_dtype, backend):
    layout = SparseLayout.of_tensors(kind, tuple(shape), layout, tuple(tile))
    if backend == "triton":
        from . import triton_backward as module
    else:
        module = _MODULES[backend]
    with on_device_of(dy):
        return module.backward(dy, x, weight, values, layout, needs, values_dtype)


def _write(weight, base, values, layout, kind, tile, backend):
    layout = SparseLayout.of_tensors(kind, tuple(weight.shape), layout, tuple(tile))
    if backend == "triton":
        from . import triton_write

        with on_device_of(weight):
            triton_write.write(weight, base, values, layout)
    elif backend == "cpu":
        cpu.write(weight, base, values, layout)
    else:
        layout.put_(weight, base + values)


_forward_op = register("sparse_delta_linear_forward", _forward, composition.forward_flops)
_backward_op = register("sparse_delta_linear_backward", _backward_of, composition.backward_flops)
_write_op = register("sparse_delta_write", _write)


@torch.library.register_fake("peft_kernels::sparse_delta_linear_forward", lib=LIBRARY)
def _(x, weight, values, bias, layout, kind, tile, backend):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("peft_kernels::sparse_delta_linear_backward", lib=LIBRARY)
def _(dy, x, weight, values, layout, kind, tile, shape, needs, values_dtype, backend):
    N, K = shape
    nnz = SparseLayout.of_tensors(kind, (N, K), layout, tuple(tile)).nnz
    empty = (dy.new_empty(dy.shape[0], K), dy.new_empty(N, K), dy.new_empty(nnz, dtype=values_dtype), dy.new_empty(N))
    return [tensor for tensor, needed in zip(empty, needs) if needed]


@torch.library.register_fake("peft_kernels::sparse_delta_write", lib=LIBRARY)
def _(weight, base, values, layout, kind, tile, backend):
    return None
