"""Hugging Face PEFT's own layers: in the base's dtype; with its default, float32 adapters trained under autocast; and
both as `pk.integrations.peft.accelerate` leaves them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

import peft_kernels as pk
from peft_kernels.testing.lora_linear import LoRACase

from . import PEFT, Provider, Ready, why_not_installed


def providers(device: str) -> list[Provider]:
    missing = why_not_installed("peft")
    found = []
    for suffix, build in (("", _build), (", accelerated", _build_accelerated)):
        found += [
            Provider(f"{PEFT}{suffix}", build, why_not=missing),
            Provider(
                f"{PEFT} f32{suffix}", lambda case, build=build: _autocast(case, build(case, torch.float32)),
                sixteen_bits=True, why_not=missing,
            ),
        ]  # fmt: skip
    return found


def linear_of(weight: torch.Tensor) -> torch.nn.Module:
    N, K = weight.shape
    layer = torch.nn.Linear(K, N, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def layers_of(
    case: LoRACase, adapter_dtype: torch.dtype, base: Callable[[torch.Tensor], torch.nn.Module] = linear_of
) -> list[torch.nn.Module]:
    """Make PEFT's layers around what `base` makes of the case's weights, with the case's adapters."""
    from peft import LoraConfig, get_peft_model

    modules = torch.nn.Module()
    names = [f"proj{j}" for j in range(len(case.projections))]
    for name, p in zip(names, case.projections):
        modules.add_module(name, base(p.weight))
    R = case.projections[0].lora_A.shape[0]
    alpha = R * case.projections[0].scaling
    config = LoraConfig(r=R, lora_alpha=alpha, lora_dropout=case.dropout_p, target_modules=names)
    model = get_peft_model(modules, config, autocast_adapter_dtype=False).base_model.model
    layers = [getattr(model, name) for name in names]
    for layer, p in zip(layers, case.projections):
        for module, value in ((layer.lora_A["default"], p.lora_A), (layer.lora_B["default"], p.lora_B)):
            module.weight = torch.nn.Parameter(value.to(adapter_dtype, copy=True))
    return layers


def ready_of(case: LoRACase, layers: list[torch.nn.Module]) -> Ready:
    x = case.x.clone().requires_grad_()
    adapters = [w for layer in layers for w in (layer.lora_A["default"].weight, layer.lora_B["default"].weight)]
    kept = [parameter for layer in layers for parameter in layer.parameters()]
    return Ready(lambda: tuple(layer(x) for layer in layers), [x, *adapters], case.grad_ys, kept)


def _build(case: LoRACase, adapter_dtype: torch.dtype | None = None) -> Ready:
    return ready_of(case, layers_of(case, adapter_dtype or case.x.dtype))


def _build_accelerated(case: LoRACase, adapter_dtype: torch.dtype | None = None) -> Ready:
    layers = layers_of(case, adapter_dtype or case.x.dtype)
    for layer in layers:
        pk.integrations.peft.accelerate(layer)
    return ready_of(case, layers)


def _autocast(case: LoRACase, built: Ready) -> Ready:
    inner = built.forward

    def forward() -> tuple[torch.Tensor, ...]:
        with torch.autocast(case.x.device.type, dtype=case.x.dtype):
            return inner()

    return dataclasses.replace(built, forward=forward)
