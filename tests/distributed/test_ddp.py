"""IST under DistributedDataParallel: the same layers everywhere, the gradients of one process on the joined batch."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.ist import IST, ISTConfig
from tests.distributed.ranks import WORLD
from tests.distributed.training import EVERYTHING, alone, batch_for, check_same, part, sent, tiny, train
from tests.interrupts import ERRORS


def trained(rank, given, options, how):
    how = dict(how)
    ddp = DistributedDataParallel(tiny(how.pop("norms", False)), **options)
    # A seed of its own in each process: they have to agree all the same.
    ist = IST(ddp if given == "wrapper" else ddp.module, ISTConfig(interval=5, seed=rank))
    trace = train(ddp, ist, rank=rank, world=WORLD, **how)
    assert ddp.require_backward_grad_sync  # as the user left it
    return trace


@pytest.mark.parametrize(
    ("options", "given", "how"),
    [
        ({}, "wrapper", {}),
        ({}, "wrapper", EVERYTHING),
        ({}, "module", EVERYTHING),
        ({"find_unused_parameters": True}, "wrapper", EVERYTHING),
        ({"find_unused_parameters": True}, "module", {}),
        ({"gradient_as_bucket_view": True}, "wrapper", EVERYTHING),
    ],
    ids=str,
)
def test_equals_one_process(ranks, options, given, how):
    check_same(ranks.run(trained, given, options, how), alone(**how))


def sent_in_backward(rank, options):
    ddp = DistributedDataParallel(tiny(norms=True), **options)
    ist = IST(ddp)
    found = []
    for step in range(3):
        ist.before_step()
        loss = ddp(**part(batch_for(step), rank, WORLD)).loss
        frozen = {id(p) for index, layer in enumerate(ist.layers) if index not in ist.active for p in layer.parameters}
        now = [p.numel() for p in ddp.parameters() if p.requires_grad and id(p) not in frozen]
        found.append((sent(loss.backward), sum(now) + len(now)))  # whether there is one: 1 each
        ddp.zero_grad()
    with ddp.no_sync():
        found.append((sent(ddp(**part(batch_for(3), rank, WORLD)).loss.backward), 0))
    return found


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}], ids=["default", "find_unused_parameters"])
def test_reduces_what_trains_and_nothing_else(ranks, options):
    for found in ranks.run(sent_in_backward, options):
        for elements, wanted in found:
            assert elements == wanted


def left_alone_after_an_interrupt(rank):
    model = tiny()
    ddp = DistributedDataParallel(model)
    ist = IST(ddp)
    for place in (model.get_base_model().model.layers[3], model.get_base_model().lm_head):
        for interruption in (KeyboardInterrupt, ValueError):

            def interrupt(*_, interruption=interruption):
                raise interruption

            ist.before_step()
            hook = place.register_forward_hook(interrupt)
            with pytest.raises(interruption):
                ddp(**part(batch_for(0), rank, WORLD))
            hook.remove()
            assert ddp.require_backward_grad_sync and ddp.require_forward_param_sync
            assert all(p.requires_grad for layer in ist.layers for p in layer.parameters)
    ist.close()
    ddp(**part(batch_for(0), rank, WORLD)).loss.backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_an_interrupt_leaves_ddp_as_it_was(ranks):
    one, other = ranks.run(left_alone_after_an_interrupt)
    assert len(one) == sum(p.requires_grad for p in tiny().parameters())
    torch.testing.assert_close(one, other)


class Blocks(nn.Module):
    """Some of whose blocks are left out of some forwards."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(pk.nn.LoRALinear(6, 6, r=2, lora_alpha=2) for _ in range(4))
        self.gain = nn.Parameter(torch.ones(6))
        for block in self.blocks:
            nn.init.normal_(block.lora_B)

    def forward(self, x, skip=(), checkpointed=False):
        for number, block in enumerate(self.blocks):
            if number not in skip:
                x = checkpoint(block, x, use_reentrant=True) if checkpointed else block(x)
        x = x * self.gain
        return {"first": x.sum(), "others": [x.square().sum(), (x,)]}


def inputs(rank):
    # It requires a gradient, so that there is one where no parameter has any, and for reentrant checkpointing.
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(7 + rank)).requires_grad_(True)


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad]


def mean_of_both(active, skips, backward, **how):
    """What the mean over two processes has to be: computed here, one after the other."""
    found = []
    for rank, skip in enumerate(skips):
        model = Blocks()
        IST(model).set_active(active)
        backward(model(inputs(rank), skip=skip, **how))
        found.append(gradients(model))
    return [
        None if one is None and other is None else ((0 if one is None else one) + (0 if other is None else other)) / 2
        for one, other in zip(*found)
    ]


def same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def once(output):
    output["first"].backward()


def twice(output):
    output["first"].backward(retain_graph=True)
    output["others"][0].backward()


def branches(rank, skips, backward, how):
    ddp = DistributedDataParallel(Blocks())
    IST(ddp).set_active([1, 2])
    backward(ddp(inputs(rank), skip=skips[rank], **how))
    return gradients(ddp)


@pytest.mark.parametrize(
    "skips", [((), (1,)), ((2,), (1,)), ((1,), (1,)), ((), (0, 1, 2, 3))],
    ids=["one in one process", "one in each", "one in both", "all in one process"],
)  # fmt: skip
def test_layers_that_are_not_used(ranks, skips):
    """No process waits for another, and what no process used has no gradient."""
    wanted = mean_of_both([1, 2], skips, once)
    for found in ranks.run(branches, skips, once, {}):
        same(found, wanted)


@pytest.mark.parametrize("how", [{}, {"checkpointed": True}], ids=["plain", "reentrant checkpointing"])
def test_several_backwards_of_a_forward(ranks, how):
    backward = once if how else twice  # reentrant checkpointing frees what a second one would need
    wanted = mean_of_both([1, 2], ((), ()), backward, **how)
    for found in ranks.run(branches, ((), ()), backward, how):
        same(found, wanted)


def interrupted(rank):
    ddp = DistributedDataParallel(Blocks())
    IST(ddp).set_active([1, 2])
    output = ddp(inputs(rank))

    def stop(gradient):
        raise KeyboardInterrupt

    output["others"][1][0].register_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        output["first"].backward()
    ddp.zero_grad()
    ddp(inputs(rank))["first"].backward()
    return gradients(ddp)


def test_goes_on_after_a_backward_that_raised(ranks):
    wanted = mean_of_both([1, 2], ((), ()), once)
    for found in ranks.run(interrupted):
        same(found, wanted)


def without_ddp(rank):
    ddp = DistributedDataParallel(Blocks())
    IST(ddp).set_active([1, 2])
    ddp(inputs(rank))["first"].backward()
    ddp.zero_grad()
    if rank == 0:
        once(ddp.module(inputs(rank)))  # past the wrapper: its own affair
    return gradients(ddp)


def test_the_module_inside_is_not_synchronised(ranks):
    found, others = ranks.run(without_ddp)
    assert all(gradient is None for gradient in others)
    model = Blocks()
    IST(model).set_active([1, 2])
    once(model(inputs(0)))
    same(found, gradients(model))


def closed(rank):
    ddp = DistributedDataParallel(Blocks())
    ist = IST(ddp)
    ist.before_step(lambda: None)
    once(ddp(inputs(rank)))
    ddp.zero_grad()
    ist.close()
    output = ddp(inputs(rank))
    elements = sent(output["first"].backward)
    return elements, gradients(ddp)


def test_closed_leaves_gradients_to_ddp(ranks):
    wanted = mean_of_both(range(4), ((), ()), once)
    for elements, found in ranks.run(closed):
        assert elements == sum(parameter.numel() for parameter in Blocks().parameters() if parameter.requires_grad)
        same(found, wanted)


def with_hook(rank, find_unused):
    ddp = DistributedDataParallel(Blocks(), find_unused_parameters=find_unused)
    ddp.register_comm_hook(None, allreduce_hook)
    IST(ddp).set_active([1, 2])
    once(ddp(inputs(rank)))
    return gradients(ddp)


def test_a_communication_hook_is_refused_or_left_alone(ranks):
    wanted = mean_of_both([1, 2], ((), ()), once)
    for found in ranks.run(with_hook, True):
        same(found, wanted)
    with pytest.raises(ValueError, match=r"expected a plain DistributedDataParallel, .*got a communication hook"):
        ranks.run(with_hook, False)


def static_graph(rank, given):
    ddp = DistributedDataParallel(Blocks(), static_graph=True, find_unused_parameters=True)
    IST(ddp if given == "wrapper" else ddp.module)
    ddp(inputs(rank))


@pytest.mark.parametrize("given", ["wrapper", "module"])
def test_a_static_graph_is_refused(ranks, given):
    with pytest.raises(ValueError, match="got static_graph=True"):
        ranks.run(static_graph, given)


def test_one_process(tmp_path):
    """DDP's reducer is as strict with a single one."""
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        ddp, model = DistributedDataParallel(Blocks()), Blocks()
        for either in (ddp, model):
            ist = IST(either)
            for active in ([0, 2], [1], [3]):
                ist.set_active(active)
                once(either(inputs(rank=0)))
        same(gradients(ddp), gradients(model))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("error", ERRORS)
def test_an_interrupted_step_leaves_ddp_as_its_user_set_it(tmp_path, error):
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        ddp, model = DistributedDataParallel(Blocks()), Blocks()
        ist = IST(ddp)
        for each in (ist, IST(model)):
            each.set_active([0, 2])

        def fail(*_):
            raise error

        last = list(ddp.module.modules())[-1]
        for hook in (last.register_forward_hook, ddp.module.register_full_backward_hook):
            broken = hook(fail)
            with contextlib.suppress(error, RuntimeError):  # backward passes on what it can
                once(ddp(inputs(rank=0)))
            broken.remove()
            assert ddp.require_backward_grad_sync
            ddp.zero_grad()
        output = ddp(inputs(rank=0))  # no backward after it
        del output
        ist.gradients.readmit()  # as before_step does
        assert ddp.require_backward_grad_sync
        for either in (ddp, model):
            with ddp.no_sync():
                once(either(inputs(rank=0)))
            assert ddp.require_backward_grad_sync
            once(either(inputs(rank=0)))
        same(gradients(ddp), gradients(model))
    finally:
        dist.destroy_process_group()


def joined(rank, batches):
    group = dist.new_group([0, 1])
    return [pk.ist.parallel.joined_losses(*batches[rank], torch.device("cpu"), group)]


def test_joined_losses(ranks):
    assert pk.ist.parallel.joined_losses([1.0, 2.0], 3.0, torch.device("cpu")) == [1.0, 2.0]
    nan = float("nan")
    cases = [
        ((([1.0, 2.0], 3.0), ([5.0, 4.0], 1.0)), [2.0, 2.5]),
        ((([1.0, 2.0], 3.0), ([nan, nan], 0.0)), [1.0, 2.0]),  # no label in one process
    ]
    for batches, wanted in cases:
        for (found,) in ranks.run(joined, batches):
            assert found == wanted
    for (found,) in ranks.run(joined, (([nan], 0.0), ([nan], 0.0))):
        assert str(found) == "[nan]"
