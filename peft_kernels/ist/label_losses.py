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
#: Of float32 logits that exist at a time. By rows, smaller pieces are no faster on a CPU either: each reads the weight.
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
    if not isinstance(labels, torch.Tensor) or labels.dim() != 2:
        return "the batch has no labels [examples, tokens]"
    can_make_inputs = hasattr(language_model, "prepare_decoder_input_ids_from_labels")
    if language_model.config.is_encoder_decoder and "decoder_input_ids" not in batch and not can_make_inputs:
        return "the batch has no decoder_input_ids, and the model makes them in its forward only"
    return None


class LabelLosses(NamedTuple):
    """The losses, and the dtype of the logits that they come from."""

    values: list[float]
    dtype: torch.dtype


def is_close(found: float, expected: float, dtype: torch.dtype = torch.float16) -> bool:
    """Whether two losses differ by the rounding of a mean over such logits only."""
    tolerance = 5e-4 if dtype.itemsize == 2 else 1e-5
    return abs(found - expected) <= tolerance * max(1.0, abs(expected))


def compute(model: nn.Module, batch: Mapping[str, Any], shift: int, parts: int) -> LabelLosses:
    """Mean cross-entropy at the labels of each of `parts` equal runs of rows with the same labels; NaN where the hidden
    states are not those of the labels' positions.

    Args:
        batch: with labels [rows, tokens].
        shift: the position that predicts label t is t − shift.
    """
    language_model = _language_model(model)
    labels = batch["labels"]
    targets = F.pad(labels[:, shift:], (0, shift), value=IGNORED)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if _takes(language_model, "use_cache"):
        inputs["use_cache"] = False
    if language_model.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = language_model.prepare_decoder_input_ids_from_labels(labels=labels)
    found = LabelLosses([float("nan")] * parts, torch.float32)

    def instead_of_logits(head: nn.Module, args: tuple) -> tuple:
        nonlocal found
        hidden, *others = args
        if hidden.shape[:2] == targets.shape:
            losses, dtype = _cross_entropy(head, hidden, targets)
            found = LabelLosses(losses.view(parts, -1).mean(1).tolist(), dtype)
        return hidden[:, :0], *others

    handle = language_model.get_output_embeddings().register_forward_pre_hook(instead_of_logits)
    try:
        model(**inputs)
    finally:
        handle.remove()
    return found


def _cross_entropy(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.dtype]:
    """At every target, in the order of rows: float32 [targets]; and the dtype of the logits."""
    counts = targets != IGNORED
    hidden, targets = hidden[counts], targets[counts]
    if type(head) is nn.Linear and type(head.weight) is nn.Parameter and "forward" not in vars(head):
        return _by_vocabulary(head.weight, head.bias, hidden, targets)
    vocabulary = getattr(head, "out_features", 1 << 17)  # of a quantised weight the shape does not say
    rows = max(1, PIECE_BYTES // (4 * vocabulary))
    losses = []
    for states, labels in zip(hidden.split(rows), targets.split(rows)):
        logits = head.forward(states)  # not the module: this is called by its hook
        losses.append(F.cross_entropy(logits.float(), labels, reduction="none"))
    return torch.cat(losses), logits.dtype


def _by_vocabulary(
    weight: torch.Tensor, bias: torch.Tensor | None, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.dtype]:
    """The same for a plain linear head, its weight [vocabulary, features] read once: some words at a time for all
    targets, log Σ exp gathered on the way (Milakov and Gimelshein, Online normalizer calculation for softmax, 2018)."""
    size = CACHED_BYTES if hidden.is_cpu else PIECE_BYTES
    words = max(256, size // (4 * max(1, len(hidden))) // 256 * 256)  # rows of logits begin aligned
    largest, total, at_target = (torch.full_like(targets, value, dtype=torch.float32) for value in (-math.inf, 0, 0))
    for first in range(0, len(weight), words):
        part = slice(first, first + words)
        logits = F.linear(hidden, weight[part], None if bias is None else bias[part])
        dtype, logits = logits.dtype, logits.float()
        place = (targets - first).clamp(0, logits.shape[1] - 1)
        inside = targets - first == place
        at_target = torch.where(inside, logits.gather(1, place[:, None]).squeeze(1), at_target)
        before, largest = largest, torch.maximum(largest, logits.amax(1))
        total = total * (before - largest).exp() + logits.sub_(largest[:, None]).exp_().sum(1)
    return largest + total.log() - at_target, dtype


def _language_model(model: nn.Module) -> nn.Module | None:
    outermost = next(iter(models_of_transformers(model)), None)
    return outermost if outermost is not None and isinstance(outermost.get_output_embeddings(), nn.Module) else None


def _takes(model: nn.Module, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters
