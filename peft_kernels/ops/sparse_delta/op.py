"""The public ops `sparse_delta_linear` and `with_sparse_gradient_`: the functions, their checks, their declaration."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch._C import _are_functorch_transforms_active

from ... import backends
from ..core.messages import describe
from ..core.op import OpFunction, kernel, needs_of, on_device_of, register
from ..core.tensors import autocast, autocasts, flatten, unflatten
from ..core.transforms import compose, is_transformed, over_values
from . import composition, reference
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
    if autocasts(x):
        x, weight, bias = (autocast(tensor, x.device.type) for tensor in (x, weight, bias))
    if is_transformed():
        return compose("sparse_delta_linear", _check_linear, composition.forward, x, weight, values, bias, layout)
    _check_linear(x, weight, values, bias, layout)
    backend, needs = backends.choose("sparse_delta_linear", x, layout.kind), needs_of(x, weight, values, bias)
    return SparseDeltaLinearFunction.call(Options(layout, values.dtype, backend, needs), x, weight, values, bias)


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
        result = compose("with_sparse_gradient_", _check_gradient, composition.with_gradient, *given)
        return result if _are_functorch_transforms_active() else y.copy_(result)
    _check_gradient(y, x, values, layout)
    if not (torch.is_grad_enabled() and values.requires_grad):
        return y
    backend, needs = backends.choose("sparse_delta_linear", x, layout.kind), [True, False, True]
    return SparseGradientFunction.call(Options(layout, values.dtype, backend, needs), y, x, values)


def write_delta(weight: torch.Tensor, base: torch.Tensor, values: torch.Tensor, layout: SparseLayout) -> None:
    """Writes base + values, added in the wider dtype and rounded once, to the layout's positions of `weight` [N, K].

    Args:
        base: [nnz], what the weight held there before Δ. values: [nnz], Δ.
    """
    backend = backends.choose("sparse_delta_linear", weight, layout.kind)
    _write(weight, base, values, *_flat(layout), backend)


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
    layout: SparseLayout
    values_dtype: torch.dtype
    backend: str
    needs: list[bool]  #: one answer a tensor


class SparseDeltaLinearFunction(OpFunction):
    """`apply(options, x, weight, values, bias)` returns y."""

    op = "sparse_delta_linear"

    @staticmethod
    def run(options, x, weight, values, bias):
        y = _forward(x, weight, values, bias, *_flat(options.layout), options.backend)
        needs_x, needs_weight, needs_values, _ = options.needs
        rows = None
        if needs_weight:
            rows = x
        elif needs_values:
            rows = _rows_of_values(x, options.layout)
        return y, (rows, weight if needs_x else None, values if needs_x else None)

    @staticmethod
    def gradients(options, saved, dy):
        grads = _gradients(options, dy, *saved, options.needs)
        if not options.needs[0]:
            return grads
        return grads[0].view(*dy.shape[:-1], options.layout.shape[1]), *grads[1:]


class SparseGradientFunction(OpFunction):
    """`apply(options, y, x, values)` returns y. A view of y instead could not be written to by what follows."""

    op = "with_sparse_gradient_"
    in_place = True

    @staticmethod
    def run(options, y, x, values):
        return y, (_rows_of_values(x, options.layout),)

    @staticmethod
    def gradients(options, saved, dy):
        return dy, *_gradients(options, dy, *saved, None, None, [False, False, True, False])


def _rows_of_values(x: torch.Tensor, layout: SparseLayout) -> torch.Tensor:
    """The part of x that the gradient of the values reads."""
    return reference.gather_columns(flatten(x), layout) if layout.kind == "columns" else x


def _gradients(options: Options, dy, x, weight, values, needs: list[bool]) -> list[torch.Tensor]:
    layout = options.layout
    rows = x if x is None else flatten(x)
    return _backward(
        flatten(dy), rows, weight, values, *_flat(layout), layout.shape, needs, options.values_dtype, options.backend
    )


def _flat(layout: SparseLayout) -> tuple[list[torch.Tensor], str, tuple[int, ...]]:
    """A layout as the dispatcher takes it: its tensors, its kind and its tile."""
    return list(layout.tensors.values()), layout.kind, layout.tile


def _run_forward(x, weight, values, bias, layout, kind, tile, backend):
    layout = SparseLayout.of_tensors(kind, tuple(weight.shape), layout, tuple(tile))
    with on_device_of(x):
        return unflatten(kernel(__package__, backend, "forward")(flatten(x), weight, values, bias, layout), x)


def _run_backward(dy, x, weight, values, layout, kind, tile, shape, needs, values_dtype, backend):
    layout = SparseLayout.of_tensors(kind, tuple(shape), layout, tuple(tile))
    with on_device_of(dy):
        return kernel(__package__, backend, "backward")(dy, x, weight, values, layout, needs, values_dtype)


def _run_write(weight, base, values, layout, kind, tile, backend):
    layout = SparseLayout.of_tensors(kind, tuple(weight.shape), layout, tuple(tile))
    with on_device_of(weight):
        kernel(__package__, backend, "write")(weight, base, values, layout)


def _fake_backward(dy, x, weight, values, layout, kind, tile, shape, needs, values_dtype, backend):
    N, K = shape
    nnz = SparseLayout.of_tensors(kind, (N, K), layout, tuple(tile)).nnz
    empty = (dy.new_empty(dy.shape[0], K), dy.new_empty(N, K), dy.new_empty(nnz, dtype=values_dtype), dy.new_empty(N))
    return [tensor for tensor, needed in zip(empty, needs) if needed]


_forward = register(
    __package__,
    "sparse_delta_linear_forward(Tensor x, Tensor weight, Tensor values, Tensor? bias, Tensor[] layout, str kind, "
    "int[] tile, str backend) -> Tensor",
    fake=lambda x, weight, *_: x.new_empty(*x.shape[:-1], weight.shape[0]),
    flops=composition.forward_flops,
    implementation=_run_forward,
)
_backward = register(
    __package__,
    "sparse_delta_linear_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor? values, Tensor[] layout, str kind, "
    "int[] tile, SymInt[] shape, bool[] needs, ScalarType values_dtype, str backend) -> Tensor[]",
    fake=_fake_backward,
    flops=composition.backward_flops,
    implementation=_run_backward,
)
_write = register(
    __package__,
    "sparse_delta_write(Tensor(a!) weight, Tensor base, Tensor values, Tensor[] layout, str kind, int[] tile, "
    "str backend) -> ()",
    fake=lambda *_: None,
    implementation=_run_write,
)
