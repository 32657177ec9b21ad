"""The loss of a language model from logits at its labels alone.

A pre-hook on the output embeddings takes the hidden states where labels stand, computes their cross-entropy piece by
piece, and hands the module an empty sequence: the [rows, tokens, vocabulary] logits never exist. It happens inside the
model's own forward, so that autocast, sharding and whatever else surrounds it are as in training.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .layers import models_of_transformers

#: The label of positions without one, as torch's cross_entropy has it.
IGNORED = -100
#: Bytes of float32 logits at a time. By rows, smaller pieces are no faster on a CPU either: each reads the weight.
PIECE_BYTES = 1 << 28
#: The same on a CPU by parts of the vocabulary: fits in its cache, and is taken again by the next piece.
CACHED_BYTES = 1 << 22


def why_not(model: nn.Module, batch: Mapping[str, Any]) -> str | None:
    """Why the loss on `batch` cannot be computed here, in words; None if it may."""
    language_model = _language_model(model)
    if language_model is None:
        return "the model is none of transformers' with output embeddings"
    if getattr(language_model.config, "output_router_logits", False):
        return "it has an auxiliary loss of its router"
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.dim() != 2 or labels.is_floating_point():
        return "the batch has no labels [examples, tokens]"
    can_make_inputs = hasattr(language_model, "prepare_decoder_input_ids_from_labels")
    if language_model.config.is_encoder_decoder and "decoder_input_ids" not in batch and not can_make_inputs:
        return "the batch has no decoder_input_ids, and the model makes them in its forward only"
    return None


class Unsuitable(Exception):
    """Why the loss is not to be had from logits at labels alone, in words."""


class LabelLosses(NamedTuple):
    """The cross-entropy at every label, float32 [parts, labels]."""

    at_labels: torch.Tensor

    @property
    def values(self) -> list[float]:
        """The loss of each part; NaN without a label."""
        return self.at_labels.mean(1).tolist()


def at_predicting_positions(labels: torch.Tensor, shift: int) -> torch.Tensor:
    """Labels [rows, tokens] at the positions that predict them: label t at t − shift."""
    return F.pad(labels[:, shift:], (0, shift), value=IGNORED)


def compute(model: nn.Module, batch: Mapping[str, Any], shift: int, parts: int) -> LabelLosses:
    """Compute the losses of each of `parts` equal runs of rows with the same labels.

    Args:
        batch: with labels [rows, tokens].
        shift: the position that predicts label t is t − shift.

    Raises:
        Unsuitable: after the forward, where its output embeddings were not given the hidden states of the labels'
            positions, once, or labels are not of their vocabulary.
    """
    language_model = _language_model(model)
    labels = batch["labels"]
    targets = at_predicting_positions(labels, shift)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if _takes(language_model, "use_cache"):
        inputs["use_cache"] = False
    if language_model.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = language_model.prepare_decoder_input_ids_from_labels(labels=labels)
    found: list[torch.Tensor] = []
    doubts: list[str] = []

    def instead_of_logits(head: nn.Module, args: tuple) -> tuple | None:
        if found:
            doubts.append("its output embeddings are called twice in a forward")
        elif not args or args[0].dim() != 3 or args[0].shape[:2] != targets.shape:
            doubts.append(f"its output embeddings are not given one value for each of the labels {list(targets.shape)}")
        else:
            hidden, *others = args
            try:
                found.append(_cross_entropy(head, hidden, targets.to(hidden.device)))
                return hidden[:, :0], *others
            except Unsuitable as doubt:
                doubts.append(str(doubt))
        return None  # the forward goes on to its end, unchanged

    with language_model.get_output_embeddings().register_forward_pre_hook(instead_of_logits):
        model(**inputs)
    if doubts or not found:
        raise Unsuitable(doubts[0] if doubts else "its output embeddings are not called in a forward without labels")
    return LabelLosses(found[0].view(parts, -1) if len(found[0]) else found[0].new_empty(parts, 0))


def _cross_entropy(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute the cross-entropy at every target, in the order of rows: float32 [targets]."""
    counts = targets != IGNORED
    hidden, targets = hidden[counts], targets[counts]
    if type(head) is nn.Linear and type(head.weight) is nn.Parameter and "forward" not in vars(head):
        _check_vocabulary(targets, len(head.weight))
        return _by_vocabulary(head.weight, head.bias, hidden, targets)
    vocabulary = getattr(head, "out_features", 1 << 17)  # a quantised weight's shape does not say
    rows = max(1, PIECE_BYTES // (4 * vocabulary))
    losses = []
    for states, labels in zip(hidden.split(rows), targets.split(rows)):
        logits = head.forward(states)  # not the module: this is called by its hook
        _check_vocabulary(labels, logits.shape[-1])
        losses.append(F.cross_entropy(logits.float(), labels, reduction="none"))
    return torch.cat(losses)


def _check_vocabulary(targets: torch.Tensor, vocabulary: int) -> None:
    """Raise `Unsuitable` for a target out of range, which would end the process' use of a GPU."""
    if bool(((targets < 0) | (targets >= vocabulary)).any()):
        raise Unsuitable(f"a label is none of the {vocabulary} that its output embeddings tell apart")


def _by_vocabulary(
    weight: torch.Tensor, bias: torch.Tensor | None, hidden: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Compute the same for a plain linear head, whose weight [vocabulary, features] is read once, some words at a time
    for all targets: a running log Σ exp (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018)."""
    size = CACHED_BYTES if hidden.is_cpu else PIECE_BYTES
    words = max(256, size // (4 * max(1, len(hidden))) // 256 * 256)  # rows of logits begin aligned
    largest, total, at_target = (torch.full_like(targets, value, dtype=torch.float32) for value in (-math.inf, 0, 0))
    for first in range(0, len(weight), words):
        part = slice(first, first + words)
        logits = F.linear(hidden, weight[part], None if bias is None else bias[part])
        logits = logits.float()
        place = (targets - first).clamp(0, logits.shape[1] - 1)
        inside = targets - first == place
        at_target = torch.where(inside, logits.gather(1, place[:, None]).squeeze(1), at_target)
        before, largest = largest, torch.maximum(largest, logits.amax(1))
        total = total * (before - largest).exp() + logits.sub_(largest[:, None]).exp_().sum(1)
    return largest + total.log() - at_target


def output_embeddings(model: nn.Module) -> nn.Module:
    """Return the output embeddings of a model that `why_not` has nothing against."""
    return _language_model(model).get_output_embeddings()


def _language_model(model: nn.Module) -> nn.Module | None:
    outermost = next(iter(models_of_transformers(model)), None)
    return outermost if outermost is not None and isinstance(outermost.get_output_embeddings(), nn.Module) else None


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters
