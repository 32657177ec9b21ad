"""Training on logits at labels alone against training on all of them: the same numbers from fewer rows of lm_head."""

import contextlib
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers.loss.loss_utils import ForCausalLMLoss

import peft_kernels as pk
from peft_kernels.integrations.transformers import cross_entropy, logits_at_labels
from peft_kernels.ist import IST, ISTConfig
from tests.interrupts import ERRORS, everywhere

VOCABULARY = 32
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GPT2 = dict(
    vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0, resid_pdrop=0.0,
    embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
ENCODER = dict(
    vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
T5 = dict(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0)
BART = dict(
    vocab_size=VOCABULARY, d_model=16, decoder_layers=1, decoder_ffn_dim=24, decoder_attention_heads=2,
    encoder_layers=1, encoder_ffn_dim=24, encoder_attention_heads=2,
)  # fmt: skip
t = transformers
MAKE = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES)),
    "llama tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**SIZES)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**SIZES)),
    "gemma": lambda: t.GemmaForCausalLM(t.GemmaConfig(**SIZES)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**SIZES, final_logit_softcapping=0.5)),
    "mixtral": lambda: t.MixtralForCausalLM(
        t.MixtralConfig(**SIZES, num_local_experts=2, output_router_logits=True, router_aux_loss_coef=0.1)
    ),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2)),
}


def make(kind: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    return MAKE[kind]().train()


def adapted(kind: str = "llama", **lora) -> nn.Module:
    settings = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False, "task_type": "CAUSAL_LM"} | lora
    return get_peft_model(make(kind), LoraConfig(**settings)).train()


def batch_for(seed: int = 0, rows: int = 3, tokens: int = 9) -> dict[str, torch.Tensor]:
    """Labels at about half of the positions, other ones in each row, and padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, tokens - 3 :] = 0
    ignored = (torch.rand(ids.shape, generator=generator) < 0.5) | (mask == 0)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(ignored, -100)}


def results(model, batch=None, **more) -> dict[str, torch.Tensor]:
    """Loss and every gradient by name."""
    model.zero_grad(set_to_none=True)
    loss = model(**(batch or batch_for()), **more).loss
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert grads
    return {"loss": loss.detach()} | grads


def count_labels(batch) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


def rows_seen(model) -> list[int]:
    """Fills with the rows that each call of the output embeddings computes."""
    head = next(m for m in model.modules() if isinstance(m, t.PreTrainedModel)).get_output_embeddings()
    seen = []
    head.register_forward_hook(lambda module, args, output: seen.append(output[..., 0].numel()))
    return seen


def assert_same(model, batch=None, context=contextlib.nullcontext, rtol=2e-5, atol=1e-6, **more) -> None:
    """With and without, on one model; and it was with and without."""
    batch, seen = batch or batch_for(), rows_seen(model)
    with context():
        expected = results(model, batch, **more)
        with logits_at_labels(model):
            found = results(model, batch, **more)
        assert_equal(results(model, batch, **more), expected, rtol=0, atol=0)
    every = seen[0]
    assert seen == [every, count_labels(batch), every]
    assert_equal(found, expected, rtol, atol)


def assert_equal(found, expected, rtol=2e-5, atol=1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kind", MAKE)
@pytest.mark.parametrize("more", [{}, {"num_items_in_batch": 29}], ids=["mean", "num_items_in_batch"])
def test_loss_and_all_gradients(kind, more):
    assert_same(make(kind), **more)


@pytest.mark.parametrize("kind", MAKE)
def test_peft_accelerated(kind):
    model = adapted(kind, fan_in_fan_out=kind == "gpt2")
    assert pk.integrations.peft.accelerate(model).fused
    assert_same(model)


@pytest.mark.parametrize("lora", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_adapters_on_the_head(lora):
    model = adapted(**lora)
    pk.integrations.peft.accelerate(model)
    expected = results(model)
    with logits_at_labels(model):
        found = results(model)
        assert model(**batch_for()).logits.shape == (1, count_labels(batch_for()), VOCABULARY)
    assert any("lm_head" in name for name in found)
    assert_equal(found, expected)


def test_prompt_tuning_lengthens_the_rows():
    model = get_peft_model(make(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).train()
    seen, expected = rows_seen(model), results(model)
    with logits_at_labels(model):
        assert_equal(results(model), expected)
    assert seen == [3 * 13, count_labels(batch_for())]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    model = adapted()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_same(model, use_cache=False)


def test_autocast():
    """bfloat16 products of other shapes may round otherwise."""
    assert_same(adapted(), context=lambda: torch.autocast("cpu", torch.bfloat16), rtol=2e-2, atol=2e-3)


def test_ddp(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert_same(DistributedDataParallel(adapted()))
    finally:
        dist.destroy_process_group()


def test_compiled():
    model = adapted()
    expected = results(model)
    with logits_at_labels(model):
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            assert_equal({n.removeprefix("_orig_mod."): v for n, v in results(compiled).items()}, expected)
        assert compiled(**batch_for()).logits.shape[:2] == (1, count_labels(batch_for()))


def test_ist_chooses_the_same_layers():
    def trained(context):
        model = adapted(kind="llama")
        pk.integrations.peft.accelerate(model)
        with context(model):
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
            ist = IST(model, ISTConfig(interval=3, candidates_per_forward=3), optimizer=optimizer)
            losses = []
            for step in range(10):
                ist.before_step(lambda: batch_for(100 + len(ist.history)))
                loss = model(**batch_for(step)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return losses, ist.updates, ist.unimportance

    (losses, updates, unimportance), plain = trained(logits_at_labels), trained(contextlib.nullcontext)
    assert losses == pytest.approx(plain[0], rel=1e-5) and updates == plain[1]
    torch.testing.assert_close(unimportance, plain[2], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 3])
def test_trainer(tmp_path, steps):
    """Batches with unlike numbers of labels, whose sum `num_items_in_batch` is."""

    def train(context):
        model, calls = adapted(), []
        examples = [{name: value[0] for name, value in batch_for(n, rows=1).items()} for n in range(24)]
        for number, example in enumerate(examples):
            example["labels"][: number % 5] = -100
        seen = rows_seen(model)
        model.get_base_model().register_forward_pre_hook(
            lambda module, args, kwargs: calls.append(kwargs.get("num_items_in_batch")), with_kwargs=True
        )
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=steps, max_steps=4,
            logging_steps=1, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        with context(model):
            trainer = transformers.Trainer(model, arguments, train_dataset=examples)
            trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(calls) == 4 * steps and None not in calls
        return losses, {name: p for name, p in model.named_parameters() if p.requires_grad}, sum(seen), sum(calls)

    ours, plain = train(logits_at_labels), train(contextlib.nullcontext)
    assert ours[0] == pytest.approx(plain[0], rel=1e-5)
    assert_equal(ours[1], plain[1], rtol=1e-3, atol=1e-5)
    assert 4 * steps * 2 * 9 == plain[2] > 1.5 * ours[2]


def test_what_is_left_untouched():
    model, batch = make(), batch_for()
    shifted = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    ids = {"input_ids": batch["input_ids"]}
    calls = {
        "no labels": (ids, 9),
        "labels nowhere": (batch | {"labels": torch.full_like(ids["input_ids"], -100)}, 9),
        "a label that no position predicts": (
            batch | {"labels": torch.full_like(ids["input_ids"], -100).index_fill(1, torch.tensor([0]), 5)}, 9,
        ),
        "shift_labels": (batch | {"shift_labels": shifted}, 9),
        "ignore_index": (batch | {"labels": batch["labels"].clamp(min=5), "ignore_index": 5}, 9),
        "logits_to_keep": (ids | {"logits_to_keep": 2}, 2),
    }  # fmt: skip
    calls["no gradient"] = (batch, 9)
    expected = {what: model(**call) for what, (call, _) in calls.items()}
    with logits_at_labels(model):
        for what, (call, tokens) in calls.items():
            with torch.set_grad_enabled(what != "no gradient"):
                output = model(**call)
            assert output.logits.shape == (3, tokens, VOCABULARY), what
            torch.testing.assert_close(output.logits, expected[what].logits, rtol=0, atol=0)
            if output.loss is not None:
                torch.testing.assert_close(output.loss, expected[what].loss, equal_nan=True)
        model.eval()
        output = model(**batch)
        assert output.logits.shape == (3, 9, VOCABULARY)
        torch.testing.assert_close(output.loss, expected["no gradient"].loss)
        assert model.generate(ids["input_ids"], max_new_tokens=3, do_sample=False).shape[1] > 9
        model.train()
        assert model.generate(ids["input_ids"], max_new_tokens=3, do_sample=False).shape[1] > 9
        assert model(**batch).logits.shape[0] == 1


def hooks_of(model) -> list[int]:
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


def test_removal():
    model = adapted()
    before = hooks_of(model)
    first, second = logits_at_labels(model), logits_at_labels(model)
    assert model(**batch_for()).logits.shape[0] == 1
    first.remove()
    first.remove()
    assert model(**batch_for()).logits.shape[0] == 1
    second.remove()
    assert hooks_of(model) == before
    assert model(**batch_for()).logits.shape == (3, 9, VOCABULARY)
    assert model.get_base_model().loss_function is ForCausalLMLoss


def test_copies():
    model = make()
    with logits_at_labels(model):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            seen = rows_seen(twin)
            assert_equal(results(twin), results(model))
            assert seen == [count_labels(batch_for())]


def test_threads_on_one_model():
    model, batches = make(), [batch_for(seed, tokens=9 + seed % 3) for seed in range(6)]
    expected = [model(**batch).loss.item() for batch in batches]
    with logits_at_labels(model), ThreadPoolExecutor(3) as pool:
        outputs = list(pool.map(lambda number: model(**batches[number % 6]), range(60)))
    for number, output in enumerate(outputs):
        assert output.logits.shape[:2] == (1, count_labels(batches[number % 6]))
        assert output.loss.item() == pytest.approx(expected[number % 6], rel=1e-5)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["in a layer", "before the first"])
def test_a_forward_that_raises_leaves_nothing(where, error):
    model = make()

    def fail(*_):
        raise error("out of luck")

    with logits_at_labels(model):
        broken = model.register_forward_pre_hook(fail) if where == "before the first" else None
        broken = broken or model.model.layers[1].register_forward_pre_hook(fail)
        with pytest.raises(error, match="out of luck"):
            model(**batch_for())
        broken.remove()
        assert model.lm_head(torch.randn(3, 9, 16)).shape == (3, 9, VOCABULARY)
        assert model.forward(input_ids=batch_for()["input_ids"]).logits.shape == (3, 9, VOCABULARY)
        assert model(input_ids=batch_for()["input_ids"]).logits.shape == (3, 9, VOCABULARY)
        with torch.no_grad():
            assert model(**batch_for()).logits.shape == (3, 9, VOCABULARY)
        assert model(**batch_for()).logits.shape == (1, count_labels(batch_for()), VOCABULARY)


def test_an_error_that_is_kept_for_its_traceback():
    """As notebooks keep it, with all that the forward held: the next forward is another one all the same."""
    model, kept = make(), []

    def fail(*_):
        raise KeyboardInterrupt

    with logits_at_labels(model):
        broken = model.model.layers[1].register_forward_pre_hook(fail)
        try:
            model(**batch_for())
        except KeyboardInterrupt as error:
            kept.append(error)
        broken.remove()
        with torch.no_grad():
            assert model.eval()(input_ids=batch_for()["input_ids"]).logits.shape == (3, 9, VOCABULARY)


def test_interrupted_anywhere():
    model, batch = make(), batch_for(rows=1)
    with logits_at_labels(model):
        for at in everywhere(lambda: model(**batch), every=7):
            assert model.lm_head(torch.randn(1, 9, 16)).shape == (1, 9, VOCABULARY), at
        assert at > 200


def test_output_embeddings_that_are_not_there_any_more():
    model = make()
    logits_at_labels(model)
    model.lm_head = nn.Linear(16, VOCABULARY, bias=False)
    with pytest.raises(ValueError, match=r"expected the output embeddings that .* got others"):
        model(**batch_for())


def test_hidden_states_of_another_shape():
    model = make()
    model.model.norm.register_forward_hook(lambda module, args, output: output[:, :2])
    with logits_at_labels(model), pytest.raises(ValueError, match=r"\[3, 9\], got \[3, 2\]"):
        model(**batch_for())


def with_a_loss_of_its_own():
    model = make()
    model.loss_function = lambda logits, labels, **_: logits.mean()
    return model


REFUSED = {
    "bert": (lambda: t.BertForMaskedLM(t.BertConfig(**ENCODER)), "BertForMaskedLM: its forward does not call"),
    "t5": (lambda: t.T5ForConditionalGeneration(t.T5Config(**T5)), "T5For.*: it is an encoder and a decoder"),
    "bart": (lambda: t.BartForCausalLM(t.BartConfig(**BART)), "BartForCausalLM: its forward does not call"),
    "own loss": (with_a_loss_of_its_own, "LlamaForCausalLM: its loss_function is <lambda>"),
    "no head": (lambda: t.LlamaModel(t.LlamaConfig(**SIZES)), "output embeddings, got LlamaModel"),
    "linear": (lambda: nn.Linear(2, 2), "a model of transformers with output embeddings, got Linear"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_line(kind):
    make, message = REFUSED[kind]
    model = make()
    before = hooks_of(model)
    with pytest.raises(ValueError, match=rf"^expected .*{message}") as caught:
        logits_at_labels(model)
    assert "\n" not in str(caught.value)
    assert hooks_of(model) == before


def rows_for(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    targets = torch.randint(VOCABULARY, (7,)).index_fill(0, torch.tensor([0, 4]), -100)
    return (5 * torch.randn(7, VOCABULARY)).to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("rows", [1, 3, 7], ids="{} rows a piece".format)
def test_cross_entropy_has_the_gradient_it_should(monkeypatch, rows):
    monkeypatch.setattr(cross_entropy, "CACHED_BYTES", 4 * rows * VOCABULARY)
    logits, targets = rows_for(torch.float64)
    assert torch.autograd.gradcheck(lambda x: cross_entropy.CrossEntropy.apply(x, targets, -100), logits)
    found = cross_entropy.CrossEntropy.apply(logits, targets, -100)
    torch.testing.assert_close(found, nn.functional.cross_entropy(logits, targets, reduction="sum"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_cross_entropy_errs_no_more_than_eager(dtype):
    logits, targets = rows_for(dtype)
    exact = logits.detach().double().requires_grad_()
    results = []
    for x, loss_of in (
        (exact, lambda x: nn.functional.cross_entropy(x, targets, reduction="sum")),
        (logits, lambda x: nn.functional.cross_entropy(x.float(), targets, reduction="sum")),
        (logits, lambda x: cross_entropy.CrossEntropy.apply(x, targets, -100)),
    ):
        loss = loss_of(x)
        (grad,) = torch.autograd.grad(3 * loss, x)
        assert grad.dtype == x.dtype and (grad[[0, 4]] == 0).all()
        results.append((loss.detach().double(), grad.double()))
    (loss, grad), eager, ours = results
    smallest = torch.finfo(torch.float32).eps
    assert (ours[0] - loss).abs() <= 2 * (eager[0] - loss).abs() + smallest * loss
    assert (ours[1] - grad).abs().max() <= 2 * (eager[1] - grad).abs().max()


def test_cross_entropy_keeps_the_logits_alone():
    logits, targets = rows_for(torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = cross_entropy.causal_lm_loss(logits[None], None, VOCABULARY, shift_labels=targets[None])
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    assert storages.pop(logits.untyped_storage().data_ptr())
    assert sum(storages.values()) <= 7 * (8 + 4 + 1) + 16  # of each row; and the sum and the count of labels
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.float(), targets), rtol=1e-5, atol=1e-5)
