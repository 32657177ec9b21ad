"""Where backward stops, what it recomputes, what is kept for it, and what is compiled."""

import pytest
import torch
import torch._dynamo.testing
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_kernels as pk
from peft_kernels.ist import IST, Fixed, ISTConfig
from peft_kernels.ist.hold import required
from peft_kernels.testing.memory import saved_tensors
from tests.ist.test_ist import batch_for, llama, tiny


def blocks(model):
    return model.get_base_model().model.layers


def switch(model, layers):
    ist = IST(model, ISTConfig(sampler=Fixed(layers)))
    ist.before_step()
    return ist


def backward_reaches(model) -> set[int]:
    reached = set()
    handles = [
        layer.mlp.register_full_backward_pre_hook(lambda *_, index=index: reached.add(index))
        for index, layer in enumerate(blocks(model))
    ]
    model(**batch_for(0)).loss.backward()
    for handle in handles:
        handle.remove()
    return reached


def assert_gradients_are_plain(model, layers):
    """Those of plain LoRA in these layers, and none elsewhere."""
    plain = llama()
    plain(**batch_for(0)).loss.backward()
    expected = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in model.named_parameters():
        if "lora_" in name and any(f"layers.{layer}." in name for layer in layers):
            torch.testing.assert_close(parameter.grad, expected[name])
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("checkpointing", [None, "not reentrant", "reentrant"])
@pytest.mark.parametrize("input_requires_grad", [False, True])
@pytest.mark.parametrize("layers", [[3, 4], [0, 5], [5]])
def test_backward_stops_below_the_lowest_active_layer(layers, input_requires_grad, checkpointing):
    """Also where a library makes the model's input require a gradient, as PEFT and checkpointing do."""
    model = llama()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    if input_requires_grad:
        model.enable_input_require_grads()
    ist = switch(model, layers)
    ran = []
    for index, block in enumerate(blocks(model)):
        block.mlp.act_fn.register_forward_hook(lambda *_, index=index: ran.append(index))
    reached = backward_reaches(model)
    assert reached == set(range(layers[0], 6))
    assert_gradients_are_plain(model, layers)
    again = ran[6:]
    assert ran[:6] == list(range(6)) and set(again) <= set(range(layers[0], 6))
    if checkpointing:
        assert len(again) >= 5 - layers[0]
    ist.set_active(range(6))
    assert all(block.gradient_checkpointing == bool(checkpointing) for block in blocks(model))
    assert backward_reaches(model) == set(range(6))


@pytest.mark.parametrize("below", ["embed_tokens", "layers.1.input_layernorm"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_trains_below_still_gets_its_gradient(below, checkpointing):
    model = llama()
    parameter = model.get_base_model().model.get_submodule(below).weight.requires_grad_(True)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    switch(model, [4])
    model(**batch_for(0)).loss.backward()
    assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("layers", [[4], [1, 4], [2]])
def test_two_stacks(layers):
    """T5: where only the decoder trains, no backward enters the encoder, whose output every layer of it reads."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny("t5"), config).train()
    model.enable_input_require_grads()
    ist = switch(model, layers)
    reached = set()
    for index, layer in enumerate(ist.layers):
        layer.module.layer[-1].register_full_backward_pre_hook(lambda *_, index=index: reached.add(index))
    model(**batch_for(0)).loss.backward()
    assert min(reached) == layers[0] and set(layers) <= reached


def saved_bytes(model, call) -> int:
    with saved_tensors(ignore=tuple(model.parameters())) as kept:
        result = call()  # alive until all is counted
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept)


def wide_llama(layers=8):
    """Layers of SmolLM2-135M's shape, with fewer of them and few words."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3,
        num_hidden_layers=layers,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    return get_peft_model(model, LoraConfig(r=16, lora_dropout=0.1, target_modules="all-linear")).train()


def test_bytes_kept_in_the_layers():
    """With the top quarter active, at most 0.3 of what plain LoRA keeps; most of it by far is kept in the layers."""
    ids = torch.randint(64, (2, 64), generator=torch.Generator().manual_seed(0))
    plain, ours = wide_llama(), wide_llama()
    pk.integrations.peft.accelerate(ours)
    switch(ours, [6, 7])
    kept = [saved_bytes(model, lambda model=model: model(input_ids=ids).logits) for model in (plain, ours)]
    assert kept[1] <= 0.3 * kept[0]


def test_a_frozen_layer_above_keeps_no_activation_for_its_linears():
    ours = wide_llama(2)
    pk.integrations.peft.accelerate(ours)
    linear = blocks(ours)[1].mlp.down_proj
    frozen = [(p, False) for n, p in linear.named_parameters() if "lora_" in n]
    x = torch.randn(2, 64, 1536, requires_grad=True)
    mask_bytes = 2 * 64 * 1536 // 8  # dx needs the dropout mask, at a bit an element
    with required(frozen):  # as inside of a forward
        assert saved_bytes(ours, lambda: linear(x)) == mask_bytes
        assert saved_bytes(ours, lambda: linear.eval()(x)) == 0


@pytest.mark.parametrize("already", [None, "not reentrant", "reentrant", "reentrant, disabled"])
def test_the_excess_over_the_budget_is_checkpointed(already):
    model = llama()
    if already:
        model.gradient_checkpointing_enable({"use_reentrant": already != "not reentrant"})
    if already == "reentrant, disabled":
        model.gradient_checkpointing_disable()
    was = [(block.gradient_checkpointing, vars(block).get("_gradient_checkpointing_func")) for block in blocks(model)]
    config = ISTConfig(sampler="rst", update_fraction=0.34, backward_budget=0.67, checkpoint_beyond_budget=True)
    ist = IST(model, config)
    depths, checkpointed = set(), []

    def look(*_):
        checkpointed[:] = [index for index, block in enumerate(blocks(model)) if block.gradient_checkpointing]

    model.register_forward_hook(look)
    for _ in range(20):
        layers = ist.before_step()
        depths.add(6 - layers[0])
        model.zero_grad()
        loss = model(**batch_for(0)).loss
        if already in (None, "reentrant, disabled"):
            assert checkpointed == list(range(layers[0], max(layers[0], 2)))
        loss.backward()
        assert_gradients_are_plain(model, layers)
    assert max(depths) > 4 > min(depths)
    now = [(block.gradient_checkpointing, vars(block).get("_gradient_checkpointing_func")) for block in blocks(model)]
    assert now == was


def test_blocks_that_cannot_be_checkpointed():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(pk.nn.LoRALinear(4, 4, 2) for _ in range(8))

    config = ISTConfig(sampler="rst", backward_budget=0.5, checkpoint_beyond_budget=True)
    with pytest.raises(ValueError, match=r"expected blocks of transformers .* got LoRALinear"):
        IST(Stack(), config)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("accelerated", [False, True])
def test_each_block_compiled_by_itself(accelerated, fresh_compiler):
    """At most four training graphs, none after all kinds of blocks were seen once; estimates do not add to them."""
    eager, model = llama(), llama()
    if accelerated:
        pk.integrations.peft.accelerate(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model.config.use_cache = False  # a cache of keys and values has a place for each block: a graph for each
    for block in blocks(model):
        block.compile(backend=counter)
    models = eager, model
    config = ISTConfig(interval=4)
    ists = [IST(each, config) for each in models]
    optimizers = [torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1) for each in models]
    counts = []
    for step in range(24):
        for each, ist, optimizer in zip(models, ists, optimizers):
            before = counter.frame_count
            ist.before_step(batch_for(1000 + step))
            estimated = counter.frame_count - before
            each(**batch_for(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        counts.append((estimated, counter.frame_count - before - estimated))
    assert ists[0].updates == ists[1].updates
    for one, other in zip(eager.parameters(), model.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert sum(training for _, training in counts) <= 4, counts
    assert not any(training for _, training in counts[8:])
    assert not any(estimating for estimating, _ in counts[9:])
    assert ists[1].estimator.shift == 1


def test_a_model_compiled_as_a_whole_is_refused():
    line = "expected each block compiled by itself .* got LlamaForCausalLM compiled as a whole"
    model = llama()
    ist = IST(model)
    model.get_base_model().compile()
    with pytest.raises(ValueError, match=line):
        ist.before_step()
    with pytest.raises(ValueError, match=line):
        IST(model)
    IST(model, ISTConfig(sampler=Fixed([0, 1])))  # always the same graph
    with pytest.raises(ValueError, match="got PeftModel compiled as a whole"):
        IST(torch.compile(llama()))
