"""LoRA linear by the native library's CUDA kernels (csrc/README.md): one pass over x for S and dropout's mask, one GEMM
for y, or both by one kernel; one pass over dy for dH and dB, one GEMM for dx of all projections that share x, and a
pass over x for dA beside its last tiles.

They multiply 16-bit operands whose rows start on 16 bytes. Low-rank matrices are filled up with zeros to a multiple of
8 ranks, and a wide matrix whose rows lie otherwise is copied once. A weight that lies otherwise is left to cuBLAS, and
so are products above rank 64 to which no mask applies: by these rules, before any launch. Float32 operands and adapters
at "high" precision are refused (`backends.OPS`), and so is "cuda:fused" where one kernel cannot compute S and y.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..core import dropout
from ..core.machine import architecture
from ..core.native import Sum, aligned, by_row, has_boxes, native, padded, reduced, takes, with_columns, with_rows
from ..core.tensors import by_field, flatten, matmul_float32, unflatten
from . import configs, reference

LARGEST_RANK_OF_PASS = 64  # of `lora_outer`, a stream; above, cuBLAS, or with a mask several streams
LARGEST_RANK_OF_JOINT_PASS = 32  # for dH and dB: above, dH's partial sums cost more than to read dy twice
LARGEST_NUMBER_OF_PAIRS = 3  # of `lora_gemm`
LARGEST_RANK_OF_FORWARD = 64  # of `lora_forward`


def forward(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    biases: list[torch.Tensor | None],
    lora_As: list[torch.Tensor],
    lora_Bs: list[torch.Tensor],
    row_scalings: list[torch.Tensor | None],
    scalings: list[float],
    seed: torch.Tensor | None,
    dropout_p: float,
    shared_dropout: bool,
    save_s: list[bool],
    save_mask: bool,
    high_precision: bool,
    backend: str,
) -> list[torch.Tensor]:
    """Compute what `reference.forward` does, of 16-bit operands.

    Raises:
        RuntimeError: for "cuda:fused" where one kernel cannot compute S and y; the line says why.
    """
    rows, num = flatten(x), len(scalings)
    if _takes_one_kernel(rows, weights, lora_As, seed, backend):
        operands = (field[0] for field in (weights, biases, lora_As, lora_Bs, row_scalings))
        y, s = _in_one(aligned(rows), *operands, scalings[0] * dropout.rescale(dropout_p))
        return [unflatten(y, x), *([s.contiguous()] if save_s[0] else [])]
    wide, masks = aligned(rows), None
    scales = [scaling * dropout.rescale(dropout_p) for scaling in scalings]
    if seed is None and max(lora_A.shape[0] for lora_A in lora_As) > LARGEST_RANK_OF_PASS:
        ss = [
            aligned(reference.scaled_mm(wide, lora_A.to(x.dtype), scale, row_scaling, transposed=True))
            for lora_A, row_scaling, scale in zip(lora_As, row_scalings, scales)
        ]
    else:
        streams = 1 if shared_dropout or seed is None else num
        if save_mask and seed is not None:
            masks = rows.new_empty(streams, len(rows), dropout.mask_bytes(rows.shape[1]), dtype=torch.uint8)
        ss = _shrunk(wide, lora_As, row_scalings, scales, seed, dropout_p, streams, masks)
    ys, kept_s = [], []
    for j, s in enumerate(ss):
        s = s[:, : lora_As[j].shape[0]]
        ys.append(unflatten(_expand(wide, weights[j], s, lora_Bs[j].to(x.dtype), biases[j]), x))
        if save_s[j]:
            kept_s.append(s)
    if kept_s:
        ys.append(_joined(kept_s, dim=1).contiguous())
    if masks is not None:
        ys.append(masks)
    return ys


def backward(
    dys: list[torch.Tensor],
    x: torch.Tensor | None,
    s: torch.Tensor | None,
    masks: torch.Tensor | None,
    weights: list[torch.Tensor | None],
    lora_As: list[torch.Tensor | None],
    lora_Bs: list[torch.Tensor | None],
    row_scalings: list[torch.Tensor | None],
    scalings: list[float],
    ranks: list[int],
    dropout_p: float,
    needs: list[bool],
    adapter_dtype: torch.dtype,
    high_precision: bool,
    backend: str,
) -> list[torch.Tensor]:
    """Compute what `reference.backward` does, of 16-bit operands."""
    dtype, given = dys[0].dtype, dys[0]
    rows = None if x is None else aligned(flatten(x))
    needs_x, (needs_weight, needs_bias, needs_A, needs_B) = needs[0], by_field(needs[1:], len(dys), 4)
    dys = [aligned(flatten(dy)) for dy in dys]
    kept_s = iter(() if s is None else s.split([rank for rank, needed in zip(ranks, needs_B) if needed], dim=1))
    dhs, grads_B = _low_rank_grads(
        dys,
        [lora_B.to(dtype) if needs_x or needs_A[j] else None for j, lora_B in enumerate(lora_Bs)],
        [next(kept_s) if needed else None for needed in needs_B],
        row_scalings,
        [scaling * dropout.rescale(dropout_p) for scaling in scalings],
        ranks,
        adapter_dtype,
    )
    products, parts = [], []
    if needs_x:
        products, parts = _products_of_x(dys, weights, dhs, [lora_A.to(dtype) for lora_A in lora_As], masks)
    grads_A = {
        j: matmul_float32(dhs[j].t(), rows).to(adapter_dtype)
        for j, needed in enumerate(needs_A)
        if needed and masks is None and ranks[j] > LARGEST_RANK_OF_PASS
    }
    others = [j for j, needed in enumerate(needs_A) if needed and j not in grads_A]
    over_x = _pass_over_x(dhs, masks, others) if others else None
    sums = None
    if over_x and products:
        part, sums = native().lora_grads(*products.pop(), rows, over_x.narrow, over_x.keep, over_x.streams)
        parts.append(part)
    elif over_x:
        sums, _ = native().lora_outer(rows, over_x.narrow, None, over_x.keep, over_x.streams, True)
    parts += [native().lora_gemm(*product[:-1], None, product.by_feature) for product in products]
    grads = [unflatten(functools.reduce(torch.Tensor.add_, parts), given)] if needs_x else []
    if over_x:
        grads_A |= zip(others, reduced([Sum(sums[:, place], adapter_dtype) for place in over_x.places]))
    grads += [dy.t().mm(rows) for dy, needed in zip(dys, needs_weight) if needed]
    grads += [dy.sum(0) for dy, needed in zip(dys, needs_bias) if needed]
    grads += [grads_A[j] for j, needed in enumerate(needs_A) if needed]
    return grads + [grad for grad, needed in zip(grads_B, needs_B) if needed]


def _takes_one_kernel(
    x: torch.Tensor,
    weights: list[torch.Tensor],
    lora_As: list[torch.Tensor],
    seed: torch.Tensor | None,
    backend: str,
) -> bool:
    """Whether one kernel computes S and y."""
    (M, K), N, device = x.shape, weights[0].shape[0], x.device
    if backend == "cuda:passes" or M * N * K == 0:
        return False
    path = configs.cuda_path(M, N, K, x.dtype, architecture(device), backend, configs.tuned(device))
    if path != "fused":
        return False
    reason = _why_not_one_kernel(weights, lora_As, seed, device)
    if reason and backend == "cuda:fused":
        raise RuntimeError(f"lora_linear: the backend 'cuda:fused' cannot run this layer: {reason}")
    return not reason


def _why_not_one_kernel(
    weights: list[torch.Tensor], lora_As: list[torch.Tensor], seed: torch.Tensor | None, device: torch.device
) -> str:
    """Empty where one kernel can compute S and y."""
    weight, lora_A = weights[0], lora_As[0]
    if len(weights) > 1:
        return f"expected one projection, got {len(weights)}"
    if seed is not None:
        return "expected no dropout"
    if not fits_one_kernel(weight.shape[0], lora_A.shape[0]):
        return (
            f"expected out_features of a multiple of 8 and a rank up to {LARGEST_RANK_OF_FORWARD}, "
            f"got {weight.shape[0]} and {lora_A.shape[0]}"
        )
    if not takes(weight):
        return f"expected a weight whose rows are adjacent and start on 16 bytes, got strides {weight.stride()}"
    if not has_boxes(device):
        return "expected compute capability 9.0, and a native library with code for sm_90a"
    return ""


def fits_one_kernel(out_features: int, rank: int) -> bool:
    """Whether `lora_forward` takes such a layer (csrc/ops/lora_linear/forward.cu)."""
    return out_features % 8 == 0 and rank <= LARGEST_RANK_OF_FORWARD


def _in_one(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    row_scaling: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [M, N] and S [M, R]."""
    adapters = aligned(lora_A.to(x.dtype)), aligned(lora_B.to(x.dtype))
    bias = None if bias is None else bias.contiguous()
    y, s = native().lora_forward(x, weight, *adapters, by_row(row_scaling, len(x)), scale, bias)
    return y, s[:, : lora_A.shape[0]]


def _shrunk(
    x: torch.Tensor,
    lora_As: list[torch.Tensor],
    row_scalings: list[torch.Tensor | None],
    scales: list[float],
    seed: torch.Tensor | None,
    dropout_p: float,
    streams: int,
    masks: torch.Tensor | None,
) -> list[torch.Tensor]:
    """S_j = scale_j · D_j(x)·A_jᵀ [M, R] by one pass over x, R the largest rank of all, padded. Writes `masks`."""
    R = padded(max(lora_A.shape[0] for lora_A in lora_As))
    stacked = aligned(_joined([with_rows(lora_A.to(x.dtype), R) for lora_A in lora_As], dim=0))
    threshold = 0 if seed is None else dropout.threshold(dropout_p)
    parts = native().lora_shrink(x, stacked, seed, threshold, streams, masks, True).split(R, dim=2)
    return reduced([Sum(part, x.dtype, *one) for part, *one in zip(parts, row_scalings, scales)])


def _expand(
    x: torch.Tensor, weight: torch.Tensor, s: torch.Tensor, lora_B: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """x·Wᵀ + S·Bᵀ + bias [M, N]."""
    bias = None if bias is None else bias.contiguous()
    if takes(weight):
        return native().lora_gemm([x], [weight], [s], [aligned(lora_B)], [], bias, True)
    if takes(weight.t()):
        return native().lora_gemm([x], [weight.t()], [s], [aligned(lora_B.t())], [], bias, False)
    return reference.add_base(s, lora_B, x, weight, bias)


class _Product(NamedTuple):
    """The arguments of `lora_gemm` for a part of dx."""

    left: list[torch.Tensor]
    right: list[torch.Tensor]
    low_left: list[torch.Tensor]
    low_right: list[torch.Tensor]
    keep: list[torch.Tensor]
    by_feature: bool


def _products_of_x(
    dys: list[torch.Tensor],
    weights: list[torch.Tensor],
    dhs: list[torch.Tensor],
    lora_As: list[torch.Tensor],
    masks: torch.Tensor | None,
) -> tuple[list[_Product], list[torch.Tensor]]:
    """The terms of Σ_j dy_j·W_j + D_j(dH_j·A_j) [M, K]: one product for what lies the same way, to be computed, and
    the products by cuBLAS."""
    one_mask = masks is None or len(masks) == 1  # or none

    def masks_of(projections: list[int]) -> list[torch.Tensor]:
        if masks is None:
            return []
        return [masks[0]] if one_mask else [masks[j] for j in projections]

    together: dict[bool, list[int]] = {}
    products, parts = [], []
    for j, weight in enumerate(weights):
        if takes(weight) or takes(weight.t()):
            together.setdefault(not takes(weight), []).append(j)
        else:
            parts.append(_grad_x_by_cublas(dys[j], weight, dhs[j], lora_As[j], masks_of([j])))
    for by_feature, members in together.items():
        for start in range(0, len(members), LARGEST_NUMBER_OF_PAIRS):
            some = members[start : start + LARGEST_NUMBER_OF_PAIRS]
            right = [weights[j].t() if by_feature else weights[j] for j in some]
            low_right = [aligned(lora_As[j].t() if by_feature else lora_As[j]) for j in some]
            left, low_left = [dys[j] for j in some], [dhs[j] for j in some]
            products.append(_Product(left, right, low_left, low_right, masks_of(some), by_feature))
    return products, parts


def _grad_x_by_cublas(
    dy: torch.Tensor, weight: torch.Tensor, dh: torch.Tensor, lora_A: torch.Tensor, masks: list[torch.Tensor]
) -> torch.Tensor:
    """dy·W + D(dH·A) [M, K]."""
    low_rank = dh.mm(lora_A)
    for mask in masks:
        low_rank.mul_(dropout.unpack_mask(mask, lora_A.shape[1], dh.dtype))
    return low_rank.addmm_(dy, weight)


class _Pass(NamedTuple):
    """Arguments of `lora_outer` beside x, for dA: dH of some projections side by side, in as many streams as their
    ranks and masks ask for.

    Attributes:
        places: the columns of each projection's.
    """

    narrow: torch.Tensor
    keep: torch.Tensor | None
    streams: int
    places: list[slice]


def _pass_over_x(dhs: list[torch.Tensor | None], masks: torch.Tensor | None, some: list[int]) -> _Pass:
    """For `some` projections. Streams have as many columns each, and a mask or none: they read the same tiles of x,
    which meet in the L2 cache. Ranks far apart cost the smaller ones streams of zeros, with a mask each."""
    one_mask = masks is None or len(masks) == 1  # or none
    if not one_mask and len(some) < len(dhs):
        masks = torch.stack([masks[j] for j in some])  # an index from the CPU could not be captured in a graph
    dhs = [dhs[j] for j in some]
    ranks = [dh.shape[1] for dh in dhs]
    stacks = [_joined(dhs, dim=1)] if one_mask else dhs
    largest = max(stack.shape[1] for stack in stacks)
    streams = -(-largest // LARGEST_RANK_OF_PASS)  # of each stack
    width = streams * padded(-(-largest // streams))
    narrow = _joined([with_columns(stack, width) for stack in stacks], dim=1)
    starts = [sum(ranks[:j]) if one_mask else j * width for j in range(len(ranks))]
    places = [slice(start, start + rank) for start, rank in zip(starts, ranks)]
    return _Pass(narrow, masks, streams * len(stacks), places)


def _low_rank_grads(
    dys: list[torch.Tensor],
    lora_Bs: list[torch.Tensor | None],
    ss: list[torch.Tensor | None],
    row_scalings: list[torch.Tensor | None],
    scales: list[float],
    ranks: list[int],
    adapter_dtype: torch.dtype,
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """dH_j = scale_j · dy_j·B_j [M, R_j] and dB_j = dy_jᵀ·S_j [N_j, R_j], None where B_j or S_j is. The float32
    partials of all of them are held until they are added up: for dH 4·M·R bytes every 128 columns of dy, to rank 32."""
    given = [*zip(dys, lora_Bs, ss, row_scalings, scales)]
    sums: list[Sum | None] = []
    for one, rank in zip(given, ranks):
        sums += (None, None) if rank > LARGEST_RANK_OF_PASS else _sums_over_dy(*one, rank, adapter_dtype)
    found = reduced(sums)
    dhs = [None if dh is None else dh[:, :rank] for dh, rank in zip(found[0::2], ranks)]
    grads_B = [None if grad is None else grad[:, :rank].contiguous() for grad, rank in zip(found[1::2], ranks)]
    for j, (dy, lora_B, s, row_scaling, scale) in enumerate(given):
        if ranks[j] > LARGEST_RANK_OF_PASS:
            dhs[j] = None if lora_B is None else aligned(reference.scaled_mm(dy, lora_B, scale, row_scaling))
            grads_B[j] = None if s is None else matmul_float32(dy.t(), s).to(adapter_dtype)
    return dhs, grads_B


def _sums_over_dy(
    dy: torch.Tensor,
    lora_B: torch.Tensor | None,
    s: torch.Tensor | None,
    row_scaling: torch.Tensor | None,
    scale: float,
    rank: int,
    adapter_dtype: torch.dtype,
) -> tuple[Sum | None, Sum | None]:
    """Partials of dH where lora_B is given, and of dB where s is, with columns up to the padded rank: by one pass over
    dy, or by one each."""
    R = padded(rank)
    right = None if lora_B is None else with_columns(lora_B, R)
    together = right is not None and s is not None and rank <= LARGEST_RANK_OF_JOINT_PASS
    sums = shrunk = None
    if s is not None:
        sums, shrunk = native().lora_outer(dy, with_columns(s, R), right if together else None, None, 1, False)
    if right is not None and not together:
        shrunk = native().lora_shrink(dy, right, None, 0, 1, None, False)
    of_dH = None if right is None else Sum(shrunk, dy.dtype, row_scaling, scale)
    return of_dH, None if sums is None else Sum(sums, adapter_dtype)


def _joined(matrices: list[torch.Tensor], dim: int) -> torch.Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim)
