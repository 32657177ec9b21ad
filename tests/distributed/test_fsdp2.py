"""IST over FSDP2 (`fully_shard`): frozen shards have no gradient, and the others that of one process."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from peft_kernels.ist import IST, ISTConfig
from tests.distributed.ranks import WORLD
from tests.distributed.training import EVERYTHING, alone, batch_for, check_same, optimizer_of, part, sent, tiny, train


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
        trains = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        found.append((sent(loss.backward), trains))
        model.zero_grad()
    return found


def test_reduces_what_trains_and_nothing_else(ranks):
    for found in ranks.run(sent_in_backward):
        for elements, wanted in found:
            assert elements == wanted


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
