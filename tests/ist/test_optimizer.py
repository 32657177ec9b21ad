"""IST beside optimizers, clipping and GradScaler, and what becomes of the state of layers that do not train."""

import pytest
import torch

from peft_kernels.ist import IST, BlockCyclic, Fixed, ISTConfig
from peft_kernels.ist import optimizer_state as placed
from tests.ist.test_ist import batch_for, llama

OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
    "AdamW, fused": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, fused=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-2),
}


def adapters(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def steps(model, ist, optimizer, number, first=0):
    for step in range(first, first + number):
        ist.before_step()
        model(**batch_for(step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("created", ["before", "after"])
def test_only_the_active_layers_move(name, created):
    model = llama()
    config = ISTConfig(sampler=Fixed([2, 4]))
    if created == "before":
        optimizer = OPTIMIZERS[name](adapters(model))
        ist = IST(model, config, optimizer=optimizer)
    else:
        ist = IST(model, config)
        optimizer = OPTIMIZERS[name](adapters(model))
        ist.optimizer = optimizer
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps(model, ist, optimizer, 3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (not ("lora_" in name and (".2." in name or ".4." in name))), name


def test_an_optimizer_that_misses_adapters_is_refused():
    """One made between two steps, of what requires a gradient, misses none."""
    model = llama()
    ist = IST(model, ISTConfig(sampler=Fixed([2])))
    ist.before_step()
    line = r"expected an optimizer that holds every adapter, got one without .*layers\.0"
    with pytest.raises(ValueError, match=line):
        ist.optimizer = torch.optim.AdamW(ist.layers[2].parameters)
    ist.optimizer = torch.optim.AdamW(adapters(model))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dropped_state_starts_anew(name):
    model = llama()
    optimizer = OPTIMIZERS[name](adapters(model))
    ist = IST(model, ISTConfig(sampler=BlockCyclic(), update_fraction=0.34, frozen_state="drop"), optimizer=optimizer)
    steps(model, ist, optimizer, 7)
    active = {id(p) for index in ist.active for p in ist.layers[index].parameters}
    assert {id(p) for p in optimizer.state if optimizer.state[p]} == active
    for group in optimizer.state.values():
        if "step" in group:
            assert int(group["step"]) == 1


def test_kept_state_goes_on():
    model = llama()
    optimizer = OPTIMIZERS["AdamW"](adapters(model))
    ist = IST(model, ISTConfig(sampler=BlockCyclic(), update_fraction=0.34), optimizer=optimizer)
    steps(model, ist, optimizer, 6)
    assert {int(optimizer.state[p]["step"]) for p in optimizer.state} == {2}
    assert len(optimizer.state) == sum(len(layer.parameters) for layer in ist.layers)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_offloaded_state_trains_as_kept_state_does(name):
    trained = []
    for frozen_state in ("keep", "offload"):
        model = llama().cuda()
        optimizer = OPTIMIZERS[name](adapters(model))
        config = ISTConfig(sampler=BlockCyclic(), update_fraction=0.34, frozen_state=frozen_state)
        ist = IST(model, config, optimizer=optimizer)
        for step in range(7):
            ist.before_step()
            model(**{key: value.cuda() for key, value in batch_for(step).items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        active = {id(p) for index in ist.active for p in ist.layers[index].parameters}
        for parameter, state in optimizer.state.items():
            moments = [value for value in state.values() if isinstance(value, torch.Tensor) and value.dim()]
            on_host = frozen_state == "offload" and id(parameter) not in active
            assert all(value.is_cpu == on_host for value in moments)
        trained.append([parameter.detach().cpu() for parameter in model.parameters()])
    for one, other in zip(*trained):
        assert torch.equal(one, other)


def test_offloading_where_all_is_on_the_host():
    """And the way back: state of another device than the parameter's comes to it, step counts stay."""
    model = llama()
    optimizer = OPTIMIZERS["AdamW"](adapters(model))
    config = ISTConfig(sampler=BlockCyclic(), update_fraction=0.34, frozen_state="offload")
    ist = IST(model, config, optimizer=optimizer)
    steps(model, ist, optimizer, 6)
    assert {int(optimizer.state[p]["step"]) for p in optimizer.state} == {2}
    parameter = ist.layers[0].parameters[0]
    state = optimizer.state[parameter]
    elsewhere = torch.nn.Parameter(torch.empty_like(parameter, device="meta"))
    optimizer.state[elsewhere] = dict(state)
    placed.bring_back(optimizer, [elsewhere])
    moved = {name: value.device.type for name, value in optimizer.state[elsewhere].items()}
    assert moved == {"step": "cpu", "exp_avg": "meta", "exp_avg_sq": "meta"}


@pytest.mark.parametrize("frozen_state", ["offload", "drop"])
def test_an_optimizer_is_needed(frozen_state):
    ist = IST(llama(), ISTConfig(sampler="rst", frozen_state=frozen_state))
    with pytest.raises(ValueError, match=f"expected an optimizer for frozen_state='{frozen_state}', got none"):
        ist.before_step()


def test_grad_scaler_and_accumulation():
    """Steps that the scaler skips for infinite gradients, two micro-batches a step, against the same without it."""
    plain, scaled = llama(), llama()
    config = ISTConfig(sampler="rst")
    runs = [(model, IST(model, config), OPTIMIZERS["SGD"](adapters(model))) for model in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(6):
        for model, ist, optimizer in runs:
            chosen = ist.before_step()
            for micro in range(2):
                loss = model(**batch_for(2 * step + micro)).loss / 2
                (scaler.scale(loss) if model is scaled else loss).backward()
            if step == 3:  # both skip it
                next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))
            if model is scaled:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            held = {id(p) for index in chosen for p in ist.layers[index].parameters}
            assert {id(p) for p in model.parameters() if p.grad is not None} == held
            if model is scaled:
                scaler.step(optimizer)
                scaler.update()
            elif step != 3:
                optimizer.step()
            optimizer.zero_grad()
    assert runs[0][1].updates == runs[1][1].updates
    for one, other in zip(plain.parameters(), scaled.parameters()):
        torch.testing.assert_close(one, other)
