"""PEFT's `shira.Linear` with a forward by the sparse op, and the conditions under which it is the same computation.

PEFT adds a sparse tensor to a clone of the weight, multiplies with the clone, keeps it for backward and computes a
dense dW there, of which it takes the trained positions. The op keeps no clone, and makes none of these whole: bands of
the weight, at most half of it, are copied and patched (all of it where the backend `cuda` is forced).

As in `layers.py`, a layer is taken over by setting its `__class__`, and `read` looks at it afresh at every call: where
PEFT's forward is not that of exactly one adapter on a plain weight, it runs itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners import shira
from peft.tuners.shira import layer as shira_layer
from torch.nn import Linear

from ...ops.core.messages import describe
from ...ops.sparse_delta import SparseLayout, sparse_delta_linear
from .layers import PLAIN, dtypes_fit, is_watched, only_adapter

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
        taken = None if args or kwargs else read(self, x)
        if taken is None:
            return super().forward(x, *args, **kwargs)
        return sparse_delta_linear(x, *taken)

    def find_positions(self) -> None:
        """For all adapters now, since torch.compile cannot do it in a forward."""
        self.__dict__.setdefault("_positions", {})
        for adapter in self.shira_weight:
            positions_of(self, adapter)

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
    layout: SparseLayout | None  # None where the op cannot take them
    order: torch.Tensor | None  # of PEFT's values in that of the layout, if it is another


def read(layer: FusedShiraLinear, x: torch.Tensor) -> tuple | None:
    """What `sparse_delta_linear` computes the same from as PEFT's forward of `layer`, after x: weight, values, layout
    and bias. None where that is not one adapter on a plain weight."""
    active = only_adapter(layer)
    modules = layer._modules
    base, values = modules["base_layer"], modules["shira_weight"]._parameters.get(active)
    if values is None or type(base) is not Linear:
        return None
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    if type(weight) not in PLAIN or type(values) not in PLAIN or weight.is_meta:
        return None
    if bias is not None and (type(bias) not in PLAIN or bias.dtype != weight.dtype):
        return None
    autocast = torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(x.device.type)
    if not dtypes_fit(x.dtype, weight.dtype, values.dtype, values.dtype, autocast, cast_input=True):
        return None
    if not x.device == weight.device == values.device:
        return None
    scaling = layer.scaling[active]
    if not isinstance(scaling, (float, int)):
        return None
    positions = positions_of(layer, active)
    if positions is None or positions.layout is None or weight.shape != positions.layout.shape:
        return None

    if is_watched(base) and not torch.compiler.is_compiling():
        _warn_of_hooks(layer)
    if autocast:
        values = values.float()  # fits whatever autocast makes of x
    if scaling != 1.0:
        values = values * scaling
    if positions.order is not None:
        values = values.index_select(0, positions.order)
    return weight.detach(), values, positions.layout, bias  # PEFT's clone is of weight.data: no gradient flows there


def positions_of(layer: FusedShiraLinear, adapter: str) -> Positions | None:
    """Of the adapter's indices as they are now, on the device of its values; None if it has no indices."""
    indices, device = layer.shira_indices.get(adapter), layer.shira_weight[adapter].device
    if indices is None:
        return None
    known = layer._positions.get(adapter)
    if known is None or known.indices is not indices or known.device != device:
        return _find(layer, adapter)
    # A graph cannot ask for a version: it does not see indices that were written to in place.
    if not torch.compiler.is_compiling() and known.version != _version(indices):
        return _find(layer, adapter)
    return known


# What it does depends on data. In a graph that may break it runs in between, once.
@torch.compiler.disable(reason="new shira_indices: call the layer once outside of torch.compile")
def _find(layer: FusedShiraLinear, adapter: str) -> Positions:
    indices, values = layer.shira_indices[adapter], layer.shira_weight[adapter]
    with torch.inference_mode(False):  # what is made of them serves later forwards too
        try:
            layout, order = layout_of(indices, values, (layer.out_features, layer.in_features))
        except ValueError:
            layout = order = None
    layer._positions[adapter] = Positions(indices, _version(indices), values.device, layout, order)
    return layer._positions[adapter]


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
