"""Where backward stops, and what is checkpointed on its way.

Autograd needs no help to stop below the lowest layer that trains, unless a library makes the model's input require a
gradient, as transformers does for checkpointing (`enable_input_require_grads`): then the output of the input embeddings
is detached, unless they train themselves. That is outside of the blocks, so that nothing of it is in what was compiled
or checkpointed.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn

from .layers import Layer, models_of_transformers

NOT_REENTRANT = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
MISSING = object()


class Backward:
    """Switches for one model, by the lowest active layer of a step."""

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self.layers, self._models = layers, models_of_transformers(model)
        self._cuts: list[torch.utils.hooks.RemovableHandle] = []
        self._switched: list[tuple[nn.Module, str, Any]] = []  # blocks, and what an attribute of theirs was

    def stop_below(self, lowest: int, depth: int | None = None) -> None:
        """Let no backward go below layer `lowest`.

        Args:
            depth: layers whose activations may be kept; deeper backwards have the excess checkpointed. None: as many
                as the model keeps anyway.
        """
        self.release()
        if lowest > 0:
            for embeddings in _input_embeddings(self._models):
                self._cuts.append(embeddings.register_forward_hook(_detached))
        for number, layer in enumerate(self.layers):
            block = layer.module
            if getattr(block, "gradient_checkpointing", False) and number <= lowest and _is_reentrant(block):
                # The reentrant kind gives no gradient to a block whose input requires none; below there is none anyway.
                self._switch(block, "gradient_checkpointing", False)
        if depth is not None:
            excess = len(self.layers) - lowest - depth
            for layer in self.layers[lowest : lowest + excess] if excess > 0 else ():
                if not layer.module.gradient_checkpointing:
                    self._switch(layer.module, "gradient_checkpointing", True)
                    self._switch(layer.module, "_gradient_checkpointing_func", NOT_REENTRANT)

    def release(self) -> None:
        """All as it was found."""
        for cut in self._cuts:
            cut.remove()
        for block, name, was in reversed(self._switched):
            if was is MISSING:
                delattr(block, name)
            else:
                setattr(block, name, was)
        self._cuts, self._switched = [], []

    def check_can_checkpoint(self) -> None:
        """Raise ValueError unless every block knows how to be checkpointed."""
        for layer in self.layers:
            if not hasattr(layer.module, "gradient_checkpointing"):
                raise ValueError(
                    f"IST: expected blocks of transformers (GradientCheckpointingLayer) for checkpoint_beyond_budget, "
                    f"got {type(layer.module).__name__}"
                )

    def _switch(self, block: nn.Module, name: str, value: Any) -> None:
        self._switched.append((block, name, vars(block).get(name, MISSING)))
        setattr(block, name, value)


def _input_embeddings(models: Sequence[nn.Module]) -> list[nn.Module]:
    """Of each, every one once, as `enable_input_require_grads` finds them."""
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
