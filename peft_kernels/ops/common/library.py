"""The torch.library that every room registers its ops in, and what their implementations share."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("peft_kernels", "DEF")


def without_autocast(implementation: Callable) -> Callable:
    """Autocast is applied outside of the ops: inside, it would change the dtypes that the fakes promise."""

    @functools.wraps(implementation)
    def wrapped(*args, **kwargs):
        if not torch._C._is_any_autocast_enabled():
            return implementation(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return implementation(*args, **kwargs)

    return wrapped


def eager_or_traced(implementation: Callable, op: torch._ops.OpOverload) -> Callable:
    """Call the implementation as it is in eager mode, and the registered op wherever somebody is watching
    (torch.compile, export, fake tensors, any dispatch mode).

    The dispatcher boxes each of the op's arguments to pass it from Python through C++ to Python: about 10 µs a
    call on one core, more than the host spends on the three products of a small layer.
    """

    def call(*args):
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return op(*args)
        return implementation(*args)

    return call
