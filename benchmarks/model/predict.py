"""From a case, or a row of results, to the launches of a provider and its predicted time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .. import lora, sparse_delta
from ..registry import BACKWARD, BOTH, FORWARD, STEP
from ..resultfile import Row
from . import lora_launches, sparse_launches
from .launches import Ceilings, Passes, timed

LORA_OPS = tuple(spec.name for spec in lora.SPECS)
OPS = (*LORA_OPS, sparse_delta.SPEC.name)
PARTS = {FORWARD: (0,), BACKWARD: (1,), BOTH: (0, 1), STEP: (0, 1, 2)}  # of Passes


def predicted(op: str, case: Any, provider: str, mode: str, ceilings: Ceilings) -> float | None:
    """µs, or None where there is no model: of another op, of torch.compile, of what a provider cannot do.

    Args:
        case: of the op (`lora.Shape`, `sparse_delta.Work`), or a row of its results.
        ceilings: FLOP/s a dtype and bytes/s, as a result file has them; `ceilings_of_file` adds what a GPU has beside.
    """
    passes = launches_of(op, case, provider, ceilings)
    if passes is None or not {str(_dtype(case)), "bytes"} <= ceilings.keys():
        return None
    return sum(µs for part in PARTS[mode] for _, _, µs in timed(passes[part], _dtype(case), ceilings))


def launches_of(op: str, case: Any, provider: str, ceilings: Ceilings) -> Passes | None:
    """Of one layer, or of all that share x; None where there is no model."""
    if op in LORA_OPS:
        layers = _lora_layers(case)
        known = lora_launches.PROVIDERS | (lora_launches.DESIGNS if len(layers) == 1 else {})
        return known[provider](layers, ceilings) if provider in known else None
    if op == sparse_delta.SPEC.name:
        known = sparse_launches.PROVIDERS
        return known[provider](_sparse_layer(case, ceilings), ceilings) if provider in known else None
    return None


def floor_us(op: str, case: lora.Shape | sparse_delta.Work, mode: str, ceilings: Ceilings) -> float:
    """The op's own floor, as its rows are measured against it."""
    if op in LORA_OPS:
        return lora.floor_us(case, mode, ceilings)
    layer = _sparse_layer(case, ceilings)
    flops = sparse_delta.flops(case.shape, layer.nnz, mode) / ceilings[str(case.dtype)]
    return 1e6 * max(flops, sparse_delta.bytes_moved(case.shape, _Counted(layer), mode) / ceilings["bytes"])


class _Counted(NamedTuple):
    """As much of a `SparseLayout` as the floor asks for, without drawing the positions."""

    layer: sparse_launches.Layer

    nnz = property(lambda self: self.layer.nnz)
    nbytes = property(lambda self: self.layer.layout)

    def mask(self) -> torch.Tensor:
        """One row for all: the columns that have an entry, as many as are to be expected where positions are drawn."""
        l = self.layer
        slots = l.N // (l.side if l.kind == "blocks" else 1)  # of a column, each taken with the density's odds
        drawn = round(l.K * (1 - (1 - l.nnz / (l.N * l.K)) ** slots))
        return torch.ones(1, {"columns": l.count, "rows": l.K}.get(l.kind, drawn), dtype=torch.bool)


def _dtype(case: Any) -> torch.dtype:
    return getattr(torch, case["dtype"]) if isinstance(case, dict) else case.dtype


def _lora_layers(case: lora.Shape | Row) -> list[lora_launches.Layer]:
    if isinstance(case, dict):
        Ns = tuple(map(int, str(case["N"]).split("+")))
        case = lora.Shape(case["M"], case["K"], Ns, case["R"], _dtype(case), case["p"])
    return [lora_launches.Layer(case.M, case.K, N, case.R, case.dtype.itemsize, case.p) for N in case.Ns]


def _sparse_layer(case: sparse_delta.Work | Row, ceilings: Ceilings) -> sparse_launches.Layer:
    side = 64 if "sms" in ceilings else 32  # of blocks, as `sparse_delta.make_layout` has them on a GPU and a CPU
    if isinstance(case, dict):
        M, K, N = case["M"], case["K"], case["N"]
        return sparse_launches.Layer(M, K, N, _dtype(case).itemsize, case["kind"], case["nnz"], side)
    (M, K, N, dtype), (kind, density, r) = case.shape, (case.pattern.kind, case.pattern.density, case.pattern.r)
    unit = {"rows": K, "columns": N, "blocks": side**2}.get(kind, 1)  # entries of one
    nnz = r * (N + K) or unit * max(1, round(density / 100 * (N * K // unit)))
    return sparse_launches.Layer(M, K, N, dtype.itemsize, kind, nnz, side)
