"""The torch.library that every op package registers its ops in, and what their implementations share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled, _len_torch_dispatch_stack
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import register_flop_formula

LIBRARY = torch.library.Library("peft_kernels", "DEF")


def register(name: str, implementation: Callable, flops: Callable[..., int] | None = None) -> Callable:
    """Register the implementation of an op that is defined, for every backend key, and return what the autograd
    Function calls: the implementation itself in eager mode, and the registered op wherever somebody is watching
    (torch.compile, export, fake and meta tensors, any dispatch mode, a backward under vmap).

    The dispatcher boxes each of the op's arguments to pass it from Python through C++ to Python: about 10 µs a
    call on one core, more than the host spends on the three products of a small layer.

    Args:
        flops: of the op's arguments, shapes in place of tensors, and `out_shape`: what `FlopCounterMode` counts. The
            products of the op's definition, whatever a backend computes to get them.
    """

    def run(*args):
        return without_autocast(implementation, *args)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    packet = getattr(torch.ops.peft_kernels, name)
    op = packet.default
    if flops is not None:
        register_flop_formula(packet)(flops)

    def call(*args):
        if (
            is_dynamo_compiling()  # what else compiles, an export that is not strict, has modes on the stack
            or _len_torch_dispatch_stack()
            or (isinstance(args[0], torch.Tensor) and args[0].is_meta)
        ):
            return op(*args)
        if _are_functorch_transforms_active():
            return OneByOne.apply(op, *args)
        # Asked here too: `run` in between would cost the host a call.
        return (run if _is_any_autocast_enabled() else implementation)(*args)

    return call


def without_autocast(function: Callable, *args):
    """`function(*args)`. Autocast is applied outside of the ops: inside, it would change the dtypes that the fakes
    promise."""
    if _is_any_autocast_enabled():
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args)
    return function(*args)


class OneByOne(torch.autograd.Function):
    """`apply(op, *args)` of a registered op that writes to nothing: under vmap once for each example, by its own
    kernels. For backwards and masks; a forward under vmap is a composition."""

    @staticmethod
    def forward(op, *args):
        result = op(*args)
        return tuple(result) if isinstance(result, list) else result

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple, op: Callable, *args: Any) -> tuple[Any, Any]:
        (flat, spec), (dims, _) = tree_flatten(args), tree_flatten(in_dims[1:])
        if not info.batch_size:
            raise ValueError(f"{op}: expected at least one example under vmap, got none")
        batched = [(i, flat[i].unbind(dim)) for i, dim in enumerate(dims) if dim is not None]
        results = []
        for number in range(info.batch_size):
            for i, examples in batched:
                flat[i] = examples[number]
            results.append(OneByOne.apply(op, *tree_unflatten(flat, spec)))
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(each) for each in zip(*results)), 0


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, wherever its arguments are."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()
