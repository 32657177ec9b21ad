"""Cases of the scaled linear op: inputs, the float64 reference, the eager expression of Hugging Face PEFT, and one
runner that takes any of them through forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..ops.scaled_linear import scaled_linear
from .bounds import Sums

NAMES = ("x", "weight", "scale", "bias")


@dataclass
class ScaledCase:
    """Inputs of one call: x [..., K], weight [N, K], scale [N] or [K], bias [N], grad_y [..., N]."""

    x: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    grad_y: torch.Tensor
    scale_input: bool
    frozen: tuple[str, ...] = ()  # of NAMES

    def leaves(self) -> dict[str, torch.Tensor | None]:
        """Fresh copies of what may train, by name."""
        tensors = {name: getattr(self, name) for name in NAMES}
        return {
            name: tensor if tensor is None else tensor.clone().requires_grad_(name not in self.frozen)
            for name, tensor in tensors.items()
        }


def make_case(
    batch: tuple[int, ...] = (6,),
    in_features: int = 24,
    out_features: int = 16,
    dtype: torch.dtype = torch.float32,
    scale_dtype: torch.dtype | None = None,
    bias: bool = True,
    scale_input: bool = False,
    device: str = "cpu",
    draw: int = 0,
    **settings,
) -> ScaledCase:
    """A seeded case with operands of order one, another one for each `draw`; every fifth value of the scale is 0.
    `settings` are those of :class:`ScaledCase`."""
    generator = torch.Generator().manual_seed(in_features * 7919 + out_features * 31 + len(batch) + 104729 * draw)

    def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(device=device, dtype=dtype)

    scale = random(in_features if scale_input else out_features, dtype=scale_dtype or dtype)
    scale[::5] = 0.0
    return ScaledCase(
        x=random(*batch, in_features),
        weight=random(out_features, in_features, scale=max(in_features, 1) ** -0.5),
        scale=scale,
        bias=random(out_features) if bias else None,
        grad_y=random(*batch, out_features),
        scale_input=scale_input,
        **settings,
    )


Expression = Callable[[ScaledCase, dict[str, torch.Tensor]], torch.Tensor]


def ours(case: ScaledCase, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    return scaled_linear(**leaves, scale_input=case.scale_input)


def eager_expression(case: ScaledCase, leaves: dict[str, torch.Tensor]) -> torch.Tensor:
    x, weight, scale, bias = leaves.values()
    if case.scale_input:
        return F.linear((x * scale).to(x.dtype), weight, bias)
    z = F.linear(x, weight, bias)
    return (z * scale).to(z.dtype)


def run(
    case: ScaledCase, expression: Expression = ours, autocast: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Forward and backward of one expression on fresh leaves: y and every gradient by name."""
    leaves = case.leaves()
    with torch.autocast(case.x.device.type, dtype=autocast) if autocast else contextlib.nullcontext():
        y = expression(case, leaves)
    results = {"y": y.detach()}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    if wanted:
        grads = torch.autograd.grad(y, list(wanted.values()), case.grad_y.to(y.dtype))
        results |= {f"grad of {name}": grad for name, grad in zip(wanted, grads)}
    return results


def eager(case: ScaledCase, autocast: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """PEFT's expression in the case's own dtypes."""
    return run(case, eager_expression, autocast)


def sums(case: ScaledCase, backend: str) -> dict[str, Sums]:
    """How many terms are summed up for an element of each float32 result, on a GPU. Triton's interpreter adds up tokens
    one after the other, too; products are then numpy's."""
    if case.x.dtype != torch.float32 or not (case.x.is_cuda or backend == "triton"):
        return {}
    N, K = case.weight.shape
    M = case.grad_y.numel() // max(N, 1)
    terms = {"grad of scale": M, "grad of bias": M}
    if case.x.is_cuda:
        terms |= {"y": K, "grad of x": N, "grad of weight": M}
    return {name: Sums(count) for name, count in terms.items()}


def float64_reference(case: ScaledCase) -> dict[str, torch.Tensor]:
    """The eager expression in float64 on the same inputs."""
    wide = {name: None if getattr(case, name) is None else getattr(case, name).double() for name in NAMES}
    return run(replace(case, **wide, grad_y=case.grad_y.double()), eager_expression)
