"""IST in transformers' Trainer: what it chooses, what it leaves alone, and going on from a checkpoint."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

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
        model=llama(), args=TrainingArguments(**(settings | arguments)), train_dataset=data, eval_dataset=DATA[:8],
        callbacks=[callback],
    )  # fmt: skip
    return trainer, callback


def test_estimates_without_a_label_go_on_with_other_examples(tmp_path):
    """Nine examples in ten without a label, one an estimate."""
    data = [example | {"labels": example["labels"] if n % 10 == 0 else -100 * torch.ones_like(example["labels"])}
            for n, example in enumerate(DATA)]  # fmt: skip
    callback = Recorder(pk.ist.ISTConfig(interval=1, examples=1))
    trainer, _ = trainer_for(tmp_path, 41, callback, data, per_device_train_batch_size=16, save_strategy="steps",
                             save_steps=20, learning_rate=1e-3)  # fmt: skip
    trainer.train()
    ist = callback.ist
    assert 0 < len(ist.history) < 20 and ist.left_out == {"no label counted": 40 - len(ist.history)}
    assert ist.estimator.shift == 1, ist.estimator.why
    resumed = Recorder(callback.config)
    trainer, _ = trainer_for(tmp_path, 41, resumed, data, per_device_train_batch_size=16, learning_rate=1e-3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert resumed.ist.left_out == ist.left_out and torch.equal(resumed.ist.unimportance, ist.unimportance)


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
    assert trainable(trainer.model) == everything
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


def test_the_same_seed_trains_the_same_and_prints_nothing(tmp_path, capfd):
    runs = []
    for number in range(2):
        trainer, callback = trainer_for(tmp_path / str(number), steps=12)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        runs.append((callback.seen, callback.ist.unimportance.tolist(), list(trainer.model.parameters())))
    assert runs[0][:2] == runs[1][:2]
    assert all(torch.equal(one, other) for one, other in zip(runs[0][2], runs[1][2]))
    assert capfd.readouterr() == ("", "")


def test_killed_while_a_checkpoint_is_written(tmp_path):
    """The newest complete checkpoint is taken, whatever file of the next was cut short or not begun."""
    whole, callback = trainer_for(tmp_path / "whole")
    whole.train()
    folder = tmp_path / "cut"
    first, _ = trainer_for(folder, save_strategy="steps", save_steps=10)
    first.train()
    shutil.rmtree(folder / "checkpoint-24")
    newest, older = folder / "checkpoint-20", folder / "checkpoint-10"
    assert pk.ist.last_checkpoint(folder) == str(newest)
    for file in sorted(newest.iterdir()):
        if file.suffix in (".safetensors", ".pt", ".pth") or file.name == "trainer_state.json":
            content = file.read_bytes()
            file.write_bytes(content[: len(content) // 2])
            assert pk.ist.last_checkpoint(folder) == str(older), file.name
            file.write_bytes(content)
    (newest / "trainer_state.json").unlink()  # written last
    second, resumed = trainer_for(folder)
    second.train(resume_from_checkpoint=pk.ist.last_checkpoint(folder))
    assert resumed.seen == callback.seen[10:]
    for one, two in zip(whole.model.parameters(), second.model.parameters()):
        assert torch.equal(one, two)
    assert pk.ist.last_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize("delay", [0.0, 0.15])
def test_killed_at_any_time(tmp_path, delay):
    """A process that is killed while it trains and saves at every step: what it left is gone on from."""
    schedule = "lr_scheduler_type='constant'"  # the same however many steps there are to be
    program = (
        "import sys\nfrom pathlib import Path\nfrom tests.ist.test_callback import trainer_for\n"
        f"trainer_for(Path(sys.argv[1]), steps=200, save_strategy='steps', save_steps=1, {schedule})[0].train()"
    )
    folder = tmp_path / "cut"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", program, str(folder)], env=environment)
    while not (folder / "checkpoint-6").exists():  # then it is killed, wherever it is
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(delay)
    process.kill()
    process.wait()
    left = pk.ist.last_checkpoint(folder)
    saved = int(left.rpartition("-")[2])
    assert saved >= 5
    whole, callback = trainer_for(tmp_path / "whole", steps=saved + 6, lr_scheduler_type="constant")
    whole.train()
    second, resumed = trainer_for(folder, steps=saved + 6, lr_scheduler_type="constant")
    second.train(resume_from_checkpoint=left)
    assert resumed.seen == callback.seen[saved:]
    for one, two in zip(whole.model.parameters(), second.model.parameters()):
        torch.testing.assert_close(one, two)  # threads of another process: rounding may differ


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer, callback = trainer_for(tmp_path, steps=16, report_to="tensorboard")
    trainer.train()
    written = EventAccumulator(str(tmp_path / "runs" / "ist")).Reload()
    tags = written.Tags()["scalars"]
    assert {"ist/reward_spread", "ist/skipped_backward"} <= set(tags)
    name = callback.ist.layers[2].name
    values = [event.value for event in written.Scalars(f"ist_importance/{name}")]
    assert values == pytest.approx([importance[2] for _, importance, _ in callback.ist.history])
    assert len([tag for tag in tags if tag.startswith("ist_updates/")]) == 6


def test_torch_compile_of_the_whole_model_is_refused(tmp_path):
    trainer, _ = trainer_for(tmp_path, steps=2, torch_compile=True)
    with pytest.raises(
        ValueError, match="expected torch_compile=False where layers change from step to step, got True"
    ):
        trainer.train()


def test_state_of_frozen_layers_in_trainer(tmp_path):
    callback = Recorder(pk.ist.ISTConfig(interval=5, examples=8, frozen_state="drop"))
    trainer, _ = trainer_for(tmp_path, steps=7, callback=callback)
    seen = []
    trainer.add_callback(type("Look", (TrainerCallback,), {
        "on_step_begin": lambda self, args, state, control, optimizer=None, **_: seen.append(len(optimizer.state))
    })())  # fmt: skip
    trainer.train()
    assert seen[0] == 0 and set(seen[1:]) <= {0, 14}  # parameters of one layer of six, dropped when another is chosen


def test_a_collator_that_draws(tmp_path):
    """Estimates leave the random state of training alone, also where making their batch draws from it."""
    states = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            states.append(torch.random.get_rng_state())

    def collate(rows):
        torch.rand(3)
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    for sampler in ("rst", "ist"):
        callback = pk.ist.ISTCallback(pk.ist.ISTConfig(interval=3, sampler=sampler))
        trainer, _ = trainer_for(tmp_path, steps=9, callback=callback)
        trainer.data_collator = collate
        trainer.add_callback(Look())
        trainer.train()
    assert all(torch.equal(one, other) for one, other in zip(states[:9], states[9:], strict=True))


def test_what_trainer_would_restore_by_itself_is_refused(tmp_path):
    trainer, _ = trainer_for(tmp_path, steps=2, restore_callback_states_from_checkpoint=True)
    with pytest.raises(ValueError, match="expected restore_callback_states_from_checkpoint=False, got True"):
        trainer.train()


def test_going_on_with_a_run_that_had_no_ist(tmp_path):
    plain, _ = trainer_for(tmp_path, steps=4, save_strategy="steps", save_steps=4)
    plain.callback_handler.callbacks = [c for c in plain.callback_handler.callbacks if not isinstance(c, Recorder)]
    plain.state.stateful_callbacks.pop("Recorder", None)
    plain.train()
    trainer, callback = trainer_for(tmp_path, steps=8, save_strategy="steps", save_steps=8)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert callback.ist.step == 4 and (tmp_path / "checkpoint-8").exists()


def test_the_best_model_is_loaded_whole(tmp_path):
    trainer, _ = trainer_for(
        tmp_path, steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True,
    )  # fmt: skip
    everything = trainable(trainer.model)
    trainer.train()
    assert trainable(trainer.model) == everything and trainer.state.best_model_checkpoint


def test_sft_trainer(tmp_path):
    """TRL's, on token ids, with labels on the completion only."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    rows = [{"input_ids": ids["input_ids"].tolist(), "labels": [-100] * 3 + ids["labels"].tolist()[3:]} for ids in DATA]
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, report_to="none", save_strategy="no",
        use_cpu=True, bf16=False, disable_tqdm=True, logging_strategy="no",
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    callback = Recorder(pk.ist.ISTConfig(interval=5, examples=8))
    trainer = trl.SFTTrainer(
        model=llama(), args=arguments, train_dataset=Dataset.from_list(rows), callbacks=[callback],
        processing_class=tokenizer(),
    )  # fmt: skip
    pk.integrations.peft.accelerate(trainer.model)
    everything = trainable(trainer.model)
    trainer.train()
    assert trainable(trainer.model) == everything
    assert len(callback.ist.history) == 2 and callback.ist.estimator.shift == 1, callback.ist.estimator.why


def tokenizer():
    """Make a tokenizer of numbers here: nothing is downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({str(number): number for number in range(40)}, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="1", pad_token="0")
