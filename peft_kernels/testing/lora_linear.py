"""Cases of the LoRA linear op: inputs, the float64 reference, the eager expression of PEFT, and one runner that
takes any of them through forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from ..ops.core import dropout
from ..ops.lora_linear import Projection, lora_linear_shared_input
from .bounds import Sums


@dataclass
class LoRACase:
    """Inputs of one call. `x` [..., K]; one :class:`Projection` a layer; `grad_ys` [..., N_j]."""

    x: torch.Tensor
    projections: list[Projection]
    grad_ys: list[torch.Tensor]
    dropout_p: float = 0.0
    shared_dropout: bool = False
    adapter_precision: str = "default"
    seed: int = 1234
    frozen: tuple[str, ...] = ()  # of "x", "weight", "bias", "lora_A", "lora_B"
    fields: tuple[str, ...] = field(default=("weight", "bias", "lora_A", "lora_B"), repr=False)

    def masks(self) -> list[torch.Tensor | None]:
        """The dropout mask of each projection [M, K], from the seed that the op will draw; None without dropout."""
        if self.dropout_p == 0.0:
            return [None] * len(self.projections)
        rows, columns = self.x.numel() // self.x.shape[-1], self.x.shape[-1]
        torch.manual_seed(self.seed)
        seed = dropout.draw_seed(self.x.device)
        streams = 1 if self.shared_dropout else len(self.projections)
        packed = dropout.draw_mask(seed, rows, columns, self.dropout_p, streams)
        masks = [dropout.unpack_mask(mask, columns).view(self.x.shape) for mask in packed]
        return masks * len(self.projections) if self.shared_dropout else masks


def make_case(
    batch: tuple[int, ...] = (6,),
    in_features: int = 24,
    out_features: tuple[int, ...] = (16,),
    rank: int | tuple[int, ...] = 4,
    dtype: torch.dtype = torch.float32,
    adapter_dtype: torch.dtype | None = None,
    bias: bool = True,
    row_scaling: bool = False,
    device: str = "cpu",
    draw: int = 0,
    **settings,
) -> LoRACase:
    """A seeded case with operands of order one and B ≠ 0, another one for each `draw`; one rank, or one for each
    projection; `settings` are those of :class:`LoRACase`."""
    ranks = rank if isinstance(rank, tuple) else (rank,) * len(out_features)
    generator = torch.Generator().manual_seed(in_features * 7919 + ranks[0] * 31 + len(batch) + 104729 * draw)

    def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> torch.Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        return values.to(device=device, dtype=dtype)

    adapter_dtype = adapter_dtype or dtype
    projections = [
        Projection(
            weight=random(features, in_features, scale=in_features**-0.5),
            lora_A=random(rank, in_features, scale=in_features**-0.5, dtype=adapter_dtype),
            lora_B=random(features, rank, scale=rank**-0.5, dtype=adapter_dtype),
            scaling=random(*batch, dtype=torch.float32).abs() if row_scaling else 0.5 + 0.25 * j,
            bias=random(features) if bias else None,
        )
        for j, (features, rank) in enumerate(zip(out_features, ranks))
    ]
    x = random(*batch, in_features)
    return LoRACase(x, projections, [random(*batch, features) for features in out_features], **settings)


Expression = Callable[[LoRACase, torch.Tensor, list[Projection]], tuple[torch.Tensor, ...]]


def ours(case: LoRACase, x: torch.Tensor, projections: list[Projection]) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(case.seed)
    return lora_linear_shared_input(
        x, projections, dropout_p=case.dropout_p, training=True, shared_dropout=case.shared_dropout,
        adapter_precision=case.adapter_precision,
    )  # fmt: skip


def peft_expression(case: LoRACase, x: torch.Tensor, projections: list[Projection]) -> tuple[torch.Tensor, ...]:
    """Compute as `peft.tuners.lora.Linear.forward`, with our dropout mask: base + lora_B(lora_A(D(x)))·scaling."""
    ys = []
    for (weight, lora_A, lora_B, scaling, bias), mask in zip(projections, case.masks()):
        base = F.linear(x, weight, bias)
        dropped = x.to(lora_A.dtype)
        if mask is not None:
            dropped = dropped * mask.to(dropped.dtype) * dropout.rescale(case.dropout_p)
        if isinstance(scaling, torch.Tensor) and scaling.dim():
            scaling = scaling.unsqueeze(-1)
        low_rank = F.linear(F.linear(dropped, lora_A), lora_B)
        ys.append((base + low_rank * scaling).to(base.dtype))
    return tuple(ys)


def run(case: LoRACase, expression: Expression = ours, autocast: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Forward and backward of one expression on fresh leaves: every output and every gradient by name."""
    x = case.x.clone().requires_grad_("x" not in case.frozen)
    projections = []
    for projection in case.projections:
        leaves = {
            name: value.clone().requires_grad_(name not in case.frozen)
            for name in case.fields
            if (value := getattr(projection, name)) is not None
        }
        projections.append(projection._replace(**leaves))
    device = case.x.device.type
    with torch.autocast(device, dtype=autocast) if autocast else contextlib.nullcontext():
        ys = expression(case, x, projections)
    results = {f"y{j}": y.detach() for j, y in enumerate(ys)}
    wanted = {"x": x} | {f"{name}{j}": getattr(p, name) for j, p in enumerate(projections) for name in case.fields}
    wanted = {name: leaf for name, leaf in wanted.items() if leaf is not None and leaf.requires_grad}
    if wanted:
        grads = torch.autograd.grad(ys, list(wanted.values()), [g.to(y.dtype) for g, y in zip(case.grad_ys, ys)])
        results |= {f"grad of {name}": grad for name, grad in zip(wanted, grads)}
    return results


def eager(case: LoRACase, autocast: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """PEFT's expression in the case's own dtypes."""
    return run(case, peft_expression, autocast)


def sums(case: LoRACase, backend: str) -> dict[str, Sums]:
    """The sums behind an element of each float32 result of a GPU's kernels, where they are float32's own: of a float32
    base, and of "high" adapters, whose gradients are; elsewhere 16-bit roundings are all that counts. Of the latter in
    Triton's interpreter too: numpy's products add up one after the other where a matrix has few rows, and torch's, by a
    CPU's vectors, in several sums."""
    high = case.x.dtype != torch.float32 and case.adapter_precision == "high"
    interpreted = not case.x.is_cuda and backend.startswith("triton")
    if (not high and (interpreted or case.x.dtype != torch.float32)) or not (case.x.is_cuda or interpreted):
        return {}
    M, K = case.x.numel() // case.x.shape[-1], case.x.shape[-1]
    Ns = [p.weight.shape[0] for p in case.projections]
    Rs = [p.lora_A.shape[0] for p in case.projections]
    terms = {}
    for j, (N, R) in enumerate(zip(Ns, Rs)):
        terms |= {f"grad of lora_A{j}": N + M, f"grad of lora_B{j}": K + M}  # of dH and of S, then over the tokens
        if not high:
            terms |= {f"y{j}": K + R, f"grad of weight{j}": M, f"grad of bias{j}": M}
    if not high:
        terms["grad of x"] = sum(Ns) + sum(Rs)
    return {name: Sums(count, tensor_cores=high and case.x.is_cuda) for name, count in terms.items()}


def float64_reference(case: LoRACase) -> dict[str, torch.Tensor]:
    """PEFT's expression in float64, on the same inputs and the same mask."""

    def double(value):
        return value.double() if isinstance(value, torch.Tensor) else value

    wide = replace(
        case,
        x=case.x.double(),
        projections=[Projection(*map(double, projection)) for projection in case.projections],
        grad_ys=[grad.double() for grad in case.grad_ys],
    )
    return run(wide, peft_expression)
