"""Finds which layers take part in the loss: a batch of text alone runs no vision tower, and not every output is used.

A layer takes part if a forward calls it, unless it trained and got no gradient where others did, and never had one.
Either is forgotten after a while. And it is known afterwards only: a forward in which nothing that was drawn takes part
runs once more, with layers that do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from . import parallel
from .layers import Layer, is_compiled_itself, tensors_of

#: Steps after which a layer that is not called any more takes no part, and one without a gradient may be tried again.
FORGOTTEN_AFTER = 100


class Participation:
    """Knows of each layer, by its number, whether it takes part.

    Processes that train together have to draw the same. Where the model has several stacks of layers they tell each
    other what they saw; in a single stack all layers are taken to take part.

    Attributes:
        step: steps before this one.
        called: layers called in the newest forward that trains.
        fed: layers that got a gradient in this step.
        proven: layers that ever got a gradient.
        unused: layers that were called and trained and got none, and in which step.
    """

    def __init__(self, layers: Sequence[Layer], group: torch.distributed.ProcessGroup | None) -> None:
        self.layers, self._group = layers, group
        self.step = 0
        self.called: set[int] = set()
        self.fed: set[int] = set()
        self.proven: set[int] = set()
        self.unused: dict[int, int] = {}
        self._called_in_step: set[int] = set()
        self._last_called: dict[int, int] = {}  # the step of each layer's last call
        self._watching = False
        several_stacks = len({layer.name.rpartition(".")[0] for layer in layers}) > 1
        self.is_shared = parallel.rank_and_world(group)[1] > 1
        self.is_known = several_stacks or not self.is_shared
        self._hooks = [
            layer.module.register_forward_pre_hook(_Called(self, index)) for index, layer in enumerate(layers)
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def candidates(self) -> list[int]:
        """The layers to draw from in this step; all of them while nothing is known."""
        since = self.step - FORGOTTEN_AFTER
        called = {index for index, step in self._last_called.items() if step >= since}
        unused = {index for index, step in self.unused.items() if step >= since}
        return sorted(called - unused) or list(range(len(self.layers)))

    def next_step(self, active: Collection[int]) -> None:
        """End a step in which `active` trained: remember what took part, in all processes alike."""
        if self.is_known:
            called, fed = self.anywhere(self._called_in_step, self.fed)
            self.proven |= fed
            self.unused = {index: step for index, step in self.unused.items() if index not in fed}
            if fed:
                self.are_unused(called & set(active))
            self._last_called |= dict.fromkeys(called, self.step)
        self._called_in_step, self.fed = set(), set()
        self.step += 1

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Note which layers are called inside the block, a forward that trains."""
        # Hooks of compiled layers do not run: these layers are taken to be called.
        self.called, self._watching = set(self._compiled()), True
        try:
            yield
        finally:
            self._watching = False
            self._called_in_step |= self.called

    def saw(self, index: int) -> None:
        if self._watching:
            self.called.add(index)

    def leads_to(self, active: Collection[int], output: Any) -> bool:
        """Return whether the newest forward, with this output, leads to a gradient of some of these layers."""
        among = self.called & set(active)
        tensors = list(tensors_of(output))
        connected = not tensors or any(tensor.requires_grad for tensor in tensors)
        return bool(among) and (connected or bool(among & self.proven))

    def expects_more(self, active: Collection[int]) -> bool:
        """Return whether a later call may lead to a gradient of some of these layers, where parts of the model are
        called one by one: the step before called them. Processes that train together need not call the same parts,
        and always expect more."""
        return self.is_shared or any(self._last_called.get(index, -2) == self.step - 1 for index in active)

    def others(self, tried: Collection[int]) -> list[int]:
        """Return the layers that the newest forward called beside those that were tried; of them those that ever got a
        gradient, if any did."""
        left = self.called - set(self.unused) - set(tried)
        return sorted(left & self.proven or left)

    def are_unused(self, layers: Collection[int]) -> None:
        """Note those of these layers that never had a gradient as unused: others had one in this step."""
        self.unused |= dict.fromkeys(set(layers) - self.proven - self._compiled(), self.step)

    def anywhere(self, *sets: Collection[int]) -> list[set[int]]:
        """Join each of these sets of numbers below L over the processes."""
        if not self.is_shared:
            return [set(each) for each in sets]
        count, device = len(self.layers), self.layers[0].parameters[0].device
        flags = [index in each for each in sets for index in range(count)]
        found = parallel.anywhere(flags, device, self._group)
        return [{i for i in range(count) if found[first + i]} for first in range(0, len(found), count)]

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "fed": sorted(self.fed),
            "proven": sorted(self.proven),
            "called_in_step": sorted(self._called_in_step),
            "unused": sorted(self.unused.items()),
            "last_called": sorted(self._last_called.items()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = state["step"]
        self.fed, self.proven, self._called_in_step = (set(state[n]) for n in ("fed", "proven", "called_in_step"))
        self.unused, self._last_called = dict(state["unused"]), dict(state["last_called"])

    def _compiled(self) -> set[int]:
        return {index for index, layer in enumerate(self.layers) if is_compiled_itself(layer.module)}


class _Called:
    """The hook of a layer. A copy of the model gets a hook that does nothing."""

    def __init__(self, participation: Participation | None = None, index: int = 0) -> None:
        self.participation, self.index = participation, index

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if not torch.compiler.is_compiling() and self.participation is not None:
            self.participation.saw(self.index)

    def __reduce__(self):
        return _Called, ()
