"""How an op is declared: its kernels by backend, the ops that it registers with torch.library, its autograd Function.

    _forward = register(__package__, "my_op_forward(Tensor x, …, str backend) -> Tensor", fake, flops)
    _backward = register(__package__, "my_op_backward(Tensor dy, …, str backend) -> Tensor[]", fake, flops)

    class MyFunction(OpFunction):
        op = "my_op"
        tensors = "x", "weight", …
        saved = ("x", "weight"), ("weight", "x")       # each with the gradients that read it
        def run(options, x, weight, …): …              # calls _forward
        def gradients(options, saved, dy): …           # calls _backward

A public function checks its arguments, chooses a backend, and calls `MyFunction.call(options, *tensors)`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch._C import _are_functorch_transforms_active, _is_any_autocast_enabled, _len_torch_dispatch_stack
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import register_flop_formula

from .transforms import backward_of, without_autocast

LIBRARY = torch.library.Library("peft_kernels", "DEF")


def kernel(package: str, backend: str, function: str) -> Callable:
    """The function of an op package that computes `function` ("forward", "backward", …) by a backend: it stands in the
    package's module `reference`, `cpu`, `cuda` or `triton_<function>`."""
    return getattr(_module(package, backend, function), function)


@functools.cache
def _module(package: str, backend: str, function: str) -> ModuleType:
    """Imported when it is first called, since Triton may be missing. A suffix of the backend chooses inside of it."""
    family = backend.partition(":")[0]
    return importlib.import_module(f".triton_{function}" if family == "triton" else f".{family}", package)


def register(
    package: str,
    schema: str,
    fake: Callable,
    flops: Callable[..., int] | None = None,
    *,
    by_sizes: Callable[..., str] | None = None,
    implementation: Callable | None = None,
) -> Callable:
    """Register an op with torch.library, for every dispatch key, and return the function that calls it.

    In eager mode that is the implementation itself, and the registered op under Dynamo, functorch, a dispatch mode and
    for meta tensors. The dispatcher boxes each argument to pass it from Python through C++ to Python: about 10 µs a
    call on one core, more CPU overhead than that of the three products of a small layer.

    Args:
        package: of the op; `__package__`.
        schema: `<op>_<function>(…, str backend) -> …`. The first argument is a tensor or a list of tensors.
        fake: of the op's arguments, returns empty tensors of the result's shapes and dtypes.
        flops: of the op's arguments, shapes in place of tensors, and `out_shape`: what `FlopCounterMode` counts. The
            products of the op's definition, whatever a backend computes to get them.
        by_sizes: of the op's arguments, the backend to take where theirs is "auto".
        implementation: of the op's arguments; by default the package's kernel of that function and backend.
    """
    name = schema.partition("(")[0]
    implementation = implementation or _by_backend(package, name.rpartition("_")[2], by_sizes)

    def run(*args):
        return without_autocast(implementation, *args)

    LIBRARY.define(schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"peft_kernels::{name}", fake, lib=LIBRARY)
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
        # Asked here too: `run` in between would cost the CPU a call.
        return (run if _is_any_autocast_enabled() else implementation)(*args)

    return call


def _by_backend(package: str, function: str, by_sizes: Callable[..., str] | None) -> Callable:
    """The implementation of a registered op whose last argument is the backend: the kernel of that backend."""

    def implementation(*args):
        backend = args[-1]
        if backend == "auto":
            backend = by_sizes(*args)
            args = (*args[:-1], backend)
        found = getattr(_module(package, backend, function), function)
        if backend == "reference":
            return found(*args)
        with on_device_of(args[0] if isinstance(args[0], torch.Tensor) else args[0][0]):
            return found(*args)

    return implementation


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, wherever its arguments are."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


class OpFunction(torch.autograd.Function):
    """The autograd of an op: `apply(options, *tensors)`, differentiable once.

    A subclass has the name of its op, and static functions:

    - `run(options, *tensors)` returns the result, a tensor or a tuple, and the tensors to be saved, with None in the
      place of those that no needed gradient reads. None instead of such a list stands for what `saved` says.
    - `gradients(options, saved, *grads)` returns an iterable of the gradients that are needed, in order. Of several
      results some `grads` may be None, not all.

    `options` is a tuple of what one call is given beside tensors. Its last field is `needs`: whether a gradient is
    needed, for as many of the tensors as may have one. It is read outside, since `needs_input_grad` ignores grad mode
    (`needs_of`).

    Attributes:
        op: the name of the op, for errors.
        call: `apply`, or `run` where no gradient is needed.
        tensors: the names of the tensors, those that may have a gradient first.
        saved: of each tensor to be saved, the names of those whose gradients read it.
        in_place: the result is the first of the tensors, its numbers unchanged.
    """

    op: str
    call: Callable[..., Any]
    tensors: Sequence[str] = ()
    saved: Sequence[tuple[str, str]] = ()
    in_place = False
    run: Callable[..., tuple[Any, Sequence[torch.Tensor | None] | None]]
    gradients: Callable[..., Iterable[torch.Tensor | None]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        place = {name: position for position, name in enumerate(cls.tensors)}
        readers = [(place[name], [place[reader] for reader in of.split()]) for name, of in cls.saved]

        run, gradients, in_place = cls.run, cls.gradients, cls.in_place  # Dynamo does not ask the class for them

        def forward(ctx, options, *tensors):
            result, saved = run(options, *tensors)
            needs = options[-1]
            if saved is None:
                saved = [tensors[one] if any([needs[reader] for reader in of]) else None for one, of in readers]
            ctx.save_for_backward(*saved)
            ctx.set_materialize_grads(False)
            if in_place:
                ctx.mark_dirty(result)
            ctx.options, ctx.without_gradient = options, len(tensors) - len(needs)
            return result

        @backward_of(cls.op)
        def backward(ctx, *grads):
            options = ctx.options
            needs = options[-1]
            result: list[torch.Tensor | None] = [None]
            for grad in grads:
                if grad is not None:
                    break
            else:
                return tuple(result * (1 + len(needs) + ctx.without_gradient))
            found = iter(gradients(options, ctx.saved_tensors, *grads))
            for needed in needs:
                result.append(next(found) if needed else None)
            return tuple(result + [None] * ctx.without_gradient)

        cls.forward, cls.backward = staticmethod(forward), staticmethod(backward)
        # What `apply` calls in the end. The Python around it asks of every argument whether it escaped from a
        # torch.func transform, a CPU overhead; no transform is active where this is called.
        apply, apply_eagerly = cls.apply, super(torch.autograd.Function, cls).apply

        def call(options, *tensors):
            """The result for these tensors, in a graph if any gradient is needed."""
            if True not in options[-1]:
                return run(options, *tensors)[0]
            if is_dynamo_compiling():
                return apply(options, *tensors)
            return apply_eagerly(options, *tensors)

        cls.call = staticmethod(call)


def needs_of(*tensors: torch.Tensor | None) -> list[bool]:
    """Say of each tensor whether a gradient is needed."""
    if not torch.is_grad_enabled():
        return [False] * len(tensors)
    return [tensor is not None and tensor.requires_grad for tensor in tensors]


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
