"""IST against its authors' algorithm, and each fault of the authors' code, which ours must not have."""

import copy
import math

import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

import peft_kernels as pk
from benchmarks.authors_ist import AuthorsIST
from peft_kernels.ist import IST, BlockCyclic, ISTConfig, LayerSampler, Lisa, Uniform, find_layers
from peft_kernels.ist.importance import draw_suppress_sets

VOCABULARY = 40
SIZES = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1)


def llama(layers: int = 6, **lora):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(num_hidden_layers=layers, head_dim=8, **SIZES)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False}
    return get_peft_model(transformers.LlamaForCausalLM(config), LoraConfig(**(settings | lora))).train()


def batch_for(seed: int, rows: int = 4) -> dict[str, torch.Tensor]:
    # Learnable, so that losses and with them the rewards differ: each token follows from the one before.
    start = torch.randint(VOCABULARY, (rows, 1), generator=torch.Generator().manual_seed(seed))
    ids = (start + 3 * torch.arange(9)) % VOCABULARY
    return {"input_ids": ids, "labels": ids}


def trainable(model) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def trains_inside(model) -> set[str]:
    """Return the names of what requires a gradient inside of a forward."""
    found = []
    hook = model.register_forward_hook(lambda *_: found.append(trainable(model)))
    model(**batch_for(0))
    hook.remove()
    return found[0]


def train(model, steps: int, config: ISTConfig | None = None, ist: IST | None = None, first: int = 0):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ist = ist or IST(model, config, optimizer=optimizer)
    for step in range(first, steps):
        ist.before_step(lambda: batch_for(1000 + len(ist.history)))
        model(**batch_for(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return ist, optimizer


def test_200_steps_equal_the_authors():
    ours, theirs = llama(), llama()
    ist, authors = IST(ours, ISTConfig(seed=5, estimator="one-by-one")), AuthorsIST(theirs, seed=5)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in (ours, theirs)]
    batches = [batch_for(1000 + number) for number in range(20)]
    moved = False
    for step in range(200):
        authors.before_step(batches[authors.estimates])
        chosen = ist.before_step(lambda: batches[len(ist.history)])
        assert set(chosen) == set(authors.active)
        torch.testing.assert_close(ist.unimportance, authors.unimportance, rtol=1e-5, atol=1e-7)
        assert len(ist.history) == authors.estimates
        moved |= bool(authors.unimportance.abs().max() > 1e-3)
        for model, optimizer in zip((ours, theirs), optimizers):
            model(**batch_for(step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert moved
    for mine, other in zip(ours.parameters(), theirs.parameters()):
        assert torch.equal(mine, other)


def test_suppress_sets_are_those_of_the_algorithm():
    unimportance = torch.tensor([0.3, -1.0, 2.0, 0.0, 0.5, -0.2])
    one, other = (torch.Generator().manual_seed(9) for _ in range(2))
    expected: list[list[int]] = []
    while len(expected) < 3:
        drawn = sorted(torch.multinomial(torch.sigmoid(unimportance), 3, generator=other).tolist())
        if drawn not in expected:
            expected.append(drawn)
    assert draw_suppress_sets(unimportance, 3, 3, one) == expected


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_few_layers(layers):
    """The authors' code loops forever with two and raises with one or three."""
    ist, _ = train(llama(layers), 25)
    assert len(ist.history) == 2
    assert sum(ist.updates) == 25
    assert all(len(rewards) == min(3, math.comb(layers, max(1, layers // 2))) for _, _, rewards in ist.history)


def test_odds_near_0_and_1_do_not_hang():
    odds = torch.tensor([60.0, -60.0])
    assert draw_suppress_sets(odds, 1, 3, torch.Generator().manual_seed(0)) == [[0]]


def test_attention_keeps_its_scaling():
    model = llama()
    before = {name: m.scaling for name, m in model.named_modules() if isinstance(getattr(m, "scaling", None), float)}
    assert before
    adapters = {name: dict(m.scaling) for name, m in model.named_modules() if hasattr(m, "lora_A")}
    train(model, 25)
    assert before == {name: model.get_submodule(name).scaling for name in before}
    assert adapters == {name: model.get_submodule(name).scaling for name in adapters}


def test_only_chosen_adapters_train_and_others_have_no_gradient():
    model = llama()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    norms = {name for name in trainable(model) if "norm" in name}
    everything = trainable(model)
    ist = IST(model)
    model(**batch_for(0)).loss.backward()
    for step in range(5):
        chosen = ist.before_step()
        expected = norms | {name for name in everything - norms if any(f"layers.{i}." in name for i in chosen)}
        assert trains_inside(model) == expected and trainable(model) == everything
        assert {n for n, p in model.named_parameters() if p.grad is not None} <= expected | norms
        model(**batch_for(step)).loss.backward()
    ist.set_active(range(6))
    assert trains_inside(model) == everything


def test_an_estimate_leaves_everything_as_it_was():
    model = llama(lora_dropout=0.3)
    model.base_model.model.model.layers[2].eval()
    ist = IST(model)
    ist.set_active([1, 3])
    modes = {name: module.training for name, module in model.named_modules()}
    grads, state, random = trainable(model), copy.deepcopy(model.state_dict()), torch.random.get_rng_state()

    def raising(*_):
        raise RuntimeError("from the loss")

    ist.estimate(batch_for(0))
    ist.estimate(batch_for(1))  # the first looks, the second takes what it found
    ist.estimator.loss_of, ist.estimator.shift = raising, None
    with pytest.raises(RuntimeError, match="from the loss"):
        ist.estimate(batch_for(0))
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert grads == trainable(model)
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(set(m.scaling.values()) == {2.0} for m in model.modules() if hasattr(m, "lora_A"))


@pytest.mark.parametrize("stop", [7, 10, 15])
def test_resumed_equals_uninterrupted(stop):
    whole = llama()
    ist, _ = train(whole, 25)

    first = llama()
    begun, optimizer = train(first, stop)
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), begun.state_dict()))
    second = llama()
    second.load_state_dict(saved[0])
    other = torch.optim.AdamW([p for p in second.parameters() if p.requires_grad], lr=1e-2)
    other.load_state_dict(saved[1])
    resumed = IST(second, optimizer=other)
    resumed.load_state_dict(saved[2])
    for step in range(stop, 25):
        resumed.before_step(lambda: batch_for(1000 + len(resumed.history)))
        second(**batch_for(step)).loss.backward()
        other.step()
        other.zero_grad()
    assert torch.equal(ist.unimportance, resumed.unimportance)
    assert ist.updates == resumed.updates
    for one, two in zip(whole.parameters(), second.parameters()):
        assert torch.equal(one, two)


def tiny(kind: str):
    hidden = dict(num_hidden_layers=3, **SIZES)
    bert = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    gpt = dict(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2)
    t5 = dict(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, decoder_start_token_id=0)
    t = transformers
    return {
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**hidden)),
        "qwen": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**hidden)),
        "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**hidden)),
        "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**hidden, head_dim=8)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**gpt)),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(num_hidden_layers=3, **bert)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**t5)),
    }[kind]()


@pytest.mark.parametrize("kind", ["llama", "qwen", "mistral", "gemma", "gpt2", "bert", "t5"])
def test_architectures(kind):
    torch.manual_seed(0)
    model = get_peft_model(tiny(kind), LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).train()
    ist, _ = train(model, 12)
    names = [layer.name for layer in ist.layers]
    assert len(names) == (6 if kind == "t5" else 3)
    assert ist.history[0][2] != [ist.history[0][2][0]] * 3
    if kind == "t5":
        assert ["encoder" in name for name in names] == [True] * 3 + [False] * 3


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}])
def test_kinds_of_lora(lora):
    """DoRA's magnitude and a bias of lora_B are switched with the rest; what PEFT computes is what is estimated."""
    model = llama(3, **lora)
    ist, _ = train(model, 12)
    layer = ist.layers[1]
    own = {id(parameter) for parameter in layer.parameters}
    for name, parameter in layer.module.named_parameters():
        assert (id(parameter) in own) == ("lora_" in name), name
    assert len(set(ist.history[0][2])) == 3


class Adapter(nn.Module):
    """A bottleneck adapter (Houlsby et al., 2019)."""

    def __init__(self, features):
        super().__init__()
        self.down, self.up = nn.Linear(features, 2), nn.Linear(2, features)

    def forward(self, x):
        return x + self.up(torch.relu(self.down(x)))


def test_bottleneck_adapters():
    """The user says which parameters adapters own; without a scaling to damp, a sampler without importance."""
    model = tiny("llama").requires_grad_(False)
    for block in model.model.layers:
        block.mlp = nn.Sequential(block.mlp, Adapter(16))

    def is_adapter(name, parameter):
        return ".mlp.1." in name

    with pytest.raises(ValueError, match=r"expected adapters with a scaling to damp in model\.layers\.0, found none"):
        IST(model, is_adapter=is_adapter)
    ist = IST(model, ISTConfig(sampler="rst", update_fraction=0.34), is_adapter=is_adapter)
    for step in range(4):
        (chosen,) = ist.before_step()
        assert trains_inside(model) == {f"model.layers.{chosen}.mlp.1.{n}" for n, _ in Adapter(16).named_parameters()}
        model(**batch_for(step)).loss.backward()


def test_another_one_takes_over():
    model = llama()
    everything = trainable(model)
    kind = type(model)
    first = IST(model, ISTConfig(sampler="rst"))
    first.before_step()
    assert trains_inside(model) < everything
    ist = IST(model)
    assert trains_inside(model) == everything and len(ist.layers) == 6
    with pytest.raises(ValueError, match="in charge of its model, got one that was closed"):
        first.before_step()
    ist.before_step()
    copied = copy.deepcopy(model)
    assert trains_inside(model) < everything
    ist.close()
    assert trains_inside(model) == everything and not any(m._forward_pre_hooks for m in model.modules())
    assert type(model) is kind and not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert trains_inside(copied) == everything and type(copied) is kind
    copied(**batch_for(0)).loss.backward()


class Other(transformers.modeling_layers.GradientCheckpointingLayer):
    def __init__(self):
        super().__init__()
        self.up = pk.nn.LoRALinear(8, 8, 2)
        self.experts = nn.ModuleList(pk.nn.LoRALinear(8, 8, 2) for _ in range(2))


class AnOther(Other):
    pass


def test_stacks_of_several_classes():
    """Hybrid models have blocks of several classes; other lists with adapters in them are no layers beside blocks."""
    model = nn.Module()
    model.projections = nn.ModuleList(pk.nn.LoRALinear(8, 8, 2) for _ in range(3))
    model.blocks = nn.ModuleList([Other(), AnOther(), Other()])
    ist = IST(model)
    assert [layer.name for layer in ist.layers] == [f"blocks.{i}" for i in range(3)]
    assert "adapters in no layer train in every step: projections.0.lora_A and 5 more" in str(ist)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = pk.nn.LoRALinear(8, 8, 2)
        self.experts = nn.ModuleList(pk.nn.LoRALinear(8, 8, 2) for _ in range(2))

    def forward(self, x):
        return self.up(x) + sum(expert(x) for expert in self.experts)


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def test_our_own_layers_and_experts_inside():
    torch.manual_seed(0)
    model = Stack()
    for module in model.modules():
        if isinstance(module, pk.nn.LoRALinear):
            nn.init.normal_(module.lora_B, std=0.3)
    layers = find_layers(model)
    assert [layer.name for layer in layers] == [f"blocks.{i}" for i in range(4)]
    assert all(len(layer.parameters) == 6 and len(layer.scaled) == 3 for layer in layers)
    ist = IST(model, ISTConfig(interval=1), loss_of=lambda model, batch: model(**batch).square().mean())
    for step in range(3):
        ist.before_step({"x": torch.randn(5, 8, generator=torch.Generator().manual_seed(step))})
    assert len(ist.history) == 2 and ist.unimportance.abs().max() > 0
    assert all(module.scaling == 1.0 for module in model.modules() if isinstance(module, pk.nn.LoRALinear))


def test_accelerated_model_chooses_the_same():
    one, other = llama(), llama()
    assert not pk.integrations.peft.accelerate(other).kept
    (plain, _), (fused, _) = train(one, 31), train(other, 31)
    assert plain.updates == fused.updates
    torch.testing.assert_close(fused.unimportance, plain.unimportance, rtol=1e-3, atol=1e-5)


def test_samplers():
    generator = torch.Generator().manual_seed(0)
    zeros = torch.zeros(8)
    drawn = [tuple(sorted(Uniform().sample(step, 2, zeros, generator))) for step in range(400)]
    assert len(set(drawn)) == 28
    lisa = [sorted(Lisa(5).sample(step, 2, zeros, generator)) for step in range(20)]
    assert all(lisa[step] == lisa[step - step % 5] for step in range(20)) and lisa[0] != lisa[5]
    sweep = [list(BlockCyclic(2).sample(step, 3, zeros, generator)) for step in range(8)]
    assert sweep[::2] == [[5, 6, 7], [2, 3, 4], [0, 1], [5, 6, 7]] and sweep[0] == sweep[1]
    important = torch.tensor([30.0] * 6 + [-30.0] * 2)
    assert sorted(pk.ist.ImportanceSampler().sample(0, 2, important, generator)) == [6, 7]


@pytest.mark.parametrize("name", ["rst", "lisa", "cyclic"])
def test_samplers_without_importance_need_no_batch_and_no_scaling(name):
    model = get_peft_model(tiny("llama"), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=[]))
    ist = IST(model, ISTConfig(sampler=name, interval=1))
    for _ in range(4):
        ist.before_step()
    assert sum(ist.updates) == 4 and not ist.history


class Nonsense(LayerSampler):
    def __init__(self, answer):
        self.answer = answer

    def sample(self, *_):
        return self.answer


@pytest.mark.parametrize("answer", [[], [0, 0], [6], [-1]])
def test_a_sampler_that_returns_nonsense(answer):
    ist = IST(llama(), ISTConfig(sampler=Nonsense(answer)))
    before = trainable(ist.model)
    with pytest.raises(ValueError, match="expected at least one layer of 0 … 5, none twice"):
        ist.before_step()
    assert trainable(ist.model) == before


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        ({"update_fraction": 0.0}, r"update_fraction in \(0, 1\], got 0.0"),
        ({"suppress_fraction": 1.5}, r"suppress_fraction in \(0, 1\], got 1.5"),
        ({"damping": 1.0}, "damping in"),
        ({"candidates": 1}, "candidates of at least 2, got 1"),
        ({"interval": 0}, "interval of at least 1, got 0"),
        ({"examples": 0}, "examples of at least 1, got 0"),
        ({"rate": -1.0}, "positive rate, got -1.0"),
        ({"estimator": "best"}, "estimator among auto, one-by-one, got 'best'"),
        ({"frozen_state": "lost"}, "frozen_state among keep, offload, drop, got 'lost'"),
        ({"candidates_per_forward": 0}, "candidates_per_forward of at least 1, got 0"),
        ({"backward_budget": 1.5}, r"backward_budget in \(0, 1\], got 1.5"),
        ({"checkpoint_beyond_budget": True}, "expected a backward_budget for checkpoint_beyond_budget, got None"),
    ],
)
def test_wrong_quantities(wrong, line):
    with pytest.raises(ValueError, match=line):
        ISTConfig(**wrong)


@pytest.mark.parametrize("sampler", [Lisa, BlockCyclic])
def test_wrong_periods(sampler):
    with pytest.raises(ValueError, match=f"{sampler.__name__}: expected a period of at least 1, got 0"):
        sampler(0)


def test_wrong_models():
    with pytest.raises(ValueError, match="expected a model with adapters"):
        IST(tiny("llama"))
    with pytest.raises(ValueError, match="expected a sampler among ist, rst, lisa, cyclic"):
        IST(llama(), ISTConfig(sampler="best"))
    with pytest.raises(ValueError, match="expected a sampler's name or a LayerSampler, got int"):
        IST(llama(), ISTConfig(sampler=3))
    with pytest.raises(ValueError, match=r"name of a module, got 'model\.lairs'"):
        IST(llama(), layers=["model.lairs"])
    with pytest.raises(ValueError, match=r"in 'base_model\.model\.lm_head', found none"):
        IST(llama(), layers=["base_model.model.lm_head"])
    ia3 = get_peft_model(tiny("llama"), IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=[]))
    with pytest.raises(ValueError, match=r"expected adapters with a scaling to damp in .*layers\.0, found none"):
        IST(ia3)
    shared = Stack()
    shared.blocks[2].up = shared.blocks[0].up
    with pytest.raises(ValueError, match=r"one that blocks\.0 and blocks\.2 share"):
        IST(shared)
    model = llama()
    some = [p for n, p in model.named_parameters() if p.requires_grad and "layers.5." not in n]
    with pytest.raises(ValueError, match=r"one without .*layers\.5's"):
        IST(model, optimizer=torch.optim.AdamW(some))
    ist = IST(llama(), ISTConfig(interval=1))
    ist.before_step()
    with pytest.raises(ValueError, match="expected a batch"):
        ist.before_step()
    state = IST(llama(3)).state_dict()
    with pytest.raises(ValueError, match="expected the state of 6 layers"):
        ist.load_state_dict(state)


def test_to_look_at(tmp_path):
    ist, _ = train(llama(), 25)
    with pytest.raises(ValueError, match="at least one estimate"):
        IST(llama()).plot(tmp_path / "none.png")
    assert ist.plot(tmp_path / "importance.png").read_bytes().startswith(b"\x89PNG")
    table = str(ist)
    lines = table.splitlines()
    assert lines[0].startswith("25 steps, ") and lines[0].endswith("% of backward skipped, 2 estimates of importance")
    assert lines[1].startswith("rewards of candidates differ by") and "logits at labels only" in lines[2]
    assert len(lines) == 10 and max(map(len, lines)) <= 80
