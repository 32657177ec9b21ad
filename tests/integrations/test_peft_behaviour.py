"""All that PEFT does with a model works on an accelerated one, and the other way round."""

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from torch import nn

import peft_kernels as pk
from tests.integrations.peft_models import assert_equal, batch_for, make, run

accelerate, restore = pk.integrations.peft.accelerate, pk.integrations.peft.restore


@pytest.fixture
def models():
    """An accelerated model and its plain twin."""
    plain = make()
    ours = copy.deepcopy(plain)
    accelerate(ours)
    return ours, plain


def test_merge_and_unload_leaves_a_plain_model(models):
    ours, plain = models
    expected = run(plain, backward=False)
    unloaded = ours.merge_and_unload()
    restore(unloaded)  # the hooks on the parents are all that is left
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in unloaded.modules())
    assert_equal(run(unloaded, backward=False), expected)


def with_second_adapter(model, **lora):
    config = LoraConfig(r=5, lora_alpha=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False, **lora)
    model.add_adapter("second", config)
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if "second" in name:
            torch.manual_seed(index)
            nn.init.normal_(parameter, std=0.2)


def test_switching_adapters(models, taken):
    for model in models:
        with_second_adapter(model)
        model.set_adapter("second")
    ours, plain = models
    assert_equal(run(ours), run(plain))
    assert taken == ["alone"] * 4  # k, v and the gate have no such adapter: nothing to share
    for model in models:
        model.set_adapter("default")
    assert_equal(run(ours), run(plain))
    for model in models:
        model.delete_adapter("second")
    assert_equal(run(ours), run(plain))


def test_several_active_adapters_take_peft_s_forward(models, taken):
    for model in models:
        with_second_adapter(model)
        model.base_model.set_adapter(["default", "second"])
    ours, plain = models
    assert_equal(run(ours), run(plain))
    assert taken == []


@pytest.mark.parametrize("later", [dict(use_dora=True), dict(lora_bias=True)])
def test_an_adapter_added_later_that_is_not_plain(models, taken, later):
    for model in models:
        with_second_adapter(model, **later)
        model.set_adapter("second")
    ours, plain = models
    assert_equal(run(ours), run(plain))
    assert taken == []


def test_a_batch_of_mixed_adapters(models, taken):
    for model in models:
        with_second_adapter(model)
        model.eval()
    batch = batch_for(models[0]) | {"adapter_names": ["default", "second"]}
    ours, plain = (model(**batch).logits for model in models)
    torch.testing.assert_close(ours, plain)
    assert taken == []


def test_adapters_of_different_rank_and_dropout_in_a_group(taken):
    plain = make(rank_pattern={"k_proj": 7})
    for name, module in plain.named_modules():
        if name.endswith("v_proj"):
            module.lora_dropout["default"] = nn.Dropout(0.5)
    ours = copy.deepcopy(plain)
    accelerate(ours)
    plain.eval(), ours.eval()
    assert_equal(run(ours), run(plain))
    assert taken.count(3) == 2  # in evaluation all three go together
    ours.train()
    taken.clear()
    run(ours)
    assert taken.count(3) == 0 and taken.count(2) == 4  # q and k, gate and up


def test_scaling_that_changes(models, taken):
    for model in models:
        for name, module in model.named_modules():
            if name.endswith("q_proj"):
                module.scaling["default"] = torch.tensor(0.25)
            elif name.endswith("k_proj"):
                module.set_scale("default", 3.0)
            elif name.endswith("v_proj"):
                module.scaling["default"] = 2
    ours, plain = models
    assert_equal(run(ours), run(plain))
    assert taken.count(3) == 2
    for model in models:
        for name, module in model.named_modules():
            if name.endswith("q_proj"):
                module.scaling["default"] = torch.full((1, 1, 1), 0.25)  # broadcasts in PEFT; no scaling of the op
    taken.clear()
    assert_equal(run(ours), run(plain))
    assert taken.count(3) == 0 and taken.count(2) == 4


def test_disabled_input_casting(models):
    ours, plain = models
    with disable_input_dtype_casting(ours):
        assert_equal(run(ours), run(plain))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent(models, taken, copied):
    ours, plain = models
    twin = copied(ours)
    expected = run(plain)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    assert_equal(run(twin), expected)
    assert taken.count(3) == 2 and taken.count(2) == 2
    restore(twin)
    assert_equal(run(twin), expected)


def test_one_layer_is_pickled_by_itself(models):
    attention = models[0].get_submodule("base_model.model.model.layers.0.self_attn")
    alone = pickle.loads(pickle.dumps(attention.q_proj))
    x = torch.randn(3, 16)
    assert torch.equal(alone(x), attention.q_proj(x))
    assert len(pickle.dumps(attention.q_proj)) < len(pickle.dumps(attention)) / 2


def test_unrelated_parameters_train_too():
    plain = make(modules_to_save=["lm_head"])
    for name, parameter in plain.named_parameters():
        if "layers.0" in name:
            parameter.requires_grad_()  # base weights too
    ours = copy.deepcopy(plain)
    accelerate(ours)
    assert_equal(run(ours), run(plain))


def test_adapters_that_are_frozen_layer_by_layer(models):
    for model in models:
        for name, parameter in model.named_parameters():
            if "layers.0" in name or "v_proj.lora_B" in name:
                parameter.requires_grad_(False)
    ours, plain = models
    assert_equal(run(ours), run(plain))


def test_lora_layers_injected_without_a_peft_model():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2, self.w3 = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 12)

        def forward(self, x):
            return self.w2(torch.relu(self.w1(x)) * self.w3(x))

    model = get_peft_model(Block(), LoraConfig(r=2, target_modules=["w1", "w2", "w3"], init_lora_weights=False))
    x = torch.randn(3, 8)
    expected = model(x)
    report = accelerate(model.base_model.model)
    assert report.fused == ("w1", "w2", "w3") and report.shared == (("w1", "w3"),)
    torch.testing.assert_close(model(x), expected)
