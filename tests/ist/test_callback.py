"""IST in transformers' Trainer: what it chooses, what it leaves alone, and going on from a checkpoint."""

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments, set_seed

import peft_kernels as pk
from tests.ist.test_ist import batch_for, llama, trainable

DATA = [{name: value[0] for name, value in batch_for(seed, rows=1).items()} for seed in range(64)]


class Recorder(pk.ist.ISTCallback):
    """Remembers what trained in each step."""

    def on_step_begin(self, args, state, control, **kwargs):
        super().on_step_begin(args, state, control, **kwargs)
        self.seen.append((state.global_step, tuple(self.ist.active)))

    def on_train_begin(self, *args, **kwargs):
        self.seen = []
        super().on_train_begin(*args, **kwargs)


def trainer_for(folder, steps=24, callback=None, data=DATA, **arguments):
    set_seed(0)
    callback = callback or Recorder(pk.ist.ISTConfig(interval=5, examples=8))
    settings = {
        "output_dir": str(folder), "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no",
    }  # fmt: skip
    trainer = Trainer(
        model=llama(), args=TrainingArguments(**(settings | arguments)), train_dataset=data, callbacks=[callback]
    )
    return trainer, callback


def test_trains_the_chosen_layers(tmp_path):
    trainer, callback = trainer_for(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.5)
    everything = trainable(trainer.model)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    assert [step for step, _ in callback.seen] == list(range(24))  # once an optimizer step, not once a micro-batch
    assert len(callback.ist.history) == 4
    assert trainable(trainer.model) == everything
    trained = {layer for _, layers in callback.seen for layer in layers}
    for name, value in trainer.model.state_dict().items():
        changes = "lora_" in name and any(f"layers.{index}." in name for index in trained)
        assert torch.equal(value, before[name]) != changes, name


def test_the_order_of_training_is_what_it_was(tmp_path):
    """Estimates draw examples of their own, and leave the generators alone."""
    seen = []

    def losses(callbacks):
        trainer, _ = trainer_for(tmp_path, steps=12, callback=callbacks)
        original = trainer.compute_loss

        def compute_loss(model, inputs, *args, **kwargs):
            seen.append(inputs["input_ids"][:, 0].tolist())
            return original(model, inputs, *args, **kwargs)

        trainer.compute_loss = compute_loss
        trainer.train()

    losses(pk.ist.ISTCallback(pk.ist.ISTConfig(sampler="rst")))
    losses(pk.ist.ISTCallback(pk.ist.ISTConfig(interval=3)))
    assert seen[:12] == seen[12:]


@pytest.mark.parametrize("stop", [4, 10, 16])
def test_resumed_equals_uninterrupted(tmp_path, stop):
    whole, callback = trainer_for(tmp_path / "whole")
    whole.train()
    first, _ = trainer_for(tmp_path / "cut", save_strategy="steps", save_steps=stop)
    first.train()  # the checkpoint of step `stop` is what a run killed after it would have left
    second, resumed = trainer_for(tmp_path / "cut")
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    assert resumed.seen == callback.seen[stop:]
    assert torch.equal(resumed.ist.unimportance, callback.ist.unimportance)
    assert resumed.ist.updates == callback.ist.updates
    for one, two in zip(whole.model.parameters(), second.model.parameters()):
        assert torch.equal(one, two)


def test_training_again_starts_anew(tmp_path):
    trainer, callback = trainer_for(tmp_path, steps=6)
    everything = trainable(trainer.model)

    def interrupted(*_):
        raise KeyboardInterrupt

    callback.batch_source = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainable(trainer.model) < everything
    callback.batch_source = None
    trainer.train()
    assert trainable(trainer.model) == everything
    assert callback.ist.step == 6 and len(callback.ist.layers) == 6


def test_a_stream_needs_a_batch_source(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(DATA)

    trainer, _ = trainer_for(tmp_path, data=Stream())
    with pytest.raises(ValueError, match="expected a dataset with a length or a batch_source"):
        trainer.train()
    trainer, callback = trainer_for(tmp_path, steps=6, data=Stream())
    callback.batch_source = lambda: batch_for(3)
    trainer.train()
    assert len(callback.ist.history) == 1
