"""What the sparse delta op and its optimizer launch: calls of them, as a user makes them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch

import peft_kernels as pk
from peft_kernels.ops.sparse_delta import configs
from tests.aot.scenario import DTYPES, Scenario, backward

M = 8192
#: [N, K], multiples of 16; the second has fewer rows than a tile.
SHAPES = [(4096, 4096), (48, 4096)]
ODD = (4097, 4095)
#: Kind, and what it is made from: a density, rows or columns, the blocks' size, n and m.
LAYOUTS = [
    ("entries", 0.001), ("entries", 0.01), ("entries", 0.1), ("rows", 41), ("rows", 64), ("columns", 41),
    ("columns", 64), ("blocks", (64, 64)), ("blocks", (8, 16)), ("n_of_m", (2, 4)), ("n_of_m", (8, 16)),
]  # fmt: skip


@functools.cache
def layout(kind: str, of: float | int | tuple[int, int], shape: tuple[int, int]) -> pk.SparseLayout:
    """On the CPU: layouts are made once, and their launches read no values."""
    (N, K), generator = shape, torch.Generator().manual_seed(0)
    if kind == "entries":
        return pk.SparseLayout.from_mask(torch.rand(N, K, generator=generator) < of)
    if kind == "rows":
        return pk.SparseLayout.rows(shape, torch.arange(of))
    if kind == "columns":
        return pk.SparseLayout.columns(shape, torch.arange(of))
    if kind == "blocks":
        return pk.SparseLayout.blocks(shape, of, torch.arange(16))
    n, m = of
    return pk.SparseLayout.n_of_m((torch.arange(K) % m < n).expand(N, K), n, m)


class Call(NamedTuple):
    """A layer's forward and backward; `step`: by `nn.SparseDeltaLinear`, and a step of its optimizer, in which the
    "delta" decays (lr is a float), or the "weight" (lr is a tensor)."""

    dtype: str
    kind: str
    of: float | int | tuple[int, int]
    shape: tuple[int, int] = SHAPES[0]
    values: str = "fp32"
    step: str = ""

    @property
    def name(self) -> str:
        of = "x".join(map(str, self.of)) if isinstance(self.of, tuple) else self.of
        words = ["sparse", self.dtype, f"{self.values}-values", self.kind, str(of), "x".join(map(str, self.shape))]
        return "-".join(words + [f"step-decays-{self.step}"] * bool(self.step))

    def run(self, device: torch.device) -> None:
        (N, K), dtype, place = self.shape, DTYPES[self.dtype], layout(self.kind, self.of, self.shape).to(device)
        x = torch.empty(M, K, dtype=dtype, device=device, requires_grad=True)
        if self.step:
            linear = torch.nn.Linear(K, N, device=device, dtype=dtype)
            # A phantom is a tensor of a class of its own, which a layer with values to compute on is refused for.
            with mock.patch("peft_kernels.nn.sparse_delta_linear.check_linear"):
                layer = pk.nn.SparseDeltaLinear.from_linear(linear, place)
            y = layer(x)
            backward(y)
            optimizer = pk.optim.SparseAdamW([layer], decay=self.step, capturable=self.step == "weight")
            if self.step == "weight":  # afterwards: torch asks for its value when the optimizer is made
                optimizer.param_groups[0]["lr"] = torch.tensor(1e-3, device=device)
            optimizer.step()
        else:
            weight = torch.empty(N, K, dtype=dtype, device=device)
            values = torch.empty(place.nnz, dtype=DTYPES[self.values], device=device, requires_grad=True)
            y = pk.sparse_delta_linear(x, weight, values, place)
            backward(y)


def calls() -> Iterator[Call]:
    for dtype, (kind, of) in itertools.product(DTYPES, LAYOUTS):
        yield Call(dtype, kind, of)
        yield Call(dtype, kind, of, step="delta")
    for kind, of in LAYOUTS[::2]:
        yield Call("bf16", kind, of, values="bf16")
        yield Call("bf16", kind, of, step="weight")
    for dtype, (kind, of) in itertools.product(DTYPES, (LAYOUTS[1], LAYOUTS[9])):
        yield Call(dtype, kind, of, SHAPES[1])
    for kind, of in (*LAYOUTS[:7], ("blocks", (17, 9)), ("n_of_m", (2, 3))):
        yield Call("bf16", kind, of, ODD)


def scenarios() -> Iterator[Scenario]:
    for call in calls():
        regular = all(size % 16 == 0 for size in call.shape)
        first = call.dtype == "bf16" and call.values == "fp32" and call.shape == SHAPES[0]
        place = "everywhere" if first else "all" if call.dtype == "fp16" else "sm_90"
        yield Scenario(call.name, "triton", call.run, call.dtype, regular, place, configs)
