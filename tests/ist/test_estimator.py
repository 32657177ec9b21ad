"""The cheaper ways to the losses of the candidates against the plain one: the model's own loss, a forward each."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_kernels as pk
from peft_kernels.ist import IST, ISTConfig, label_losses
from tests.ist.test_ist import SIZES, VOCABULARY, batch_for, llama, tiny, train

SETS = [[0, 1], [2], [0, 2]]


def some_labels(seed: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    """Labels at some positions, other ones in each row, and padding."""
    batch = batch_for(seed, rows)
    keep = torch.rand(batch["labels"].shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    labels = batch["labels"].masked_fill(~keep, -100)
    mask = torch.ones_like(labels)
    mask[0, 6:] = 0
    return {"input_ids": batch["input_ids"], "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


def adapted(kind: str, **lora):
    torch.manual_seed(0)
    settings = {"r": 2, "target_modules": "all-linear", "init_lora_weights": False} | lora
    return get_peft_model(tiny(kind) if isinstance(kind, str) else kind, LoraConfig(**settings)).train()


def with_our_layers():
    """A model of transformers with LoRALinear for its linear layers."""
    torch.manual_seed(0)
    model = tiny("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block in model.model.layers:
        for name, child in list(block.mlp.named_children()):
            if isinstance(child, nn.Linear):
                layer = pk.nn.LoRALinear.from_linear(child, 2, lora_alpha=6)
                nn.init.normal_(layer.lora_B, std=0.3)
                setattr(block.mlp, name, layer)
    return model


def losses_of(model, batch, **config):
    """The plain way's, and those of `config`, with how they were computed; the first estimate's and the second's."""
    plain, _ = IST(model, ISTConfig(estimator="one-by-one")).estimator(SETS, batch)
    ist = IST(model, ISTConfig(**config))
    first, weight = ist.estimator(SETS, batch)
    second, weight_again = ist.estimator(SETS, batch)
    assert first == second and weight == weight_again
    return plain, first, ist.estimator


@pytest.mark.parametrize(
    ("kind", "shift"),
    [("llama", 1), ("qwen", 1), ("mistral", 1), ("gemma", 1), ("gpt2", 1), ("bert", 0), ("t5", 0)],
)
@pytest.mark.parametrize("together", [None, 2, 3])
def test_every_way_gives_the_same_losses(kind, shift, together):
    model, batch = adapted(kind), some_labels()
    if together:
        pk.integrations.peft.accelerate(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    plain, again, estimator = losses_of(model, batch, candidates_per_forward=together)
    assert estimator.shift == shift
    assert len(set(plain)) == 3
    torch.testing.assert_close(again, plain, rtol=2e-6, atol=2e-6)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert estimator.together == (together or 1), estimator.why


class OwnHead(nn.Linear):
    """Whose forward the weight does not say."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, OwnHead])
def test_logits_in_pieces(monkeypatch, kind, bias):
    """Of a part of the vocabulary at a time, or of a part of the labels that is no whole row."""
    model = adapted("llama", target_modules=["q_proj", "down_proj"])
    torch.manual_seed(1)
    head = kind(model.get_output_embeddings().in_features, 600, bias=bias)
    model.get_base_model().lm_head, model.config.vocab_size = head, 600
    with torch.no_grad():
        head.weight *= 40  # a maximum that rises from piece to piece
    monkeypatch.setattr(label_losses, "PIECE_BYTES", 4 * 5 * 600)
    monkeypatch.setattr(label_losses, "CACHED_BYTES", 4)
    plain, again, estimator = losses_of(model, some_labels())
    assert estimator.shift == 1, estimator.why
    torch.testing.assert_close(again, plain, rtol=2e-6, atol=2e-6)


def test_our_own_layers_share_a_forward():
    plain, again, estimator = losses_of(with_our_layers(), some_labels(), candidates_per_forward=3)
    assert estimator.together == 3, estimator.why
    torch.testing.assert_close(again, plain, rtol=2e-6, atol=2e-6)


def test_an_encoder_decoder_that_makes_its_inputs_itself():
    config = transformers.M2M100Config(
        vocab_size=VOCABULARY, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
        decoder_start_token_id=2, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
    )  # fmt: skip
    model = adapted(transformers.M2M100ForConditionalGeneration(config))
    plain, again, estimator = losses_of(model, some_labels())
    assert plain == again and "no decoder_input_ids" in estimator.why


def test_the_faster_of_two_ways_is_kept():
    """As on a GPU: both ways twice, then one of them."""
    model = llama(3)
    pk.integrations.peft.accelerate(model)
    plain, _, _ = losses_of(model, some_labels())
    ist = IST(model, ISTConfig(candidates_per_forward=3))
    ist.estimator(SETS, some_labels())
    ist.estimator.together = None
    for number in range(3):
        assert (ist.estimator.together is None) == (number < 2)
        losses, _ = ist.estimator(SETS, some_labels())
        torch.testing.assert_close(losses, plain, rtol=2e-6, atol=2e-6)
    assert ist.estimator.together in (1, 3) and "3 a forward" in ist.estimator.why


def test_layers_that_turn_out_not_to_run_fused():
    model = llama(3)
    pk.integrations.peft.accelerate(model)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj")
    layer.lora_A["default"].register_forward_hook(lambda *_: None)
    plain, again, estimator = losses_of(model, some_labels(), candidates_per_forward=3)
    assert estimator.together == 1 and "expected one plain LoRA adapter" in estimator.why
    torch.testing.assert_close(again, plain, rtol=2e-6, atol=2e-6)


def test_one_forward_for_all_and_no_logits():
    model = llama()
    pk.integrations.peft.accelerate(model)
    ist = IST(model, ISTConfig(candidates_per_forward=3))
    seen, caches = [], []
    language_model = model.get_base_model()
    language_model.lm_head.register_forward_hook(lambda module, args, output: seen.append(output.numel()))
    language_model.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: caches.append(kwargs.get("past_key_values")), with_kwargs=True
    )
    sets = [[0, 1, 2], [3, 4, 5], [1, 3, 5]]
    ist.estimator(sets, some_labels())
    seen.clear(), caches.clear()
    ist.estimator(sets, some_labels())
    assert seen == [0] and caches == [None]


def test_the_layers_chosen_are_the_same():
    def chosen(together, estimator):
        model = llama()
        pk.integrations.peft.accelerate(model)
        config = ISTConfig(interval=5, estimator=estimator, candidates_per_forward=together)
        return train(model, 41, config)[0]

    plain, labels, joined = chosen(None, "one-by-one"), chosen(None, "auto"), chosen(3, "auto")
    assert labels.estimator.shift == joined.estimator.shift == 1 and joined.estimator.together == 3
    for ist in (labels, joined):
        assert ist.updates == plain.updates
        torch.testing.assert_close(ist.unimportance, plain.unimportance, rtol=1e-3, atol=1e-6)
    assert plain.unimportance.abs().max() > 1e-4


def mixtral():
    sizes = SIZES | {"num_local_experts": 2, "num_hidden_layers": 3, "output_router_logits": True}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))


def gemma_with_capped_logits():
    config = transformers.Gemma2Config(
        **SIZES, num_hidden_layers=3, head_dim=8, final_logit_softcapping=0.5, hidden_activation="gelu"
    )
    return transformers.Gemma2ForCausalLM(config)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (mixtral, "auxiliary loss of its router"),
        (gemma_with_capped_logits, "not the mean cross-entropy of the logits at the labels"),
    ],
)
def test_models_with_a_loss_of_another_kind_go_one_by_one(make, reason):
    model = adapted(make(), target_modules=["q_proj", "v_proj"])
    pk.integrations.peft.accelerate(model)
    plain, again, estimator = losses_of(model, some_labels(), candidates_per_forward=3)
    assert plain == again and estimator.shift is None and reason in estimator.why, estimator.why


def test_what_cannot_be_repeated_or_routed_goes_one_by_one():
    batch = some_labels()
    _, _, estimator = losses_of(llama(3), batch, candidates_per_forward=3)
    assert estimator.together == 1 and "layers.0 has a Linear that takes no scaling a row" in estimator.why

    def fused():
        model = llama(3)
        pk.integrations.peft.accelerate(model)
        return model

    packed = batch | {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])}
    plain, again, estimator = losses_of(fused(), packed, candidates_per_forward=3)
    assert estimator.together == 1 and "packed (position_ids begin anew" in estimator.why
    torch.testing.assert_close(again, plain, rtol=2e-6, atol=2e-6)
    # A batch that cannot be repeated among others that can.
    ist = IST(fused(), ISTConfig(candidates_per_forward=3))
    ist.estimator(SETS, batch)
    torch.testing.assert_close(ist.estimator(SETS, packed)[0], plain, rtol=2e-6, atol=2e-6)
    assert ist.estimator.together == 3

    flattened = fused()  # OPT and shared experts hand their linear layers [tokens, features]
    for block in flattened.get_base_model().model.layers:
        forward = block.mlp.forward
        block.mlp.forward = lambda x, forward=forward: forward(x.flatten(0, 1)).view_as(x)
    _, _, estimator = losses_of(flattened, batch, candidates_per_forward=3)
    assert estimator.together == 1 and "is given [18, 16], not the 2 examples" in estimator.why


def test_the_loss_of_the_user_is_taken():
    model = llama(3)
    ist = IST(model, loss_of=lambda model, batch: model(**batch).logits.square().mean())
    expected, _ = ist.estimator(SETS, some_labels())
    assert ist.estimator(SETS, some_labels())[0] == expected
    assert "it has a loss_of of its own" in ist.estimator.why


def test_a_scaling_a_row_is_refused_where_it_would_mean_something_else():
    model = llama(1)
    pk.integrations.peft.accelerate(model)
    layer = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    x = torch.randn(3, 5, 16)
    layer.scaling["default"] = torch.tensor([[1.0], [0.0], [2.0]])
    expected = [layer.base_layer(row) + scale * layer.lora_B["default"](layer.lora_A["default"](row))
                for row, scale in zip(x, (1.0, 0.0, 2.0))]  # fmt: skip
    torch.testing.assert_close(layer(x), torch.stack(expected))
    layer.lora_A["default"].register_forward_hook(lambda *_: None)  # PEFT's own forward runs
    with pytest.raises(ValueError, match=r"expected one plain LoRA adapter and x of shape \[3, 1, 'K'\]"):
        layer(x)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype):
    """Training with estimates: both ways are timed, one is kept, and the losses stay those of the plain way."""
    model = llama().to("cuda", dtype)
    pk.integrations.peft.accelerate(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ist = IST(model, ISTConfig(interval=2, frozen_state="offload"), optimizer=optimizer)
    for step in range(12):
        ist.before_step(lambda: some_labels(len(ist.history)))
        loss = model(**{name: value.cuda() for name, value in some_labels(step).items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ist.estimator.together in (1, 3) and "candidates measured" in ist.estimator.why, ist.estimator.why
    batch = {name: value.cuda() for name, value in some_labels(99).items()}
    found, _ = ist.estimator(SETS, batch)
    plain, _ = IST(model, ISTConfig(estimator="one-by-one")).estimator(SETS, batch)
    torch.testing.assert_close(found, plain, rtol=2e-3 if dtype == torch.float32 else 2e-2, atol=0.0)
