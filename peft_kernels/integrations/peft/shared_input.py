"""Siblings that read the same tensor (query/key/value, gate/up) in one op.

Which siblings: `siblings_of_one_input` reads the source of their parent's forward and takes the children that
it calls on the same variable, one after another. No list of names: `self.q_proj(hidden_states)` beside
`self.k_proj(hidden_states)` is a group, and the query of a cross-attention, which reads another variable than
its key and value, is not in theirs.

How: while the parent's forward runs in a thread, a `_Call` is found in the group's `calls` under that thread.
The member that is called first computes all members that would compute the same thing from the same tensor,
and the others find their results there, each under its own call with its own hooks. A result is handed out
only for the very same tensor, unchanged, under the same grad mode and autocast; else the member computes for
itself.

The `_Call` is a local of the frame that runs the parent's forward, and the group refers to it weakly. So it ends
with that forward, however it ends, and what was not asked for ends with it: torch runs no hook after a
KeyboardInterrupt, and results that were kept would keep the graph of all blocks below.

The source only decides what is worth trying. What is right is decided at run time, so that a wrong guess
costs time and nothing else. Whether members run together must not depend on the past, or a recomputation by
activation checkpointing would draw other dropout masks than the first forward: nothing is learnt from call to
call.

Under torch.compile members run one by one.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sys
import textwrap
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from ...ops.lora_linear import Projection, lora_linear_shared_input
from .lora import FusedLoraLinear, resolve
from .tuner import only_adapter


class SharedInput:
    """A group: the members' names in their parent, in the order in which it calls them.

    Its bound method is the parent's hook. It holds no module, so a copy of the model, a replica or one
    layer by itself never drags the others along: the parent that is running says who the members are.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.key = "peft_kernels." + "+".join(names)
        self._calls: dict[int, weakref.ref[_Call]] = {}  # by thread

    def __reduce__(self):
        return SharedInput, (self.names,)  # deepcopy and pickle: never the running calls

    def join(self, parent: nn.Module) -> None:
        for name in self.names:
            parent._modules[name]._shared_input = (self, name)
        # A key that is the same in every parent: torch's own are numbers that count up, and torch.compile may guard on
        # them, so that each block would get a graph of its own.
        parent._forward_pre_hooks[self.key] = self.begin

    def begin(self, parent: nn.Module, args) -> None:
        # A forward of the instance may be anything, such as a checkpoint whose recomputation runs no hooks.
        if not torch.compiler.is_compiling() and "forward" not in parent.__dict__:
            call = _Call(parent)
            # Of the frame of nn.Module's that calls the hooks and then forward: names that the function does not have
            # stay with the frame (PEP 667; before Python 3.13 in its dictionary of locals).
            sys._getframe(1).f_locals[self.key] = call
            self._calls[threading.get_ident()] = weakref.ref(call)

    def running(self) -> _Call | None:
        """The parent's forward that this thread is in."""
        call = self._calls.get(threading.get_ident())
        return call and call()


class _Call:
    """One forward of the parent: who has been called, and what was computed ahead."""

    __slots__ = ("__weakref__", "called", "parent", "results", "state", "version", "x")

    def __init__(self, parent: nn.Module) -> None:
        self.parent = parent
        self.called: set[str] = set()
        self.results: dict[str, torch.Tensor] = {}
        self.x: torch.Tensor | None = None

    def computed(self, name: str, x: torch.Tensor) -> torch.Tensor | None:
        """The result of the member `name` for `x`, once, if it was computed ahead."""
        self.called.add(name)
        return self.results.pop(name) if name in self.results and self.holds_for(x) else None

    def holds_for(self, x: torch.Tensor) -> bool:
        """Whether what was computed ahead was computed from this tensor as it is now, in the present mode."""
        return x is self.x and x._version == self.version and _state(x) == self.state

    def compute(
        self,
        group: SharedInput,
        name: str,
        layer: FusedLoraLinear,
        x: torch.Tensor,
        resolved: tuple,
        autocast: bool,
    ) -> torch.Tensor | None:
        """The result of the member `name`, with those not called yet computed ahead; None if there are none.

        `resolved`: what `resolve` says of the member.
        """
        if x.is_inference() or _has_any_global_hook():
            return None  # an inference tensor has no version; a hook may hand each member a tensor of its own
        if not _may_share(self.parent._modules.get(name), layer) or (self.results and self.holds_for(x)):
            return None
        operands, p = resolved
        names, projections = [name], [Projection(*operands)]
        for other in group.names:
            sibling = self.parent._modules.get(other)
            if other in self.called or not _may_share(sibling):
                continue
            ahead = resolve(sibling, only_adapter(sibling), x, autocast)
            if type(ahead) is str or ahead[1] != p or ahead[0][1].dtype != operands[1].dtype:
                continue
            names.append(other)
            projections.append(Projection(*ahead[0]))
        if len(names) == 1:
            return None
        y, *ys = lora_linear_shared_input(
            x, projections, dropout_p=p, training=True, adapter_precision="default" if autocast else "high"
        )
        self.x, self.version, self.state = x, x._version, _state(x)
        self.results = dict(zip(names[1:], ys))
        return y


def _may_share(module: nn.Module | None, expected: nn.Module | None = None) -> bool:
    """Whether the child that the parent holds is ours, is the one that was called, and gets x as it is."""
    return (
        type(module) is FusedLoraLinear
        and (expected is None or module is expected)
        and "forward" not in module.__dict__
        and not (module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
    )


def _state(x: torch.Tensor) -> tuple:
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    return torch.is_grad_enabled(), torch.get_autocast_dtype(device) if autocast else None


def siblings_of_one_input(parent: nn.Module, children: set[str]) -> list[tuple[str, ...]]:
    """The groups of two or more among `children` of `parent` that its forward calls on one variable."""
    if "forward" in parent.__dict__:  # not the class's forward: its source says nothing
        return []
    groups = (tuple(n for n in group if n in children) for group in _calls_on_one_variable(type(parent).forward))
    return [group for group in groups if len(group) > 1]


@functools.cache
def _calls_on_one_variable(forward: Callable) -> tuple[tuple[str, ...], ...]:
    """Names of attributes of self that the function calls on the same variable: within one block of
    statements, none of them in a branch of an expression, each once in the whole function, the variable not
    assigned in between."""
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):  # no source, or none that stands alone
        return ()
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        return ()
    this = function.args.args[0].arg
    uses = _uses_of_children(function, this)
    groups: list[list[str]] = []
    for block in _blocks(function):
        open_groups: dict[str, list[str]] = {}
        for statement in block:
            for node in _evaluated(statement):
                if call := _call_of_child(node, this):
                    name, variable = call
                    if uses[name] == 1:
                        open_groups.setdefault(variable, []).append(name)
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, (ast.Store, ast.Del)):
                    groups.append(open_groups.pop(node.id, []))
        groups += open_groups.values()
    return tuple(tuple(group) for group in groups if len(group) > 1)


def _call_of_child(node: ast.AST, this: str) -> tuple[str, str] | None:
    """(child, variable) if the node is `self.child(variable)`."""
    if not isinstance(node, ast.Call) or node.keywords or len(node.args) != 1 or not isinstance(node.args[0], ast.Name):
        return None
    target = node.func
    if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == this:
        return target.attr, node.args[0].id
    return None


def _uses_of_children(function: ast.FunctionDef, this: str) -> Counter:
    """How often the function calls `self.child` or passes it on; `self.child.weight` does not count."""
    nodes = list(ast.walk(function))
    opened = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    attributes = (node for node in nodes if isinstance(node, ast.Attribute) and id(node) not in opened)
    return Counter(node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == this)


def _blocks(function: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(function):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                yield block


_BRANCHES = (ast.Lambda, ast.IfExp, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _evaluated(node: ast.AST) -> Iterator[ast.AST]:
    """The expressions that a statement always evaluates itself, outside of the blocks nested in it."""
    yield node
    if not isinstance(node, _BRANCHES):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
                yield from _evaluated(child)
