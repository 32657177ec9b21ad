"""What the first estimate takes for rounding and what for another loss, and that any doubt means the plain way."""

import contextlib
import math

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_kernels as pk
from peft_kernels.ist import IST, ISTConfig, probe
from tests.interrupts import ERRORS
from tests.ist.test_estimator import SETS, adapted, losses_of, some_labels
from tests.ist.test_ist import SIZES, VOCABULARY, llama

t = transformers
LAYERS = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2)
STACKS = dict(vocab_size=VOCABULARY, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32)
FSMT = dict(langs=["en", "de"], src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY)
PROPHETNET = dict(hidden_size=16, num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=2,
                  num_decoder_attention_heads=2)  # fmt: skip
NOT_THE_LOSS = "it is not the mean cross-entropy of the logits at the labels"
ENCODER_DECODERS = {
    "fsmt": (lambda: t.FSMTForConditionalGeneration(t.FSMTConfig(**FSMT, **LAYERS, **STACKS)), "its output embeddings"),
    "prophetnet": (
        lambda: t.ProphetNetForConditionalGeneration(t.ProphetNetConfig(**PROPHETNET, **STACKS)),
        "its output embeddings",
    ),
    "bart": (lambda: t.BartForConditionalGeneration(t.BartConfig(**LAYERS, **STACKS)), None),
    "marian": (
        lambda: t.MarianMTModel(t.MarianConfig(**LAYERS, **STACKS, pad_token_id=0, decoder_start_token_id=0)), None,
    ),
    "pegasus": (lambda: t.PegasusForConditionalGeneration(t.PegasusConfig(**LAYERS, **STACKS)), None),
}  # fmt: skip


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_any_encoder_and_decoder(kind):
    make, reason = ENCODER_DECODERS[kind]
    model = adapted(make())
    batch = some_labels()
    batch["labels"][:, 0] = 3
    plain, again, estimator = losses_of(model, batch)
    torch.testing.assert_close(again, plain, rtol=2e-6, atol=2e-6)
    if reason:
        assert plain == again and estimator.shift is None and reason in estimator.why, estimator.why
    else:
        assert not estimator.one_by_one


class Noisy(nn.Linear):
    """Whose logits are off by a share of their size, at random; other ones in each call."""

    share = 0.0

    def forward(self, x):
        y = super().forward(x)
        return y + self.share * y.square().mean().sqrt() * torch.randn(y.shape).to(y)


def noisy(share: float, dtype: torch.dtype = torch.float32):
    model = llama(3, target_modules=["q_proj", "down_proj"]).to(dtype)
    head = model.get_output_embeddings()
    head.__class__, head.share = Noisy, share
    return model


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize(
    ("dtype", "share", "taken"),
    [
        (torch.float32, 1e-6, True), (torch.float32, 1e-5, True), (torch.float32, 1e-3, False),
        (torch.bfloat16, 2.0**-8, True), (torch.bfloat16, 0.5, False),
    ],
)  # fmt: skip
def test_rounding_of_another_kind_is_taken_and_more_than_that_is_not(dtype, share, taken, rows):
    ist = IST(noisy(share, dtype))
    ist.estimator(SETS, some_labels(rows=rows))
    assert (ist.estimator.shift == 1) == taken, ist.estimator.why
    if not taken:
        assert "rounding explains" in ist.estimator.why


def test_rounding_on_one_side_only():
    """As where kernels for the shapes of the one way differ from those for the other's."""
    model = llama(3)
    model.get_output_embeddings().register_forward_hook(lambda module, args, y: y * (1 + 4e-6 * torch.randn(y.shape)))
    plain, again, estimator = losses_of(model, some_labels())
    assert estimator.shift == 1, estimator.why
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)


def cohere():
    config = t.CohereConfig(**SIZES, num_hidden_layers=3, logit_scale=0.99)
    return adapted(t.CohereForCausalLM(config), target_modules=["q_proj"])


def with_z_loss():
    return with_loss(lambda loss, logits: loss + 1e-4 * logits.logsumexp(-1).square().mean())


def gemma(cap: float):
    config = t.Gemma2Config(**SIZES, num_hidden_layers=3, head_dim=8, final_logit_softcapping=cap)
    return adapted(t.Gemma2ForCausalLM(config), target_modules=["q_proj"])


def with_loss(change):
    model = llama(3)
    language_model = model.get_base_model()
    function = language_model.loss_function

    def changed(logits, labels, **more):
        return change(function(logits, labels, **more), logits)

    language_model.loss_function = changed
    return model


def with_head_hook(change):
    model = llama(3)
    model.get_output_embeddings().register_forward_hook(lambda module, args, y: change(y))
    return model


def without_labels_another_mask():
    """As PaliGemma's prefix: what a position sees depends on whether it is trained."""
    model = llama(3)

    def mask(module, args, kwargs):
        if kwargs.get("labels") is None:
            kwargs["attention_mask"] = kwargs["attention_mask"].clone()
            kwargs["attention_mask"][:, 1] = 0
        return args, kwargs

    model.get_base_model().register_forward_pre_hook(mask, with_kwargs=True)
    return model


OTHERS = {
    "a cap": (lambda: gemma(0.5), NOT_THE_LOSS),
    "a cap far above": (lambda: gemma(30.0), NOT_THE_LOSS),
    "a scale": (cohere, NOT_THE_LOSS),
    "a sum": (lambda: with_loss(lambda loss, logits: 9 * loss), NOT_THE_LOSS),
    "a share more": (lambda: with_loss(lambda loss, logits: loss * (1 + 1e-4)), NOT_THE_LOSS),
    "z-loss": (with_z_loss, NOT_THE_LOSS),
    "scaled by a hook": (lambda: with_head_hook(lambda y: 0.99 * y), "rounding explains"),
    "another mask": (without_labels_another_mask, "rounding explains"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_not_rounding(kind):
    make, reason = OTHERS[kind]
    plain, again, estimator = losses_of(make(), some_labels())
    assert plain == again and estimator.shift is None and reason in estimator.why, estimator.why


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    ist = IST(llama(3).to(dtype))
    ist.estimator(SETS, some_labels())
    assert ist.estimator.shift == 1, ist.estimator.why


def test_autocast():
    ist = IST(llama(3))
    with torch.autocast("cpu", torch.bfloat16):
        ist.estimator(SETS, some_labels())
    assert ist.estimator.shift == 1, ist.estimator.why


def test_the_bound_follows_from_what_products_are_rounded_to():
    bounds = {dtype: probe.forward_error(dtype, torch.device("cpu")) for dtype in (torch.float64, torch.float32)}
    assert bounds[torch.float32] == 16 * 33 * 2.0**-24 and bounds[torch.float64] == 16 * 33 * 2.0**-53
    assert probe.forward_error(torch.bfloat16, torch.device("cpu")) == 16 * (2.0**-8 + 2.0**-19)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert probe.forward_error(torch.float32, torch.device("cpu")) == 16 * (2.0**-8 + 2.0**-19)
    finally:
        torch.set_float32_matmul_precision(before)


def test_a_model_that_cannot_do_without_labels():
    """The reason is the probe's, and the losses are the model's own."""
    model = llama(3)

    def demand(module, args, kwargs):
        kwargs["labels"].sum()

    model.get_base_model().register_forward_pre_hook(demand, with_kwargs=True)
    plain, again, estimator = losses_of(model, some_labels())
    assert plain == again and "KeyError: 'labels'" in estimator.why


def test_rows_that_do_not_stand_alone():
    model = llama(3)

    def demand(module, args, kwargs):
        if kwargs["input_ids"].shape[0] != 4:
            raise ValueError("four rows or none")

    model.get_base_model().register_forward_pre_hook(demand, with_kwargs=True)
    plain, again, estimator = losses_of(model, some_labels())
    assert plain == again and "ValueError: four rows or none" in estimator.why


@pytest.mark.parametrize("together", [None, 3])
def test_a_later_batch_that_fits_less(together):
    """Labels out of the vocabulary are the model's fault to report, and what only the cheaper way cannot is not one."""
    model = llama(3)
    pk.integrations.peft.accelerate(model)
    ist = IST(model, ISTConfig(candidates_per_forward=together))
    ist.estimator(SETS, some_labels())
    assert ist.estimator.shift == 1
    batch = some_labels(1)
    with pytest.raises(IndexError), pytest.warns(UserWarning, match=r"a label is none of the 40"):
        ist.estimator(SETS, batch | {"labels": batch["labels"].masked_fill(batch["labels"] != -100, 99)})
    assert not model.get_output_embeddings()._forward_pre_hooks

    def refuse(module, args, kwargs):
        if kwargs.get("labels") is None:
            raise RuntimeError("no labels")

    handle = model.get_base_model().register_forward_pre_hook(refuse, with_kwargs=True)
    expected = IST(model, ISTConfig(estimator="one-by-one")).estimator(SETS, batch)[0]
    ist = IST(model, ISTConfig(candidates_per_forward=together))
    handle.remove()
    ist.estimator(SETS, some_labels())
    model.get_base_model().register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.warns(UserWarning, match="the model's own loss, a forward a candidate: RuntimeError: no labels"):
        assert ist.estimator(SETS, batch)[0] == expected
    assert ist.estimator.one_by_one == {"RuntimeError: no labels": 1} and "one by one in 1 estimates" in str(ist)
    resumed = IST(model, ISTConfig())
    resumed.load_state_dict(ist.state_dict())
    assert resumed.estimator.one_by_one == ist.estimator.one_by_one


def masked(batch, rows=slice(None)):
    labels = batch["labels"].clone()
    labels[rows] = -100
    return batch | {"labels": labels}


@pytest.mark.parametrize("estimator", ["auto", "one-by-one"])
@pytest.mark.parametrize("first", [True, False])
def test_batches_without_a_label_change_nothing_and_are_counted(estimator, first):
    ist = IST(llama(3), ISTConfig(interval=1, estimator=estimator))
    ist.before_step()
    batches = [some_labels(0), some_labels(1)]
    batches.insert(0 if first else 1, masked(some_labels(2)))
    for number, batch in enumerate(batches):
        before = ist.unimportance.clone()
        assert ist.before_step(batch)
        assert torch.equal(ist.unimportance, before) == (number == (0 if first else 1))
    assert ist.left_out == {"no label counted": 1} and len(ist.history) == 2 and ist.estimates == 3
    assert (ist.estimator.shift == 1) == (estimator == "auto"), ist.estimator.why
    assert "estimates left out: 1 (no label counted)" in str(ist)
    resumed = IST(llama(3), ISTConfig(interval=1, estimator=estimator))
    resumed.load_state_dict(ist.state_dict())
    assert resumed.left_out == ist.left_out and resumed.estimates == 3
    for each in (ist, resumed):
        each.before_step(some_labels(3))
    assert torch.equal(ist.unimportance, resumed.unimportance) and ist.active == resumed.active


def test_nine_rows_in_ten_masked():
    batch = masked(some_labels(rows=10), slice(9))
    plain, again, estimator = losses_of(llama(3), batch)
    assert estimator.shift == 1, estimator.why
    torch.testing.assert_close(again, plain, rtol=2e-6, atol=2e-6)
    alone = IST(llama(3), ISTConfig(estimator="one-by-one")).estimator(SETS, {k: v[9:] for k, v in batch.items()})[0]
    torch.testing.assert_close(plain, alone, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -1000.0])
def test_losses_that_importance_cannot_use(value):
    ist = IST(llama(3), ISTConfig(interval=1), loss_of=lambda model, batch: model(**batch).loss * 0 + value)
    ist.before_step()
    ist.before_step(some_labels())
    assert ist.left_out == {"a loss was not finite": 1} and not ist.history and not ist.unimportance.any()


class Own(nn.Module):
    def __init__(self, give):
        super().__init__()
        self.layers, self.give = nn.ModuleList(nn.Linear(4, 4) for _ in range(4)), give

    def forward(self, x, labels):
        for layer in self.layers:
            x = layer(x)
        return self.give((x - labels).square().mean(), x)


class Named(dict):
    """As a ModelOutput: by name and as attributes."""

    __getattr__ = dict.__getitem__


OUTPUTS = {
    "dict": lambda loss, x: {"logits": x, "loss": loss},
    "tuple": lambda loss, x: (loss, x),
    "list": lambda loss, x: [loss, x],
    "tensor": lambda loss, x: loss,
    "one element": lambda loss, x: {"loss": loss[None]},
    "number": lambda loss, x: (loss.item(), x),
    "named": lambda loss, x: Named(loss=loss, logits=x),
}
NO_LOSS = {
    "no key": (lambda loss, x: {"logits": x}, "got None beside logits"),
    "none": (lambda loss, x: (None, x), "got None"),
    "empty": (lambda loss, x: (), "got None"),
    "logits": (lambda loss, x: x, r"got a tensor \[2, 4\]"),
    "text": (lambda loss, x: "loss", "got str"),
}


def own(give):
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules=r"layers\.\d", init_lora_weights=False)
    return get_peft_model(Own(give), lora)


@pytest.mark.parametrize("kind", OUTPUTS)
def test_whatever_a_forward_gives_its_loss_in(kind):
    batch = {"x": torch.randn(2, 4), "labels": torch.randn(2, 4)}
    model = own(OUTPUTS[kind])
    ist = IST(model)
    ist.estimate(batch)
    (_, _, rewards), *_ = ist.history
    expected = IST(own(OUTPUTS["tensor"]), loss_of=lambda model, batch: model(**batch))
    expected.estimate(batch)
    assert len(set(rewards)) > 1 and len(ist.history) == 1
    assert set(rewards) == set(expected.history[0][2])


@pytest.mark.parametrize("kind", NO_LOSS)
def test_no_loss_in_one_line(kind):
    give, message = NO_LOSS[kind]
    ist = IST(own(give))
    batch = {"x": torch.randn(2, 4), "labels": torch.randn(2, 4)}
    with pytest.raises(ValueError, match=rf"^IST: expected model\(\*\*batch\) to give a loss of one number, {message}"):
        ist.estimate(batch)
    with pytest.raises(ValueError, match=rf"^IST: expected loss_of to give a loss of one number, {message}"):
        IST(own(give), loss_of=lambda model, batch: model(**batch)).estimate(batch)


def test_tuples_of_transformers():
    expected, _, _ = losses_of(llama(3), some_labels())
    plain, again, estimator = losses_of(llama(3), some_labels() | {"return_dict": False})
    assert plain == expected and estimator.shift == 1, estimator.why
    torch.testing.assert_close(again, plain, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("error", ERRORS)
def test_an_estimate_that_is_interrupted_leaves_the_model_as_it_was(error):
    """At each call of a module, of all forwards of a first estimate."""

    def state(model):
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for m in model.modules()]
        return hooks, [dict(m.scaling) for m in model.modules() if hasattr(m, "lora_A")], torch.get_rng_state().tolist()

    model = llama(2, target_modules=["q_proj", "down_proj"])
    ist, calls, at = IST(model), 0, 0
    before = state(model)

    def count(module, args):
        nonlocal calls
        calls += 1
        if calls == at:
            raise error("here")

    for at in range(1, 1000, 7):
        calls, ist.estimator.why, ist.estimator.shift = 0, "", None
        handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
        try:
            with contextlib.suppress(error):
                ist.estimator(SETS, some_labels())
        finally:
            handle.remove()
        assert state(model) == before and torch.is_grad_enabled(), at
        if calls < at:
            break
    assert at > 100
