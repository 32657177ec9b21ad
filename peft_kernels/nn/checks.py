"""Checks of a layer that modules and functions make before they change anything in a model."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.core.messages import describe


def check_linear(linear: nn.Module, ours: type[nn.Linear], written: bool = False, name: str | None = None) -> None:
    """Raise ValueError, which names the layer's class, unless `linear` is an `nn.Linear` with a weight (and a bias, or
    none) that is a plain floating-point tensor: not quantised, packed, sharded or computed by a parametrisation.

    Args:
        ours: the class that the layer is to become, and is not yet.
        written: the weight will be written to.
        name: of the layer in its model.
    """
    whose = type(linear).__name__ if name is None else f"{name!r}, {type(linear).__name__}"
    if not isinstance(linear, nn.Linear) or isinstance(linear, ours):
        raise ValueError(f"expected a plain nn.Linear, got {whose}")
    if problem := _problem(linear, written):
        raise ValueError(f"expected an nn.Linear with plain floating-point parameters, got {whose}, {problem}")


def _problem(linear: nn.Linear, written: bool) -> str | None:
    own = linear._parameters
    if own.get("weight") is None:
        return "whose weight is no parameter of its own"
    for role, tensor in (("weight", own["weight"]), ("bias", own.get("bias"))):
        if tensor is None:
            continue
        kind = type(tensor)
        if kind is not nn.Parameter and kind is not torch.Tensor:
            return f"whose {role} is a {kind.__name__}"
        if not tensor.is_floating_point() or tensor.is_quantized:
            return f"whose {role} is {describe(tensor)}"
        if tensor.dtype.itemsize == 1:
            return f"whose {role} is {describe(tensor)}, which has no products of its own"
    weight = own["weight"]
    if tuple(weight.shape) != (linear.out_features, linear.in_features):
        return f"whose weight is {describe(weight)} for {linear.in_features} features in, {linear.out_features} out"
    if written and weight.is_inference():
        return "whose weight is an inference tensor, which cannot be written to"
    return None
