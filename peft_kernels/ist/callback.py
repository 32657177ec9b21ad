"""IST in transformers' Trainer, and in whatever trains by its loop (TRL's SFTTrainer)."""

from __future__ import annotations

import inspect
import json
import sys
import threading
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

from .config import ISTConfig
from .ist import IST
from .parallel import rank_and_world
from .samplers import Fixed, make_sampler


class ISTCallback(TrainerCallback, ExportableState):
    """`Trainer(…, callbacks=[ISTCallback()])`: before every step of the optimizer, the layers that train in it.

    The estimate's batch comes from the training dataset and its collator, by an order of its own seed, so that the
    order of training is what it would have been. The state goes into Trainer's checkpoints and comes back from them.

    Args:
        config: the quantities of the algorithm.
        layers, is_adapter, loss_of: as :class:`IST` has them.
        batch_source: returns the batch of an estimate, instead.

    With "tensorboard" among Trainer's `report_to`, every estimate is written to `<output_dir>/runs/ist`.

    Raises, when training begins:
        ValueError: as :class:`IST` does, for a dataset without a length and no batch_source, and for `torch_compile`,
            which compiles the whole model.

    Attributes:
        ist: the :class:`IST`, from the beginning of training on; `print(callback.ist)`, `callback.ist.plot(path)`.
    """

    def __init__(
        self,
        config: ISTConfig | None = None,
        *,
        layers: Sequence[str] | None = None,
        is_adapter: Callable[[str, nn.Parameter], bool] | None = None,
        loss_of: Callable[[nn.Module, Mapping[str, Any]], torch.Tensor] | None = None,
        batch_source: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        self.config = config or ISTConfig()
        self.arguments = {"layers": layers, "is_adapter": is_adapter, "loss_of": loss_of}
        self.batch_source = batch_source
        self.ist: IST | None = None
        self.writer = None

    def on_train_begin(self, args, state, control, model=None, optimizer=None, train_dataloader=None, **kwargs) -> None:
        if args.torch_compile and not isinstance(make_sampler(self.config.sampler), Fixed):
            raise ValueError(
                "ISTCallback: expected torch_compile=False where layers change from step to step, got True: compile "
                "each block by itself (block.compile())"
            )
        if args.restore_callback_states_from_checkpoint:  # Trainer would make another callback, without a configuration
            raise ValueError(
                "ISTCallback: expected restore_callback_states_from_checkpoint=False, got True: it restores itself"
            )
        self._close()  # an earlier training may have been interrupted
        self.ist = IST(model, self.config, optimizer=optimizer, in_charge=_still_trains(), **self.arguments)
        # A checkpoint of a run without IST has no place for its state yet.
        saved = state.stateful_callbacks.setdefault(type(self).__name__, _state(None))
        if isinstance(saved, list):
            raise ValueError(f"ISTCallback: expected one of it in a Trainer, got {len(saved)}")
        if state.global_step > 0 and saved and saved["attributes"]["ist"]:
            self.ist.load_state_dict(_from_json(saved["attributes"]["ist"]))
        self.source = self.batch_source or self._from_dataset(train_dataloader)
        if "tensorboard" in args.report_to and state.is_world_process_zero:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(Path(args.output_dir) / "runs" / "ist"))

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        estimates = len(self.ist.history)
        self.ist.before_step(self.source)
        if self.writer is not None and len(self.ist.history) > estimates:
            self.ist.write(self.writer)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Let every adapter train again, so that evaluation and saving find the model as it came."""
        self._close()

    def _close(self) -> None:
        if self.ist is not None:
            self.ist.close()
        if self.writer is not None:
            self.writer.close()
            self.writer = None

    def state(self) -> dict[str, dict]:
        """Return the state that Trainer writes into a checkpoint, in types of JSON."""
        return _state(_to_json(self.ist.state_dict()) if self.ist else None)

    def _from_dataset(self, loader) -> Callable[[], Mapping[str, Any]]:
        """Return a function that draws the examples of an estimate from the seed and the estimate's number alone, so
        that a resumed run goes on with the same ones. Each process takes its share, one at the least."""
        dataset, collate, config = loader.dataset, loader.collate_fn, self.config
        rank, world = rank_and_world()
        if not hasattr(dataset, "__len__"):
            kind = type(dataset).__name__
            raise ValueError(f"ISTCallback: expected a dataset with a length or a batch_source, got {kind}")

        def batch() -> Mapping[str, Any]:
            generator = torch.Generator().manual_seed(config.seed + self.ist.estimates)
            chosen = torch.randint(len(dataset), (max(config.examples, world),), generator=generator)
            return collate([dataset[index] for index in chosen[rank::world].tolist()])

        return batch


def _still_trains() -> Callable[[], bool]:
    """Return a function that says whether the `train()` on the stack now still runs, if asked in the same thread.

    Trainer tells no callback of an error or an interrupt, and the next one that trains the model may be without this
    callback. What tells them apart is the call on the stack, and its state, which every `train()` makes anew.
    """
    mine, thread = _state_of_training(), threading.get_ident()
    return lambda: mine is None or thread != threading.get_ident() or _state_of_training() is mine


def _state_of_training() -> TrainerState | None:
    """Return the state of the Trainer whose `train()` is on the stack, or None."""
    code, frame = inspect.unwrap(Trainer.train).__code__, sys._getframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"].state


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint of a Trainer in `output_dir`, for `trainer.train(resume_from_checkpoint=…)`; None
    if there is none. One that was being written when the run was killed is passed over: Trainer writes its state last,
    and every *.safetensors, *.pt and *.pth has to be whole."""
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.name[11:].isdigit()]
    for folder in sorted(folders, key=lambda folder: int(folder.name[11:]), reverse=True):
        if _is_whole(folder):
            return str(folder)
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        for file in checkpoint.glob("*.safetensors"):
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all(zipfile.is_zipfile(file) for file in [*checkpoint.glob("*.pt"), *checkpoint.glob("*.pth")])


def _state(ist: dict[str, Any] | None) -> dict[str, dict]:
    return {"args": {}, "attributes": {"ist": ist}}


def _to_json(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in state.items()}


def _from_json(state: Mapping[str, Any]) -> dict[str, Any]:
    return dict(
        state,
        unimportance=torch.tensor(state["unimportance"], dtype=torch.float32),
        generator=torch.tensor(state["generator"], dtype=torch.uint8),
    )
