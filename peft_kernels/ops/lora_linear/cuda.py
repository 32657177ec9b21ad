"""LoRA linear by the native library's CUDA kernels (csrc/README.md): one pass over x for S and dropout's mask, one GEMM
for y, or both by one kernel; one pass over dy for dH and dB, one GEMM for dx of all projections that share x, and a
pass over x for dA beside its last tiles.

They multiply 16-bit operands whose rows start on 16 bytes. Low-rank matrices are filled up with zeros to a multiple of
8 ranks, and a wide matrix whose rows lie otherwise is copied once. A weight that lies otherwise is left to the vendor's
GEMM, and float32 (operands, or adapters at "high" precision) to the reference: by these rules, before any launch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..common import dropout
from ..common.machine import architecture
from ..common.native import Sum, aligned, by_row, has_boxes, native, padded, reduced, takes, with_columns, with_rows
from ..common.tensors import flatten, unflatten
from . import configs, reference

LARGEST_RANK_OF_PASS = 64  # of `lora_outer`; above, a pass for every 64 ranks
LARGEST_NUMBER_OF_PAIRS = 3  # of `lora_gemm`
LARGEST_RANK_OF_FORWARD = 64  # of `lora_forward`


def forward(
    x: torch.Tensor,
    projections: list[torch.Tensor | None],
    scalings: list[float],
    seed: torch.Tensor | None,
    dropout_p: float,
    shared_dropout: bool,
    save_s: list[bool],
    save_mask: bool,
    high_precision: bool,
    backend: str,
) -> list[torch.Tensor]:
    """As `reference.forward`."""
    if x.dtype == torch.float32 or high_precision:
        return reference.forward(
            x, projections, scalings, seed, dropout_p, shared_dropout, save_s, save_mask, high_precision
        )
    rows, num = flatten(x), len(scalings)
    if num == 1 and seed is None and _in_one_kernel(rows, projections[0], projections[2].shape[0], backend):
        y, s = _in_one(aligned(rows), *projections, scalings[0] * dropout.rescale(dropout_p))
        return [unflatten(y, x), *([s.contiguous()] if save_s[0] else [])]
    (M, K), R = rows.shape, padded(max(lora_A.shape[0] for lora_A in projections[2::5]))
    streams = 1 if shared_dropout or seed is None else num
    masks = None
    if save_mask and seed is not None:
        masks = rows.new_empty(streams, M, dropout.mask_bytes(K), dtype=torch.uint8)
    stacked = _joined([with_rows(lora_A.to(x.dtype), R) for lora_A in projections[2::5]], dim=0)
    threshold = 0 if seed is None else dropout.threshold(dropout_p)
    wide = aligned(rows)
    partials = native().lora_shrink(wide, aligned(stacked), seed, threshold, streams, masks, True)
    scales = [scaling * dropout.rescale(dropout_p) for scaling in scalings]
    parts = partials.split(R, dim=2)
    ss = reduced([Sum(part, x.dtype, *one) for part, *one in zip(parts, projections[4::5], scales)])  # [M, R] each
    ys, kept_s = [], []
    for j, s in enumerate(ss):
        weight, bias, lora_A, lora_B, _ = projections[5 * j : 5 * j + 5]
        s = s[:, : lora_A.shape[0]]
        ys.append(unflatten(_expand(wide, weight, s, lora_B.to(x.dtype), bias), x))
        if save_s[j]:
            kept_s.append(s)
    if kept_s:
        ys.append(_joined(kept_s, dim=1).contiguous())
    if masks is not None:
        ys.append(masks)
    return ys


def backward(
    grad_ys: list[torch.Tensor],
    x: torch.Tensor | None,
    s: torch.Tensor | None,
    masks: torch.Tensor | None,
    projections: list[torch.Tensor | None],
    scalings: list[float],
    ranks: list[int],
    dropout_p: float,
    needs_x: bool,
    needs: list[bool],
    adapter_dtype: torch.dtype,
    high_precision: bool,
    backend: str,
) -> list[torch.Tensor]:
    """As `reference.backward`."""
    dtype = grad_ys[0].dtype
    if dtype == torch.float32 or high_precision:
        return reference.backward(
            grad_ys, x, s, masks, projections, scalings, ranks, dropout_p, needs_x, needs, adapter_dtype, high_precision
        )
    rows = None if x is None else aligned(flatten(x))
    weights, lora_As, lora_Bs, row_scalings = (projections[i::4] for i in range(4))
    needs_weight, needs_bias, needs_A, needs_B = (needs[i::4] for i in range(4))
    dys = [aligned(flatten(grad_y)) for grad_y in grad_ys]
    kept_s = iter(() if s is None else s.split([rank for rank, needed in zip(ranks, needs_B) if needed], dim=1))
    dhs, grads_B = _passes_over_dys(
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
    with_A = [j for j, needed in enumerate(needs_A) if needed]
    if with_A and masks is not None and len(masks) > 1 and len(with_A) < len(dys):
        masks = torch.stack([masks[j] for j in with_A])  # an index from the host could not be captured in a graph
    passes = _passes_over_x([dhs[j] for j in with_A], masks) if with_A else []
    more_parts, sums = _launched(products, passes, rows)
    grads_A = iter(_grads_A(passes, sums, [ranks[j] for j in with_A], adapter_dtype))
    grads = [unflatten(functools.reduce(torch.Tensor.add_, parts + more_parts), grad_ys[0])] if needs_x else []
    for j, dy in enumerate(dys):
        if needs_weight[j]:
            grads.append(dy.t().mm(rows))
        if needs_bias[j]:
            grads.append(dy.sum(0))
        if needs_A[j]:
            grads.append(next(grads_A))
        if needs_B[j]:
            grads.append(grads_B[j])
    return grads


def _in_one_kernel(x: torch.Tensor, weight: torch.Tensor, rank: int, backend: str) -> bool:
    """Whether one kernel takes the forward, and is to."""
    (M, K), N, device = x.shape, weight.shape[0], x.device
    if not (fits_one_kernel(N, rank) and takes(weight) and M * N * K and has_boxes(device)):
        return False
    arch = architecture(device)
    return configs.cuda_path(M, N, K, x.dtype, arch, backend, configs.tuned(device)) == "fused"


def fits_one_kernel(out_features: int, rank: int) -> bool:
    """Whether `lora_forward` takes such a layer (csrc/lora_linear/forward.cu)."""
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
    """What `lora_gemm` takes, for a part of dx."""

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
    """What adds up to Σ_j dy_j·W_j + D_j(dH_j·A_j) [M, K]: one product for what lies the same way, to be computed, and
    the vendor's parts."""
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
            parts.append(_grad_x_by_vendor(dys[j], weight, dhs[j], lora_As[j], masks_of([j])))
    for by_feature, members in together.items():
        for start in range(0, len(members), LARGEST_NUMBER_OF_PAIRS):
            some = members[start : start + LARGEST_NUMBER_OF_PAIRS]
            right = [weights[j].t() if by_feature else weights[j] for j in some]
            low_right = [aligned(lora_As[j].t() if by_feature else lora_As[j]) for j in some]
            left, low_left = [dys[j] for j in some], [dhs[j] for j in some]
            products.append(_Product(left, right, low_left, low_right, masks_of(some), by_feature))
    return products, parts


def _grad_x_by_vendor(
    dy: torch.Tensor, weight: torch.Tensor, dh: torch.Tensor, lora_A: torch.Tensor, masks: list[torch.Tensor]
) -> torch.Tensor:
    """dy·W + D(dH·A) [M, K]."""
    low_rank = dh.mm(lora_A)
    for mask in masks:
        low_rank.mul_(dropout.unpack_mask(mask, lora_A.shape[1], dh.dtype))
    return low_rank.addmm_(dy, weight)


class _Pass(NamedTuple):
    """One over x for dA: dH of one or more projections side by side, and their masks.

    Attributes:
        widths: of projections by number: the columns of `narrow`, from the left.
    """

    narrow: torch.Tensor
    keep: torch.Tensor | None
    widths: dict[int, int]


def _passes_over_x(dhs: list[torch.Tensor], masks: torch.Tensor | None) -> list[_Pass]:
    """For all of these: one where ranks fit; with a mask each its tiles are read once a projection, by blocks that meet
    in the L2 cache."""
    ranks = [dh.shape[1] for dh in dhs]
    one_mask = masks is None or len(masks) == 1  # or none
    widths = ranks if one_mask else [padded(max(ranks))] * len(ranks)
    if len(dhs) > 1 and (sum(widths) if one_mask else widths[0]) <= LARGEST_RANK_OF_PASS:
        narrow = _joined([dh if one_mask else with_columns(dh, widths[0]) for dh in dhs], dim=1)
        return [_Pass(with_columns(narrow, padded(sum(widths))), masks, dict(enumerate(widths)))]
    return [
        _Pass(with_columns(some, width := padded(some.shape[1])), masks if one_mask else masks[j : j + 1], {j: width})
        for j, dh in enumerate(dhs)
        for some in dh.split(LARGEST_RANK_OF_PASS, dim=1)
    ]


def _launched(
    products: list[_Product], passes: list[_Pass], x: torch.Tensor | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Each product's part of dx, and each pass's partial sums: the first pass beside the last product."""
    both = 1 if products and passes else 0
    parts = [native().lora_gemm(*one[:-1], None, one.by_feature) for one in products[: len(products) - both]]
    sums = []
    if both:
        part, its_sums = native().lora_grads(*products[-1], x, passes[0].narrow, passes[0].keep)
        parts.append(part), sums.append(its_sums)
    sums += [native().lora_outer(x, one.narrow, None, one.keep, True)[0] for one in passes[both:]]
    return parts, sums


def _grads_A(passes: list[_Pass], sums: list[torch.Tensor], ranks: list[int], dtype: torch.dtype) -> list[torch.Tensor]:
    """dA_j = dH_jᵀ·D_j(x) [R_j, K], of the partial sums of these passes."""
    of_each: list[list[Sum]] = [[] for _ in ranks]
    for one, its_sums in zip(passes, sums):
        widths = [*one.widths.values()]
        for j, part in zip(one.widths, its_sums[:, : sum(widths)].split(widths, dim=1)):
            of_each[j].append(Sum(part, dtype))
    return [grad_A[:rank] for grad_A, rank in zip(_added(of_each, dim=0), ranks)]


def _passes_over_dys(
    dys: list[torch.Tensor],
    lora_Bs: list[torch.Tensor | None],
    ss: list[torch.Tensor | None],
    row_scalings: list[torch.Tensor | None],
    scales: list[float],
    ranks: list[int],
    adapter_dtype: torch.dtype,
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """dH_j [M, R_j] and dB_j [N_j, R_j] of each projection, None where B_j or S_j is. The float32 partials of all of
    them are held until they are added up: for dH 4·M·R bytes every 128 columns of dy."""
    passes = [_pass_over_dy(*one, adapter_dtype) for one in zip(dys, lora_Bs, ss, row_scalings, scales)]
    found = _added([sums for both in passes for sums in both], dim=1)
    dhs = [None if dh is None else dh[:, :rank] for dh, rank in zip(found[0::2], ranks)]
    return dhs, [None if grad_B is None else grad_B[:, :rank].contiguous() for grad_B, rank in zip(found[1::2], ranks)]


def _pass_over_dy(
    dy: torch.Tensor,
    lora_B: torch.Tensor | None,
    s: torch.Tensor | None,
    row_scaling: torch.Tensor | None,
    scale: float,
    adapter_dtype: torch.dtype,
) -> tuple[list[Sum], list[Sum]]:
    """Of dH = scale · dy·B [M, R] where lora_B is given, and of dB = dyᵀ·S [N, R] where s is, by one pass: the sums
    whose first R columns, side by side, they are."""
    if lora_B is None:
        return [], [] if s is None else _outer(dy, s, adapter_dtype)
    R = padded(lora_B.shape[1])
    right = with_columns(lora_B, R)
    if s is None or R > LARGEST_RANK_OF_PASS:
        shrunk = native().lora_shrink(dy, right, None, 0, 1, None, False)
        grad_B = [] if s is None else _outer(dy, s, adapter_dtype)
    else:
        sums, shrunk = native().lora_outer(dy, with_columns(s, R), right, None, False)
        grad_B = [Sum(sums, adapter_dtype)]
    return [Sum(shrunk, dy.dtype, row_scaling, scale)], grad_B


def _outer(dy: torch.Tensor, s: torch.Tensor, dtype: torch.dtype) -> list[Sum]:
    """Of dB = dyᵀ·S [N, R]: the sums whose first R columns, side by side, it is."""
    return [
        Sum(native().lora_outer(dy, with_columns(some, padded(some.shape[1])), None, None, False)[0], dtype)
        for some in s.split(LARGEST_RANK_OF_PASS, dim=1)
    ]


def _added(of_each: list[list[Sum]], dim: int) -> list[torch.Tensor | None]:
    """Each list's sums side by side, None of an empty one; all of a dtype are added up by one launch."""
    results = iter(reduced([one for sums in of_each for one in sums]))
    return [_joined([next(results) for _ in sums], dim) if sums else None for sums in of_each]


def _joined(matrices: list[torch.Tensor], dim: int) -> torch.Tensor:
    return matrices[0] if len(matrices) == 1 else torch.cat(matrices, dim)
