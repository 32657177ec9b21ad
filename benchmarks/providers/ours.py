"""`pk.lora_linear`, and `pk.lora_linear_shared_input` where projections share x, by each backend."""

from __future__ import annotations

from importlib.util import find_spec

import torch

import peft_kernels as pk
from peft_kernels import _native, backends
from peft_kernels.testing.lora_linear import LoRACase

from . import Provider, Ready, ready


def providers(device: str) -> list[Provider]:
    on_gpu = ("triton:fused", "triton:blas", "cuda:passes", "cuda:fused", "reference")
    names = on_gpu if device == "cuda" else ("reference",)
    return [
        Provider(
            f"ours, {backend}", lambda case, backend=backend: build(case, backend), our_masks=True,
            why_not=why_not(backend.partition(":")[0]),
        )
        for backend in names
    ]  # fmt: skip


def why_not(family: str) -> str | None:
    """Say why a family of backends is not here, whatever the tensors."""
    if family == "triton" and find_spec("triton") is None:
        return "Triton is not installed"
    return (family == "cuda" and _native.why_not(cuda=True)) or None


def build(case: LoRACase, backend: str) -> Ready:
    dropout = dict(dropout_p=case.dropout_p, training=True)

    def forward(x: torch.Tensor, projections: list[pk.Projection], _: float) -> tuple[torch.Tensor, ...]:
        if len(projections) == 1:
            return (pk.lora_linear(x, *projections[0], **dropout),)
        return pk.lora_linear_shared_input(x, projections, **dropout)

    def forced(x: torch.Tensor, projections: list[pk.Projection], p: float) -> tuple[torch.Tensor, ...]:
        with pk.use_backend(backend):
            return forward(x, projections, p)

    # The backend that `auto` takes is not forced, which would cost CPU time.
    return ready(case, forward if backends.choose("lora_linear", case.x) == backend else forced)
