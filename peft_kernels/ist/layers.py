"""Finds the layers of a model: which parameters of each are switched on and off, and which scalings are damped."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..nn import AdaptedLinear, LoRALinear


class Layer(NamedTuple):
    """A block of the model that holds adapters.

    Attributes:
        name: its place, such as `model.layers.3`.
        module: the block itself.
        parameters: the adapters' parameters that trained when it was found.
        scaled: the modules in it that scale an adapter: PEFT's tuner layers with scalings, `LoRALinear`.
    """

    name: str
    module: nn.Module
    parameters: list[nn.Parameter]
    scaled: list[nn.Module]


def find_layers(
    model: nn.Module,
    names: Sequence[str] | None = None,
    is_adapter: Callable[[str, nn.Parameter], bool] | None = None,
) -> list[Layer]:
    """The blocks with adapters, in the model's order.

    Args:
        model: any module; wrappers (PEFT's, DDP's) make no difference.
        names: modules to take as layers. By default the members of every outermost `nn.ModuleList` of transformers'
            blocks that hold adapters (of several classes in hybrid models): the encoder's and the decoder's, not the
            experts inside. In a model without such, of every outermost `nn.ModuleList` of one class.
        is_adapter: says of a parameter's full name and the parameter whether an adapter owns it. By default what
            PEFT's tuner layers hold beside their base layer, and the adapters of `pk.nn`'s layers.

    Only what requires a gradient now counts: norms, heads and biases stay as the user set them.

    Raises:
        ValueError: if no adapter is found, a name is not a module's, or two layers share an adapter's parameter.
    """
    adapters = adapter_parameters(model, is_adapter)
    if names is None:
        found = (
            [name for name in _blocks(model, are_layers) if _within(name, adapters)]
            for are_layers in (_are_blocks_of_transformers, _are_of_one_class)
        )
        names = next(filter(None, found), [])
    modules = dict(model.named_modules())
    layers, owners = [], {}
    for name in names:
        if name not in modules:
            raise ValueError(f"IST: expected the name of a module, got {name!r}")
        parameters = _within(name, adapters)
        if not parameters:
            raise ValueError(f"IST: expected adapters that require a gradient in {name!r}, found none")
        for parameter in parameters:
            if id(parameter) in owners:
                other = owners[id(parameter)]
                raise ValueError(f"IST: expected each adapter in one layer, got one that {other} and {name} share")
        owners |= {id(parameter): name for parameter in parameters}
        scaled = [module for module in modules[name].modules() if scalings(module) is not None]
        layers.append(Layer(name, modules[name], parameters, scaled))
    if not layers:
        raise ValueError(
            "IST: expected a model with adapters that require a gradient in its blocks, found none (`layers=` names "
            "blocks that are not found by themselves)"
        )
    return layers


def scalings(module: nn.Module) -> dict | None:
    """Return the dictionary in which `module` holds the scalings of its adapters; None if it has none. Attention
    modules have an attribute of that name too: only tuner layers are asked."""
    if isinstance(module, LoRALinear):
        return vars(module)
    if _is_tuner_layer(module) and isinstance(getattr(module, "scaling", None), dict):
        return module.scaling
    return None


def _scaling_keys(module: nn.Module) -> list[str]:
    if isinstance(module, LoRALinear):
        return ["scaling"]
    return [adapter for adapter in module.active_adapters if adapter in module.scaling]


@contextlib.contextmanager
def rescaled(layers: Sequence[Layer], factors: Sequence[float | torch.Tensor]) -> Iterator[None]:
    """Multiply every active adapter's scaling by its layer's factor inside the block, and put it back after.

    Args:
        factors: one for each layer: a number, a 0-dim tensor, or a tensor that :func:`peft_kernels.lora_linear` takes.
    """
    changed = []
    try:
        for layer, factor in zip(layers, factors):
            products: dict[float, float | torch.Tensor] = {}  # adapters mostly have one scaling: a product a layer
            for module in layer.scaled:
                held = scalings(module)
                for key in _scaling_keys(module):
                    value = held[key]
                    changed.append((held, key, value))
                    if isinstance(value, torch.Tensor):
                        held[key] = value * factor
                        continue
                    if value not in products:
                        products[value] = value * factor
                    held[key] = products[value]
        yield
    finally:
        for held, key, value in reversed(changed):
            held[key] = value


def models_of_transformers(model: nn.Module) -> list[nn.Module]:
    """Return the `PreTrainedModel` s in it, outermost first."""
    transformers = sys.modules.get("transformers.modeling_utils")  # not imported: then none is
    return [m for m in model.modules() if transformers is not None and isinstance(m, transformers.PreTrainedModel)]


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has been asked to compile `module`, or something in it."""
    return any(is_compiled_itself(part) for part in module.modules())


def around(model: nn.Module, layers: Sequence[Layer]) -> list[nn.Module]:
    """Return the modules of which layers are parts, from the model down."""
    modules = dict(model.named_modules())
    paths = {""}
    for layer in layers:
        parts = layer.name.split(".")
        paths.update(".".join(parts[:end]) for end in range(1, len(parts)))
    return [modules[path] for path in sorted(paths)]


def entrances(model: nn.Module, layers: Sequence[Layer]) -> list[nn.Module]:
    """The model, and whatever else calls layers: the nearest module around each that is not a mere list of them."""
    modules = dict(model.named_modules())
    found = {id(model): model}
    for layer in layers:
        path = layer.name.rpartition(".")[0]
        while path and isinstance(modules[path], (nn.ModuleList, nn.ModuleDict)):
            path = path.rpartition(".")[0]
        found[id(modules[path])] = modules[path]
    return list(found.values())


def tensors_of(output: Any) -> Iterator[torch.Tensor]:
    """The tensors in what a model returns, wherever DDP finds them."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_of(value)
    elif dataclasses.is_dataclass(output):
        for field in dataclasses.fields(output):
            yield from tensors_of(getattr(output, field.name))


def is_compiled_itself(module: nn.Module) -> bool:
    """Whether torch.compile has been asked to compile `module` as a whole."""
    return module._compiled_call_impl is not None or isinstance(module, torch._dynamo.eval_frame.OptimizedModule)


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter is spread over processes (FSDP2, tensor parallelism)."""
    return any(hasattr(parameter, "device_mesh") for parameter in model.parameters())


def adapter_parameters(
    model: nn.Module, is_adapter: Callable[[str, nn.Parameter], bool] | None
) -> list[tuple[str, nn.Parameter]]:
    """Return names and parameters of the adapters, a shared one under each of its names."""
    if is_adapter is None:
        owned = set()
        for name, module in model.named_modules(remove_duplicate=False):
            for inner, _ in module.named_parameters(remove_duplicate=False):
                own = inner in module.adapter if isinstance(module, AdaptedLinear) else _is_tuner_layer(module)
                if own and inner.partition(".")[0] != "base_layer":
                    owned.add(f"{name}.{inner}" if name else inner)

        def is_adapter(name: str, parameter: nn.Parameter) -> bool:
            return name in owned

    return [
        (name, parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.requires_grad and is_adapter(name, parameter)
    ]


def _is_tuner_layer(module: nn.Module) -> bool:
    peft = sys.modules.get("peft.tuners.tuners_utils")  # not imported: then the model has none of its layers
    return peft is not None and isinstance(module, peft.BaseTunerLayer)


def _are_blocks_of_transformers(members: nn.ModuleList) -> bool:
    transformers = sys.modules.get("transformers.modeling_layers")  # not imported: then none is
    blocks = [getattr(member, "_orig_mod", member) for member in members]  # inside of what torch.compile returned
    return bool(blocks) and transformers is not None and all(
        isinstance(block, transformers.GradientCheckpointingLayer) for block in blocks
    )  # fmt: skip


def _are_of_one_class(members: nn.ModuleList) -> bool:
    return len({type(member) for member in members}) == 1


def _blocks(model: nn.Module, are_layers: Callable[[nn.ModuleList], bool]) -> Iterator[str]:
    """Names of the members of every outermost ModuleList of layers."""

    def visit(module: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if isinstance(child, nn.ModuleList) and are_layers(child):
                yield from (f"{path}.{index}" for index in range(len(child)))
            else:
                yield from visit(child, f"{path}.")

    return visit(model, "")


def _within(name: str, adapters: list[tuple[str, nn.Parameter]]) -> list[nn.Parameter]:
    found = {id(parameter): parameter for path, parameter in adapters if path.startswith(f"{name}.")}
    return list(found.values())
