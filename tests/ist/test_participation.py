"""Layers that take no part in the loss: what is drawn always has a gradient, and is what the batch uses."""

import json

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

import peft_kernels as pk
from peft_kernels.ist import IST, Fixed, ISTConfig, LayerSampler, participation
from peft_kernels.ist.callback import _from_json, _to_json
from tests.ist.test_ist import SIZES, batch_for, tiny

IMAGE = 31
STEPS = 24
VISION, TEXT = range(3), range(3, 7)


def llava(dropout=0.0):
    """Three layers of vision, of whose outputs the last but one is used, and four of text."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=32, patch_size=16
    )
    text = transformers.LlamaConfig(num_hidden_layers=4, **(SIZES | {"vocab_size": 32}))
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    lora = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj", "fc1", "up_proj"], init_lora_weights=False, lora_dropout=dropout
    )
    return get_peft_model(transformers.LlavaForConditionalGeneration(config), lora).train()


def text(seed=0):
    ids = torch.randint(1, IMAGE, (2, 8), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def images(seed=0):
    ids = text(seed)["input_ids"].clone()
    ids[:, :4] = IMAGE
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE, -100), "pixel_values": pixels}


def with_gradient(ist) -> list[int]:
    return [i for i, layer in enumerate(ist.layers) if any(p.grad is not None for p in layer.parameters)]


def steps(model, ist, batches):
    """Of each step, what trained and what had a gradient."""
    for batch in batches:
        ist.before_step()
        model(**batch).loss.backward()
        yield list(ist.active), with_gradient(ist)
        model.zero_grad()


@pytest.fixture(params=[None, "not reentrant", "reentrant"])
def checkpointed(request):
    def switch(model):
        if request.param:
            model.gradient_checkpointing_enable({"use_reentrant": request.param == "reentrant"})
        return model

    return switch


@pytest.mark.parametrize("sampler", ["ist", "rst", "lisa", "cyclic"])
def test_text_only(checkpointed, sampler):
    model = checkpointed(llava())
    config = ISTConfig(sampler=sampler, update_fraction=0.5, interval=STEPS)
    ist = IST(model, config)
    found = list(steps(model, ist, [text(seed) for seed in range(STEPS)]))
    assert all(grads and set(grads) <= set(active) for active, grads in found)
    for active, grads in found[1:]:
        assert active == grads and len(active) == 2  # a half of those that take part
    assert {layer for active, _ in found for layer in active if layer in TEXT} == set(TEXT)
    assert sum(ist.updates) == sum(len(active) for active, _ in found)
    assert ist.updates == [sum(layer in active for active, _ in found) for layer in range(7)]


def test_images(checkpointed):
    """The last layer of the vision tower is called, and its output is not used: it is found out once."""
    model = checkpointed(llava())
    ist = IST(model, ISTConfig(sampler="rst", update_fraction=0.15))
    found = list(steps(model, ist, [images(seed) for seed in range(40)]))
    assert all(active == grads for active, grads in found)  # one a step: where it is the unused one, another is drawn
    assert {layer for active, _ in found for layer in active} == {0, 1, *TEXT}
    assert 2 in ist.participation.unused


@pytest.mark.parametrize("fraction", [0.15, 0.5])
def test_text_and_images_in_turn(checkpointed, fraction):
    model = checkpointed(llava())
    ist = IST(model, ISTConfig(sampler="rst", update_fraction=fraction))
    batches = [images(seed) if seed % 2 else text(seed) for seed in range(STEPS)]
    found = list(steps(model, ist, batches))
    assert all(grads for _, grads in found)
    trained = {layer for _, grads in found for layer in grads}
    assert trained == {0, 1, *TEXT}


def test_an_accumulated_batch_without_a_gradient(checkpointed):
    """The step has one from the images: the text adds nothing, and does not raise."""
    model, plain = checkpointed(llava()), llava()
    ist = IST(model, ISTConfig(sampler=Fixed([1])))
    ist.before_step()
    for batch in (images(), text(), images(1)):
        model(**batch).loss.backward()
    for batch in (images(), images(1)):
        plain(**batch).loss.backward()
    assert with_gradient(ist) == [1]
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name].grad)


@pytest.mark.parametrize("layers", [[0, 3], [1, 5], [2, 3], [0, 1, 2, 3, 4, 5, 6]])
def test_the_lowest_text_layer_beside_an_unused_one(checkpointed, layers):
    model, plain = checkpointed(llava()), llava()
    ist = IST(model, ISTConfig(sampler=Fixed(layers)))
    ist.before_step()
    model(**text()).loss.backward()
    plain(**text()).loss.backward()
    assert with_gradient(ist) == [layer for layer in layers if layer in TEXT]
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, expected[name].grad)


def test_a_forward_that_runs_again_is_the_one_that_it_would_have_been(checkpointed):
    """With the same dropout, and no gradient of what was drawn at first."""
    drawn_again = 0
    for seed in range(12):
        model, other = checkpointed(llava(dropout=0.5)), checkpointed(llava(dropout=0.5))
        calls = []
        model.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        ist = IST(model, ISTConfig(sampler="rst", seed=seed, update_fraction=0.15))
        ist.before_step()
        torch.manual_seed(seed)
        model(**text()).loss.backward()
        drawn_again += len(calls) > 1
        IST(other, ISTConfig(sampler=Fixed(ist.active))).before_step()
        torch.manual_seed(seed)
        other(**text()).loss.backward()
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert (one.grad is None) == (two.grad is None)
            assert one.grad is None or torch.equal(one.grad, two.grad)
    assert 0 < drawn_again < 12


def test_forgotten_when_no_longer_called(monkeypatch):
    monkeypatch.setattr(participation, "FORGOTTEN_AFTER", 5)
    model = llava()
    ist = IST(model, ISTConfig(sampler="rst", update_fraction=1.0))
    list(steps(model, ist, [images(seed) for seed in range(3)]))
    found = list(steps(model, ist, [text(seed) for seed in range(10)]))
    assert set(found[0][0]) >= {0, 1} and found[-1][0] == list(TEXT)
    found = list(steps(model, ist, [images(seed) for seed in range(2)]))
    assert set(found[-1][0]) >= {0, 1}


def test_tried_again_after_a_while(monkeypatch):
    """What had no gradient when it was first drawn may be used by other batches."""
    monkeypatch.setattr(participation, "FORGOTTEN_AFTER", 5)
    model = Two()
    ist = IST(model, ISTConfig(sampler="rst", update_fraction=0.2))
    for step in range(40):
        ist.before_step()
        x = model(torch.ones(2, 4), sides="both, left used" if step < 20 else "left and right")
        x.sum().backward()
        if step == 19:
            assert set(ist.participation.unused) <= {3, 4, 5} and ist.participation.unused
        model.zero_grad()
    assert {3, 4, 5} & ist.participation.proven


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_resumed_equals_uninterrupted(stop):
    def batches(first, last):
        return [images(seed) if seed % 3 == 0 else text(seed) for seed in range(first, last)]

    config = ISTConfig(sampler="rst", update_fraction=0.3)
    whole, first, second = llava(), llava(), llava()
    expected = list(steps(whole, IST(whole, config), batches(0, 20)))
    ist = IST(first, config)
    found = list(steps(first, ist, batches(0, stop)))
    state = _from_json(json.loads(json.dumps(_to_json(ist.state_dict()))))
    ist = IST(second, config)
    ist.load_state_dict(state)
    assert found + list(steps(second, ist, batches(stop, 20))) == expected


def test_the_decoder_alone():
    """Of an encoder-decoder whose encoder's outputs are given."""
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny("t5"), lora).train()
    with torch.no_grad():
        encoded = model.get_base_model().encoder(batch_for(0)["input_ids"])
    ist = IST(model, ISTConfig(sampler="rst"))
    decoder = [index for index, layer in enumerate(ist.layers) if "decoder" in layer.name]
    found = list(steps(model, ist, [{"encoder_outputs": encoded, "labels": batch_for(0)["labels"]}] * STEPS))
    assert all(grads and set(grads) <= set(decoder) for _, grads in found)
    assert all(active == grads for active, grads in found[1:])


@pytest.mark.parametrize("sampler", ["ist", "rst", "lisa", "cyclic"])
def test_a_part_that_is_called_by_itself(checkpointed, sampler):
    """The encoder of an encoder-decoder; the first step cannot know that the decoder will not be called."""
    for seed in range(6):
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = checkpointed(get_peft_model(tiny("t5"), lora)).train()
        encoder = model.get_base_model().encoder
        ist = IST(model, ISTConfig(sampler=sampler, seed=seed, update_fraction=0.3, interval=STEPS))
        for _ in range(4):
            ist.before_step()
            encoder(batch_for(0)["input_ids"]).last_hidden_state.sum().backward()
            assert with_gradient(ist) == ist.active
            model.zero_grad()


def test_parts_that_are_called_one_after_the_other():
    """What is drawn may be called by a later part: from the second step on nothing runs again."""
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(tiny("t5"), lora).train()
    base, calls, trained = model.get_base_model(), [], set()
    base.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    ist = IST(model, ISTConfig(sampler="rst", update_fraction=0.3))
    for step in range(STEPS):
        drawn = ist.before_step()
        encoded = base.encoder(batch_for(0)["input_ids"]).last_hidden_state
        base.decoder(batch_for(0)["labels"], encoder_hidden_states=encoded).last_hidden_state.sum().backward()
        assert with_gradient(ist) == ist.active and (step == 0 or ist.active == drawn)
        trained |= set(ist.active)
        model.zero_grad()
    assert STEPS <= len(calls) <= STEPS + 1 and trained == set(range(len(ist.layers)))


class Two(nn.Module):
    """Two lists of blocks in one module, of which a batch uses one or both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.left = nn.ModuleList(pk.nn.LoRALinear(4, 4, 2) for _ in range(3))
        self.right = nn.ModuleList(pk.nn.LoRALinear(4, 4, 2) for _ in range(3))
        for name, parameter in self.named_parameters():
            if "lora" in name:
                nn.init.normal_(parameter)

    def forward(self, x, sides="left"):
        for block in self.left if "left" in sides else ():
            x = block(x).tanh()
        y = x
        for block in self.right if "right" in sides or "both" in sides else ():
            y = block(y).tanh()
        return x if "both" in sides else y


class Stubborn(LayerSampler):
    """Knows the layers by their numbers."""

    def sample(self, step, count, unimportance, generator):
        return [3]


@pytest.mark.parametrize("sampler", ["rst", Stubborn()], ids=["rst", "of one's own"])
def test_a_model_of_ones_own(sampler):
    model = Two()
    ist = IST(model, ISTConfig(sampler=sampler, update_fraction=0.2))
    for step in range(STEPS):
        ist.before_step()
        model(torch.ones(2, 4), sides="left" if step % 3 else "left and right").sum().backward()
        assert with_gradient(ist) == ist.active
        model.zero_grad()


def test_an_output_that_leads_nowhere_changes_nothing():
    """A forward with gradients whose output is detached, ahead of the one that trains."""
    model = llava()
    ist = IST(model, ISTConfig(sampler="rst", update_fraction=0.3))
    hook = model.register_forward_hook(lambda _, args, output: output.logits.detach())
    drawn = ist.before_step()
    model(**images())
    hook.remove()
    assert ist.active == drawn and not ist.participation.unused
    model(**images()).loss.backward()
    assert with_gradient(ist)


def test_what_trains_beside_the_layers_is_not_enough():
    model = llava()
    for name, parameter in model.named_parameters():
        if "lm_head" in name:
            parameter.requires_grad_(True)
    ist = IST(model, ISTConfig(sampler="rst", update_fraction=0.15))
    for active, grads in steps(model, ist, [text(seed) for seed in range(STEPS)]):
        assert active == grads


def test_a_budget():
    """Over the layers that take part."""
    pytest.importorskip("scipy")
    model = llava()
    config = ISTConfig(sampler="rst", update_fraction=0.3, backward_budget=0.7, checkpoint_beyond_budget=True)
    ist = IST(model, config)
    for active, grads in list(steps(model, ist, [text(seed) for seed in range(STEPS)]))[1:]:
        assert active == grads
    assert 0.0 < ist.skipped < 1.0
