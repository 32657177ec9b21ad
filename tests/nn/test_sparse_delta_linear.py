"""`nn.SparseDeltaLinear`: Δ in the weight, the weight restored to the bit, named deltas, checkpoints; and the
optimizers of `pk.optim` on it."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from benchmarks.measure import peak_bytes
from peft_kernels.nn import sparse_delta_linear
from peft_kernels.testing import saved_tensors
from peft_kernels.testing.sparse_delta import make_layout

KINDS = ["entries", "rows", "columns", "blocks", "n_of_m"]
N, K = 48, 64


def make_layer(kind="entries", dtype=torch.float32, bias=True, seed=0):
    """A layer, and the weight that it began with."""
    torch.manual_seed(seed)
    linear = torch.nn.Linear(K, N, bias=bias, dtype=dtype)
    base = linear.weight.detach().clone()
    return pk.nn.SparseDeltaLinear.from_linear(linear, make_layout(kind, N, K, 0.1, seed)), base


def train(layer, optimizer, steps=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(8, K, generator=generator).to(layer.weight.dtype)
        optimizer.zero_grad()
        layer(x).float().square().mean().backward()
        optimizer.step()


def dense_weight(layer, base):
    """W₀ + Δ from scratch."""
    wide = base.to(layer.values.dtype).flatten()
    return wide.index_add(0, layer.layout.indices(), layer.values.detach()).view(N, K).to(base.dtype)


@pytest.mark.parametrize("what", ["restore", "write"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_was_interrupted_is_written_again(monkeypatch, what, when):
    """Ctrl-C around the writing itself: the next forward has W₀ + Δ, and `restore` W₀."""
    layer, base = make_layer()
    with torch.no_grad():
        layer.values.normal_()
    x = torch.randn(4, K)
    with torch.no_grad():  # no step may follow: what is known to be there is not written again
        layer(x)
    owner, name = (pk.SparseLayout, "put_") if what == "restore" else (sparse_delta_linear, "write_delta")
    inner = getattr(owner, name)

    def interrupted(*args):
        if when == "after":
            inner(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(owner, name, interrupted)
        layer.values.data.add_(1.0)
        layer.restore() if what == "restore" else layer.write(changed=True)
    with torch.no_grad():
        layer(x)
    assert torch.equal(layer.weight, dense_weight(layer, base))
    layer.restore()
    assert torch.equal(layer.weight, base)


OPTIMIZERS = {
    "SparseAdamW": lambda layer: pk.optim.SparseAdamW(layer, lr=1e-2),
    "SparseSGD": lambda layer: pk.optim.SparseSGD(layer, lr=1e-1, momentum=0.9),
    "AdamW": lambda layer: torch.optim.AdamW([layer.values], lr=1e-2),
    "AdamW, fused": lambda layer: torch.optim.AdamW([layer.values], lr=1e-2, fused=True),
    "SGD, for loop": lambda layer: torch.optim.SGD([layer.values], lr=1e-1, foreach=False),
    "Adafactor": lambda layer: torch.optim.Adafactor([layer.values], lr=1e-2),
}


class TestTraining:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("decay", [0.0, 0.1])
    @pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
    def test_fifty_steps_as_masked_dense_training(self, kind, decay, optimizer):
        """Dense training whose gradient is masked, and whose frozen entries are put back after each step (decay)."""
        layer, base = make_layer(kind)
        dense = torch.nn.Linear(K, N)
        dense.load_state_dict({"weight": base, "bias": layer.bias})
        if optimizer == "AdamW":
            ours = pk.optim.SparseAdamW(layer, lr=1e-2, weight_decay=decay, decay="weight")
            theirs = torch.optim.AdamW([dense.weight], lr=1e-2, weight_decay=decay)
        else:
            ours = pk.optim.SparseSGD(layer, lr=1e-1, momentum=0.9, weight_decay=decay, decay="weight")
            theirs = torch.optim.SGD([dense.weight], lr=1e-1, momentum=0.9, weight_decay=decay)
        mask, generator = layer.layout.mask(), torch.Generator().manual_seed(2)
        for _ in range(50):
            x, dy = torch.randn(8, K, generator=generator), torch.randn(8, N, generator=generator)
            for module, step in ((layer, ours), (dense, theirs)):
                step.zero_grad()
                (module(x) - dy).square().mean().backward()
                if module is dense:
                    dense.weight.grad *= mask
                step.step()
            with torch.no_grad():
                dense.weight[~mask] = base[~mask]
        assert (layer.weight - base).abs().max() > 0.05
        torch.testing.assert_close(layer.weight, dense.weight, rtol=0, atol=1e-6)
        assert torch.equal(layer.weight[~mask], base[~mask])

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_any_optimizer_trains_it(self, optimizer):
        layer, base = make_layer()
        x = torch.randn(5, K)
        for _ in range(3):
            train(layer, OPTIMIZERS[optimizer](layer), steps=1)
            expected = dense_weight(layer, base)
            assert not torch.equal(expected, base)
            with torch.no_grad():
                torch.testing.assert_close(layer(x), F.linear(x, expected, layer.bias), rtol=0, atol=0)
            assert torch.equal(layer.weight, expected)

    def test_a_fused_step_after_an_evaluation(self):
        """A forward between backward and a step that leaves no trace, and a write through `.data` that is told of."""
        layer, base = make_layer()
        optimizer = OPTIMIZERS["AdamW, fused"](layer)
        x = torch.randn(5, K)
        layer(x).square().sum().backward()
        with torch.no_grad():
            layer(x)
        layer.state_dict()
        optimizer.step()
        with torch.no_grad():
            assert torch.equal(layer(x), F.linear(x, dense_weight(layer, base), layer.bias))
        train(layer, pk.optim.SparseAdamW(layer), steps=1)
        layer.values.data.mul_(0.5)
        layer.write(changed=True)
        assert torch.equal(layer.weight, dense_weight(layer, base))

    def test_our_step_writes_the_weight_itself(self):
        for make in (OPTIMIZERS["SparseAdamW"], OPTIMIZERS["SparseSGD"]):
            layer, base = make_layer()
            train(layer, make(layer), steps=1)
            assert torch.equal(layer.weight, dense_weight(layer, base))

    def test_updates_too_small_for_bfloat16_add_up(self):
        layer, base = make_layer(dtype=torch.bfloat16)
        assert layer.values.dtype == torch.float32 and layer.base.dtype == torch.bfloat16
        optimizer = pk.optim.SparseSGD(layer, lr=1.0)
        for _ in range(1000):
            layer.values.grad = torch.full_like(layer.values, -1e-5)
            optimizer.step()
        torch.testing.assert_close(layer.values.detach(), torch.full((layer.layout.nnz,), 1e-2), rtol=1e-3, atol=0)
        assert torch.equal(layer.weight, dense_weight(layer, base))
        assert not torch.equal(layer.weight, base)

    def test_forward_is_the_bare_linear(self):
        """The same operations (but views), and what is saved: the weight and x, nothing of the weight's size beside."""
        layer, _ = make_layer()
        plain = torch.nn.Linear(K, N).requires_grad_(False)
        x = torch.randn(8, K, requires_grad=True)
        layer(x)
        with saved_tensors(ignore=(layer.weight, x)) as saved:
            layer(x)
        assert not saved
        train(layer, pk.optim.SparseAdamW(layer), steps=1)
        names = []
        for module in (layer, plain):
            with torch.profiler.profile() as profile:
                module(x)
            names.append([e.name for e in profile.events() if e.name.startswith("aten::") and e.name != "aten::view"])
        assert names[0] == names[1]

    def test_columns_keep_their_part_of_x_only(self):
        layer, _ = make_layer("columns")
        x = torch.randn(8, K)
        with saved_tensors(ignore=(layer.weight,)) as saved:
            layer(x)
        assert [tuple(tensor.shape) for tensor in saved] == [(8, len(layer.layout.tensors["index"]))]

    def test_bytes_of_a_trainable_value(self):
        """At most 20 with AdamW, without the live gradient; nothing for a frozen entry."""
        for kind in KINDS:
            for dtype in (torch.bfloat16, torch.float32):
                torch.manual_seed(0)
                layout = make_layout(kind, 512, 1024, 0.01)
                layer = pk.nn.SparseDeltaLinear.from_linear(torch.nn.Linear(1024, 512, dtype=dtype), layout)
                optimizer = pk.optim.SparseAdamW(layer)
                layer(torch.randn(4, 1024, dtype=dtype)).sum().backward()
                optimizer.step()
                held = [layer.values, *(b for b in layer.buffers())]
                held += [value for value in optimizer.state[layer.values].values() if value.numel() > 1]
                assert sum(tensor.nbytes for tensor in held) <= 20 * layout.nnz

    @pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "n_of_m"])  # half of whose weight trains
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_step_takes_no_memory_like_the_weight_s(self, kind, dtype):
        """Forward, backward and the optimizer's step, by the events of torch's allocator."""
        layout = make_layout(kind, 1024, 1024, 0.01)
        layer = pk.nn.SparseDeltaLinear.from_linear(nn.Linear(1024, 1024, bias=False, dtype=dtype), layout)
        optimizer = pk.optim.SparseAdamW(layer)
        x = torch.randn(8, 1024, dtype=dtype, requires_grad=True)

        def step():
            layer(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            x.grad = None

        step()
        # A product may pack its weight on the way, as oneDNN does at 16 bits where the CPU has instructions for them.
        bare = peak_bytes(lambda: F.linear(x, layer.weight).sum().backward(), "cpu")
        assert peak_bytes(step, "cpu") < bare + layer.weight.nbytes / 2

    def test_several_forwards_before_backwards(self):
        """As in a pipeline: forwards and backwards of several micro-batches take turns."""
        layer, base = make_layer()
        xs = torch.randn(3, 8, K, requires_grad=True)
        weight = base.requires_grad_()
        F.linear(xs, weight, layer.bias).square().sum().backward()
        expected_x, xs.grad = xs.grad, None
        first, second = layer(xs[0]).square().sum(), layer(xs[1]).square().sum()
        first.backward()
        third = layer(xs[2]).square().sum()
        second.backward()
        third.backward()
        torch.testing.assert_close(xs.grad, expected_x)
        torch.testing.assert_close(layer.values.grad, layer.layout.take(weight.grad))

    def test_a_step_between_forward_and_backward_is_refused(self):
        layer, _ = make_layer()
        x = torch.randn(8, K, requires_grad=True)
        optimizer = pk.optim.SparseAdamW(layer)
        layer(x).sum().backward()
        y = layer(x)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_autocast(self):
        layer, base = make_layer()
        x = torch.randn(8, K)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
            assert y.dtype == torch.bfloat16
            torch.testing.assert_close(y, F.linear(x, base, layer.bias))
        y.float().sum().backward()
        assert layer.values.grad.dtype == torch.float32

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing(self, reentrant):
        layer, _ = make_layer()
        x = torch.randn(8, K, requires_grad=True)
        expected = torch.autograd.grad(layer(x).tanh().sum(), (x, layer.values))
        checkpoint(lambda x: layer(x).tanh(), x, use_reentrant=reentrant).sum().backward()
        for one, other in zip((x.grad, layer.values.grad), expected):
            torch.testing.assert_close(one, other)

    def test_compile(self):
        """fullgraph; two graphs at most; steps of a fused optimizer, which leaves no trace, arrive; eager goes on."""
        torch._dynamo.reset()
        layer, base = make_layer()
        graphs = CompileCounterWithBackend("inductor")
        compiled = torch.compile(layer, fullgraph=True, backend=graphs)
        optimizer = torch.optim.AdamW([layer.values], lr=1e-2, fused=True)
        for rows in (5, 6, 7, 8):
            x = torch.randn(rows, K)
            first, second = compiled(x), compiled(2 * x)
            torch.testing.assert_close(first, F.linear(x, dense_weight(layer, base), layer.bias))
            optimizer.zero_grad()
            (first.square().sum() + second.sum()).backward()
            optimizer.step()
        assert graphs.frame_count <= 2
        with torch.no_grad():
            torch.testing.assert_close(layer(x), F.linear(x, dense_weight(layer, base), layer.bias))

    def test_a_weight_that_trains_too(self):
        """A dense gradient for once, as for growing new positions."""
        layer, _ = make_layer()
        layer.weight.requires_grad_()
        layer(torch.randn(8, K)).square().sum().backward()
        torch.testing.assert_close(layer.values.grad, layer.layout.take(layer.weight.grad))

    @pytest.mark.parametrize("bias", [True, False])
    def test_leading_dims(self, bias):
        layer, base = make_layer(bias=bias)
        for shape in ((K,), (0, K), (2, 3, K)):
            x = torch.randn(shape)
            y = layer(x)
            torch.testing.assert_close(y, F.linear(x, base, layer.bias))
            y.add_(1).sum().backward()


class TestOptimizers:
    def test_a_whole_model_and_groups(self):
        model = torch.nn.Sequential(make_layer()[0], torch.nn.ReLU(), torch.nn.Linear(N, 4))
        assert pk.optim.SparseAdamW(model).param_groups[0]["params"] == [model[0].values]
        groups = [{"params": model[0], "lr": 0.1}, {"params": model[2].parameters(), "lr": 0.2}]
        optimizer = pk.optim.SparseAdamW(groups, weight_decay=0.1)
        assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
        assert [len(group["params"]) for group in optimizer.param_groups] == [1, 2]
        both = pk.optim.SparseSGD([model[0], *model[2].parameters()], lr=0.1)
        assert len(both.param_groups[0]["params"]) == 3
        before = [p.detach().clone() for p in (model[0].weight, model[2].weight)]
        model(torch.randn(3, K)).sum().backward()
        both.step()
        assert not any(torch.equal(old, new) for old, new in zip(before, (model[0].weight, model[2].weight)))

    def test_groups_of_layers_and_a_copy_of_the_optimizer(self):
        layers = [make_layer(seed=seed)[0] for seed in (0, 1)]
        optimizer = pk.optim.SparseAdamW([{"params": [layer], "lr": 0.1} for layer in layers], decay="weight")
        copied_layers, copied = copy.deepcopy((layers, optimizer))
        for layer in (*layers, *copied_layers):
            layer.values.grad = torch.ones_like(layer.values)
        for one in (optimizer, copied):
            one.step()
        for layer, other in zip(layers, copied_layers):
            assert torch.equal(layer.weight, other.weight) and layer.weight is not other.weight

    def test_state_dict_schedule_clipping_and_scaler(self):
        """Torch's own parts on it; a run that is stopped and resumed is the same to the bit."""

        def build():
            layer, _ = make_layer(dtype=torch.bfloat16)
            optimizer = pk.optim.SparseAdamW(layer, lr=1e-2, weight_decay=0.1)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
            return layer, optimizer, schedule, torch.amp.GradScaler("cpu", init_scale=64.0)

        def steps(layer, optimizer, schedule, scaler, numbers):
            for number in numbers:
                x = torch.randn(8, K, generator=torch.Generator().manual_seed(number)).bfloat16()
                optimizer.zero_grad()
                scaler.scale(layer(x).float().square().mean()).backward()
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_([layer.values], 0.1)
                scaler.step(optimizer)
                scaler.update()
                schedule.step()

        whole, first, second = build(), build(), build()
        steps(*whole, range(6))
        steps(*first, range(3))
        for fresh, old in zip(second, first):
            fresh.load_state_dict(copy.deepcopy(old.state_dict()))
        steps(*second, range(3, 6))
        assert torch.equal(whole[0].weight, second[0].weight) and torch.equal(whole[0].values, second[0].values)

    def test_a_step_that_overflowed_is_skipped(self):
        layer, base = make_layer()
        optimizer = pk.optim.SparseAdamW(layer, weight_decay=0.1, decay="weight")
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale(layer(torch.full((2, K), 1e38)).sum() * 1e10).backward()
        scaler.step(optimizer)
        assert not layer.values.any() and torch.equal(layer.weight, base)

    def test_state_of_torch_adamw_loads(self):
        layer, _ = make_layer()
        theirs = torch.optim.AdamW([layer.values], lr=1e-2, foreach=True)
        train(layer, theirs)
        ours = pk.optim.SparseAdamW(layer, lr=1e-3)
        ours.load_state_dict(theirs.state_dict())
        assert torch.equal(ours.state[layer.values]["exp_avg"], theirs.state[layer.values]["exp_avg"])
        assert ours.param_groups[0]["fused"] and ours.param_groups[0]["lr"] == 1e-2
        train(layer, ours)
        with pytest.raises(ValueError, match="expected the state of an optimizer without amsgrad"):
            ours.load_state_dict(torch.optim.AdamW([layer.values], amsgrad=True).state_dict())

    def test_sgd_leaves_the_gradient_as_it_was(self):
        layer, _ = make_layer()
        optimizer = pk.optim.SparseSGD(layer, weight_decay=0.5, decay="weight")
        layer.values.grad = torch.ones_like(layer.values)
        optimizer.step()
        assert torch.equal(layer.values.grad, torch.ones_like(layer.values))

    def test_hooks_run_once_a_step(self):
        for plain, ours in ((torch.optim.AdamW, pk.optim.SparseAdamW), (torch.optim.SGD, pk.optim.SparseSGD)):
            plain([nn.Parameter(torch.zeros(1))])  # torch wraps the step of a class when one is made
            layer, _ = make_layer()
            optimizer, called = ours(layer), []
            optimizer.register_step_pre_hook(lambda *_, called=called: called.append("pre"))
            optimizer.register_step_post_hook(lambda *_, called=called: called.append("post"))
            train(layer, optimizer, steps=2)
            assert called == ["pre", "post"] * 2

    def test_closure(self):
        layer, _ = make_layer()
        optimizer = pk.optim.SparseAdamW(layer)

        def closure():
            optimizer.zero_grad()
            loss = layer(torch.ones(2, K)).square().sum()
            loss.backward()
            return loss

        assert optimizer.step(closure) > 0

    def test_bad_input(self):
        with pytest.raises(ValueError, match="expected decay 'delta' or 'weight', got 'both'"):
            pk.optim.SparseAdamW(make_layer()[0], decay="both")
        with pytest.raises(ValueError, match="expected a SparseDeltaLinear, or a module with some, got Linear"):
            pk.optim.SparseAdamW(torch.nn.Linear(3, 3))


class TestDeltas:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    def test_restored_to_the_bit(self, kind, dtype):
        """After training, after switching, and after an interruption in the middle of a step."""
        layer, base = make_layer(kind, dtype)
        optimizer = torch.optim.AdamW([layer.values], lr=1e-2)
        train(layer, optimizer)
        trained = layer.delta()
        assert not torch.equal(layer.weight, base)
        layer.restore()
        assert torch.equal(layer.weight, base)
        layer.add_delta("other", make_layout(kind, N, K, 0.1, seed=9))
        for name in ("default", "other", "default"):
            layer.apply_delta(name)
        assert torch.equal(layer.delta("default").values, trained.values)
        train(layer, optimizer)
        layer(torch.randn(3, K).to(dtype)).sum().backward()
        optimizer.step()  # values moved, the weight not yet
        layer.restore()
        assert torch.equal(layer.weight, base)
        assert torch.equal(layer(torch.eye(K, dtype=dtype)), F.linear(torch.eye(K, dtype=dtype), base, layer.bias))

    def test_switching(self):
        layer, base = make_layer()
        layer.add_delta("two", pk.SparseDelta(make_layout("rows", N, K, 0.1), torch.ones(5 * K)))
        train(layer, pk.optim.SparseAdamW(layer))
        one = layer.weight.detach().clone()
        layer.apply_delta("two")
        assert torch.equal(layer.weight, base + layer.delta("two").to_dense())
        layer.apply_delta("default")
        assert torch.equal(layer.weight, one)
        removed = layer.remove_delta("default")
        assert layer.active is None and torch.equal(layer.weight, base)
        torch.testing.assert_close(base + removed.to_dense(), one)

    def test_adding_and_scaling(self):
        """LT-SFT's composition: W₀ + language + task / 2, at the positions of both."""
        layer, base = make_layer()
        language = pk.SparseDelta(make_layout("entries", N, K, 0.1, 1), torch.randn(307))
        task = pk.SparseDelta(make_layout("entries", N, K, 0.2, 2), torch.randn(614))
        for total in (language + 0.5 * task, task * 0.5 + language):
            assert 614 < total.layout.nnz <= 921
            torch.testing.assert_close(total.to_dense(), language.to_dense() + 0.5 * task.to_dense())
        same = language + language
        assert same.layout == language.layout and torch.equal(same.values, 2 * language.values)
        assert not (language - language).values.any()
        layer.add_delta("both", total)
        layer.apply_delta("both")
        torch.testing.assert_close(layer.weight, base + language.to_dense() + 0.5 * task.to_dense())

    def test_merge(self):
        layer, base = make_layer()
        train(layer, torch.optim.AdamW([layer.values], lr=1e-2))
        merged = layer.merge()
        assert type(merged) is torch.nn.Linear and merged.weight is layer.weight and merged.bias is layer.bias
        torch.testing.assert_close(merged.weight, dense_weight(layer, base), rtol=0, atol=0)
        assert str(merged) == f"Linear(in_features={K}, out_features={N}, bias=True)"

    def test_checkpoints(self):
        """Of the layer, into the layer and into a plain `nn.Linear`; of a plain one into the layer."""
        layer, base = make_layer()
        train(layer, torch.optim.AdamW([layer.values], lr=1e-2))
        state = layer.state_dict()
        assert not any("layout" in key for key in state)
        fresh = pk.nn.SparseDeltaLinear(K, N, make_layout("entries", N, K, 0.1, seed=5))
        fresh.load_state_dict(state)
        x = torch.randn(4, K)
        assert torch.equal(fresh(x), layer(x)) and fresh.layout == layer.layout
        fresh.restore()
        assert torch.equal(fresh.weight, base)
        plain = torch.nn.Linear(K, N)
        plain.load_state_dict({key: state[key] for key in ("weight", "bias")})
        assert torch.equal(plain(x), layer(x))
        other = torch.nn.Linear(K, N)
        values = layer.values.detach().clone()
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer.values, values)
        torch.testing.assert_close(layer.weight, dense_weight(layer, other.weight.detach()))
        layer.restore()
        assert torch.equal(layer.weight, other.weight)

    def test_a_checkpoint_with_another_delta_in_the_weight(self):
        layer, base = make_layer()
        layer.add_delta("two", make_layout("columns", N, K, 0.1))
        state = {key: value.clone() for key, value in layer.state_dict().items()}
        layer.apply_delta("two")
        layer.load_state_dict(state)
        assert layer.active == "default"
        layer.apply_delta("two")
        layer.restore()
        without = {key: value.clone() for key, value in layer.state_dict().items()}
        layer.apply_delta("two")
        layer.load_state_dict(without)
        assert layer.active is None and torch.equal(layer.weight, base)

    def test_a_checkpoint_of_what_trains(self):
        """Values alone, as trainable parameters are saved: the next forward computes with them."""
        layer, base = make_layer()
        train(layer, torch.optim.AdamW([layer.values], lr=1e-2))
        fresh, _ = make_layer()
        fresh.load_state_dict({"deltas.default.values": layer.values.detach()}, strict=False)
        x = torch.randn(4, K)
        assert fresh.active == "default" and torch.equal(fresh(x), layer(x))
        fresh.restore()
        assert torch.equal(fresh.weight, base)

    def test_loading_leaves_a_shared_layout_alone(self):
        layout = make_layout("entries", N, K, 0.1)
        one, other = (pk.nn.SparseDeltaLinear(K, N, layout) for _ in range(2))
        before = layout.indices()
        one.load_state_dict(make_layer(seed=7)[0].state_dict())
        assert one.layout != layout
        assert torch.equal(layout.indices(), before) and torch.equal(other.layout.indices(), before)

    def test_a_checkpoint_that_lacks_a_delta(self):
        layer, _ = make_layer()
        state = layer.state_dict()
        layer.add_delta("two", make_layout("columns", N, K, 0.1))
        with pytest.raises(RuntimeError, match=r"Missing key.*deltas\.two\.values"):
            layer.load_state_dict(state)

    def test_copies_pickles_and_moves(self):
        layer, base = make_layer()
        train(layer, torch.optim.AdamW([layer.values], lr=1e-2))
        x = torch.randn(4, K)
        expected = layer(x)
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)]
        for other in copies:
            assert torch.equal(other(x), expected)
            train(other, torch.optim.AdamW([other.values], lr=1e-2))
            other.restore()
            assert torch.equal(other.weight, base)
        assert torch.equal(layer(x), expected)
        half = copy.deepcopy(layer).bfloat16()
        assert half.values.dtype == torch.float32 and torch.equal(half.values, layer.values)
        assert torch.equal(half(x.bfloat16()), F.linear(x.bfloat16(), dense_weight(half, base.bfloat16()), half.bias))
        wide = copy.deepcopy(layer).double()
        wide(x.double()).sum().backward()
        assert wide.values.dtype == torch.float64
        wide = wide.float()
        assert wide.values.dtype == wide.values.grad.dtype == torch.float32
        assert layer.to("meta").layout.device.type == "meta"

    def test_from_linear_shares_and_freezes(self):
        linear = torch.nn.Linear(K, N).eval()
        layer = pk.nn.SparseDeltaLinear.from_linear(linear, make_layout("rows", N, K, 0.1))
        assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
        assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["deltas.default.values"]

    def test_without_bias_and_printed(self):
        layer, _ = make_layer(bias=False)
        assert "delta in the weight: default" in repr(layer) and "density" in repr(layer)
        layer.restore()
        assert "delta in the weight: none" in repr(layer)

    def test_bad_input(self):
        layer, base = make_layer()
        layout = make_layout("rows", N, K, 0.1)
        cases = [
            (lambda: pk.nn.SparseDeltaLinear.from_linear(layer, layout), "plain nn.Linear, got SparseDeltaLinear"),
            (lambda: pk.nn.SparseDeltaLinear(K + 1, N, layout), r"expected a delta of \[48, 65\], got"),
            (lambda: layer.add_delta("default", layout), "expected a new name, got 'default'"),
            (lambda: layer.add_delta("a.b", layout), "expected a name without dots, got 'a.b'"),
            (lambda: layer.apply_delta("none"), "expected one of the deltas default, got 'none'"),
            (lambda: pk.SparseDelta(layout, torch.ones(3)), r"expected values \[320\] on cpu, got \[3\]"),
            (
                lambda: layer.delta() + pk.SparseDelta(make_layout("rows", K, N, 0.1), torch.zeros(288)),
                r"expected a delta of \[48, 64\] on cpu to add",
            ),
        ]  # fmt: skip
        for call, message in cases:
            with pytest.raises(ValueError, match=message) as error:
                call()
            assert "\n" not in str(error.value)
        assert torch.equal(layer.weight, base)
        layer.restore()
        with pytest.raises(RuntimeError, match="expected a delta in the weight, got none"):
            _ = layer.values
