"""Where torch asks more of an op than a forward and one backward: how every op answers.

Under `torch.func`, in forward mode and under `torch.jit.trace` an op runs as a composition of torch's own operations
(`composition.py` of its package), which torch differentiates, batches and traces as often as it is asked to. A nested
tensor goes through an op by its values.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
from torch._C import (
    _are_functorch_transforms_active,
    _get_tracing_state,
    _is_any_autocast_enabled,
    _set_tracing_state,
)
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from ... import backends


def is_transformed() -> bool:
    """Whether an op called now has to be a composition: a `torch.func` transform is active, or a level of forward mode,
    or `torch.jit.trace`."""
    # Asked at every call. Dynamo traces each of them; `torch.jit.is_tracing` costs the CPU as much again as all three.
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0 or _get_tracing_state() is not None


def compose(op: str, check: Callable[..., None], composition: Callable, *args):
    """`composition(*args)` with autocast off, as its operands are cast already, after `check(*args)`.

    Raises:
        RuntimeError: a backend is forced that has no kernels for this.
    """
    backends.refuse_forced(op, "torch.func, forward mode and torch.jit.trace")
    with untraced():
        check(*args)
    return without_autocast(composition, *args)


def without_autocast(function: Callable, *args):
    """`function(*args)`. Autocast is applied outside of the ops: inside, it would change the dtypes that the fakes
    promise."""
    if _is_any_autocast_enabled():
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args)
    return function(*args)


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Keep what is done inside out of the graph that `torch.jit.trace` records; sizes are plain numbers there."""
    state = _get_tracing_state()
    if state is None:
        yield
        return
    _set_tracing_state(None)
    try:
        yield
    finally:
        _set_tracing_state(state)


def backward_of(op: str) -> Callable[[Callable], Callable]:
    """Decorates the backward `(ctx, *grads)` of an op, whose forward was not a composition. It can be differentiated
    once: a second derivative is refused when it is asked for. Under `is_grads_batched` (torch's older vmap, which knows
    nothing of Functions) it runs once for each example.

    Raises, from the backward:
        RuntimeError: a gradient that comes in carries a tangent, which would be lost.
    """

    def decorate(backward: Callable) -> Callable:
        @functools.wraps(backward)
        def call(ctx, *grads):
            if is_dynamo_compiling():
                return backward(ctx, *grads)
            if forward_ad._current_level >= 0:
                _refuse_tangents(op, grads)
            run = backward
            for grad in grads:
                if grad is not None and is_legacy_batchedtensor(grad):
                    run = functools.partial(_one_by_one, backward)
                    break
            if not torch.is_grad_enabled():
                return run(ctx, *grads)
            with torch.no_grad():  # create_graph=True
                results = run(ctx, *grads)
            found = [result for result in results if result is not None]
            kept = iter(Once.apply(op, len(found), *found, *grads, *ctx.saved_tensors))
            return tuple(None if result is None else next(kept) for result in results)

        return call

    return decorate


class Once(torch.autograd.Function):
    """`apply(op, count, *tensors)`: the first `count` of the tensors, which must not be differentiated by any of the
    others. torch's own `once_differentiable` is not connected to these, so that `torch.autograd.functional.jvp` and
    `hvp`, which ask for a derivative by them, get zeros and no error."""

    @staticmethod
    def forward(ctx, op: str, count: int, *tensors: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        ctx.op = op
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(f"{ctx.op}: expected a first derivative, got asked to differentiate twice")


def _refuse_tangents(op: str, grads: tuple[torch.Tensor | None, ...]) -> None:
    dual = (grad is not None and forward_ad.unpack_dual(grad).tangent is not None for grad in grads)
    if _are_functorch_transforms_active() or any(dual):
        raise RuntimeError(
            f"{op}: expected a forward inside of the dual level or torch.func.jvp that its backward is differentiated "
            f"in, got one outside of it"
        )


def _one_by_one(backward: Callable, ctx, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    batched = [grad is not None and is_legacy_batchedtensor(grad) for grad in grads]
    whole = [torch._remove_batch_dim(grad, level, 1, 0) for grad, found in zip(grads, batched) if found]
    results = []
    for examples in zip(*(grad.unbind() for grad in whole), strict=True):
        each = iter(examples)
        results.append(backward(ctx, *(next(each) if found else grad for grad, found in zip(grads, batched))))
    return tuple(
        None if column[0] is None else torch._add_batch_dim(torch.stack(column), 0, level) for column in zip(*results)
    )


def straight_through(value: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """The numbers of `value`, and the derivatives of value + slope, of any order and in either mode; of one shape and
    dtype. A traced graph is to hold torch's operations alone: by it infinite slopes have no derivative."""
    if _get_tracing_state() is None:
        return StraightThrough.apply(value, slope)
    return value + (slope - slope.detach()).nan_to_num(0.0)


class StraightThrough(torch.autograd.Function):
    """`apply(value, slope)` for `straight_through`."""

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
