"""The torch.library that every room registers its ops in, and what their implementations share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled, _len_torch_dispatch_stack
from torch.compiler import is_dynamo_compiling

LIBRARY = torch.library.Library("peft_kernels", "DEF")


def register(name: str, implementation: Callable) -> Callable:
    """Register the implementation of an op that is defined, for every backend key, and return what the autograd
    Function calls: the implementation itself in eager mode, and the registered op wherever somebody is watching
    (torch.compile, export, fake and meta tensors, any dispatch mode, torch.func, whose wrapped tensors not all of torch
    takes).

    The dispatcher boxes each of the op's arguments to pass it from Python through C++ to Python: about 10 µs a
    call on one core, more than the host spends on the three products of a small layer.
    """

    def run(*args):
        # Autocast is applied outside of the ops: inside, it would change the dtypes that the fakes promise.
        if _is_any_autocast_enabled():
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                return implementation(*args)
        return implementation(*args)

    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    op = getattr(torch.ops.peft_kernels, name).default

    def call(*args):
        if (
            is_dynamo_compiling()  # what else compiles, an export that is not strict, has modes on the stack
            or _len_torch_dispatch_stack()
            or _are_functorch_transforms_active()
            or (isinstance(args[0], torch.Tensor) and args[0].is_meta)
        ):
            return op(*args)
        # Asked here too: `run` in between would cost the host a call.
        return (run if _is_any_autocast_enabled() else implementation)(*args)

    return call


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, wherever its arguments are."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()
