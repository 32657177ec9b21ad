"""Holds the choice of a step in force inside the model's forwards and the backwards through them, and only there.

Everywhere else all adapters require a gradient, as the user set them. So an interruption of any kind leaves a model of
which everything trains: Trainer tells nobody of an interrupt, and torch runs no hook then. And nothing that happens
between a forward and its backward (PEFT lets every adapter require a gradient again whenever a reference pass is over)
changes what the backward, or a forward that it recomputes, finds.
"""

from __future__ import annotations

import contextlib
import copyreg
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .layers import tensors_of


@contextlib.contextmanager
def required(wanted: Sequence[tuple[nn.Parameter, bool]]) -> Iterator[None]:
    """Let each of these parameters require a gradient, or none, inside the block; afterwards it is as it was."""
    changed = []
    try:
        for parameter, requires_grad in wanted:
            if parameter.requires_grad != requires_grad:
                changed.append((parameter, parameter.requires_grad))
                parameter.requires_grad_(requires_grad)
        yield
    finally:
        for parameter, was in changed:
            parameter.requires_grad_(was)


class InBackward:
    """A hook of a forward's outputs that runs every backward through them inside `context()`."""

    def __init__(self, context: Callable[[], contextlib.AbstractContextManager]) -> None:
        self.context = context
        self.under_way = False

    def watch(self, output: Any) -> None:
        for tensor in tensors_of(output):
            if tensor.requires_grad:
                tensor.register_hook(self)

    def __call__(self, gradient: torch.Tensor) -> None:
        if self.under_way:  # through another of the outputs
            return
        ending = _Ending()
        ending.stack.callback(setattr, self, "under_way", False)
        self.under_way = True
        ending.stack.enter_context(self.context())
        torch.autograd.Variable._execution_engine.queue_callback(ending)


class _Ending:
    """A callback that autograd runs when a backward is over. Where backward raised or was interrupted, nothing is
    called, but autograd drops the only reference to this."""

    def __init__(self) -> None:
        self.stack = contextlib.ExitStack()

    def __call__(self) -> None:
        self.stack.close()

    def __del__(self) -> None:
        self.stack.close()


def _new(kind: type, *arguments: Any) -> Any:
    return kind.__new__(kind, *arguments)


class Entrance:
    """Sends every call of `module` through `around`, by a class of the module's own, as FSDP2 does it: hooks do not run
    when a forward is interrupted. A copy of the module, and one that is pickled, has the original class.

    Args:
        module: left as it was by `remove()`.
        around: (call, args, kwargs) → what the call returns.
        owner: to be found by `owners`.
    """

    def __init__(self, module: nn.Module, around: Callable[[Callable, tuple, dict], Any], owner: Any) -> None:
        self.module, self.kind, self._owner = module, type(module), owner
        kind, entrance = self.kind, self

        def __call__(self, *args, **kwargs):
            # A module compiled as a whole is entered from outside; a replica of nn.DataParallel has other parameters.
            if torch.compiler.is_compiling() or entrance._owner is None or getattr(self, "_is_replica", False):
                return kind.__call__(self, *args, **kwargs)
            return around(types.MethodType(kind.__call__, self), args, kwargs)

        def __reduce_ex__(self, protocol):
            function, arguments, *rest = kind.__reduce_ex__(self, protocol)
            if function is copyreg.__newobj__:  # pickle knows it, and insists on the class that the module has now
                function = _new
            return function, tuple(kind if each is entered else each for each in arguments), *rest

        names = {"__call__": __call__, "__reduce_ex__": __reduce_ex__, "_entrance": entrance}
        names |= {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        entered = types.new_class(kind.__name__, (kind,), exec_body=lambda namespace: namespace.update(names))
        self.entered = entered
        object.__setattr__(module, "__class__", entered)  # torch.compile's wrapper passes attributes on

    def remove(self) -> None:
        self._owner = None
        if type(self.module) is self.entered:
            object.__setattr__(self.module, "__class__", self.kind)

    @staticmethod
    def owners(model: nn.Module) -> list[Any]:
        """Return the owners of the entrances into `model` and its parts, each once."""
        found = (getattr(type(module), "_entrance", None) for module in model.modules())
        return list({id(each._owner): each._owner for each in found if each and each._owner is not None}.values())
