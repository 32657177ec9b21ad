"""What was chosen holds from one step to the next whatever happens in between, and no longer than the training does."""

import contextlib
import copy
import pickle

import pytest
import torch
from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

import peft_kernels as pk
from peft_kernels.ist import IST, Fixed, ISTConfig
from tests.ist.test_callback import DATA
from tests.ist.test_ist import batch_for, llama, trainable


def layers_with_gradient(model) -> list[int]:
    names = (name for name, parameter in model.named_parameters() if parameter.grad is not None)
    return sorted({int(name.split("layers.")[1].split(".")[0]) for name in names})


def plain_gradients(batches):
    model = llama()
    for batch in batches:
        model(**batch).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_gradients(model, layers, batches):
    expected = plain_gradients(batches)
    assert layers_with_gradient(model) == layers
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name])


def without_adapter(model):
    with torch.no_grad(), model.disable_adapter():
        model(**batch_for(7))


def without_adapter_with_gradients(model):
    with model.disable_adapter():
        model(**batch_for(7))


def nested(model):
    with torch.no_grad(), model.disable_adapter():
        with model.disable_adapter():
            model(**batch_for(7))
        model(**batch_for(8))
    without_adapter(model)


def other_adapter(model):
    model.set_adapter("ref")
    with torch.no_grad():
        model(**batch_for(7))
    model.set_adapter("default")


def other_adapter_that_stays(model):
    """Without checkpointing, what the forward used is what gets a gradient."""
    if not model.is_gradient_checkpointing:
        model.set_adapter("ref")


def evaluation(model):
    model.eval()
    with torch.no_grad():
        model(**batch_for(7))
    model.train()


def checkpointing_off_and_on(model):
    """As TRL does it around what it computes without gradients, also just before a forward."""
    if model.is_gradient_checkpointing:
        arguments = model.get_base_model().model.layers[0]._gradient_checkpointing_func.keywords
        model.gradient_checkpointing_disable()
        without_adapter(model)
        model.gradient_checkpointing_enable(arguments)


def another_forward(model):
    model(**batch_for(7))


BETWEEN = [
    without_adapter, without_adapter_with_gradients, nested, other_adapter, other_adapter_that_stays, evaluation,
    checkpointing_off_and_on, another_forward,
]  # fmt: skip


@pytest.mark.parametrize("between", BETWEEN, ids=lambda function: function.__name__)
@pytest.mark.parametrize("checkpointing", [None, "not reentrant", "reentrant"])
def test_between_a_forward_and_its_backward(checkpointing, between):
    model = llama()
    model.add_adapter("ref", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("default")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    ist = IST(model, ISTConfig(sampler=Fixed([2, 4])))
    ist.before_step()
    batches = [batch_for(0), batch_for(1)]
    for batch in batches:  # accumulated
        between(model)
        model.set_adapter("default")
        loss = model(**batch).loss
        between(model)
        loss.backward()
    assert_gradients(model, [2, 4], batches)


@pytest.mark.parametrize("checkpointing", [None, "not reentrant", "reentrant"])
def test_several_forwards_before_one_backward(checkpointing):
    model = llama()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    ist = IST(model, ISTConfig(sampler=Fixed([2, 4])))
    ist.before_step()
    losses = []
    for seed in (0, 1):
        losses.append(model(**batch_for(seed)).loss)
        without_adapter(model)
    sum(losses).backward()
    assert_gradients(model, [2, 4], [batch_for(0), batch_for(1)])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_part_of_the_model_is_called(reentrant):
    """As losses that never compute all logits do it: the hidden states of what is inside of PEFT's wrappers."""
    model, plain = llama(), llama()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    IST(model, ISTConfig(sampler=Fixed([2, 4]))).before_step()
    for each in (model, plain):
        hidden = each.get_base_model().model(batch_for(0)["input_ids"]).last_hidden_state
        without_adapter(each)
        hidden.square().mean().backward()
    assert layers_with_gradient(model) == [2, 4]
    for one, other in zip(model.parameters(), plain.parameters()):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("together", [True, False])
def test_a_penalty_on_adapters(together):
    """Its gradients do not come through a forward."""
    model = llama()
    IST(model, ISTConfig(sampler=Fixed([1, 3]))).before_step()
    penalty = sum(p.square().sum() for n, p in model.named_parameters() if "lora_" in n)
    loss = model(**batch_for(0)).loss
    if together:
        loss = loss + penalty
    else:
        penalty.backward()
    loss.backward()
    assert layers_with_gradient(model) == [1, 3]


def test_copies():
    model = llama()
    with IST(model, ISTConfig(sampler=Fixed([1]))) as ist:
        ist.before_step()
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert [type(module) for module in copied.modules()] == [type(module) for module in llama().modules()]
            copied(**batch_for(0)).loss.backward()
            assert layers_with_gradient(copied) == list(range(6))
        model(**batch_for(0)).loss.backward()
        assert layers_with_gradient(model) == [1]


def interrupt(*_, **__):
    raise KeyboardInterrupt


class Stops(TrainerCallback):
    """Raises in the second step at the event of this name."""

    def __init__(self, event, error=KeyboardInterrupt):
        def stop(args, state, control, **kwargs):
            if state.global_step >= 1:
                raise error

        setattr(self, event, stop)


def in_forward(trainer):
    hook = trainer.model.get_base_model().model.layers[3].register_forward_hook(interrupt)
    return hook.remove


def in_backward(trainer):
    handles = []

    def hook(module, args, output):
        if output.requires_grad:
            handles.append(output.register_hook(interrupt))

    handles.append(trainer.model.get_base_model().model.layers[4].mlp.register_forward_hook(hook))
    return lambda: [handle.remove() for handle in handles]


def in_loss(trainer):
    trainer.compute_loss_func = lambda outputs, labels, **_: interrupt(outputs.logits.sum())
    return lambda: setattr(trainer, "compute_loss_func", None)


def in_estimate(trainer):
    """While adapters are damped."""
    remove = in_forward(trainer)
    trainer.model.eval()
    return remove


def in_optimizer(trainer):
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    return register_optimizer_step_pre_hook(interrupt).remove


def on(event, error=KeyboardInterrupt):
    def add(trainer):
        trainer.add_callback(Stops(event, error))
        return lambda: trainer.remove_callback(Stops)

    return add


STOPS = {
    "forward": in_forward, "backward": in_backward, "loss": in_loss, "optimizer": in_optimizer,
    "estimate": in_estimate, "on_step_begin": on("on_step_begin"), "on_step_end": on("on_step_end"),
    "on_step_end, an error": on("on_step_end", RuntimeError), "on_substep_end": on("on_substep_end"),
    "on_pre_optimizer_step": on("on_pre_optimizer_step", ValueError),
}  # fmt: skip


def trainer_of(model, folder, *callbacks, steps=2, **arguments):
    set_seed(0)
    settings = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4, learning_rate=0.1, report_to="none", use_cpu=True,
        disable_tqdm=True, save_strategy="no", gradient_accumulation_steps=2, logging_strategy="no", **arguments,
    )  # fmt: skip
    return Trainer(model, settings, train_dataset=DATA, callbacks=list(callbacks))


def changed_layers(model, before) -> set[str]:
    changed = (n for n, value in model.state_dict().items() if not torch.equal(value, before[n]))
    return {name.split("layers.")[1].split(".")[0] for name in changed}


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_the_next_training_after_an_interrupt(tmp_path, stop, reentrant):
    """Plain: as if there had been no IST; with a callback of its own: it begins. The error, and with it every frame on
    its way, is still there then, as in a notebook."""
    model, weights = llama(), llama().state_dict()
    checkpointing = {}
    if reentrant is not None:
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    callback = pk.ist.ISTCallback(ISTConfig(interval=1, update_fraction=0.34, sampler="ist"))
    trainer = trainer_of(model, tmp_path, callback, **checkpointing)
    undo = stop(trainer)
    with pytest.raises((KeyboardInterrupt, RuntimeError, ValueError)) as caught:
        trainer.train()
    undo()
    assert trainable(model) == trainable(llama())
    assert all(set(m.scaling.values()) == {2.0} for m in model.modules() if hasattr(m, "lora_A"))
    model.load_state_dict(weights)
    model.zero_grad()
    plain = llama()
    if reentrant is not None:
        plain.gradient_checkpointing_enable({"use_reentrant": False})
    for each in (model, plain):
        if reentrant is not None:
            each.enable_input_require_grads()
        trainer_of(each, tmp_path, steps=1).train()
    for (name, value), other in zip(model.state_dict().items(), plain.state_dict().values()):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name} {m}")
    assert changed_layers(model, weights) == set("012345")
    again = pk.ist.ISTCallback(ISTConfig(sampler="rst"))
    trainer_of(model, tmp_path, again).train()
    assert again.ist.step == 2 and caught.value is not None


def test_the_same_trainer_without_its_callback(tmp_path):
    model = llama()
    trainer = trainer_of(model, tmp_path, pk.ist.ISTCallback(ISTConfig(sampler="rst")), steps=1)
    undo = on("on_substep_end")(trainer)
    trainer.callback_handler.callbacks[-1].on_substep_end = interrupt
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    undo()
    trainer.remove_callback(pk.ist.ISTCallback)
    trainer.state.stateful_callbacks.pop("ISTCallback", None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train()
    assert changed_layers(model, before) == set("012345")


@pytest.mark.parametrize("stop", ["forward", "backward", "after"])
def test_a_loop_by_hand(stop):
    model = llama()
    with pytest.raises(KeyboardInterrupt), IST(model, ISTConfig(sampler=Fixed([2]))) as ist:
        ist.before_step()
        if stop == "forward":
            hook = model.get_base_model().model.layers[3].register_forward_hook(interrupt)
        loss = model(**batch_for(0)).loss
        if stop == "backward":
            hook = loss.register_hook(interrupt)
        loss.backward()
        interrupt()
    if stop != "after":
        hook.remove()
    assert trainable(model) == trainable(llama())
    model(**batch_for(0)).loss.backward()
    assert layers_with_gradient(model) == list(range(6))


def test_a_step_is_tried_again():
    """Whoever catches an error and runs the batch once more has what was chosen."""
    model = llama()
    ist = IST(model, ISTConfig(sampler=Fixed([2])))
    ist.before_step()
    hook = model.get_base_model().model.layers[3].register_forward_hook(interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        model(**batch_for(0))
    hook.remove()
    assert trainable(model) == trainable(llama())
    model(**batch_for(0)).loss.backward()
    assert layers_with_gradient(model) == [2]


def test_a_backward_is_tried_again():
    """After an error in it, through the same outputs."""
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    IST(model, ISTConfig(sampler=Fixed([2, 4]))).before_step()
    loss = model(**batch_for(0)).loss
    hook = loss.register_hook(interrupt)
    with contextlib.suppress(KeyboardInterrupt):
        loss.backward(retain_graph=True)
    hook.remove()
    assert trainable(model) == trainable(llama())
    without_adapter(model)
    loss.backward()
    assert_gradients(model, [2, 4], [batch_for(0)])
