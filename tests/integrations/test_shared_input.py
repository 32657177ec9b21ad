"""Siblings that read one tensor run as one op: only where that is right, and leaving nothing behind."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules.module import register_module_full_backward_hook
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.integrations.peft import shared_input
from peft_kernels.testing import saved_tensors
from tests.integrations.peft_models import assert_equal, make, run
from tests.interrupts import ERRORS, everywhere

accelerate = pk.integrations.peft.accelerate


class Attention(nn.Module):
    """q/k/v with a forward that tests can bend: `between(self, x, name)` runs before each projection."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 6)

    def forward(self, x, between=None, then=None):
        x = x * 1.0
        q = self.q(x)
        if between is not None:
            x = between(self, x)
        k = self.k(x)
        v = self.v(x)
        if then is not None:
            then(self, x)
        return torch.cat([q, k, v], -1)


def make_pair(p=0.0, cls=Attention):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q", "k", "v"], init_lora_weights=False, lora_dropout=p)
    plain = get_peft_model(cls(), config).base_model.model
    for name, parameter in plain.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    ours = copy.deepcopy(plain)
    return ours, plain, accelerate(ours)


def gradients(model, x, *args):
    x = x.clone().requires_grad_()
    leaves = {"x": x} | {n: p for n, p in model.named_parameters() if p.requires_grad}
    y = model(x, *args)
    grads = torch.autograd.grad(y.square().sum(), list(leaves.values()), allow_unused=True)
    return {"y": y.detach(), **dict(zip(leaves, grads))}


def nothing_left(model):
    groups = [member[0] for module in model.modules() if (member := getattr(module, "_shared_input", None))]
    return bool(groups) and all(group.running() is None for group in groups)


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


# Attention above is found as {k, v}: q's x may be assigned anew before they are called. Here it is not.
class Together(Attention):
    def forward(self, x, between=None, then=None):
        q = self.q(x)
        if between is not None:
            between(self, x)
        k, v = self.k(x), self.v(x)
        if then is not None:
            then(self, x)
        return torch.cat([q, k, v], -1)


def test_groups_are_read_from_the_parent_s_forward():
    assert make_pair()[2].shared == (("k", "v"),)
    assert make_pair(cls=Together)[2].shared == (("q", "k", "v"),)

    class Twice(Attention):
        def forward(self, x):
            return torch.cat([self.q(x), self.k(x), self.v(x), self.k(-x)], -1).to(self.q.weight.dtype)

    class Conditional(Attention):
        def forward(self, x, cross=None):
            q = self.q(x)
            k = self.k(x) if cross is None else self.k(cross)
            if cross is None:
                v = self.v(x)
            return q, k, v

    class Nested(Attention):
        def forward(self, x):
            for _ in range(2):
                q = self.q(x) * self.k(x)[..., :1]
            return q + (self.v(x)[..., :1] if x.sum() > 0 else 0)

    class Elsewhere(Attention):
        def forward(self, x, *, y=None):
            return self.q(y), self.k(x=x), self.v(x + 1)

    class Named(Attention):
        def forward(this, hidden):
            return this.v(hidden), this.q(hidden)

    for cls, groups in [
        (Twice, (("q", "v"),)),
        (Conditional, ()),
        (Nested, (("q", "k"),)),
        (Elsewhere, ()),
        (Named, (("v", "q"),)),
    ]:
        assert make_pair(cls=cls)[2].shared == groups, cls


def test_a_forward_without_source_or_of_the_instance_shares_nothing():
    namespace = {}
    exec("def forward(self, x): return self.q(x) + self.k(x)", namespace)
    unknown = type("Unknown", (Attention,), {"forward": namespace["forward"]})
    assert make_pair(cls=unknown)[2].shared == ()
    model = make()
    mlp = model.get_submodule("base_model.model.model.layers.0.mlp")
    mlp.forward = mlp.forward
    assert len(accelerate(model).shared) == 3


@pytest.mark.parametrize("kind", ["t5", "bert_decoder"])
def test_cross_attention_wastes_nothing(kind, taken):
    plain = make(kind)
    model = copy.deepcopy(plain)
    report = accelerate(model)
    ran = []
    for name in report.fused:
        model.get_submodule(name).register_forward_hook(lambda *args, name=name: ran.append(name))
    taken.clear()
    assert_equal(run(model), run(plain))
    computed = sum(1 if how == "alone" else how for how in taken)
    assert computed == len(ran), kind  # each result was asked for
    assert sum(how != "alone" for how in taken) == len(report.shared), kind


def test_a_wrong_guess_is_only_slower(taken):
    ours, plain, _ = make_pair(cls=Together)

    class Crossed(Together):  # k and v see another tensor than q
        def forward(self, x):
            q = self.q(x)
            y = x.flip(0)
            return torch.cat([q, self.k(y), self.v(y)], -1)

    for model in (ours, plain):
        model.__class__ = Crossed
    assert_equal(gradients(ours, X), gradients(plain, X))
    assert taken == [3, 2] and nothing_left(ours)


def change_in_place(module, x):
    with torch.no_grad():
        x.mul_(2.0)
    return x


@pytest.mark.parametrize("cls", [Attention, Together])
def test_a_tensor_changed_in_place_is_read_again(cls):
    ours, plain, _ = make_pair(cls=cls)
    with torch.no_grad():
        torch.testing.assert_close(ours(X.clone(), change_in_place), plain(X.clone(), change_in_place))
    assert nothing_left(ours)


def test_grad_mode_and_autocast_of_each_member():
    class Mixed(Together):
        def forward(self, x):
            q = self.q(x)
            with torch.no_grad():
                k = self.k(x)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                v = self.v(x)
            assert not k.requires_grad and v.dtype == torch.bfloat16
            return torch.cat([q, k, v.float()], -1)

    ours, plain, _ = make_pair(cls=Together)
    for model in (ours, plain):
        model.__class__ = Mixed
    results, expected = gradients(ours, X), gradients(plain, X)
    for name, value in expected.items():
        if value is None:  # of k: computed ahead, not used, and so without a gradient of its own
            assert results[name] is None or not results[name].any()
        else:
            torch.testing.assert_close(results[name], value, rtol=0.05, atol=0.2)


def test_members_by_themselves_out_of_order_and_twice(taken):
    class Odd(Together):
        def forward(self, x):
            return torch.cat([self.v(x), self.q(x), self.v(x), self.q(x), self.k(x), self.k(x)], -1)

    ours, plain, _ = make_pair(cls=Together)
    torch.testing.assert_close(ours.k(X), plain.k(X))
    assert taken == ["alone"]
    for model in (ours, plain):
        model.__class__ = Odd
    taken.clear()
    assert_equal(gradients(ours, X), gradients(plain, X))
    assert taken == [3, "alone", "alone", "alone"]


def test_an_exception_leaves_nothing(taken):
    def fail(module, x):
        raise RuntimeError("no")

    ours, plain, _ = make_pair(cls=Together)
    with pytest.raises(RuntimeError, match="no"):
        ours(X, fail)
    assert taken == [3] and nothing_left(ours)
    assert_equal(gradients(ours, X), gradients(plain, X))


class Stack(nn.Module):
    """Two blocks; the output of the first is what the graph of the second would keep."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), Together()

    def forward(self, x):
        below = torch.tanh(self.first(x))  # its backward keeps it
        self.below = weakref.ref(below)
        return self.second(below)


def stack():
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["first", "q", "k", "v"], init_lora_weights=False)
    model = get_peft_model(Stack(), config).base_model.model
    assert accelerate(model).shared == (("second.q", "second.k", "second.v"),)
    return model


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["q", "v"])
def test_a_forward_that_is_interrupted_keeps_no_graph(where, error):
    def fail(*_):
        raise error

    model = stack()
    broken = getattr(model.second, where).register_forward_hook(fail)
    with pytest.raises(error):
        model(X)
    gc.collect()
    assert model.below() is None and nothing_left(model)
    broken.remove()
    y = model(X)
    assert torch.equal(y, model(X)) and nothing_left(model)


def test_interrupted_anywhere():
    model = stack()
    model(X)
    for at in everywhere(lambda: model(X), every=3):
        assert model.below() is None and nothing_left(model), at
    assert at > 100


def test_results_do_not_outlive_the_parent_s_forward():
    results = []

    def remember(module, x):
        call = module.q._shared_input[0].running()
        results.extend(weakref.ref(y) for y in call.results.values())

    ours, _, _ = make_pair(cls=Together)
    with torch.no_grad():
        ours(X, remember)
        assert len(results) == 2
        gc.collect()
        assert [ref() for ref in results] == [None, None]
    assert nothing_left(ours)


def test_hooks_of_members_run_and_are_obeyed(taken):
    ours, plain, _ = make_pair(cls=Together)
    seen = []
    for model in (ours, plain):
        model.k.register_forward_hook(lambda module, args, y: seen.append(args[0]) or y * 2)
        model.v.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert_equal(gradients(ours, X), gradients(plain, X))
    assert len(seen) == 2 and torch.equal(*seen)
    assert taken == [2, "alone"]  # v sees another x: not computed ahead
    taken.clear()
    for model in (ours, plain):
        model.q.register_full_backward_hook(lambda module, grads, outer: (grads[0] * 3,))
    assert_equal(gradients(ours, X), gradients(plain, X))
    assert taken == ["alone"] * 3


def test_global_backward_hooks_hand_each_member_a_tensor_of_its_own(taken):
    ours, _, _ = make_pair(cls=Together)
    handle = register_module_full_backward_hook(lambda module, grads, outer: None)
    try:
        gradients(ours, X)
    finally:
        handle.remove()
    assert taken == ["alone"] * 3


def test_outputs_may_be_changed_in_place(taken):
    class InPlace(Together):
        def forward(self, x):
            q = self.q(x)
            q.mul_(0.5)
            return torch.cat([q, self.k(x).add_(1), self.v(x)], -1)

    ours, plain, _ = make_pair(cls=Together)
    for model in (ours, plain):
        model.__class__ = InPlace
    assert_equal(gradients(ours, X), gradients(plain, X))
    assert taken == [3]


def test_inference_mode(taken):
    ours, plain, _ = make_pair(cls=Together)
    with torch.inference_mode():
        torch.testing.assert_close(ours(X.clone(), change_in_place), plain(X.clone(), change_in_place))
    assert taken == ["alone"] * 3  # an inference tensor does not tell when it is changed


def test_an_input_that_is_not_a_leaf_of_this_layer():
    """A replica of the parent (as DataParallel makes) uses its own children."""
    ours, plain, _ = make_pair(cls=Together)
    replica = ours._replicate_for_data_parallel()
    children = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in children.parameters():
            parameter.add_(1.0)
    for name in "qkv":
        replica._modules[name] = children._modules[name]
        replica._modules[name].__dict__["_shared_input"] = ours._modules[name]._shared_input
    torch.testing.assert_close(replica(X), children(X))
    assert_equal(gradients(ours, X), gradients(plain, X))


def test_threads_do_not_meet(taken):
    ours, plain, _ = make_pair(cls=Together)
    barrier = threading.Barrier(2, timeout=20)
    results = {}

    def work(number):
        x = X + number

        def wait(module, x):
            barrier.wait()

        results[number] = (ours(x, wait, wait), plain(x))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for y, expected in results.values():
        torch.testing.assert_close(y, expected)
    assert taken == [3, 3] and nothing_left(ours)


def test_x_is_saved_once():
    ours, plain, _ = make_pair(cls=Together)
    x = X.clone().requires_grad_()
    with saved_tensors(ignore=(*ours.parameters(), x)) as saved:
        ours(x)
    # x itself is the user's; S of all three projections is one tensor
    assert sorted(tensor.numel() for tensor in saved) == [3 * 2 * 3]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        ours(x)
    assert kept.count(x.data_ptr()) == 1
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        kept.clear()
        plain(x)
    assert kept.count(x.data_ptr()) >= 3


class Checkpointed(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_masks(reentrant, taken):
    ours, _, _ = make_pair(p=0.5, cls=Together)
    torch.manual_seed(7)
    expected = gradients(ours, X)
    torch.manual_seed(7)
    results = backward(Checkpointed(ours, reentrant))
    assert_equal({name.removeprefix("inner."): value for name, value in results.items()}, expected)
    assert taken == [3, 3, 3]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside_of_the_parent_s_call_shares_nothing(reentrant, taken):
    """Its recomputation would run no hooks of the parent."""
    ours, _, _ = make_pair(p=0.5, cls=Together)
    forward = ours.forward
    ours.forward = lambda x: checkpoint(forward, x, use_reentrant=reentrant)
    torch.manual_seed(7)
    results = backward(ours)
    assert set(taken) == {"alone"}
    del ours.forward
    for layer in (ours.q, ours.k, ours.v):
        layer.__dict__.pop("_shared_input")
    torch.manual_seed(7)
    assert_equal(results, gradients(ours, X))


def backward(model):
    """As `gradients`, through `.grad`: reentrant checkpointing refuses `torch.autograd.grad`."""
    x = X.clone().requires_grad_()
    y = model(x)
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_a_layer_with_two_parents_is_in_one_group():
    torch.manual_seed(0)
    first, second = Together(), Together()
    second.q = first.q
    model = get_peft_model(
        nn.ModuleList([first, second]),
        LoraConfig(r=2, target_modules=["q", "k", "v"], init_lora_weights=False),
    ).base_model.model
    expected = [block(X) for block in model]
    report = accelerate(model)
    assert report.shared == (("0.q", "0.k", "0.v"), ("1.k", "1.v"))
    for block, y in zip(model, expected):
        torch.testing.assert_close(block(X), y)


def test_a_group_is_no_module_and_carries_no_results():
    ours, _, _ = make_pair(cls=Together)
    group = ours.q._shared_input[0]
    assert isinstance(group, shared_input.SharedInput) and not isinstance(group, nn.Module)
    assert [name for name, _ in ours.named_children()] == ["q", "k", "v"]
    twin = copy.deepcopy(ours)
    assert twin.q._shared_input[0] is twin.k._shared_input[0] is not group
    (hook,) = twin._forward_pre_hooks.values()
    assert hook.__self__ is twin.q._shared_input[0]
