"""Cases of the linear layer with a sparse delta: inputs, the float64 reference, the eager expression of the peers
(clone the weight, scatter, multiply), and one runner that takes any of them through forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from ..ops.sparse_delta import SparseLayout, sparse_delta_linear, with_sparse_gradient_
from .bounds import Sums

LEAVES = ("x", "weight", "values", "bias")


@dataclass
class SparseCase:
    """Inputs of one call: x [..., K], weight [N, K] without Δ, values [nnz], bias [N] or None, dy [..., N]."""

    x: torch.Tensor
    weight: torch.Tensor
    values: torch.Tensor
    layout: SparseLayout
    bias: torch.Tensor | None
    dy: torch.Tensor
    frozen: tuple[str, ...] = ()  # of LEAVES


def make_layout(kind: str, N: int, K: int, density: float, seed: int = 0, tile: tuple[int, int] = (16, 16)):
    """A random layout of about that density; blocks and n_of_m have to fill [N, K]."""
    generator = torch.Generator().manual_seed(seed)

    def some(end: int) -> torch.Tensor:
        return torch.randperm(end, generator=generator)[: max(1, round(density * end))]

    if kind == "rows":
        return SparseLayout.rows((N, K), some(N))
    if kind == "columns":
        return SparseLayout.columns((N, K), some(K))
    if kind == "blocks":
        return SparseLayout.blocks((N, K), tile, some(N // tile[0] * (K // tile[1])))
    if kind == "n_of_m":
        scores = torch.rand(N, K // 4, 4, generator=generator)
        mask = torch.zeros(N, K // 4, 4, dtype=torch.bool).scatter_(2, scores.topk(2).indices, True)
        return SparseLayout.n_of_m(mask.view(N, K), 2, 4)
    return SparseLayout.from_indices((N, K), some(N * K))


def make_case(
    kind: str = "entries",
    batch: tuple[int, ...] = (6,),
    in_features: int = 32,
    out_features: int = 16,
    density: float = 0.1,
    dtype: torch.dtype = torch.float32,
    values_dtype: torch.dtype | None = None,
    bias: bool = True,
    tile: tuple[int, int] = (8, 16),
    device: str = "cpu",
    draw: int = 0,
    **settings,
) -> SparseCase:
    """A seeded case with operands of order one and Δ as large as W, another one for each `draw`."""
    N, K = out_features, in_features
    layout = make_layout(kind, N, K, density, draw, tile)
    generator = torch.Generator().manual_seed(K * 7919 + N * 31 + 104729 * draw)

    def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(device=device, dtype=dtype)

    return SparseCase(
        x=random(*batch, K),
        weight=random(N, K, scale=K**-0.5),
        values=random(layout.nnz, scale=K**-0.5, dtype=values_dtype or dtype),
        layout=layout.to(device),
        bias=random(N) if bias else None,
        dy=random(*batch, N),
        **settings,
    )


Expression = Callable[..., torch.Tensor]


def ours(x, weight, values, layout, bias) -> torch.Tensor:
    return sparse_delta_linear(x, weight, values, layout, bias)


def ours_in_weight(x, weight, values, layout, bias) -> torch.Tensor:
    """Δ in a copy of the weight, as `nn.SparseDeltaLinear` has it: no gradient of the weight without Δ."""
    with torch.no_grad():
        trained = weight.clone()
        layout.put_(trained, layout.take(weight) + values)
    y = F.linear(x, trained, bias)
    return with_sparse_gradient_(y, x.to(y.dtype), values, layout)


def scatter_expression(x, weight, values, layout, bias) -> torch.Tensor:
    """Compute as SpIEL, RoSA and PEFT's SHiRA: a dense copy of the weight, Δ added to it, one product."""
    patched = weight.flatten().index_add(0, layout.indices(), values.to(weight.dtype))
    return F.linear(x, patched.view(weight.shape), bias)


def run(
    case: SparseCase, expression: Expression = ours, autocast: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Forward and backward of one expression on fresh leaves: the output and every gradient by name."""
    leaves = {
        name: None if (value := getattr(case, name)) is None else value.clone().requires_grad_(name not in case.frozen)
        for name in LEAVES
    }
    device = case.x.device.type
    with torch.autocast(device, dtype=autocast) if autocast else contextlib.nullcontext():
        y = expression(leaves["x"], leaves["weight"], leaves["values"], case.layout, leaves["bias"])
    results = {"y": y.detach()}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    if wanted:
        grads = torch.autograd.grad(y, list(wanted.values()), case.dy.to(y.dtype))
        results |= {f"grad of {name}": grad for name, grad in zip(wanted, grads)}
    return results


def eager(case: SparseCase, autocast: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """The peers' expression in the case's own dtypes."""
    return run(case, scatter_expression, autocast)


def sums(case: SparseCase) -> dict[str, Sums]:
    """The sums behind an element of each float32 result of a GPU's kernels."""
    if not case.x.is_cuda or case.x.dtype != torch.float32:
        return {}
    N, K = case.layout.shape
    M = case.dy.numel() // N
    terms = {"y": K, "grad of x": N, "grad of weight": M, "grad of values": M, "grad of bias": M}
    return {name: Sums(count) for name, count in terms.items()}


def float64_reference(case: SparseCase) -> dict[str, torch.Tensor]:
    """The peers' expression in float64, on the same inputs."""
    wide = {name: getattr(case, name) for name in (*LEAVES, "dy")}
    wide = {name: value if value is None else value.double() for name, value in wide.items()}
    return run(replace(case, **wide), scatter_expression)
