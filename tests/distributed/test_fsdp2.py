"""IST over FSDP2 (`fully_shard`): frozen shards have no gradient, and the others that of one process."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from peft_kernels.ist import IST, Fixed, ISTConfig
from tests.distributed.ranks import WORLD
from tests.distributed.training import (
    EVERYTHING,
    alone,
    batch_for,
    check_same,
    optimizer_of,
    part,
    sent,
    tiny,
    train,
    whole,
)


def sharded(model, blocks=True, **options):
    options["mesh"] = init_device_mesh("cpu", (WORLD,))
    for block in model.get_base_model().model.layers if blocks else ():
        fully_shard(block, **options)
    return fully_shard(model, **options)


def trained(rank, options, optimizer_first, how):
    how = dict(how)
    model = sharded(tiny(how.pop("norms", False)), **options)
    optimizer = optimizer_of(model) if optimizer_first else None
    ist = IST(model, ISTConfig(interval=5, seed=rank), optimizer=optimizer)
    trace = train(model, ist, rank=rank, world=WORLD, **how)
    assert all(isinstance(parameter, DTensor) for layer in ist.layers for parameter in layer.parameters)
    return trace


@pytest.mark.parametrize(
    ("options", "optimizer_first", "how"),
    [
        ({}, False, EVERYTHING),
        ({}, True, {}),
        ({"reshard_after_forward": False}, False, {}),
        ({"blocks": False}, False, {}),  # adapters in the root's group, which stays gathered after an estimate
    ],
    ids=str,
)
def test_equals_one_process(ranks, options, optimizer_first, how):
    check_same(ranks.run(trained, options, optimizer_first, how), alone(**how))


def sent_in_backward(rank):
    model = sharded(tiny())
    ist = IST(model)
    found = []
    for step in range(3):
        ist.before_step()
        loss = model(**part(batch_for(step), rank, WORLD)).loss
        trains = sum(parameter.numel() for index in ist.active for parameter in ist.layers[index].parameters)
        found.append((sent(loss.backward), trains))
        model.zero_grad()
    return found


def test_reduces_what_trains_and_nothing_else(ranks):
    for found in ranks.run(sent_in_backward):
        for elements, wanted in found:
            assert elements == wanted


def with_a_reference_pass(rank, blocks, reentrant):
    model, alone = tiny(), tiny()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model = sharded(model, blocks)
    ist = IST(model, ISTConfig(sampler=Fixed([2, 4])))
    for step in range(2):
        ist.before_step()
        for micro in range(2):
            loss = model(**part(batch_for(2 * step + micro), rank, WORLD)).loss
            with torch.no_grad(), model.disable_adapter():
                model(**part(batch_for(7), rank, WORLD))
            loss.backward()
    for micro in range(4):
        alone(**batch_for(micro)).loss.backward()
    expected = dict(alone.named_parameters())
    found = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    assert {int(name.split("layers.")[1].split(".")[0]) for name in found} == {2, 4}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name].grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "not reentrant", "reentrant"])
@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "root only"])
def test_a_reference_pass_between_a_forward_and_its_backward(ranks, blocks, reentrant):
    ranks.run(with_a_reference_pass, blocks, reentrant)


def mixed(rank, blocks):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = sharded(tiny().float(), blocks=blocks, mp_policy=policy)
    ist = IST(model)
    dtypes = set()
    for step in range(6):
        if step > 0:  # an evaluation, which leaves the root's group gathered
            with torch.no_grad():
                model(**part(batch_for(step), rank, WORLD))
        ist.set_active([step])
        model(**part(batch_for(step), rank, WORLD)).loss.backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert found and all(f"layers.{step}." in name for name in found)
        dtypes |= {gradient.to_local().dtype for gradient in found.values()}
    return dtypes


@pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "root only"])
def test_mixed_precision_gives_full_gradients(ranks, blocks):
    """Also to layers that were frozen in the first forward; and to no others, also after an evaluation."""
    for dtypes in ranks.run(mixed, blocks):
        assert dtypes == {torch.float32}


def made_before(rank):
    model = tiny()
    ist = IST(model)
    sharded(model)
    ist.before_step()


def test_refusals(ranks):
    with pytest.raises(ValueError, match=r"expected the adapters that .*\.0 had when IST was made, got others"):
        ranks.run(made_before)
    fsdp1 = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # a hollow one: a real one needs a GPU
    nn.Module.__init__(fsdp1)
    fsdp1._fsdp_wrapped_module, fsdp1.training_state = tiny(), None
    with pytest.raises(ValueError, match=r"expected FSDP2 \(fully_shard\), got FSDP1"):
        IST(fsdp1)
