"""The losses of the candidates: with the adapters of some layers damped, what is the loss?

The plain way is the model's own loss, a forward a candidate. What makes it cheaper changes no number beyond rounding:

- logits only where there are labels, computed in pieces, no cache of keys and values (`label_losses.py`);
- several candidates in one forward: the batch once for each of them, the damping as a scaling a row of the LoRA op.

The first estimate compares them with the plain way on a few rows. What it found is part of the state, so that a resumed
run computes as the one before it did.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..nn import LoRALinear
from . import label_losses, parallel
from .config import ISTConfig
from .importance import evaluation
from .layers import Layer, is_compiled, is_sharded, rescaled

#: Estimates that are timed both ways on a GPU before the faster is kept; the first warms up.
TRIALS = 2
#: Rows on which the ways are compared.
PROBE = 2


class Estimator:
    """Losses of candidates, each a set of damped layers.

    Args:
        model: in any mode; left as it was.
        layers: of it.
        config: `damping`, `estimator` and `candidates_per_forward` count.
        loss_of: (model, batch) → the loss; None for the model's own, `model(**batch).loss`.
        group: processes that estimate together.

    Attributes:
        shift: how far labels stand after the position that predicts them, where the loss was seen to be the mean
            cross-entropy of the output embeddings at the labels; None where it is not.
        together: candidates a forward; None while a GPU is still being timed.
        why: the reasons for both, in a line; empty before the first estimate.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        config: ISTConfig,
        loss_of: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor] | None,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        self.model, self.layers, self.config, self.loss_of, self.group = model, layers, config, loss_of, group
        self.shift: int | None = None
        self.together: int | None = 1
        self.why = ""
        self._seconds: dict[int, list[float]] = {}

    def __call__(self, sets: Sequence[Sequence[int]], batch: Mapping[str, Any]) -> tuple[list[float], float]:
        """The loss of each candidate on `batch`, and what they weigh beside those of other processes: the number of
        labels that count, or of examples where there are no labels."""
        with evaluation(self.model):
            if not self.why:
                self._look(sets, batch)
            if self.shift is None or not self._everywhere(label_losses.why_not(self.model, batch) is None):
                return self._one_by_one(sets, batch), _weight(batch, 0)
            weight = _weight(batch, self.shift)
            if self.together == 1 or not self._everywhere(_why_not_repeated(batch) is None):
                return self._at_labels(sets, batch, 1), weight
            if self.together is None:
                return self._timed(sets, batch), weight
            try:
                return self._at_labels(sets, batch, self.together), weight
            except torch.cuda.OutOfMemoryError:  # a longer batch than those before
                torch.cuda.empty_cache()
                return self._at_labels(sets, batch, 1), weight

    def state_dict(self) -> dict[str, Any]:
        return {"shift": self.shift, "together": self.together, "why": self.why}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.shift, self.together, self.why = state["shift"], state["together"], state["why"]
        self._seconds = {}

    def _one_by_one(self, sets: Sequence[Sequence[int]], batch: Mapping[str, Any]) -> list[float]:
        losses = []
        for chosen in sets:
            with rescaled(self.layers, self._factors([chosen], rows=None)):
                loss = self.loss_of(self.model, batch) if self.loss_of else self.model(**batch).loss
            if loss is None:
                raise ValueError("IST: expected model(**batch) to give a loss, got None: give a loss_of")
            losses.append(float(loss))
        return losses

    def _at_labels(self, sets: Sequence[Sequence[int]], batch: Mapping[str, Any], together: int) -> list[float]:
        rows, losses = batch["labels"].shape[0], []
        for first in range(0, len(sets), together):
            part = sets[first : first + together]
            factors = self._factors(part, rows if len(part) > 1 else None)
            with rescaled(self.layers, factors):
                repeated = _repeated(batch, len(part))
                losses += label_losses.compute(self.model, repeated, self.shift, len(part)).values
        return losses

    def _factors(self, sets: Sequence[Sequence[int]], rows: int | None) -> list[float | torch.Tensor]:
        """For each layer what its scaling is multiplied by: a number for one candidate, or [candidates · rows, 1]."""
        factors = [[self.config.damping if i in chosen else 1.0 for chosen in sets] for i in range(len(self.layers))]
        if rows is None and not any(is_compiled(layer.module) for layer in self.layers):
            return [factor for (factor,) in factors]
        # As tensors, so that nothing that was compiled has their values in it.
        found = [torch.tensor(row, device=layer.parameters[0].device) for row, layer in zip(factors, self.layers)]
        return [row[0] if rows is None else row.repeat_interleave(rows).unsqueeze(1) for row in found]

    def _device(self) -> torch.device:
        return self.layers[0].parameters[0].device

    def _everywhere(self, condition: bool) -> bool:
        """Whether all processes say so: their forwards have to be of one kind."""
        return parallel.everywhere(condition, self._device(), self.group)

    def _look(self, sets: Sequence[Sequence[int]], batch: Mapping[str, Any]) -> None:
        """What may take the place of the plain way from now on: that which gives the same on a few rows."""
        if self.config.estimator == "one-by-one":
            self.why = "the model's own loss, a forward a candidate, as asked for"
            return
        reason = "it has a loss_of of its own" if self.loss_of else label_losses.why_not(self.model, batch)
        if self._everywhere(reason is None):
            probe = _probe(batch)
            with _shapes_of_inputs(self.layers) as shapes:
                (expected,) = self._one_by_one(sets[-1:], probe)
            self.shift = self._find_shift(sets[-1], expected, probe)
            reason = "it is not the mean cross-entropy of the logits at the labels"
        if self.shift is None:
            reason = reason or "another process has a batch of another kind"
            self.why = f"the model's own loss, a forward a candidate: {reason}"
        else:
            self.together, why = self._share(sets, shapes, expected, probe)
            self.why = f"logits at labels only; {why}"

    def _find_shift(self, chosen: Sequence[int], expected: float, batch: Mapping[str, Any]) -> int | None:
        """How far labels stand after the position that predicts them, judged by the loss with `chosen` damped."""
        with rescaled(self.layers, self._factors([chosen], rows=None)):
            found = {shift: label_losses.compute(self.model, batch, shift, 1) for shift in (0, 1)}
        # Losses of a model that has learnt nothing are near each other: the nearest.
        shift = min(found, key=lambda shift: abs(found[shift].values[0] - expected))
        close = label_losses.is_close(found[shift].values[0], expected, found[shift].dtype)
        votes = [float(close and shift == each) for each in found]
        # A process whose batch has no label that counts follows the others.
        votes = parallel.joined_losses(votes, float(_weight(batch, 0) > 0), self._device(), self.group)
        return next((each for each, share in zip(found, votes) if share == 1.0), None)

    def _share(
        self, sets: Sequence[Sequence[int]], shapes: Mapping[str, torch.Size], expected: float, batch: Mapping[str, Any]
    ) -> tuple[int | None, str]:
        """How many candidates a forward from now on (None: to be timed), and why."""
        asked, device = self.config.candidates_per_forward, self._device()
        if asked == 1:
            return 1, "a forward a candidate, as asked for"
        if asked is None and device.type != "cuda":
            return 1, "a forward a candidate: sharing one saves nothing on a CPU"
        rows = batch["labels"].shape[0]
        reason = _why_not_fused(self.layers) or _why_not_repeated(batch)
        for name, shape in shapes.items():
            if len(shape) < 3 or shape[0] != rows:
                reason = reason or f"{name} is given {list(shape)}, not the {rows} examples one after another"
        if asked is None and is_sharded(self.model):
            reason = reason or "the model is sharded, and a process out of memory would leave the others waiting"
        if self._everywhere(reason is None):
            reason = self._why_not_same(sets, expected, batch)
        if not self._everywhere(reason is None):
            return 1, f"a forward a candidate: {reason or 'another process has a batch of another kind'}"
        if asked is None:
            return None, "how many candidates share a forward is being timed"
        return asked, f"{asked} candidates a forward, as asked for"

    def _why_not_same(self, sets: Sequence[Sequence[int]], expected: float, batch: Mapping[str, Any]) -> str | None:
        """Why one forward for all of `sets` does not give the last of them its loss; None if it does."""
        try:
            found = self._at_labels(sets, batch, len(sets))[-1]
        except ValueError as error:  # a layer that does not run fused after all
            return str(error)
        if math.isnan(expected) or label_losses.is_close(found, expected):
            return None
        return f"sharing one changed a loss from {expected:.6f} to {found:.6f}"

    def _timed(self, sets: Sequence[Sequence[int]], batch: Mapping[str, Any]) -> list[float]:
        """A forward a candidate and one for all, on the same batch, until it is known which is faster."""
        for together in (1, len(sets)):
            _synchronize(self._device())
            began = time.perf_counter()
            try:
                losses = self._at_labels(sets, batch, together)
                elapsed = time.perf_counter() - began
            except torch.cuda.OutOfMemoryError:
                if together == 1:
                    raise
                torch.cuda.empty_cache()
                elapsed = math.inf
            # The mean of all processes, so that all choose the same.
            self._seconds.setdefault(together, []).extend(
                parallel.joined_losses([elapsed], 1.0, self._device(), self.group)
            )
        if len(self._seconds[1]) == TRIALS:
            self.together = min(self._seconds, key=lambda ways: self._seconds[ways][-1])
            times = ", ".join(f"{ways} a forward {last[-1] * 1e3:.0f} ms" for ways, last in self._seconds.items())
            self.why = f"logits at labels only; candidates measured: {times}"
        return losses


class _shapes_of_inputs:
    """By name, the shape that each scaled module of the layers was given."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers, self.shapes, self.handles = layers, {}, []

    def __enter__(self) -> dict[str, torch.Size]:
        for layer in self.layers:
            for number, module in enumerate(layer.scaled):

                def record(module, args, kwargs, name=f"adapter {number} of {layer.name}"):
                    x = next(iter((*args, *kwargs.values())), None)
                    self.shapes[name] = x.shape if isinstance(x, torch.Tensor) else torch.Size()

                self.handles.append(module.register_forward_pre_hook(record, with_kwargs=True))
        return self.shapes

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()


def _weight(batch: Mapping[str, Any], shift: int) -> float:
    labels = batch.get("labels")
    if isinstance(labels, torch.Tensor) and labels.dim() == 2:
        return float((labels[:, shift:] != label_losses.IGNORED).sum())
    return float(next((len(v) for v in batch.values() if isinstance(v, torch.Tensor) and v.dim()), 1))


def _probe(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """A few rows with labels, where rows can be told apart."""
    if _why_not_repeated(batch):
        return batch
    labels = batch["labels"]
    has_label = (labels != label_losses.IGNORED).any(1)
    labelled = has_label.nonzero().flatten()[:PROBE] if has_label.any() else slice(PROBE)
    return _of_rows(batch, lambda value: value[labelled])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _repeated(batch: Mapping[str, Any], times: int) -> Mapping[str, Any]:
    if times == 1:
        return batch
    return _of_rows(batch, lambda value: value.repeat(times, *[1] * (value.dim() - 1)))


def _of_rows(batch: Mapping[str, Any], change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """The batch with what has a row for each example changed."""
    rows = len(batch["labels"])

    def has_rows(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == rows

    return {name: change(value) if has_rows(value) else value for name, value in batch.items()}


def _why_not_repeated(batch: Mapping[str, Any]) -> str | None:
    """Why the batch cannot stand several times in one forward, in words; None if it can."""
    rows = batch["labels"].shape[0]
    for name, value in batch.items():
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] not in (1, rows):
            return f"{name} {list(value.shape)} has no row for each of the {rows} examples"
        if name.startswith(("cu_seq_lens", "max_length_")) or name == "seq_idx":
            return f"the batch is packed ({name})"
    positions = batch.get("position_ids")
    if isinstance(positions, torch.Tensor) and bool((positions.diff(dim=-1) < 0).any()):
        return "the batch is packed (position_ids begin anew within a row)"
    return None


def _why_not_fused(layers: Sequence[Layer]) -> str | None:
    for layer in layers:
        for module in layer.scaled:
            # By name: that integration needs PEFT, which the package does not.
            if not isinstance(module, LoRALinear) and type(module).__name__ != "FusedLoraLinear":
                kind = type(module).__name__
                return f"{layer.name} has a {kind} that takes no scaling a row (see integrations.peft.accelerate)"
    return None
