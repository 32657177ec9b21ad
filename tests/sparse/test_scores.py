"""Scores against what they stand for, and a model that is afterwards what it was."""

import copy
import importlib
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_kernels.sparse import change, fisher, gradient, linear_weights, magnitude, scores
from tests.sparse.live_memory import LiveMemory


class Own(nn.Linear):
    """Not exactly an nn.Linear."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.q_proj, self.up_proj = nn.Linear(width, width), nn.Linear(width, 2 * width, bias=False)
        self.own, self.norm = Own(2 * width, width), nn.LayerNorm(width)

    def forward(self, x):
        return x + self.own(torch.tanh(self.up_proj(self.norm(self.q_proj(x)))))


class Model(nn.Module):
    """A model of tokens, with output embeddings that are tied to the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(Block(6) for _ in range(2))
        self.dropout = nn.Dropout(0.1)
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = self.dropout(layer(x))
        return self.lm_head(x)


def next_token(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def model_and_tokens(dtype=torch.float32, batches: int = 3):
    torch.manual_seed(0)
    return Model().to(dtype).eval(), [torch.randint(11, (1, 7)) for _ in range(batches)]


NAMES = ["layers.0.q_proj", "layers.0.up_proj", "layers.1.q_proj", "layers.1.up_proj"]


# --- Which weights ---------------------------------------------------------------------------------------------


def test_linear_weights():
    model = Model()
    weights = linear_weights(model)
    assert list(weights) == NAMES
    assert all(weight is model.get_submodule(name).weight for name, weight in weights.items())
    assert list(linear_weights(model, ["up_proj"])) == NAMES[1::2]
    assert list(linear_weights(model, "up_proj")) == NAMES[1::2]
    assert list(linear_weights(model, ("1.q_proj", "layers.0.up_proj"))) == NAMES[1:3]  # in the model's order
    assert linear_weights(model, ["lm_head"])["lm_head"] is model.embed.weight  # who asks for it gets it
    model.lm_head = nn.Linear(6, 11)
    assert list(linear_weights(model)) == [*NAMES, "lm_head"]
    model.layers[1].q_proj.weight = model.layers[0].q_proj.weight
    assert list(linear_weights(model)) == [*NAMES[:2], NAMES[3], "lm_head"]
    assert list(linear_weights(nn.Linear(2, 3))) == [""]


# --- Scores of the weights alone -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_magnitude_and_change(dtype):
    model, _ = model_and_tokens(dtype)
    weights, before = linear_weights(model), linear_weights(copy.deepcopy(model))
    for weight in before.values():
        weight.data += 0.1 * torch.randn_like(weight)
    for name, score in magnitude(weights).items():
        assert torch.equal(score, weights[name].detach().abs()) and score.dtype == dtype
    for name, score in change(weights, before).items():
        assert torch.equal(score, (weights[name].double() - before[name].double()).abs().float())
        assert score.dtype == torch.float32 and not score.requires_grad
    assert not any(change(weights, weights)[name].any() for name in weights)


# --- Scores of gradients ---------------------------------------------------------------------------------------


def by_hand(model, weights, batches, of_each):
    """The sum of `of_each` of every batch's gradient, float32."""
    model = copy.deepcopy(model).requires_grad_(True)
    own, sums = {name: model.get_submodule(name).weight for name in weights}, {}
    for batch in batches:
        for name, grad in zip(own, torch.autograd.grad(next_token(model, batch), list(own.values()))):
            sums[name] = sums.get(name, 0) + of_each(grad.float())
    return sums


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_gradient_and_fisher(dtype, frozen, monkeypatch):
    monkeypatch.setattr(scores, "PIECE", 20)
    model, batches = model_and_tokens(dtype)
    model.requires_grad_(not frozen)
    weights = linear_weights(model)
    found, expected = gradient(model, weights, next_token, batches), by_hand(model, weights, batches, lambda g: g)
    squares, of_each = fisher(model, weights, next_token, iter(batches)), by_hand(model, weights, batches, torch.square)
    assert list(found) == list(squares) == NAMES
    for name in NAMES:
        assert found[name].dtype == squares[name].dtype == torch.float32
        assert not found[name].requires_grad and found[name].shape == weights[name].shape
        assert found[name].any() and squares[name].any()
        torch.testing.assert_close(found[name], expected[name].abs(), rtol=1e-6, atol=0)
        torch.testing.assert_close(squares[name], of_each[name] / 3, rtol=1e-6, atol=0)
        # The absolute value of the sum, not the sum of those; the mean of squares, not the square of the mean.
        assert bool((found[name] < 0.9 * by_hand(model, weights, batches, torch.abs)[name]).any())
        assert bool((squares[name] > 1.1 * (found[name] / 3) ** 2).any())


def test_some_weights_only():
    model, batches = model_and_tokens()
    every = fisher(model, linear_weights(model), next_token, batches)
    some = fisher(model, linear_weights(model, ["1.q_proj"]), next_token, batches)
    assert list(some) == NAMES[2:3] and torch.equal(some[NAMES[2]], every[NAMES[2]])
    with torch.no_grad():  # of the caller's
        assert torch.equal(fisher(model, linear_weights(model), next_token, batches)[NAMES[0]], every[NAMES[0]])


class Broken(torch.autograd.Function):
    """Raises in backward."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        raise KeyError("backward")


def state(model: nn.Module):
    """All that must not change: objects by identity, numbers by bits."""
    parameters = list(model.parameters())
    facts = [(p, p.requires_grad, p.grad, len(p._post_accumulate_grad_hooks or ())) for p in parameters]
    modes = [module.training for module in model.modules()]
    bits = [tensor.clone() for p in parameters for tensor in (p.detach(), p.grad) if tensor is not None]
    return facts, modes, bits


@pytest.mark.parametrize("score", [gradient, fisher])
@pytest.mark.parametrize("fails", ["never", "at once", "second", "in backward", "no scalar", "no batch", "interrupted"])
def test_the_model_is_what_it_was(score, fails):
    model, batches = model_and_tokens(batches=3)
    # Some frozen, some with a gradient, some frozen and with one, modes mixed.
    model.layers[0].requires_grad_(False)
    model.layers[1].train()
    for parameter in (model.layers[0].q_proj.weight, model.layers[1].norm.weight, model.embed.weight):
        parameter.grad = torch.randn_like(parameter)
    calls = []

    def loss(model, tokens):
        calls.append(tokens)
        if fails == "at once" or (fails == "second" and len(calls) == 2):
            raise KeyError("loss")
        if fails == "interrupted":
            raise KeyboardInterrupt
        value = next_token(model, tokens)
        if fails == "in backward":
            hidden = model.embed(tokens)
            for layer in model.layers:
                hidden = Broken.apply(layer(hidden)) if layer is model.layers[0] else layer(hidden)
            return hidden.sum()  # the gradients of the second layer are there before it breaks
        return model(tokens) if fails == "no scalar" else value

    before = state(model)
    errors = {"never": (), "no scalar": ValueError, "no batch": ValueError, "interrupted": KeyboardInterrupt}
    kind = errors.get(fails, KeyError)
    if kind:
        with pytest.raises(kind):
            score(model, linear_weights(model), loss, [] if fails == "no batch" else batches)
    else:
        score(model, linear_weights(model), loss, batches)
        assert len(calls) == 3
    after = state(model)
    assert all(x is y for one, other in zip(before[0], after[0]) for x, y in zip(one, other))
    assert before[1] == after[1] and all(torch.equal(x, y) for x, y in zip(before[2], after[2], strict=True))


@pytest.mark.parametrize("score", [gradient, fisher])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_dense_gradient_at_a_time(score, frozen, dtype, monkeypatch):
    monkeypatch.setattr(scores, "PIECE", 1000)
    model = nn.Sequential(*[nn.Linear(96, 96) for _ in range(6)]).to(dtype).requires_grad_(not frozen)
    weights = linear_weights(model, [str(i) for i in range(4)])  # the gradients of two others are in the way
    with LiveMemory(least=96 * 96 * dtype.itemsize) as memory:
        score(model, weights, lambda model, x: model(x).float().square().mean(), torch.randn(3, 1, 96).to(dtype))
    assert memory.counted == len(weights) + 1  # the accumulators and a gradient
    assert memory.peak < len(weights) * 4 * 96 * 96 + 96 * 96 * dtype.itemsize + 20_000


def test_checkpointing():
    """Reentrant too, where a gradient comes only because the input of a block requires one."""
    model, batches = model_and_tokens()
    weights = linear_weights(model)
    plain = fisher(model, weights, next_token, batches)
    for reentrant in (False, True):
        for layer in model.layers:
            layer.forward = lambda x, layer=layer, way=reentrant: checkpoint(Block.forward, layer, x, use_reentrant=way)
        found = fisher(model, weights, next_token, batches)
        assert all(torch.equal(found[name], plain[name]) for name in plain)


def test_a_gradient_in_parts():
    """One weight in two reentrant segments: its square cannot be had, its sum can."""
    shared = nn.Linear(4, 4)

    def loss(model, x):
        for _ in range(2):
            x = checkpoint(lambda x: torch.tanh(model(x)), x, use_reentrant=True)
        return x.sum()

    def plain(model, x):
        return torch.tanh(model(torch.tanh(model(x)))).sum()

    examples = [torch.randn(1, 4, requires_grad=True) for _ in range(2)]
    weights = linear_weights(shared)
    torch.testing.assert_close(gradient(shared, weights, loss, examples), gradient(shared, weights, plain, examples))
    with pytest.raises(ValueError, match=r"^expected one gradient of '' for each example, got it in parts$"):
        fisher(shared, weights, loss, examples)
    assert fisher(shared, weights, plain, examples)[""].any()


def test_a_weight_that_is_not_reached():
    model = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    with pytest.warns(UserWarning, match=r"^no gradient reached 1 weights, as '1': they score 0$") as caught:
        found = gradient(model, linear_weights(model), lambda model, x: model[0](x).sum(), [torch.ones(1, 3)])
    assert caught[0].filename == __file__
    assert found["0"].any() and not found["1"].any()


def test_progress(capsys, monkeypatch):
    model, batches = model_and_tokens()
    weights = linear_weights(model)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tqdm", None)  # not needed for anything but the bar
        fisher(model, weights, next_token, batches)
    assert capsys.readouterr().err == ""
    pytest.importorskip("tqdm")
    fisher(model, weights, next_token, batches, progress=True)
    assert "Fisher information: 100%" in capsys.readouterr().err


def test_tqdm_is_not_imported_with_the_package():
    source = importlib.import_module("peft_kernels.sparse.scores")
    assert not hasattr(source, "tqdm")


# --- What is refused -------------------------------------------------------------------------------------------


def three(loss=lambda model, x: model(x).sum(), weights=None, batches=None, score=gradient):
    model = nn.Linear(3, 3)
    batches = [torch.ones(1, 3)] if batches is None else batches
    return score(model, linear_weights(model) if weights is None else weights(model), loss, batches)


REFUSED = {
    "target": (lambda: linear_weights(Model(), ["q_proj", "k_proj"]), "ends of names of nn.Linear .* 'k_proj'"),
    "part of a name": (lambda: linear_weights(Model(), ["proj"]), "ends of names .* got 'proj'"),
    "another class": (lambda: linear_weights(Model(), ["own"]), "ends of names .* got 'own'"),
    "no linears": (lambda: linear_weights(nn.Sequential(Own(3, 3))), "nn.Linear modules, got Sequential without"),
    "no pretrained": (lambda: change({"w": torch.ones(2, 3)}, {}), "for each name, got none for 'w'"),
    "pretrained shape": (
        lambda: change({"w": torch.ones(2, 3)}, {"w": torch.ones(3, 3)}), r"'w' of \[2, 3\], got \[3, 3\]",
    ),
    "no parameter": (lambda: three(weights=lambda model: {"w": torch.ones(3, 3)}), "parameters .* for 'w'"),
    "a copy": (lambda: three(weights=lambda model: {"w": model.weight.detach()}), "parameters .* for 'w'"),
    "a bias": (lambda: three(weights=lambda model: {"b": model.bias}), r"parameters .*, got \[3\] .* for 'b'"),
    "one twice": (lambda: three(weights=lambda model: dict.fromkeys("ab", model.weight)), "one under two names"),
    "no batch": (lambda: three(batches=()), "at least one batch, got none"),
    "no scalar": (lambda: three(loss=lambda model, x: model(x)), r"the loss as a scalar .*, got \[1, 3\]"),
    "a number": (lambda: three(loss=lambda model, x: 1.0, score=fisher), "the loss as a scalar .*, got float"),
    "a constant": (lambda: three(loss=lambda model, x: x.sum()), r"depends on the weights, got \[\] float32"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_line(kind):
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=rf"^expected .*{message}") as caught:
        make()
    assert "\n" not in str(caught.value)
