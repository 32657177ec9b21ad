"""Has several processes choose the same layers, and estimate on one batch that is spread over them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from .layers import Layer, is_sharded


def is_initialised() -> bool:
    """Whether there is a group of processes, of one or more."""
    return dist.is_available() and dist.is_initialized()


def rank_and_world(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """Return this process' number in the group, and how many there are; (0, 1) without torch.distributed.

    Raises:
        ValueError: if this process is not in the group.
    """
    if not is_initialised():
        return 0, 1
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    if rank < 0:
        raise ValueError(
            f"IST: expected a process group with this process in it, got one without rank {dist.get_rank()}"
        )
    return rank, world


def agreed(
    tensors: Sequence[torch.Tensor], device: torch.device, group: dist.ProcessGroup | None = None
) -> list[torch.Tensor]:
    """Return the tensors of the group's first process, on the CPU, in every process; shapes are the same everywhere.

    Args:
        device: where the group's backend can reach; the parameters' device.
    """
    if rank_and_world(group)[1] == 1:
        return list(tensors)
    result = []
    for tensor in tensors:
        sent = tensor.to(device, copy=True)
        dist.broadcast(sent, group=group, group_src=0)
        result.append(sent.cpu())
    return result


def joined_losses(
    losses: Sequence[float], weight: float, device: torch.device, group: dist.ProcessGroup | None = None
) -> list[float]:
    """Average each loss over the batches of all processes, weighted by `weight`, such as the number of labels: one
    process would have the result on the joined batch. NaN where the weights are all 0.

    Args:
        losses: as many in every process; not looked at where `weight` is 0.
        device: where the group's backend can reach; the parameters' device.
    """
    if rank_and_world(group)[1] == 1:
        return list(losses)
    parts = [loss * weight for loss in losses] if weight else [0.0] * len(losses)
    sums = torch.tensor([*parts, weight], dtype=torch.float64, device=device)
    dist.all_reduce(sums, group=group)
    *totals, total = sums.tolist()
    return [part / total if total else float("nan") for part in totals]


def everywhere(condition: bool, device: torch.device, group: dist.ProcessGroup | None = None) -> bool:
    """Whether the condition holds in all processes."""
    return joined_losses([float(condition)], 1.0, device, group) == [1.0]


def anywhere(flags: Sequence[bool], device: torch.device, group: dist.ProcessGroup | None = None) -> list[bool]:
    """Return for each flag whether it is set in some process; every process gives as many."""
    sums = torch.tensor([float(flag) for flag in flags], device=device)
    dist.all_reduce(sums, group=group)
    return [total > 0.0 for total in sums.tolist()]


class Sharded:
    """A model whose blocks may be sharded by FSDP2 (`fully_shard`), of which some parameters are frozen step by step.

    A sharded parameter passes its `requires_grad` on when it is gathered, and a frozen one is neither given a gradient
    nor reduced. Two things stand in the way of that:

    - What is still gathered from an earlier forward (the root group after an estimate or an evaluation) is not gathered
      again. So everything is sharded again before layers are switched.
    - In the first forward of all FSDP notes the dtypes of each group by what requires a gradient then: to a group that
      had nothing, mixed precision would later give 16-bit gradients. So every adapter requires one while it looks.

    Raises:
        ValueError: for FSDP1, whose flat parameters have one `requires_grad` for many.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self._modules: list[nn.Module] = []
        self._chosen: list[tuple[nn.Module, str, nn.Parameter, bool]] = []
        fsdp = sys.modules.get("torch.distributed.fsdp")  # not imported: then the model is not sharded by it
        if fsdp is None:
            return
        if any(isinstance(module, fsdp.FullyShardedDataParallel) for module in model.modules()):
            raise ValueError("IST: expected FSDP2 (fully_shard), got FSDP1 (FullyShardedDataParallel)")
        if is_sharded(model):
            self._modules = [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]
        adapters = {id(parameter) for layer in layers for parameter in layer.parameters}
        self._places = [
            (parameter, (module, name))
            for layer in layers
            for module in layer.module.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in adapters
        ]
        if self._modules:
            self._hooks = [
                self._modules[0].register_forward_pre_hook(self._all_require_grad, prepend=True),  # before FSDP's own
                self._modules[0].register_forward_pre_hook(self._as_chosen),  # and after it
            ]

    def __bool__(self) -> bool:
        return bool(self._modules)

    def reshard(self) -> None:
        """Free what is still gathered, so that the parameters of the layers are the model's."""
        self._restore()
        for module in self._modules:
            module.reshard()

    def gathered(self, wanted: Sequence[tuple[nn.Parameter, bool]]) -> list[tuple[nn.Parameter, bool]]:
        """Return what stands in place of these parameters while FSDP has gathered them, each with whether it trains."""
        if not self._modules:
            return []
        places = {id(parameter): place for parameter, place in self._places}
        found = [(getattr(*places[id(parameter)]), required) for parameter, required in wanted]
        return [(now, required) for (now, required), (own, _) in zip(found, wanted) if now is not own]

    def check_current(self) -> None:
        """Raise ValueError if the model's parameters were replaced since the layers were found."""
        for layer in self.layers:
            current = {id(parameter) for parameter in layer.module.parameters()}
            if any(id(parameter) not in current for parameter in layer.parameters):
                raise ValueError(
                    f"IST: expected the adapters that {layer.name} had when IST was made, got others: "
                    f"make IST after fully_shard and whatever else replaces parameters"
                )

    def _all_require_grad(self, *_) -> None:
        self._restore()
        # By place: the gathered parameters are other ones, and have to be switched back as well.
        adapters = {id(parameter) for layer in self.layers for parameter in layer.parameters}
        self._chosen = [
            (module, name, parameter, parameter.requires_grad)
            for layer in self.layers
            for module in layer.module.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in adapters
        ]
        for _, _, parameter, _ in self._chosen:
            parameter.requires_grad_(True)

    def _as_chosen(self, *_) -> None:
        self._restore()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _restore(self) -> None:
        """Put back what was chosen before FSDP looked, also where it was interrupted."""
        for module, name, parameter, required in self._chosen:
            parameter.requires_grad_(required)
            getattr(module, name).requires_grad_(required)
        self._chosen = []
