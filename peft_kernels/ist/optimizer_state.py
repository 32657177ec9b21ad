"""Keeps the optimizer's state of layers that do not train, moves it to CPU memory until they do, or drops it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from .layers import Layer


def check_holds(optimizer: torch.optim.Optimizer, layers: Sequence[Layer]) -> None:
    """Raise ValueError unless the optimizer holds every adapter: one frozen when it was made would never train."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for layer in layers:
        if any(id(parameter) not in held for parameter in layer.parameters):
            raise ValueError(f"IST: expected an optimizer that holds every adapter, got one without {layer.name}'s")


def place(optimizer: torch.optim.Optimizer, parameters: Iterable[tuple[nn.Parameter, bool]], frozen_state: str) -> None:
    """Put the state of parameters, each with whether it trains, where `frozen_state` of the configuration has it."""
    trains, frozen = [], []
    for parameter, required in parameters:
        (trains if required else frozen).append(parameter)
    if frozen_state == "drop":
        drop(optimizer, frozen)
    elif frozen_state == "offload":
        offload(optimizer, frozen)
        bring_back(optimizer, trains)


def drop(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Forget their moments and step counts: an optimizer starts them anew."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def offload(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Move their state to the CPU, into pinned memory; step counts stay where they are. All copies go together, and
    are done when this returns, so that the state can be saved at any time.

    Raises:
        ValueError: for state that is spread over processes.
    """
    devices = set()
    for parameter in parameters:
        for name, value in _tensors_of(optimizer, parameter):
            if hasattr(value, "device_mesh"):
                raise ValueError("IST: expected plain tensors for frozen_state='offload', got a DTensor: keep or drop")
            if value.device.type != "cpu" and value.dim() > 0:
                pinned = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
                optimizer.state[parameter][name] = pinned.copy_(value, non_blocking=True)
                devices.add(value.device)
    for device in devices:
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()


def bring_back(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Undo `offload`: moments go where the parameter is."""
    for parameter in parameters:
        for name, value in _tensors_of(optimizer, parameter):
            if value.device != parameter.device and value.dim() > 0:
                optimizer.state[parameter][name] = value.to(parameter.device, non_blocking=True)


def _tensors_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[tuple[str, torch.Tensor]]:
    state = optimizer.state.get(parameter, {})
    return [(name, value) for name, value in state.items() if isinstance(value, torch.Tensor)]
