"""TRL's trainers, whose reference passes come between a forward and its backward."""

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

import peft_kernels as pk
from peft_kernels.ist import ISTConfig
from tests.ist.test_callback import tokenizer
from tests.ist.test_hold import layers_with_gradient
from tests.ist.test_ist import llama, trainable

trl = pytest.importorskip("trl")

STEPS = 4


class Looks(TrainerCallback):
    """Which layers were chosen for a step, and which have gradients at its end."""

    def __init__(self, callback):
        self.callback, self.found = callback, []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found.append((list(self.callback.ist.active), layers_with_gradient(model)))


def sft(model, arguments, **common):
    rows = Dataset.from_list([{"text": f"{n} {n + 3} {n + 6} {n + 9}"} for n in range(16)])
    return trl.SFTTrainer(model, trl.SFTConfig(**arguments), train_dataset=rows, **common)


def preferences():
    return Dataset.from_list(
        [{"prompt": f"{n} {n + 3}", "chosen": f" {n + 6} {n + 9}", "rejected": f" {n + 5} {n}"} for n in range(16)]
    )


def dpo(model, arguments, **common):
    return trl.DPOTrainer(model, args=trl.DPOConfig(**arguments), train_dataset=preferences(), **common)


def kto(model, arguments, **common):
    rows = Dataset.from_list(
        [{"prompt": f"{n} {n + 3}", "completion": f" {n + 6} {n}", "label": n % 3 > 0} for n in range(16)]
    )
    return trl.KTOTrainer(model, args=trl.KTOConfig(**arguments), train_dataset=rows, **common)


def grpo(model, arguments, **common):
    rows = Dataset.from_list([{"prompt": f"{n} {n + 3}"} for n in range(16)])
    own = {"num_generations": 2, "max_completion_length": 5, "beta": 0.1, "num_iterations": 2}

    def reward(completions, **_):
        return [float(sum(map(ord, completion)) % 7) for completion in completions]

    config = trl.GRPOConfig(**arguments, **own)
    return trl.GRPOTrainer(model, reward_funcs=reward, args=config, train_dataset=rows, **common)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "not reentrant", "reentrant"])
@pytest.mark.parametrize("trainer", [sft, dpo, kto, grpo], ids=lambda function: function.__name__)
def test_trains_the_chosen_layers(tmp_path, trainer, reentrant):
    arguments = {
        "output_dir": str(tmp_path), "max_steps": STEPS, "per_device_train_batch_size": 2, "report_to": "none",
        "gradient_accumulation_steps": 2, "gradient_checkpointing": reentrant is not None, "learning_rate": 0.05,
        "gradient_checkpointing_kwargs": {"use_reentrant": bool(reentrant)}, "save_strategy": "no", "use_cpu": True,
        "bf16": False, "disable_tqdm": True, "logging_strategy": "no",
    }  # fmt: skip
    callback = pk.ist.ISTCallback(ISTConfig(sampler="rst", update_fraction=0.34))
    looks = Looks(callback)
    torch.manual_seed(0)
    made = trainer(llama(), arguments, processing_class=tokenizer(), callbacks=[callback, looks])
    model = made.model
    everything, before = trainable(model), {name: value.clone() for name, value in model.state_dict().items()}
    made.train()
    assert len(looks.found) == STEPS
    for active, grads in looks.found:
        assert active == grads and len(active) == 2
    trained = {layer for active, _ in looks.found for layer in active}
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert {int(name.split("layers.")[1].split(".")[0]) for name in changed} == trained
    assert trainable(model) == everything
