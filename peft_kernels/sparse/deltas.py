"""The sparse deltas of a whole model: put in, read, taken out, merged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import nn

from ..nn import SparseDeltaLinear
from ..nn.checks import check_linear
from ..nn.sparse_delta_linear import check_delta
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
        ValueError: a name is no linear layer's, a shape or the delta's name does not fit, a weight is no plain tensor
            with data (quantised, a tensor subclass, on meta), or is shared with another module, which would train
            along. Nothing is changed then.
    """
    owners = defaultdict(set)
    for path, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            owners[id(parameter)].add(path)
    modules = dict(model.named_modules())
    for path, delta in deltas.items():
        module, where = modules.get(path), f" for {path!r}"
        if not path or type(module) not in (nn.Linear, SparseDeltaLinear):
            raise ValueError(f"expected the name of an nn.Linear, got {path!r}, {type(module).__name__}")
        if isinstance(module, SparseDeltaLinear):
            if name in module.deltas:
                raise ValueError(f"expected a new name, got {name!r}, which {path!r} has")
        else:
            check_linear(module, SparseDeltaLinear, written=True, name=path)
        check_delta(delta, name, module.weight.shape, where)
        if module.weight.is_meta:
            raise ValueError(f"expected a weight with data, got {path!r}, whose weight is on meta")
        shared = owners[id(module.weight)] - {path}
        if shared:
            raise ValueError(f"expected a weight of its own, got {path!r}, whose weight is {shared.pop()!r}'s too")
    wanted = {path: delta for path, delta in deltas.items() if _layout(delta).nnz}
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
    """Return the deltas that are in the weights, or those of that name, by name of the module: detached, not copied."""
    found = sparse_layers(model)
    if name is None:
        return {path: layer.delta() for path, layer in found.items() if layer.active is not None}
    return {path: layer.delta(name) for path, layer in found.items() if name in layer.deltas}


def remove_deltas(model: nn.Module) -> dict[str, SparseDelta]:
    """Puts every weight back, bit for bit, and plain `nn.Linear`s in place; returns the deltas that were in weights.

    Raises:
        ValueError: `model` is such a layer itself, in whose place nothing can be put; nothing is changed then.
    """
    _check_model(model)
    found = deltas(model)
    for layer in sparse_layers(model).values():
        layer.restore()
    merge_deltas(model)
    return found


def merge_deltas(model: nn.Module) -> None:
    """Puts plain `nn.Linear`s with W₀ + Δ in place; W₀ is gone then.

    Raises:
        ValueError: as `remove_deltas`.
    """
    _check_model(model)
    plain: dict[nn.Module, nn.Linear] = {}
    for path, layer in list(model.named_modules(remove_duplicate=False)):  # one layer may stand in several places
        if isinstance(layer, SparseDeltaLinear):
            if layer not in plain:
                plain[layer] = layer.merge()
            _replace(model, path, plain[layer])


def _check_model(model: nn.Module) -> None:
    if isinstance(model, SparseDeltaLinear):
        raise ValueError(
            f"expected a model with layers in it, got a {type(model).__name__}: use its restore() and merge()"
        )


def _layout(delta: SparseLayout | SparseDelta) -> SparseLayout:
    return delta.layout if isinstance(delta, SparseDelta) else delta


def _replace(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
