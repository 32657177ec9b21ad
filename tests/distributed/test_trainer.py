"""transformers' Trainer with ISTCallback on two processes, against one process with the same batches."""

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

import peft_kernels as pk
from tests.distributed.ranks import WORLD
from tests.ist.test_callback import DATA, Recorder, trainer_for

# Labels of unlike number, so that means of processes are not the joined mean.
UNLIKE = [
    {**example, "labels": torch.where(torch.arange(9) < 3 + number % 6, example["labels"], -100)}
    for number, example in enumerate(DATA)
]
HOW = {"max_grad_norm": 0.05, "optim": "sgd", "learning_rate": 0.5, "per_device_train_batch_size": 2, "data": UNLIKE}


def fit(folder, resume=None, **how):
    callback = Recorder(pk.ist.ISTConfig(interval=5, examples=8))
    trainer, _ = trainer_for(folder, steps=13, callback=callback, **(HOW | how))
    result = trainer.train(resume_from_checkpoint=resume)
    weights = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    examples = len(callback.source()["labels"])  # of an estimate
    return callback.seen, callback.ist.unimportance, norms, weights, result.training_loss, examples


def fit_in_ranks(rank, folder, how, resume=None):
    try:
        return fit(folder, resume, ddp_backend="gloo", gradient_accumulation_steps=2, **how)
    finally:  # accelerate keeps what it found out about its processes; the next test has others
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()


def check_same(found, wanted):
    seen, unimportance, norms, weights, loss, examples = wanted
    assert len({layers for _, layers in seen}) > 2
    assert found[0] == seen
    torch.testing.assert_close(found[1], unimportance, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(found[2]), torch.tensor(norms), rtol=1e-4, atol=1e-6)
    for name in weights:
        torch.testing.assert_close(found[3][name], weights[name], rtol=1e-4, atol=1e-6)
    assert found[4] == pytest.approx(loss, rel=1e-4)
    assert found[5] * WORLD == examples == 8


@pytest.mark.parametrize("find_unused", [False, True], ids=["default", "find_unused_parameters"])
def test_equals_one_process(ranks, tmp_path, find_unused):
    logged = {"logging_strategy": "steps", "logging_steps": 1}
    wanted = fit(tmp_path / "alone", gradient_accumulation_steps=2 * WORLD, **logged)
    how = {"ddp_find_unused_parameters": find_unused, **logged}
    for found in ranks.run(fit_in_ranks, tmp_path / "both", how):
        assert max(found[2]) > HOW["max_grad_norm"]
        check_same(found, wanted)


def test_resumed_equals_uninterrupted(ranks, tmp_path):
    how = {"ddp_find_unused_parameters": False}
    saving = {"save_strategy": "steps", "save_steps": 7}
    wanted = ranks.run(fit_in_ranks, tmp_path, how | saving)
    found = ranks.run(fit_in_ranks, tmp_path, how, str(tmp_path / "checkpoint-7"))
    for one, other in zip(found, wanted):
        assert one[0] == other[0][7:]
        assert torch.equal(one[1], other[1])
        for name, weight in other[3].items():
            assert torch.equal(one[3][name], weight)
