"""Makes DistributedDataParallel reduce only what trains now, where other parameters train in every step.

DDP counts on every parameter that required a gradient when it was made; with `find_unused_parameters=True` it bears
frozen ones, and reduces them all the same. Here its reducer is kept out of it, as `no_sync()` does, and the gradients
that there are, are averaged in the same backward, so that they are ready when `backward()` returns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .layers import Layer, tensors_of


class DDPGradients:
    """Averages gradients over the processes of whatever DDP runs `model`, once DDP is seen to run it.

    A backward that passes through the output of a forward outside of `no_sync()` reduces all that trains
    then, accumulated gradients included: a buffer a layer, sent from the top layer down as soon as its gradients are
    there, and the rest at the end. Order and sizes depend on what trains alone, so that they are the same in all
    processes, whatever got a gradient where. A parameter without a gradient in one process counts as zero, and without
    one in all processes stays without.

    DDP is left alone where it cannot be replaced (communication hooks, its mixed precision, `join()`) and finds
    unused parameters itself.

    Args:
        model: the wrapper, or the module inside that it runs.
        layers: of the model.
        trains: which of its parameters do so in this step.

    Raises:
        ValueError: now for a wrapper, otherwise in the first forward, for a DDP that can neither be replaced nor left
            alone.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], trains: Callable[[nn.Parameter], bool]) -> None:
        if isinstance(model, DistributedDataParallel):
            _check_replaceable(model)
        self.layers, self.trains = layers, trains
        self.ddp: DistributedDataParallel | None = None
        self._groups: list[list[nn.Parameter]] = []
        self._reduces = False  # whether the forward that runs now leads to a reduction
        self._kept_out = False  # DDP's reducer, at the end of such a forward
        inner = unwrapped(model)
        self._hooks = [
            inner.register_forward_pre_hook(self._before_forward),
            inner.register_forward_hook(self._after_forward),
        ]
        self._begin_anew()
        if isinstance(model, DistributedDataParallel):
            self._adopt(model)

    def remove(self) -> None:
        """Leave gradients to DDP again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.readmit()

    def readmit(self, *_) -> None:
        """Undo what kept DDP's reducer out of the last forward: DDP as its user set it."""
        if self._kept_out:
            self.ddp.require_backward_grad_sync = True
            self.ddp.require_forward_param_sync = True  # as DDP itself has it after such a forward
            self._kept_out = False

    def _adopt(self, ddp: DistributedDataParallel) -> None:
        """Hook all parameters of the DDP that train; a hook can only be registered where a gradient is required."""
        self.ddp = ddp
        self._hooks.append(ddp.register_forward_hook(self.readmit))
        left = {id(parameter): parameter for parameter in ddp.module.parameters() if parameter.requires_grad}
        left |= {id(parameter): parameter for layer in self.layers for parameter in layer.parameters}
        for layer in reversed(self.layers):
            own = [left.pop(id(parameter), None) for parameter in layer.module.parameters()]
            self._groups.append([parameter for parameter in own if parameter is not None])
        self._groups.append(list(left.values()))
        for number, group in enumerate(self._groups):
            for parameter in group:
                required = parameter.requires_grad
                hook = parameter.requires_grad_(True).register_post_accumulate_grad_hook(
                    functools.partial(self._arrived, number)
                )
                parameter.requires_grad_(required)
                self._hooks.append(hook)

    def _before_forward(self, module: nn.Module, args: tuple) -> None:
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:  # a recomputation inside backward
            return
        self.readmit()
        self._begin_anew()
        # DDP says so while it runs its module; the module inside is all that Trainer's callbacks see.
        ddp = DistributedDataParallel._get_active_ddp_module()
        if ddp is None or not ddp.require_backward_grad_sync or not _check_replaceable(ddp):
            return
        if ddp is not self.ddp:
            self._adopt(ddp)
        self._reduces = True

    def _after_forward(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._reduces:
            self.watch(output)

    def watch(self, output: Any) -> None:
        """Let a backward through the output of this forward reduce gradients."""
        if not (self._reduces or self._kept_out) or not torch.is_grad_enabled():
            return
        tensors = list(tensors_of(output))
        if not tensors:
            raise ValueError(f"IST: expected tensors in what a model under DDP returns, got {type(output).__name__}")
        for tensor in tensors:
            if tensor.requires_grad:
                tensor.register_hook(self._begin)
        # Read when the module's forward is over, and set no earlier: a forward that is interrupted runs no hook. In the
        # first one the wrapper's hook, just registered, does not run: backward, or the next step, readmits.
        self._reduces, self._kept_out = False, True
        self.ddp.require_backward_grad_sync = False

    def _begin_anew(self) -> None:
        """Forget what a forward, or a backward that raised, has left behind: no backward is under way."""
        self._reduces = self._under_way = False
        self._missing: list[set[int]] = []  # by group, the parameters whose gradients are still to come
        self._sent: list[tuple[list[nn.Parameter], torch.Tensor, dist.Work]] = []
        self._next = 0

    def _begin(self, gradient: torch.Tensor) -> None:
        if self._under_way:
            return
        self.readmit()
        self._begin_anew()
        self._under_way = True
        self._missing = [{id(p) for p in group if self.trains(p)} for group in self._groups]
        torch.autograd.Variable._execution_engine.queue_callback(self._end)

    def _arrived(self, number: int, parameter: nn.Parameter) -> None:
        if not self._under_way or not self.trains(parameter):
            return
        if number < self._next:
            raise RuntimeError(
                f"IST: expected one gradient of each parameter in a backward under DDP, got a second one for a "
                f"parameter of {list(parameter.shape)} after its layer was reduced"
            )
        self._missing[number].discard(id(parameter))
        while self._next < len(self._groups) and not self._missing[self._next]:
            self._send_next()

    def _send_next(self) -> None:
        buckets: dict[tuple, list[nn.Parameter]] = {}
        for parameter in self._groups[self._next]:
            if self.trains(parameter):
                buckets.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        self._next += 1
        for parameters in buckets.values():
            has = parameters[0].new_ones(len(parameters))
            parts = []
            for index, parameter in enumerate(parameters):
                if parameter.grad is None:
                    has[index] = 0.0
                parts.append((torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).reshape(-1))
            flat = torch.cat([*parts, has]).div_(self.ddp.process_group.size())
            work = dist.all_reduce(flat, group=self.ddp.process_group, async_op=True)
            self._sent.append((parameters, flat, work))

    def _end(self) -> None:
        while self._next < len(self._groups):
            self._send_next()
        for parameters, flat, work in self._sent:
            work.wait()
            *averages, has = flat.split([*(parameter.numel() for parameter in parameters), len(parameters)])
            for index, (parameter, average) in enumerate(zip(parameters, averages)):
                if parameter.grad is not None:
                    parameter.grad.copy_(average.view_as(parameter))
                elif has[index] > 0:
                    parameter.grad = average.view_as(parameter).clone()
        self._begin_anew()


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module that DDP runs if `model` is DDP's wrapper, else `model`."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def _check_replaceable(ddp: DistributedDataParallel) -> bool:
    """Return whether its reducer can be replaced; raise ValueError if it cannot, nor bear frozen parameters."""
    found = (
        "static_graph=True" if ddp.static_graph
        else "a communication hook" if ddp._comm_hooks
        else "mixed_precision" if ddp.mixed_precision is not None
        else "delay_all_reduce_named_params" if ddp._delay_all_reduce_all_params or ddp._delay_all_reduce_params
        else "torch.compile's DDP" if ddp._use_python_reducer
        else "join()" if ddp._join_config.enable
        else None
    )  # fmt: skip
    if found and (ddp.static_graph or not ddp.find_unused_parameters):
        raise ValueError(
            f"IST: expected a plain DistributedDataParallel, or find_unused_parameters=True without static_graph, "
            f"got {found}"
        )
    return found is None
