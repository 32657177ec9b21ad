"""Runs every forward of a model with the adapters of the chosen layers, and has its backward lead to some of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .hold import Entrance, InBackward, required
from .layers import entrances, tensors_of

if TYPE_CHECKING:
    from .ist import IST


class Forwards:
    """Has the choice of `ist` in force in every forward with gradients, of the model or of what calls its layers.

    Args:
        ist: the IST whose layers, `participation`, `backward` and `sharded` this works with.
        in_charge: whether the training that it was made for goes on; asked ahead of every forward. Once it does not,
            the IST is closed.

    Attributes:
        may_draw: whether the step has had no forward that leads to a gradient, and may draw other layers.
    """

    def __init__(self, ist: IST, in_charge: Callable[[], bool]) -> None:
        self.ist, self.in_charge = ist, in_charge
        self.may_draw = False
        self._led_to_gradients = False  # whether a forward of this step did
        self._inside = False
        self._wanted: list[tuple[nn.Parameter, bool]] = []
        self._devices = sorted({p.device.index for layer in ist.layers for p in layer.parameters if p.is_cuda})
        self._entrances = [
            Entrance(module, functools.partial(self._enter, module is ist.model), ist)
            for module in entrances(ist.model, ist.layers)
        ]

    def remove(self) -> None:
        for entrance in self._entrances:
            entrance.remove()

    def choose(self, active: Sequence[int]) -> None:
        """Have these layers in force in the next forwards, and in backwards through them."""
        self._wanted = [(p, i in active) for i, layer in enumerate(self.ist.layers) for p in layer.parameters]

    def next_step(self, may_draw: bool) -> None:
        self.may_draw, self._led_to_gradients = may_draw, False

    def _in_force(self, wanted: list[tuple[nn.Parameter, bool]]):
        return required([*wanted, *self.ist.sharded.gathered(wanted)])

    def _enter(self, is_model: bool, call: Callable, args: tuple, kwargs: dict) -> Any:
        if not torch.is_grad_enabled():
            return call(*args, **kwargs)
        if self._inside:
            with self._in_force(self._wanted):  # again: a model may switch adapters in its own forward
                return call(*args, **kwargs)
        if not self.in_charge():
            self.ist.close()
            return call(*args, **kwargs)
        self._inside = True
        try:
            is_all = is_model or not self.ist.participation.expects_more(self.ist.active)
            return (self._run_to_gradients if is_all else self._run)(call, args, kwargs)
        except BaseException:
            if self.ist.gradients is not None:
                self.ist.gradients.readmit()  # DDP's hooks do not run after an interrupt either
            raise
        finally:
            self._inside = False

    def _run(self, call: Callable, args: tuple, kwargs: dict) -> Any:
        wanted = self._wanted
        with self.ist.participation.watching(), self.ist.backward.stopping(), self._in_force(wanted):
            output = call(*args, **kwargs)
        InBackward(functools.partial(self._in_force, wanted)).watch(output)
        return output

    def _run_to_gradients(self, call: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a forward, and the first of a step again with layers that take part where none that was drawn does."""
        ist, participation = self.ist, self.ist.participation
        first, tried = ist.active, set()
        random = self._random_states() if self.may_draw else None
        output = self._run(call, args, kwargs)
        leads = participation.leads_to(ist.active, output)
        while self.may_draw:
            # One of several processes is enough: the others' gradients count as zeros.
            participation.called, somewhere = participation.anywhere(participation.called, [0] if leads else [])
            if somewhere:
                participation.are_unused(tried)
                self.may_draw = False
                break
            tried |= participation.called & set(ist.active)
            left = participation.others(tried)
            if not left:  # the output leads to no adapter at all
                if ist.active != first:
                    ist.exchange(first)
                break
            ist.draw_again(left)
            output = None
            self._restore(random)
            output = self._run(call, args, kwargs)
            leads = participation.leads_to(ist.active, output)
        if not leads and (self._led_to_gradients or participation.is_shared):
            self._let_backward_pass(output, args, kwargs)
        self._led_to_gradients |= leads
        return output

    def _let_backward_pass(self, output: Any, *inputs: Any) -> None:
        """Let a backward from this output do nothing: the step's other batches lead to gradients, this one does not."""
        tensors, given = list(tensors_of(output)), {id(tensor) for tensor in tensors_of(inputs)}
        if any(tensor.requires_grad for tensor in tensors):
            return
        for tensor in tensors:
            if tensor.is_floating_point() and id(tensor) not in given and not isinstance(tensor, nn.Parameter):
                tensor.requires_grad_(True)
        if self.ist.gradients is not None:
            self.ist.gradients.watch(output)

    def _random_states(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self._devices)]

    def _restore(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:]):
            torch.cuda.set_rng_state(state, device)
