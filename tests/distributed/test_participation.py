"""Batches of several processes that use different layers: all draw the same, and every step has a gradient."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from peft_kernels.ist import IST, ISTConfig
from tests.ist.test_participation import images, llava, text, with_gradient


def trained(rank, kinds, reentrant, accumulate):
    model = llava()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    ddp = DistributedDataParallel(model)
    ist = IST(ddp, ISTConfig(sampler="rst", update_fraction=0.15, seed=rank))
    found, of_kind = [], {"text": text, "images": images}
    for step in range(16):
        ist.before_step()
        for micro in range(accumulate):
            kind = kinds[rank] if kinds[rank] in of_kind else list(of_kind)[(step + rank) % 2]
            ddp.require_backward_grad_sync = micro == accumulate - 1
            ddp(**of_kind[kind](step)).loss.backward()
        gradients = [p.grad.clone() for i in ist.active for p in ist.layers[i].parameters if p.grad is not None]
        found.append((list(ist.active), with_gradient(ist), gradients))
        ddp.zero_grad()
    return found, sorted(ist.participation.unused)


@pytest.mark.parametrize("reentrant", [None, True])
@pytest.mark.parametrize(
    "kinds", [("text", "text"), ("images", "text"), ("text", "images"), ("in turn", "in turn")], ids=" and ".join
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_all_draw_the_same(ranks, kinds, reentrant, accumulate):
    (one, unused), (other, unused_there) = ranks.run(trained, kinds, reentrant, accumulate)
    assert unused == unused_there
    for (active, grads, gradients), (active_there, grads_there, gradients_there) in zip(one, other, strict=True):
        assert active == grads == active_there == grads_there
        torch.testing.assert_close(gradients, gradients_there)
