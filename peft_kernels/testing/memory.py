"""Poisoned allocations and counted saved tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Inside the block `torch.empty` and its kin hand out NaN (integers: their largest value), so that an
    element that a kernel forgets to write is seen."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@contextlib.contextmanager
def saved_tensors(ignore: tuple[torch.Tensor, ...] = ()) -> Iterator[list[torch.Tensor]]:
    """Collects what autograd saves for backward inside the block as it saves it, each storage once, a sparse tensor as
    its indices and values; parameters and other tensors given in `ignore` cost nothing to keep and are left out."""
    seen = {tensor.untyped_storage().data_ptr() for tensor in ignore}
    found: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()  # what a node saves of its own output would keep the node, and the node it, for good
        for part in (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,):
            pointer = part.untyped_storage().data_ptr()
            if pointer not in seen:
                seen.add(pointer)
                found.append(part)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found
