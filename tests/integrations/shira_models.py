"""SHiRA layers and models of random values that matter, as PEFT makes them."""

from __future__ import annotations

import torch
from peft import PeftModel, ShiraConfig
from peft.tuners import shira
from torch import nn

from tests.integrations.peft_models import KINDS


def layer_of(dtype=torch.float32, values=torch.float32, bias=True, r=5) -> shira.Linear:
    torch.manual_seed(0)
    config = ShiraConfig(r=r, init_weights=False, random_seed=1)
    base = nn.Linear(48, 40, bias=bias)
    nn.init.normal_(base.weight, std=0.3)
    layer = shira.Linear(base, config.mask_fn(base, r, random_seed=1), "default", config, r=r)
    layer.shira_weight["default"].data.mul_(0.3)
    base.to(dtype), layer.shira_weight.to(values)
    return layer


def inputs(dtype=torch.float32, autocast=None, leading=(3, 11)):
    generator = torch.Generator().manual_seed(2)
    x, grad = (torch.randn(*leading, size, generator=generator, dtype=torch.float64) for size in (48, 40))
    return x.to(dtype), grad.to(autocast or dtype)


def shuffle(layer: shira.Linear, adapter: str = "default") -> None:
    """The same delta, its positions in another order, as a file may have them."""
    order = torch.randperm(len(layer.shira_weight[adapter]), generator=torch.Generator().manual_seed(3))
    layer.shira_indices[adapter] = layer.shira_indices[adapter][:, order]
    layer.shira_weight[adapter].data = layer.shira_weight[adapter].data[order]


def make_shira(shuffled: bool = False, **settings):
    torch.manual_seed(0)
    base = KINDS["llama"]()
    base.loss_type = base.loss_type or "ForCausalLM"
    model = with_adapter(base, "default", **settings)
    for layer in shira_layers(model):
        if shuffled:
            shuffle(layer)
    return model.train()


def with_adapter(model, name, **settings):
    """A SHiRA adapter of values that matter in every linear layer, or in some, of a model with or without others."""
    names = [f"{letter}_proj" for letter in ("q", "k", "v", "o", "gate", "up", "down")]
    config = ShiraConfig(**(dict(r=2, target_modules=names, random_seed=len(name)) | settings))
    if isinstance(model, PeftModel):
        model.add_adapter(name, config)
    else:
        model = PeftModel(model, config, name)
    for index, layer in enumerate(shira_layers(model)):
        if name in layer.shira_weight:
            generator = torch.Generator().manual_seed(index)
            layer.shira_weight[name].data.normal_(std=0.2, generator=generator)
    return model


def shira_layers(model) -> list[shira.Linear]:
    return [module for module in model.modules() if isinstance(module, shira.Linear)]
