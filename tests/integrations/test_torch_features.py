"""torch.compile, checkpointing, sharding and Trainer around an accelerated model."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments

import peft_kernels as pk
from tests.integrations.peft_models import KINDS, assert_equal, batch_for, make, run
from tests.integrations.shira_models import layer_of

accelerate = pk.integrations.peft.accelerate


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def pair(kind="llama", **lora):
    plain = make(kind, **lora)
    ours = copy.deepcopy(plain)
    accelerate(ours)
    return ours, plain


@pytest.mark.parametrize("kind", KINDS)
def test_compile_the_whole_model(kind):
    ours, plain = pair(kind)
    expected = run(plain)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    results = run(compiled, batch_for(plain))
    assert_equal({name.removeprefix("_orig_mod."): value for name, value in results.items()}, expected)


def test_compile_each_block_with_dynamic_lengths():
    ours, plain = pair()
    counts = []
    expected = [run(plain, batch_for(plain, tokens)) for tokens in (7, 8, 11, 5)]
    for model in (plain, ours):
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        for block in model.base_model.model.model.layers:
            block.compile(fullgraph=True, backend=counter, dynamic=True)
        assert_equal(run(model, batch_for(model, 7)), expected[0])
        warm = counter.frame_count
        for tokens, results in zip((8, 11, 5), expected[1:]):
            assert_equal(run(model, batch_for(model, tokens)), results)
        counts.append((warm, counter.frame_count - warm))
    assert counts[1] <= counts[0] and counts[1][1] <= counts[0][1]  # no graph more than PEFT's own


def test_compile_a_layer_with_dropout():
    ours, _ = pair(lora_dropout=0.3)
    layer = ours.get_submodule("base_model.model.model.layers.0.mlp.down_proj")
    x = torch.randn(2, 5, 24)

    def loss_and_gradients(function):
        torch.manual_seed(3)
        y = function(x)
        return y, *torch.autograd.grad(y.sum(), [p for p in layer.parameters() if p.requires_grad])

    expected = loss_and_gradients(layer)
    compiled = loss_and_gradients(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(compiled, expected)


def test_compile_sees_what_changes():
    ours, plain = pair()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    batch = batch_for(plain)

    def check():
        results = run(compiled, batch, backward=False)
        assert_equal(results, run(plain, batch, backward=False))

    check()
    for model in (ours, plain):
        for module in model.modules():
            if hasattr(module, "scaling") and isinstance(module.scaling, dict):
                module.scaling["default"] = 0.5
    check()
    with ours.disable_adapter(), plain.disable_adapter():
        check()
    for model in (ours, plain):
        model.merge_adapter()
    check()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, taken):
    ours, _ = pair(lora_dropout=0.3)
    expected = run(ours)
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    taken.clear()
    assert_equal(run(ours), expected)
    assert taken.count(3) == 4  # two blocks, twice


@pytest.mark.parametrize("use_reentrant", [False])
def test_gradient_checkpointing_and_compile(use_reentrant):
    ours, _ = pair(lora_dropout=0.3)
    expected = run(ours)
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for block in ours.base_model.model.model.layers:
        block.mlp.compile(fullgraph=True, backend="aot_eager")
        block.self_attn.o_proj.compile(fullgraph=True, backend="aot_eager")
    results = run(ours)
    assert results.keys() == expected.keys() and torch.isfinite(results["loss"])


def test_hooks_on_the_layer_and_saved_tensor_hooks():
    ours, plain = pair()
    seen = []
    for model in (ours, plain):
        layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        layer.register_forward_hook(lambda module, args, y: seen.append(y.shape) or y + 1)
        layer.register_full_backward_hook(lambda module, grads, outer: (grads[0] * 3,))
    assert_equal(run(ours), run(plain))
    assert len(seen) == 2
    with torch.autograd.graph.save_on_cpu():
        assert_equal(run(ours), run(plain))


def test_functional_call_with_other_parameters():
    ours, plain = pair()
    others = {name: parameter.detach() * 0.5 for name, parameter in plain.named_parameters()}
    batch = batch_for(plain)
    results = [torch.func.functional_call(model, others, (), batch).logits for model in (ours, plain)]
    torch.testing.assert_close(*results)


@pytest.fixture
def one_rank(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_fsdp2(one_rank, taken):
    from torch.distributed.fsdp import fully_shard

    ours, plain = pair()
    expected = run(plain)
    for block in ours.base_model.model.model.layers:
        fully_shard(block)
    fully_shard(ours)
    results = run(ours)
    results = {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in results.items()}
    assert_equal(results, expected)
    assert taken.count(3) == 2


def test_fsdp2_units_inside_of_a_layer_take_peft_s_forward(one_rank, taken):
    from torch.distributed.fsdp import fully_shard

    ours, plain = pair()
    expected = run(plain, backward=False)
    for name, module in list(ours.named_modules()):
        if name.endswith("lora_A.default"):
            fully_shard(module)
    fully_shard(ours)
    assert_equal(run(ours, backward=False), expected)
    assert taken == []
    sharded = copy.deepcopy(plain)
    for name, module in list(sharded.named_modules()):
        if name.endswith("q_proj.lora_A.default"):
            fully_shard(module)
    report = accelerate(sharded)
    assert set(report.kept.values()) == {"its lora_A is FSDPLinear, not nn.Linear"} and len(report.kept) == 2


def test_trainer(tmp_path):
    plain = make()
    results = []
    for accelerated in (False, True):
        model = copy.deepcopy(plain)
        if accelerated:
            accelerate(model)
        batch = batch_for(model)
        rows = [{"input_ids": ids, "labels": ids} for ids in batch["input_ids"].tolist()] * 2
        arguments = TrainingArguments(
            str(tmp_path / str(accelerated)), max_steps=2, per_device_train_batch_size=2, report_to=[],
            use_cpu=True, learning_rate=0.01, gradient_checkpointing=accelerated, disable_tqdm=True,
            save_steps=1,
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows).train()
        results.append({name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad})
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-4)
    saved = tmp_path / "True" / "checkpoint-2" / "adapter_model.safetensors"
    assert saved.exists()


def test_a_mixture_of_experts(taken):
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12)

        def forward(self, x):
            return self.w2(torch.relu(self.w1(x)) * self.w3(x))

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Linear(8, 3)
            self.experts = nn.ModuleList(Expert() for _ in range(3))

        def forward(self, x):
            x = x.view(-1, 8)
            chosen, y = self.gate(x).argmax(-1), torch.zeros_like(x)
            for number, expert in enumerate(self.experts):
                rows = chosen == number
                y[rows] = expert(x[rows])  # some get no row at all
            return y

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["w1", "w2", "w3"], init_lora_weights=False)
    plain = get_peft_model(Mixture(), config)
    plain.base_model.model.gate.bias.data[2] = -100.0
    ours = copy.deepcopy(plain)
    assert len(accelerate(ours).shared) == 3
    x = torch.randn(2, 5, 8)
    results = []
    for model in (ours, plain):
        leaves = [p for p in model.parameters() if p.requires_grad]
        y = model(x)
        results.append(dict(enumerate([y, *torch.autograd.grad(y.square().sum(), leaves)])))
    assert_equal(*results)
    assert taken == [2, "alone"] * 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.out = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(8, 16)

    def forward(self, x):
        return self.out(torch.tanh(self.key(x))) + torch.tanh(self.query(x))


def pair_of_blocks(p=0.0):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["query", "key", "out"], init_lora_weights=False, lora_dropout=p)
    plain = get_peft_model(Block(), config).double()
    ours = copy.deepcopy(plain)
    assert len(accelerate(ours).shared) == 1
    return ours, plain


@pytest.mark.parametrize("transform", ["jvp", "each sample", "hessian", "jacrev"])
def test_transforms_of_a_block(transform):
    """Forward mode and per-sample gradients, of x and the adapters, where two of three layers share their input."""
    pair, x = pair_of_blocks(), torch.randn(3, 5, 16, dtype=torch.float64)
    trained = {name: p.detach() for name, p in pair[1].named_parameters() if p.requires_grad}

    def result(model):
        def loss(trained, x):
            return functional_call(model, trained, (x,)).square().sum()

        return {
            "jvp": lambda: jvp(loss, (trained, x), (trained, x)),
            "each sample": lambda: vmap(grad(loss), (None, 0))(trained, x),
            "hessian": lambda: jacfwd(jacrev(loss))(trained, x[0]),
            "jacrev": lambda: jacrev(lambda x: functional_call(model, trained, (x,)))(x[0]),
        }[transform]()

    torch.testing.assert_close(result(pair[0]), result(pair[1]))


def test_trace_nested_and_flops_of_a_block():
    ours, plain = pair_of_blocks(0.3)
    traced = torch.jit.trace(ours.eval(), (torch.randn(3, 5, 16, dtype=torch.float64),))
    plain.eval()
    for shape in ((7, 2), (1, 9)):
        x = torch.randn(*shape, 16, dtype=torch.float64)
        torch.testing.assert_close(traced(x), plain(x))
    x = torch.nested.nested_tensor([torch.randn(n, 16, dtype=torch.float64) for n in (3, 5)], layout=torch.jagged)
    torch.testing.assert_close(ours(x).values(), plain(x).values())
    assert ours.train()(x).shape == x.shape  # with dropout

    def flops(model):
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(2, 3, 16, dtype=torch.float64)).sum().backward()
        return counter.get_total_flops()

    assert flops(ours) == flops(plain)


def test_transforms_of_shira():
    """Which PEFT's own sparse tensors take neither in forward mode nor batched."""
    layer = layer_of(torch.float64, torch.float64)
    ours, dense = copy.deepcopy(nn.Sequential(layer)), layer.base_layer.weight.detach()
    accelerate(ours)
    name, x = "0.shira_weight.default", torch.randn(3, 5, 48, dtype=torch.float64)
    values, (rows, columns) = layer.shira_weight["default"].detach(), layer.shira_indices["default"].long()

    def found(values, x):
        return functional_call(ours, {name: values}, (x,)).square().sum()

    def expected(values, x):
        weight = dense.index_put((rows, columns), values * layer.scaling["default"], accumulate=True)
        return nn.functional.linear(x, weight, layer.base_layer.bias).square().sum()

    for transform in (
        lambda f: jvp(f, (values, x), (values, x)),
        lambda f: vmap(grad(f), (None, 0))(values, x),
        lambda f: jacfwd(jacrev(f))(values, x[0]),
    ):
        torch.testing.assert_close(transform(found), transform(expected))
    traced = torch.jit.trace(ours, (x,))
    other = torch.randn(7, 2, 48, dtype=torch.float64)
    torch.testing.assert_close(traced(other), layer(other))
    nested = torch.nested.nested_tensor([x[0], x[1, :2]], layout=torch.jagged)
    torch.testing.assert_close(ours(nested).values(), layer(nested.values()))
