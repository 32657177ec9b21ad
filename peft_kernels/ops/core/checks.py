"""Refusals that public ops share, in one line that says what was expected and what came, before anything runs."""

from __future__ import annotations

import torch

from .messages import describe


def check_linear(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Raise ValueError unless x [..., K], weight [N, K] and bias [N] are of one floating-point dtype and device."""
    if not x.dim() or not x.dtype.is_floating_point:
        raise ValueError(f"{op}: expected a floating-point x of shape [..., K], got {describe(x)}")
    K, dtype = x.shape[-1], x.dtype
    if weight.dim() != 2 or weight.shape[1] != K or weight.dtype != dtype:
        raise ValueError(f"{op}: expected weight [N, {K}] in x's dtype {dtype}, got {describe(weight)}")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != dtype):
        raise ValueError(f"{op}: expected bias [{weight.shape[0]}] in x's dtype {dtype}, got {describe(bias)}")
    check_devices(op, x, weight, bias)


def check_devices(op: str, x: torch.Tensor, *others: object) -> None:
    """Raise ValueError unless all that are tensors are on x's device."""
    for other in others:
        if isinstance(other, torch.Tensor) and other.device != x.device:
            raise ValueError(f"{op}: expected every tensor on x's device {x.device}, got {describe(other)}")


def check_number(op: str, name: str, number: object) -> None:
    """Raise ValueError unless it is a float or a floating-point tensor of shape [] that takes no gradient."""
    if not isinstance(number, (float, int, torch.Tensor)):
        raise ValueError(f"{op}: expected {name} as a float or a tensor, got {type(number).__name__}")
    if not isinstance(number, torch.Tensor):
        return
    if number.dim() or not number.is_floating_point():
        raise ValueError(f"{op}: expected a floating-point {name} of shape [], got {describe(number)}")
    if number.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{op}: expected a {name} that takes no gradient, got one that requires it")
