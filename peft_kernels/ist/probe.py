"""Tests, by one plain forward of a few rows, whether logits at labels alone give the model's own loss.

Losses are compared where rounding is known, not as two numbers that went through two forwards:

- The model's loss with the mean cross-entropy of the logits that it computed itself, in float64. Between these lies the
  rounding of log Σ exp and of a mean, whatever the model.
- The logits that it returns with what its output embeddings gave: nothing caps or scales them on the way.
- The cross-entropy at each label, not their mean, with that of a forward of the cheaper path. Between these lies what
  kernels round in a forward, relative to the logits: see `forward_error`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .label_losses import IGNORED, PIECE_BYTES, Unsuitable, at_predicting_positions, output_embeddings

#: Roundings one after another on the way to a logit, and terms of the sums on it: either adds up as its square root.
ROUNDINGS, TERMS = 256, 1024
#: Unit roundoff, 2⁻²⁴ for float32, of products that torch was told to take more lightly.
LIGHTER = {"tf32": 2.0**-11, "bf16": 2.0**-8}


class Plain(NamedTuple):
    """The result of the plain path on a few rows.

    Attributes:
        shift: how far labels stand after the position that predicts them.
        losses: float64 [labels]: the cross-entropy at each label.
        error: bound on the root mean square of what another path may differ by at a label.
    """

    shift: int
    losses: torch.Tensor
    error: float

    def why_not(self, found: torch.Tensor) -> str | None:
        """Say why these losses [labels] of another path are others; None if they differ by rounding only."""
        if found.shape != self.losses.shape:
            return f"{len(found)} labels, not {len(self.losses)}"
        difference = (found.double() - self.losses).square().mean().sqrt().item()
        if difference <= self.error:  # not so for NaN
            return None
        return (
            f"a loss of {found.double().mean().item():.6f}, not {self.losses.mean().item():.6f}: labels differ by "
            f"{difference:.1e}, and rounding explains {self.error:.1e}"
        )


class Calls:
    """Counts the calls of the output embeddings in a forward, and holds what the first was given and gave."""

    def __init__(self) -> None:
        self.count = 0
        self.given: Any = None
        self.gave: Any = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if not self.count:
            self.given, self.gave = next(iter((*args, *kwargs.values())), None), output
        self.count += 1


@contextlib.contextmanager
def recorded_calls(model: nn.Module) -> Iterator[Calls]:
    """Record the calls of the model's output embeddings inside the block."""
    calls = Calls()
    with output_embeddings(model).register_forward_hook(calls, with_kwargs=True):
        yield calls


def loss_in(outputs: Any, source: str = "model(**batch)") -> torch.Tensor:
    """Return the loss as transformers' Trainer takes it: `outputs["loss"]`, the first of a tuple; also an attribute
    `loss`, or a tensor that is the loss itself.

    Raises:
        ValueError: where there is none of one number.
    """
    loss = outputs
    if isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    elif hasattr(outputs, "loss"):
        loss = outputs.loss
    elif isinstance(outputs, (tuple, list)):
        loss = outputs[0] if outputs else None
    if isinstance(loss, (int, float)):
        loss = torch.tensor(float(loss))
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return loss.detach()
    got = (
        f"a tensor {list(loss.shape)}"
        if isinstance(loss, torch.Tensor)
        else loss
        if loss is None
        else type(loss).__name__
    )
    if loss is None and isinstance(outputs, Mapping):
        got = f"None beside {', '.join(map(str, outputs)) or 'nothing'}"
    raise ValueError(f"IST: expected {source} to give a loss of one number, got {got}: give a loss_of")


def forward_error(dtype: torch.dtype, device: torch.device) -> float:
    """Bound the difference of two forwards whose kernels sum in another order, relative to the logits: it is that of
    roundings to `dtype` one after another, each of a sum that is accumulated in float32 at least."""
    unit = torch.finfo(dtype).eps / 2
    accumulated = min(unit, 2.0**-24)
    if dtype == torch.float32:
        matmul = torch.backends.cuda.matmul if device.type == "cuda" else torch.backends.mkldnn.matmul
        unit = LIGHTER.get(matmul.fp32_precision, unit)
    return math.sqrt(ROUNDINGS) * (unit + math.sqrt(TERMS) * accumulated)


def evaluation_error(vocabulary: int, largest: float) -> float:
    """Bound the error of a float32 cross-entropy of logits up to ±`largest`: log Σ exp sums `vocabulary` terms."""
    return 4 * 2.0**-24 * (math.sqrt(vocabulary) + largest + math.log(vocabulary))


def examined(model: nn.Module, outputs: Any, calls: Calls, labels: torch.Tensor) -> Plain:
    """Return what a forward of the plain path shows.

    Args:
        outputs: what the model's forward with `labels` [rows, tokens] returned.
        calls: the calls of its output embeddings in that forward.

    Raises:
        Unsuitable: with the reason why the loss is not to be had from logits at labels alone.
    """
    if calls.count != 1:
        raise Unsuitable(f"its output embeddings are called {calls.count} times in a forward, not once")
    for tensor, what in ((calls.given, "are given"), (calls.gave, "give")):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point() or tensor.dim() != 3:
            raise Unsuitable(
                f"its output embeddings {what} no values [examples, tokens, …] (of another module's kind?)"
            )
        if tensor.shape[:2] != labels.shape:
            raise Unsuitable(f"its output embeddings {what} {list(tensor.shape)} for labels {list(labels.shape)}")
    logits, returned = calls.gave, _logits_in(outputs)
    if returned is not None and returned.shape != logits.shape:
        raise Unsuitable(f"its logits are {list(returned.shape)}, its output embeddings give {list(logits.shape)}")
    loss = loss_in(outputs)
    found = [_at_labels(logits, returned, labels, shift) for shift in (0, 1)]
    # Losses of a model that has learnt nothing are near each other: the nearest.
    shift = min((0, 1), key=lambda shift: abs(found[shift].losses.mean().item() - loss.item()))
    here = found[shift]
    not_the_loss = "it is not the mean cross-entropy of the logits at the labels"
    unit = torch.finfo(logits.dtype).eps / 2
    if not here.changed <= 2 * (unit + 2.0**-20) * here.size:
        raise Unsuitable(f"{not_the_loss}: they are changed after the output embeddings")
    expected, count = here.losses.mean().item(), len(here.losses)
    evaluation = evaluation_error(logits.shape[2], here.largest)
    mean = (4 * 2.0**-24 * math.sqrt(count) + torch.finfo(loss.dtype).eps) * abs(expected)
    if not abs(loss.item() - expected) <= evaluation + mean:
        raise Unsuitable(f"{not_the_loss}: {loss.item():.6f}, not {expected:.6f}")
    error = 2 * forward_error(_coarsest(model, calls), logits.device) * here.size + evaluation
    return Plain(shift, here.losses, error)


class _AtLabels(NamedTuple):
    losses: torch.Tensor  # float64 [labels]
    size: float  # root mean square of the logits there
    changed: float  # root mean square of their difference from those that the model returns
    largest: float


def _at_labels(logits: torch.Tensor, returned: torch.Tensor | None, labels: torch.Tensor, shift: int) -> _AtLabels:
    """Compute the losses at the labels in float64, a piece of rows at a time."""
    targets = at_predicting_positions(labels, shift).flatten().to(logits.device)
    places = (targets != IGNORED).nonzero().squeeze(1)
    vocabulary = logits.shape[2]
    flat, theirs = logits.flatten(0, 1), None if returned is None else returned.flatten(0, 1)
    losses, squares, changes, largest = [], 0.0, 0.0, 0.0
    for rows in places.split(max(1, PIECE_BYTES // (8 * vocabulary))):
        piece, at = flat[rows].double(), targets[rows]
        if bool(((at < 0) | (at >= vocabulary)).any()):
            raise Unsuitable(f"a label is none of the {vocabulary} that its output embeddings tell apart")
        losses.append(F.cross_entropy(piece, at, reduction="none"))
        squares += piece.square().sum().item()
        largest = max(largest, piece.abs().max().item()) if len(piece) else largest
        if theirs is not None:
            changes += (theirs[rows].to(piece.device, torch.float64) - piece).square().sum().item()
    count = max(1, len(places)) * vocabulary
    return _AtLabels(torch.cat(losses), math.sqrt(squares / count), math.sqrt(changes / count), largest)


def _logits_in(outputs: Any) -> torch.Tensor | None:
    """Return the logits that the model returns, where it says which they are."""
    if isinstance(outputs, Mapping):
        found = outputs.get("logits")
    elif isinstance(outputs, (tuple, list)):  # transformers returns them after the loss
        found = outputs[1] if len(outputs) > 1 else None
    else:
        found = getattr(outputs, "logits", None)
    return found if isinstance(found, torch.Tensor) and found.is_floating_point() else None


def _coarsest(model: nn.Module, calls: Calls) -> torch.dtype:
    """Return the coarsest dtype that anything on the way to the logits is rounded to."""
    dtypes = {calls.given.dtype, calls.gave.dtype, *(parameter.dtype for parameter in model.parameters())}
    if torch.is_autocast_enabled(calls.gave.device.type):
        dtypes.add(torch.get_autocast_dtype(calls.gave.device.type))
    floating = (
        dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1
    )  # 8 bits: of quantised weights
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps)
