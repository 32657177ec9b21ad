"""Computes the losses of the candidates, each with the adapters of some layers damped.

The plain path is the model's own loss, a forward a candidate. What makes it cheaper changes no number beyond rounding:

- logits only where there are labels, computed in pieces, no cache of keys and values (`label_losses.py`);
- several candidates in one forward: the batch once for each of them, the damping as a scaling a row of the LoRA op.

The first estimate compares them with the plain path on a few rows (`probe.py`). Any doubt means the plain path, with
the reason. What it found is part of the state, so that a resumed run computes as the one before it did.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..nn import LoRALinear
from . import label_losses, parallel, probe
from .config import ISTConfig
from .importance import evaluation
from .layers import Layer, is_compiled, is_sharded, rescaled

#: Estimates in which a GPU times both paths before it takes the faster; the first warms up.
TRIALS = 2
#: Rows on which the paths are compared.
PROBE = 2


class Estimator:
    """Computes the losses of candidates, each a set of damped layers.

    Args:
        model: in any mode; left as it was.
        layers: the layers of the model.
        config: `damping`, `estimator` and `candidates_per_forward` count.
        loss_of: (model, batch) → the loss; None for the model's own, as `probe.loss_in` finds it.
        group: processes that estimate together.

    Attributes:
        shift: how far labels stand after the position that predicts them, where the loss was seen to be the mean
            cross-entropy of the output embeddings at the labels; None where it is not.
        together: candidates a forward; None while a GPU is still being timed.
        why: the reasons for both, in a line; empty before the first estimate of a batch with labels.
        one_by_one: estimates that took the plain path though `shift` is known, by the reason in their batch.
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
        self.one_by_one: dict[str, int] = {}
        self._seconds: dict[int, list[float]] = {}

    def __call__(self, sets: Sequence[Sequence[int]], batch: Mapping[str, Any]) -> tuple[list[float], float]:
        """Return the loss of each candidate on `batch`, and their weight beside those of other processes: the number of
        labels that count, or of examples where there are no labels."""
        with evaluation(self.model):
            if not self.why:
                self._look(sets, batch)
            if self.shift is not None:
                losses, doubt = None, label_losses.why_not(self.model, batch)
                if self._everywhere(doubt is None):
                    losses, doubt = self._cheaply(sets, batch)
                if self._everywhere(losses is not None):
                    return losses, weight_of(batch, self.shift)
                doubt = doubt or "another process has a batch of another kind"
                self.one_by_one[doubt] = self.one_by_one.get(doubt, 0) + 1
            return self._one_by_one(sets, batch), weight_of(batch, 0)

    def _cheaply(
        self, sets: Sequence[Sequence[int]], batch: Mapping[str, Any]
    ) -> tuple[list[float] | None, str | None]:
        """Return the losses at labels, or None and what stands against them in this batch."""
        if self.together == 1 or not self._everywhere(_why_not_repeated(batch) is None):
            return self._tried(sets, batch, 1)
        if self.together is None:
            return self._timed(sets, batch)
        try:
            return self._tried(sets, batch, self.together)
        except torch.OutOfMemoryError:  # a longer batch than those before
            torch.cuda.empty_cache()
            return self._tried(sets, batch, 1)

    def _tried(
        self, sets: Sequence[Sequence[int]], batch: Mapping[str, Any], together: int
    ) -> tuple[list[float] | None, str | None]:
        try:
            return self._at_labels(sets, batch, together), None
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever it is: the model's own forward says whether it is the batch's fault
            doubt = _in_words(error)
            warnings.warn(f"IST: an estimate takes the model's own loss, a forward a candidate: {doubt}", stacklevel=2)
            return None, doubt

    def state_dict(self) -> dict[str, Any]:
        names = ("shift", "together", "why", "one_by_one")
        return {name: getattr(self, name) for name in names} | {"one_by_one": dict(self.one_by_one)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.shift, self.together, self.why = state["shift"], state["together"], state["why"]
        self.one_by_one = dict(state["one_by_one"])
        self._seconds = {}

    def _one_by_one(self, sets: Sequence[Sequence[int]], batch: Mapping[str, Any]) -> list[float]:
        losses = []
        for chosen in sets:
            with rescaled(self.layers, self._factors([chosen], rows=None)):
                loss = self._loss(batch)
            losses.append(loss.item())
        return losses

    def _loss(self, batch: Mapping[str, Any]) -> torch.Tensor:
        if self.loss_of is not None:
            return probe.loss_in(self.loss_of(self.model, batch), "loss_of")
        return probe.loss_in(self.model(**batch))

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
        """Return each layer's factor of the scaling: a number for one candidate, or [candidates · rows, 1]."""
        factors = [[self.config.damping if i in chosen else 1.0 for chosen in sets] for i in range(len(self.layers))]
        if rows is None and not any(is_compiled(layer.module) for layer in self.layers):
            return [factor for (factor,) in factors]
        # They are tensors, so that no compiled graph contains their values.
        found = [torch.tensor(row, device=layer.parameters[0].device) for row, layer in zip(factors, self.layers)]
        return [row[0] if rows is None else row.repeat_interleave(rows).unsqueeze(1) for row in found]

    def _device(self) -> torch.device:
        return self.layers[0].parameters[0].device

    def _everywhere(self, condition: bool) -> bool:
        """Return whether all processes say so: their forwards have to be of one kind."""
        return parallel.everywhere(condition, self._device(), self.group)

    def _anywhere(self, condition: bool) -> bool:
        return not self._everywhere(not condition)

    def _look(self, sets: Sequence[Sequence[int]], batch: Mapping[str, Any]) -> None:
        """Decide what takes the place of the plain path from now on: what gives the same losses on a few rows."""
        if self.config.estimator == "one-by-one":
            self.why = "the model's own loss, a forward a candidate, as asked for"
            return
        reason = "it has a loss_of of its own" if self.loss_of else label_losses.why_not(self.model, batch)
        shapes: dict[str, torch.Size] = {}
        plain, rows = None, batch
        if self._everywhere(reason is None):
            rows = _probe(batch)
            plain, reason = self._plainly(sets[-1], rows, shapes)
            if not self._anywhere(plain is not None or reason is not None):
                return  # no process has a label that counts: a later batch will show
        if self._everywhere(reason is None):
            reason = self._why_not_same(sets[-1:], plain, rows)
            # A process whose batch has no label that counts follows the others.
            votes = [float(plain is not None and reason is None and plain.shift == shift) for shift in (0, 1)]
            votes = parallel.joined_losses(votes, float(plain is not None), self._device(), self.group)
            self.shift = next((shift for shift, share in enumerate(votes) if share == 1.0), None)
        if self.shift is None:
            reason = reason or "another process has a batch of another kind"
            self.why = f"the model's own loss, a forward a candidate: {reason}"
        else:
            self.together, why = self._share(sets, shapes, plain, rows)
            self.why = f"logits at labels only; {why}"

    def _plainly(
        self, chosen: Sequence[int], batch: Mapping[str, Any], shapes: dict[str, torch.Size]
    ) -> tuple[probe.Plain | None, str | None]:
        """Run the plain path with `chosen` damped: return what it shows, or why it is the only one, or neither without
        a label that counts or a finite loss. Fills `shapes` with those of the adapters' inputs, by name."""
        try:
            with (
                rescaled(self.layers, self._factors([chosen], rows=None)),
                _recorded(self.layers, shapes),
                probe.recorded_calls(self.model) as calls,
            ):
                outputs = self.model(**batch)
            if not weight_of(batch, 1) or not math.isfinite(probe.loss_in(outputs).item()):
                return None, None
            return probe.examined(self.model, outputs, calls, batch["labels"]), None
        except Exception as error:  # a few rows alone may raise: the whole batch says whether it is its fault
            return None, _in_words(error)

    def _share(
        self,
        sets: Sequence[Sequence[int]],
        shapes: Mapping[str, torch.Size],
        plain: probe.Plain | None,
        batch: Mapping[str, Any],
    ) -> tuple[int | None, str]:
        """Return how many candidates a forward takes from now on (None: to be timed), and why."""
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
            reason = self._why_not_same(sets, plain, batch)
        if not self._everywhere(reason is None):
            return 1, f"a forward a candidate: {reason or 'another process has a batch of another kind'}"
        if asked is None:
            return None, "how many candidates share a forward is being timed"
        return asked, f"{asked} candidates a forward, as asked for"

    def _why_not_same(
        self, sets: Sequence[Sequence[int]], plain: probe.Plain | None, batch: Mapping[str, Any]
    ) -> str | None:
        """Return why one forward for all of `sets`, of logits at labels alone, does not give the last of them the
        losses of the plain path; None if it does. All processes run it, also those without a label."""
        shift = plain.shift if plain is not None else 1
        try:
            factors = self._factors(sets, len(batch["labels"]) if len(sets) > 1 else None)
            with rescaled(self.layers, factors):
                found = label_losses.compute(self.model, _repeated(batch, len(sets)), shift, len(sets))
        except Exception as error:  # also a layer that does not run fused after all
            return _in_words(error)
        why = plain.why_not(found.at_labels[-1]) if plain is not None else None
        return why and (f"sharing one gives {why}" if len(sets) > 1 else f"logits at labels alone give {why}")

    def _timed(self, sets: Sequence[Sequence[int]], batch: Mapping[str, Any]) -> tuple[list[float] | None, str | None]:
        """Time a forward a candidate and one for all on the same batch, until it is known which is faster."""
        for together in (1, len(sets)):
            _synchronize(self._device())
            began = time.perf_counter()
            try:
                result = self._tried(sets, batch, together)
                elapsed = time.perf_counter() - began if result[0] is not None else math.inf
            except torch.OutOfMemoryError:
                if together == 1:
                    raise
                torch.cuda.empty_cache()
                elapsed = math.inf
            # The mean of all processes, so that all choose the same.
            self._seconds.setdefault(together, []).extend(
                parallel.joined_losses([elapsed], 1.0, self._device(), self.group)
            )
        if len(self._seconds[1]) == TRIALS:
            self.together = min(self._seconds, key=lambda together: self._seconds[together][-1])
            times = ", ".join(f"{number} a forward {last[-1] * 1e3:.0f} ms" for number, last in self._seconds.items())
            self.why = f"logits at labels only; candidates measured: {times}"
        return result


@contextlib.contextmanager
def _recorded(layers: Sequence[Layer], shapes: dict[str, torch.Size]) -> Iterator[None]:
    """Fill `shapes` with the shape of the input of each scaled module, by name, in forwards inside the block."""
    with contextlib.ExitStack() as hooks:
        for layer in layers:
            for number, module in enumerate(layer.scaled):

                def record(module, args, kwargs, name=f"adapter {number} of {layer.name}"):
                    x = next(iter((*args, *kwargs.values())), None)
                    shapes[name] = x.shape if isinstance(x, torch.Tensor) else torch.Size()

                hooks.enter_context(module.register_forward_pre_hook(record, with_kwargs=True))
        yield


def _in_words(error: Exception) -> str:
    """Return the error as one line, with its type unless it is one of ours."""
    line = next(iter(str(error).splitlines()), "")
    return line if isinstance(error, label_losses.Unsuitable) else f"{type(error).__name__}: {line}"


def weight_of(batch: Mapping[str, Any], shift: int) -> float:
    """Count the labels that have a position `shift` before them and are not ignored; in other batches the examples."""
    labels = batch.get("labels")
    if isinstance(labels, torch.Tensor) and labels.dim() == 2:
        return float((labels[:, shift:] != label_losses.IGNORED).sum())
    return float(next((len(v) for v in batch.values() if isinstance(v, torch.Tensor) and v.dim()), 1))


def _probe(batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a few rows with labels, or the whole batch where rows cannot be told apart."""
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
    """Apply `change` to what has a row for each example, and return the new batch."""
    rows = len(batch["labels"])

    def has_rows(value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == rows

    return {name: change(value) if has_rows(value) else value for name, value in batch.items()}


def _why_not_repeated(batch: Mapping[str, Any]) -> str | None:
    """Say why the batch cannot stand several times in one forward; None if it can."""
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
            # The class is known by name: that integration needs PEFT, which the package does not.
            if not isinstance(module, LoRALinear) and type(module).__name__ != "FusedLoraLinear":
                kind = type(module).__name__
                return f"{layer.name} has a {kind} that takes no scaling a row (see integrations.peft.accelerate)"
    return None
