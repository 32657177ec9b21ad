"""Where torch asks more of an op than a forward and one backward: how every op answers.

Under `torch.func`, in forward mode and under `torch.jit.trace` an op runs as a composition of torch's own operations
(`composition.py` of its package), which torch differentiates, batches and traces as often as it is asked to. A nested
tensor goes through an op by its values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.jit import is_tracing

from ... import backends
from .library import without_autocast


def is_transformed() -> bool:
    """Whether an op called now has to be a composition: a `torch.func` transform is active, or a level of forward mode,
    or `torch.jit.trace`."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0 or is_tracing()


def compose(op: str, check: Callable[[], None], composition: Callable, *args):
    """`composition(*args)` with autocast off, as its operands are cast already, after `check`.

    Raises:
        RuntimeError: a backend is forced that has no kernels for this.
    """
    backends.refuse_forced(op, "torch.func, forward mode and torch.jit.trace")
    with untraced():
        check()
    return without_autocast(composition, *args)


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """What is done inside is no part of a graph that `torch.jit.trace` records, and sees sizes as plain numbers."""
    state = torch._C._get_tracing_state()
    if state is not None:
        torch._C._set_tracing_state(None)
    try:
        yield
    finally:
        if state is not None:
            torch._C._set_tracing_state(state)


def refuse_tangents(op: str, grads: tuple[torch.Tensor | None, ...]) -> None:
    """Of a backward whose forward did not run as a composition.

    Raises:
        RuntimeError: a gradient that comes in carries a tangent, which the backward would lose.
    """
    if forward_ad._current_level < 0:
        return
    dual = (grad is not None and forward_ad.unpack_dual(grad).tangent is not None for grad in grads)
    if _are_functorch_transforms_active() or any(dual):
        raise RuntimeError(
            f"{op}: expected a forward inside of the dual level or torch.func.jvp that its backward is differentiated "
            f"in, got one outside of it"
        )


class StraightThrough(torch.autograd.Function):
    """`apply(value, slope)`, of one shape and dtype: the numbers of `value`, and the derivatives of value + slope, of
    any order and in either mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grad, grad

    @staticmethod
    def jvp(ctx, value: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        return value + slope


def over_values(op: str, function: Callable, x: torch.Tensor):
    """What `function` makes of the values of a nested tensor x, nested as x is: of tensors [..., K] one, or a tuple of
    them, with the same leading dimensions.

    Raises:
        ValueError: x has no last dimension of one size.
    """
    if x.layout == torch.jagged:
        if x._ragged_idx == x.dim() - 1:
            raise ValueError(f"{op}: expected a nested x whose last dimension has one size, got {list(x.shape)}")
        offsets, lengths, sizes = x.offsets(), x.lengths(), (x._maybe_min_seqlen, x._maybe_max_seqlen)
        values = x.values()

        def nested(y: torch.Tensor) -> torch.Tensor:
            return torch.nested.nested_tensor_from_jagged(y, offsets, lengths, x._ragged_idx, *sizes)
    else:
        parts = x.unbind()
        if len({part.shape[-1] if part.dim() else None for part in parts} - {None}) != 1:
            raise ValueError(f"{op}: expected tensors [..., K] of one K in a nested x, got {len(parts)} others")
        rows = [part.reshape(-1, part.shape[-1]) for part in parts]
        values = torch.cat(rows)

        def nested(y: torch.Tensor) -> torch.Tensor:
            split = y.split([len(row) for row in rows])
            return torch.nested.as_nested_tensor(
                [one.view(*part.shape[:-1], y.shape[-1]) for one, part in zip(split, parts)], layout=torch.strided
            )

    result = function(values)
    return tuple(map(nested, result)) if isinstance(result, tuple) else nested(result)
