"""Sparse deltas on two processes: under DDP, and under FSDP2 with the weights left out of the shards."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import peft_kernels as pk
from peft_kernels.testing.sparse_delta import make_layout
from tests.distributed.ranks import WORLD


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 16)).requires_grad_(False)
    pk.sparse.add_deltas(model, {"0": make_layout("entries", 48, 32, 0.1), "2": make_layout("columns", 16, 48, 0.1)})
    return model


def train(model, optimizer, rows):
    """Three steps on the same 8 rows, or a rank's part of them."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(8, 32, generator=generator)
        optimizer.zero_grad()
        model(x[rows]).square().mean().backward()
        optimizer.step()


def trained(rank, how):
    model = make_model()
    layers = pk.sparse.sparse_layers(model)
    rows = slice(rank * 8 // WORLD, (rank + 1) * 8 // WORLD)
    if how == "DDP":
        train(DistributedDataParallel(model), pk.optim.SparseAdamW(model, lr=1e-2), rows)
    else:
        weights = {parameter for layer in layers.values() for parameter in (layer.weight, layer.bias)}
        fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)), ignored_params=weights)
        assert all(isinstance(layer.values, DTensor) for layer in layers.values())
        values = [layer.values for layer in layers.values()]
        train(model, torch.optim.AdamW(values, lr=1e-2, weight_decay=0.0), rows)
        model(torch.zeros(1, 32))  # the weights as they are after the last step
    return [layer.weight.detach() for layer in layers.values()]


@pytest.mark.parametrize("how", ["DDP", "FSDP2"])
def test_equals_one_process(ranks, how):
    model = make_model()
    layers = pk.sparse.sparse_layers(model)
    before = [layer.weight.detach().clone() for layer in layers.values()]
    train(model, pk.optim.SparseAdamW(model, lr=1e-2), slice(None))
    for of_rank in ranks.run(trained, how):
        for found, layer, old in zip(of_rank, layers.values(), before):
            torch.testing.assert_close(found, layer.weight.detach(), rtol=0, atol=1e-6)
            assert (found - old).abs().max() > 1e-3
