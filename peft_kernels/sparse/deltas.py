"""The sparse deltas of a whole model: put in, read, taken out, merged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import nn

from ..nn import SparseDeltaLinear
from ..ops.sparse_delta import SparseDelta, SparseLayout


def add_deltas(
    model: nn.Module, deltas: Mapping[str, SparseLayout | SparseDelta], name: str = "default"
) -> dict[str, SparseDeltaLinear]:
    """Trains the model's linear layers at these positions: each `nn.Linear` becomes a `SparseDeltaLinear` around the
    same weight. One that is such a layer already gets a further delta, which goes into the weight.

    What else of the model trains is not changed; `model.requires_grad_(False)` before leaves the deltas alone.

    Args:
        deltas: by name of the module, as `linear_weights` has them; a layout begins at Δ = 0. Empty ones are left out.
        name: of the delta in its layer.

    Returns:
        The layers by name of the module.

    Raises:
        ValueError: a name is no linear layer's, a shape or the delta's name does not fit, or the weight is shared with
            another module, which would train along. Nothing is changed then.
    """
    owners = defaultdict(set)
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            owners[id(parameter)].add(path)
    modules = dict(model.named_modules())
    wanted = {path: delta for path, delta in deltas.items() if _layout(delta).nnz}
    for path, delta in wanted.items():
        module = modules.get(path)
        if type(module) not in (nn.Linear, SparseDeltaLinear):
            raise ValueError(f"expected the name of an nn.Linear, got {path!r}, {type(module).__name__}")
        if _layout(delta).shape != tuple(module.weight.shape):
            raise ValueError(f"expected a delta of {list(module.weight.shape)} for {path!r}, got {delta}")
        shared = owners[id(module.weight)] - {path}
        if shared:
            raise ValueError(f"expected a weight of its own, got {path!r}, whose weight is {shared.pop()!r}'s too")
        if isinstance(module, SparseDeltaLinear) and name in module.deltas:
            raise ValueError(f"expected a new name, got {name!r}, which {path!r} has")
    layers = {}
    for path, delta in wanted.items():
        layer = modules[path]
        if isinstance(layer, SparseDeltaLinear):
            layer.add_delta(name, delta)
            layer.apply_delta(name)
        else:
            layer = SparseDeltaLinear.from_linear(layer, delta, name)
            _replace(model, path, layer)
        layers[path] = layer
    return layers


def sparse_layers(model: nn.Module) -> dict[str, SparseDeltaLinear]:
    """The model's layers with deltas, by name of the module."""
    return {path: module for path, module in model.named_modules() if isinstance(module, SparseDeltaLinear)}


def deltas(model: nn.Module, name: str | None = None) -> dict[str, SparseDelta]:
    """The deltas that are in the weights, or those of that name, by name of the module: detached, not copied."""
    found = sparse_layers(model)
    if name is None:
        return {path: layer.delta() for path, layer in found.items() if layer.active is not None}
    return {path: layer.delta(name) for path, layer in found.items() if name in layer.deltas}


def remove_deltas(model: nn.Module) -> dict[str, SparseDelta]:
    """Puts every weight back, bit for bit, and plain `nn.Linear`s in place; returns the deltas that were in weights."""
    found = deltas(model)
    for path, layer in sparse_layers(model).items():
        layer.restore()
        _replace(model, path, layer.merge())
    return found


def merge_deltas(model: nn.Module) -> None:
    """Puts plain `nn.Linear`s with W₀ + Δ in place; W₀ is gone then."""
    for path, layer in sparse_layers(model).items():
        _replace(model, path, layer.merge())


def _layout(delta: SparseLayout | SparseDelta) -> SparseLayout:
    return delta.layout if isinstance(delta, SparseDelta) else delta


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
