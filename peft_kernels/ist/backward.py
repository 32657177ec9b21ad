"""Stops backward below the lowest layer that trains, and checkpoints what it may not save for it.

Autograd needs no help to stop below the lowest layer that trains, unless a library makes the model's input require a
gradient, as transformers does for checkpointing (`enable_input_require_grads`): then the output of the input embeddings
is detached, unless they train themselves. That is outside of the blocks, so that nothing of it is in what was compiled
or checkpointed. All of it lasts for a forward: libraries switch checkpointing off and on between two of them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from .layers import Layer, models_of_transformers

NOT_REENTRANT = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
MISSING = object()


class Backward:
    """Switches how the blocks of a model run while only some of the layers train: for a forward, and back after it."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self.layers, self._models = layers, models_of_transformers(model)
        self._stops, self._excess = False, set()
        self._instead: dict[Callable, Callable] = {}  # replaces a block's checkpointing; compiled graphs contain it

    def stop_below(self, active: Sequence[int], in_use: Sequence[int], depth: int | None = None) -> None:
        """Let no backward go below the lowest of the `active` layers.

        Args:
            in_use: layers that take part in the loss.
            depth: layers whose activations may be saved; deeper backwards have the excess checkpointed. None: as many
                as the model saves anyway.
        """
        self._stops = len(active) < len(self.layers)
        reached = [index for index in in_use if index >= active[0]]
        self._excess = set(reached[: max(0, len(reached) - depth)]) if self._stops and depth is not None else set()

    @contextlib.contextmanager
    def stopping(self) -> Iterator[None]:
        """Run the forward inside the block so that its backward stops there."""
        switched: list[tuple[nn.Module, str, Any]] = []  # blocks, and what an attribute of theirs was

        def switch(block: nn.Module, name: str, value: Any) -> None:
            switched.append((block, name, vars(block).get(name, MISSING)))
            setattr(block, name, value)

        with contextlib.ExitStack() as cuts:
            for embeddings in _input_embeddings(self._models) if self._stops else ():
                # Registered anew for every forward, it comes after whatever has their output require a gradient.
                cuts.callback(embeddings.register_forward_hook(_detached).remove)
            try:
                for number, layer in enumerate(self.layers):
                    if getattr(layer.module, "gradient_checkpointing", False):
                        if _is_reentrant(layer.module):
                            switch(layer.module, "_gradient_checkpointing_func", self._either(layer.module))
                    elif number in self._excess:
                        switch(layer.module, "gradient_checkpointing", True)
                        switch(layer.module, "_gradient_checkpointing_func", NOT_REENTRANT)
                yield
            finally:
                for block, name, was in reversed(switched):
                    if was is MISSING:
                        delattr(block, name)
                    else:
                        setattr(block, name, was)

    def check_can_checkpoint(self) -> None:
        """Raise ValueError unless every block knows how to be checkpointed."""
        for layer in self.layers:
            if not hasattr(layer.module, "gradient_checkpointing"):
                raise ValueError(
                    f"IST: expected blocks of transformers (GradientCheckpointingLayer) for checkpoint_beyond_budget, "
                    f"got {type(layer.module).__name__}"
                )

    def _either(self, block: nn.Module) -> Callable:
        reentrant = block._gradient_checkpointing_func
        return self._instead.setdefault(reentrant, functools.partial(_checkpointed, reentrant))


def _checkpointed(reentrant: Callable, function: Callable, *args: Any) -> Any:
    """Checkpoint by the kind that fits the input: the reentrant one gives no gradient if the input requires none."""
    has_gradient = any(isinstance(value, torch.Tensor) and value.requires_grad for value in args)
    return (reentrant if has_gradient else NOT_REENTRANT)(function, *args)


def _input_embeddings(models: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the input embeddings of the models, each once, as `enable_input_require_grads` finds them."""
    found: dict[int, nn.Module] = {}
    for model in models:
        try:
            embeddings = model.get_input_embeddings()
        except NotImplementedError:
            continue
        if isinstance(embeddings, nn.Module):
            found[id(embeddings)] = embeddings
    return list(found.values())


def _detached(module: nn.Module, args: tuple, output: Any) -> Any:
    if any(parameter.requires_grad for parameter in module.parameters()):
        return output
    if isinstance(output, tuple):  # patches of an image, and how many
        return tuple(value.detach() if isinstance(value, torch.Tensor) else value for value in output)
    return output.detach()


def _is_reentrant(block: nn.Module) -> bool:
    function = getattr(block, "_gradient_checkpointing_func", None)
    return not isinstance(function, functools.partial) or function.keywords.get("use_reentrant", True)
