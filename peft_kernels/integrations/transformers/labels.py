"""Computes logits at labels alone: lm_head, softmax and their backward leave out ignored positions."""

from __future__ import annotations

import inspect
import threading
import weakref
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from .cross_entropy import causal_lm_loss

#: The label of positions without one, as transformers and torch's cross_entropy have it.
IGNORED = -100
#: Arguments of a forward that say themselves where logits are wanted, or which labels count. The last one is TRL's.
OWN_CHOICE = ("logits_to_keep", "shift_labels", "ignore_index", "fused_lm_head")


class _Positions(NamedTuple):
    """The positions at which a forward wants logits. They are valid during that forward only, however it ends (torch
    runs no hook after a KeyboardInterrupt): they refer weakly to labels that were made for it as an argument."""

    flat: torch.Tensor  # positions in the batch, one row after the other
    batch: torch.Size  # [examples, tokens]
    labels: weakref.ref[torch.Tensor]


class Handle:
    """Undoes `logits_at_labels` by `remove()`, or when its `with` block is left.

    Its bound methods are the hooks. Nothing that it holds is copied with the model, so that a copy has hooks that work
    by themselves.
    """

    def __init__(self) -> None:
        self._model: PreTrainedModel | None = None
        self._forwards: dict[int, _Positions] = {}  # by thread, of the forward that it is in
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __reduce__(self):
        return Handle, ()  # deepcopy and pickle: never the running forwards

    def _join(self, model: PreTrainedModel) -> Handle:
        self._handles = [
            model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            # Ahead of hooks that shard what the module is given.
            _head(model).register_forward_pre_hook(self._select, prepend=True),
        ]
        self._model, model.loss_function = model, causal_lm_loss
        return self

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        if self._model is not None and self._model.loss_function is causal_lm_loss:
            self._model.loss_function = ForCausalLMLoss

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _before_forward(self, model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        self._forwards.pop(threading.get_ident(), None)  # left by a forward that never came to its output embeddings
        labels = kwargs.get("labels")
        if not (model.training and torch.is_grad_enabled()) or any(name in kwargs for name in OWN_CHOICE):
            return None
        if not isinstance(labels, torch.Tensor) or labels.dim() != 2:
            return None
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()  # position t predicts label t + 1
        flat = (targets != IGNORED).nonzero().squeeze(1)
        if not len(flat):
            return None
        if self._select not in _head(model)._forward_pre_hooks.values():
            raise ValueError(
                "expected the output embeddings that logits_at_labels was called with, got others: call it again"
            )
        labels_there = targets[flat][None]
        self._forwards[threading.get_ident()] = _Positions(flat, labels.shape, weakref.ref(labels_there))
        return args, kwargs | {"shift_labels": labels_there}

    def _select(self, head: nn.Module, args: tuple) -> tuple | None:
        """Select rows, [examples, tokens, features] → [1, labels, features], once in a forward."""
        positions = self._forwards.pop(threading.get_ident(), None)
        if positions is None or positions.labels() is None:
            return None
        hidden, *others = args
        if hidden.shape[:-1] != positions.batch:
            raise ValueError(
                f"expected hidden states of every label's position at the output embeddings, {list(positions.batch)}, "
                f"got {list(hidden.shape[:-1])}"
            )
        # index_select, not [positions]: its backward adds rows without sorting them first.
        return hidden.flatten(0, 1).index_select(0, positions.flat.to(hidden.device))[None], *others


def logits_at_labels(model: nn.Module) -> Handle:
    """Lets `model`, in training, compute logits only at the positions whose next token has a label.

    The loss and all gradients are as before to rounding, and so is whatever `num_items_in_batch` divides by. The loss
    saves these logits alone, in their own dtype, and can be differentiated once (see `CrossEntropy`). `logits` of the
    output become [1, labels, vocabulary], in the order of the batch: nothing in training may expect another shape of
    them. Older releases of TRL's SFTTrainer do, for their token accuracy; newer ones bring a loss of their own.

    It is done by hooks, in forwards in training mode with gradients and `labels` [examples, tokens] given by name.
    Everything else goes on as before: evaluation, generation, batches without any label, calls with `logits_to_keep`,
    `shift_labels` or `ignore_index`. torch.compile breaks its graph around the forward's choice of positions.

    Args:
        model: a causal language model of transformers, or what wraps one: PEFT's, DDP's. Call this once its output
            embeddings are in place, that is after get_peft_model and resize_token_embeddings.

    Raises:
        ValueError: its loss is not the ForCausalLMLoss of transformers, or its forward hands no arguments on to it.
            Later, from the model's forward: where its output embeddings are no longer those of this call, or are given
            other hidden states than those of the labels' positions.
    """
    found = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    language_model = next((module for module in found if _head(module)), None)
    if language_model is None:
        raise ValueError(f"expected a model of transformers with output embeddings, got {type(model).__name__}")
    if problem := _why_not(language_model):
        raise ValueError(
            f"expected a causal language model whose forward computes transformers' ForCausalLMLoss, got "
            f"{type(language_model).__name__}: {problem}"
        )
    return Handle()._join(language_model)


def _head(model: PreTrainedModel) -> nn.Module | None:
    head = model.get_output_embeddings()
    return head if isinstance(head, nn.Module) else None


def _why_not(model: PreTrainedModel) -> str | None:
    """Say why the model's loss cannot be replaced, or None. The class's forward is read: on the instance accelerate and
    others put wrappers that take and hand on anything."""
    if model.config.is_encoder_decoder:
        return "it is an encoder and a decoder"
    forward = inspect.unwrap(type(model).forward)
    # Many models of transformers compute a loss by themselves, whatever their loss_function is.
    if "loss_function" not in getattr(getattr(forward, "__code__", None), "co_names", ()):
        return "its forward does not call loss_function"
    if model.loss_function not in (ForCausalLMLoss, causal_lm_loss):
        return f"its loss_function is {getattr(model.loss_function, '__name__', model.loss_function)}"
    if all(parameter.kind != parameter.VAR_KEYWORD for parameter in inspect.signature(forward).parameters.values()):
        return "its forward takes no **kwargs"
    return None
