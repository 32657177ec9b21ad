"""PEFT's `shira.Linear` with a forward by the sparse op, and the conditions under which it is the same computation.

PEFT adds a sparse tensor to a clone of the weight, multiplies with the clone, keeps it for backward and computes a
dense dW there, of which it takes the trained positions. The op keeps no clone, and makes none of these whole: bands of
the weight, at most half of it, are copied and patched (all of it where the backend `cuda` is forced).

Hooks of the base layer do not matter: PEFT's forward never calls it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners import shira
from peft.tuners.shira import ShiraLayer
from peft.tuners.shira import layer as shira_layer
from torch.nn import Linear

from ...ops.core.messages import describe
from ...ops.sparse_delta import SparseLayout, sparse_delta_linear
from .tuner import PLAIN, Tuner, autocasts, dtypes_fit, is_hooked, only_adapter, short, why_not_plain

#: PEFT's forward never calls the base layer, and warns once if that one has hooks. Old versions do not warn.
_warn_of_hooks = getattr(shira_layer, "_warn_once_about_module_hooks", lambda layer: None)


class FusedShiraLinear(shira.Linear):
    """`peft.tuners.shira.Linear`, forward by :func:`peft_kernels.sparse_delta_linear`; made by `accelerate` only.

    Backward reads the weight and the values themselves, as that of `nn.Linear` does its weight, where PEFT's reads a
    clone: between a forward and its backward, neither may be written to.
    """

    #: What was made of `shira_indices`, by adapter; set by `find_positions`.
    _positions: dict[str, Positions]

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        resolved = "arguments" if args or kwargs else resolve(self, only_adapter(self), x, autocasts(x))
        if type(resolved) is str:
            return super().forward(x, *args, **kwargs)
        if is_hooked(self._modules["base_layer"]) and not torch.compiler.is_compiling():
            _warn_of_hooks(self)
        return sparse_delta_linear(x, *resolved)

    def find_positions(self) -> None:
        """For all adapters now, since torch.compile cannot do it in a forward."""
        self.__dict__.setdefault("_positions", {})
        for adapter, values in self.shira_weight.items():
            if (indices := self.shira_indices.get(adapter)) is not None:
                _positions_of(self, adapter, indices, values)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_positions"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.find_positions()

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        self.find_positions()  # on another device, maybe
        return self


class Positions(NamedTuple):
    """The positions of one adapter, and what they were made of."""

    indices: torch.Tensor
    version: int | None
    device: torch.device
    found: tuple[SparseLayout, torch.Tensor | None] | str  # as `layout_of` has it, or why the op cannot take them


def resolve(layer: shira.Linear, adapter: str | None, x: torch.Tensor | None, autocast: bool) -> tuple | str:
    """What `sparse_delta_linear` takes after x: weight, values, layout and bias; or why it cannot. Arguments as
    `Tuner.resolve` has them."""
    modules = layer._modules
    base, values = modules["base_layer"], modules["shira_weight"]._parameters.get(adapter)
    if values is None:
        return "not exactly one adapter is active"
    if type(base) is not Linear:
        return f"its base_layer is {type(base).__name__}, not nn.Linear"
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(weight) not in PLAIN or type(values) not in PLAIN:
        if type(weight) in PLAIN:
            return f"its shira_weight is a {type(values).__name__}"
        return why_not_plain(base_layer=weight)
    if weight.is_meta:
        return "the weight of its base_layer has no data"
    if bias is not None:
        if type(bias) not in PLAIN:
            return f"the bias of its base_layer is a {type(bias).__name__}"
        if bias.dtype != weight.dtype:
            return f"a bias {short(bias.dtype)} beside a {short(weight.dtype)} weight"
    dtype_x, device = (weight.dtype, weight.device) if x is None else (x.dtype, x.device)
    if not dtypes_fit(dtype_x, weight.dtype, values.dtype, values.dtype, autocast, cast_input=True):
        return f"shira_weight {short(values.dtype)} beside a {short(weight.dtype)} weight"
    if not device == weight.device == values.device:
        return f"x on {device}, the weight of its base_layer on {weight.device}, shira_weight on {values.device}"
    scaling = layer.scaling[adapter]
    if not isinstance(scaling, (float, int)):
        return f"its scaling is a {type(scaling).__name__}, not a number"
    indices = layer.shira_indices.get(adapter)
    if indices is None:
        return "it has no shira_indices"
    found = _positions_of(layer, adapter, indices, values).found
    if type(found) is str:
        return found
    layout, order = found
    if weight.shape != layout.shape:
        return f"a weight {list(weight.shape)} for {layer.in_features} features in, {layer.out_features} out"

    if autocast:
        values = values.float()  # fits whatever autocast makes of x
    if scaling != 1.0:
        values = values * scaling
    if order is not None:
        values = values.index_select(0, order)
    return weight.detach(), values, layout, bias  # PEFT's clone is of weight.data: no gradient flows there


def _positions_of(layer: shira.Linear, adapter: str, indices: torch.Tensor, values: torch.Tensor) -> Positions:
    """What `indices` are now, on the device of the values; looked up where they are as they were."""
    known = layer._positions.get(adapter) if type(layer) is FusedShiraLinear else None
    if known is None or known.indices is not indices or known.device != values.device:
        return _find(layer, adapter)
    # A graph cannot ask for a version: it does not see indices that were written to in place.
    if not torch.compiler.is_compiling() and known.version != _version(indices):
        return _find(layer, adapter)
    return known


# What it does depends on data. In a graph that may break it runs in between, once.
@torch.compiler.disable(reason="new shira_indices: call the layer once outside of torch.compile")
def _find(layer: shira.Linear, adapter: str) -> Positions:
    indices, values = layer.shira_indices[adapter], layer.shira_weight[adapter]
    with torch.inference_mode(False):  # what is made of them serves later forwards too
        try:
            found = layout_of(indices, values, (layer.out_features, layer.in_features))
        except ValueError as error:
            found = str(error)
    positions = Positions(indices, _version(indices), values.device, found)
    if type(layer) is FusedShiraLinear:
        layer._positions[adapter] = positions
    return positions


def _version(indices: torch.Tensor) -> int | None:
    return None if indices.is_inference() else indices._version


def layout_of(
    indices: torch.Tensor, values: torch.Tensor, shape: tuple[int, int]
) -> tuple[SparseLayout, torch.Tensor | None]:
    """The layout of `shira_indices`, integers [2, nnz], on the device of values [nnz], and in which order it wants the
    values, int64 [nnz]; None if they stand in it, as `torch.where` of a mask gives them.

    Raises:
        ValueError: with what is wrong with the indices.
    """
    if indices.shape != (2, len(values)) or indices.is_meta or values.is_meta:
        raise ValueError(f"its shira_indices are {describe(indices)}, beside values {describe(values)}")
    (N, K), (rows, columns) = shape, indices.to(values.device, torch.int64)
    if bool(((rows < 0) | (rows >= N) | (columns < 0) | (columns >= K)).any()):
        raise ValueError("a position in its shira_indices lies outside of the weight")
    flat, order = rows * K + columns, None
    if not _ascending(flat):
        flat, order = flat.sort()
        if not _ascending(flat):
            raise ValueError("a position is in its shira_indices twice")
    return SparseLayout._of_sorted(shape, flat), order


def _ascending(flat: torch.Tensor) -> bool:
    return bool((flat[1:] > flat[:-1]).all())


TUNER = Tuner(
    "SHiRA", ShiraLayer, shira.Linear, FusedShiraLinear, lambda layer: layer.shira_weight, resolve,
    prepare=FusedShiraLinear.find_positions, attributes=("_positions",),
)  # fmt: skip
