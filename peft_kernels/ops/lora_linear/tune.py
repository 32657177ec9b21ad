"""The problems that `python -m peft_kernels tune` runs for each choice in `configs.py`."""

from __future__ import annotations

import torch

from ... import _native
from ..blocks.reduce import reduce_partials
from ..core import dropout
from ..core.machine import architecture
from ..core.problem import Inputs, Problem
from . import configs, cuda, reference, triton_backward, triton_forward
from .reference import add_base
from .triton_backward import grad_lora_A, grad_x_of, sums_over_dy
from .triton_forward import shrink
from .triton_gemm import extended_gemm

_RANK = 16  # of the layer at which two paths are compared
_DROPOUT = 0.1


def _shrink(inputs: Inputs, M, K, width, dropping, **_) -> Problem:
    x, lora_A = inputs.normal(M, K), inputs.normal(width, K, scale=K**-0.5)
    seed = inputs.below(2**62, 1) if dropping else None
    kept = dropout.unpack_mask(dropout.draw_mask(seed, M, K, _DROPOUT, 1)[0], K) if dropping else 1

    def launch(tile):
        return shrink(x, lora_A, [1.0], [None], seed, _DROPOUT, False, dropping, False, tile)[:1]

    return Problem(launch, lambda x, lora_A: ((x * kept) @ lora_A.t(),), (x, lora_A))


def _dh_db(inputs: Inputs, M, N, R, **_) -> Problem:
    dy, lora_B, s = inputs.normal(M, N), inputs.normal(N, R, scale=N**-0.5), inputs.normal(M, R)

    def launch(tile):
        dh = torch.empty_like(s)
        grad_B, sums = sums_over_dy(dy, lora_B, s, dh, 1.0, None, dy.dtype, False, tile)
        reduce_partials(sums, M)
        return dh, grad_B

    return Problem(launch, lambda dy, lora_B, s: (dy @ lora_B, dy.t() @ s), (dy, lora_B, s))


def _da(inputs: Inputs, M, K, width, **_) -> Problem:
    x, dh = inputs.normal(M, K), inputs.normal(M, width)

    def launch(tile):
        return tuple(grad_lora_A(x, dh, None, [width], [True], x.dtype, False, tile))

    return Problem(launch, lambda x, dh: (dh.t() @ x,), (x, dh))


def _gemm(inputs: Inputs, M, N, R, masks, base, **_) -> Problem:
    """Forward, which has no mask, and dx; onto dx without `base` cuBLAS would be added."""
    K = inputs.K
    e, f = inputs.normal(M, R), inputs.normal(R, N, scale=R**-0.5)
    if masks:
        packed = inputs.below(256, 1, M, dropout.mask_bytes(N), dtype=torch.uint8)
        kept = dropout.unpack_mask(packed[0], N)
    if not base:

        def launch(tile):
            return (extended_gemm([], [], [e], [f], e.new_empty(M, N), masks=packed, base=False, tile=tile),)

        return Problem(launch, lambda e, f: ((e @ f) * kept,), (e, f))
    p, q = inputs.normal(M, K), inputs.normal(K, N, scale=K**-0.5)
    if masks:

        def launch(tile):
            return (extended_gemm([p], [q], [e], [f], p.new_empty(M, N), masks=packed, tile=tile),)

        return Problem(launch, lambda p, q, e, f: (p @ q + (e @ f) * kept,), (p, q, e, f))
    weight, lora_B = q.t().contiguous(), f.t().contiguous()

    def launch(tile):
        y = extended_gemm([p], [weight.t()], [e], [lora_B.t()], p.new_empty(M, N), tile=tile)
        return y, extended_gemm([p], [q], [e], [f], p.new_empty(M, N), tile=tile)

    return Problem(launch, lambda p, q, e, f: (p @ q + e @ f,) * 2, (p, q, e, f))


def _fused_from(inputs: Inputs, at, table, element_size) -> Problem:
    """y and dx of a layer without dropout, by each path."""
    (M, N, K), R = at, _RANK
    x, dy, s, dh = inputs.normal(M, K), inputs.normal(M, N), inputs.normal(M, R), inputs.normal(M, R)
    weight, lora_A = inputs.normal(N, K, scale=K**-0.5), inputs.normal(R, K)
    lora_B = inputs.normal(N, R)
    arch = architecture(inputs.device)

    def tile(columns: int) -> configs.GemmTile:
        return configs.gemm_tile(M, columns, R, element_size, arch, arch >= 90, table=table)

    def launch(path):
        if path == "blas":
            y = add_base(s, lora_B, x, weight, None)
            return y, grad_x_of([dy], [weight], [lora_A], dh, None, [R], False, "triton:blas")
        y = extended_gemm([x], [weight.t()], [s], [lora_B.t()], x.new_empty(M, N), tile=tile(N))
        return y, extended_gemm([dy], [weight], [dh], [lora_A], x.new_empty(M, K), tile=tile(K))

    def expression(x, dy, s, dh, weight, lora_A, lora_B):
        return x @ weight.t() + s @ lora_B.t(), dy @ weight + dh @ lora_A

    return Problem(launch, expression, (x, dy, s, dh, weight, lora_A, lora_B))


def _cuda_fused_from(inputs: Inputs, at, table, element_size) -> Problem:
    """Output and S of a layer without dropout, by each path."""
    (M, N, K), R = at, _RANK
    x, weight = inputs.normal(M, K), inputs.normal(N, K, scale=K**-0.5)
    lora_A, lora_B = inputs.normal(R, K, scale=K**-0.5), inputs.normal(N, R, scale=R**-0.5)

    def launch(backend):
        if not _native.load(cuda=True):
            raise RuntimeError(_native.why_not(cuda=True))
        operands = [weight], [None], [lora_A], [lora_B], [None]
        return tuple(cuda.forward(x, *operands, [1.0], None, 0.0, False, [True], False, False, backend))

    def expression(x, weight, lora_A, lora_B):
        s = x @ lora_A.t()
        return x @ weight.t() + s @ lora_B.t(), s

    return Problem(launch, expression, (x, weight, lora_A, lora_B))


def _backend_from(inputs: Inputs, at, table, element_size) -> Problem:
    """Output and every gradient of a layer without dropout, by each backend and the path that was found for it;
    Triton's tiles are those of the tables in force."""
    (M, N, K), R, arch = at, _RANK, architecture(inputs.device)
    x, dy, weight = inputs.normal(M, K), inputs.normal(M, N), inputs.normal(N, K, scale=K**-0.5)
    lora_A, lora_B = inputs.normal(R, K, scale=K**-0.5), inputs.normal(N, R, scale=R**-0.5)

    def launch(backend):
        if backend == "reference or triton":
            backend = configs.reference_or_triton(M, N, K, x.dtype, table)
        if backend == "cuda":
            if not _native.load(cuda=True):
                raise RuntimeError(_native.why_not(cuda=True))
            forward = backward = cuda
            backend = f"cuda:{configs.cuda_path(M, N, K, x.dtype, arch, backend, table)}"
        elif backend == "triton":
            forward, backward = triton_forward, triton_backward
            backend = f"triton:{configs.expand_path(M, N, K, R, x.dtype, arch, backend, table)}"
        else:
            forward = backward = reference
        operands = [weight], [None], [lora_A], [lora_B], [None]
        y, s = forward.forward(x, *operands, [1.0], None, 0.0, False, [True], False, False, backend)
        needs, operands = [True, False, False, True, True], ([weight], [lora_A], [lora_B], [None])
        return y, *backward.backward([dy], x, s, None, *operands, [1.0], [R], 0.0, needs, x.dtype, False, backend)

    def expression(x, dy, weight, lora_A, lora_B):
        s, dh = x @ lora_A.t(), dy @ lora_B
        return x @ weight.t() + s @ lora_B.t(), dy @ weight + dh @ lora_A, dh.t() @ x, dy.t() @ s

    return Problem(launch, expression, (x, dy, weight, lora_A, lora_B))


PROBLEMS = {
    "shrink_tile": _shrink,
    "dh_db_tile": _dh_db,
    "da_tile": _da,
    "gemm_tile": _gemm,
    "fused_from": _fused_from,
    "cuda_fused_from": _cuda_fused_from,
    "triton_from": _backend_from,
    "cuda_from": _backend_from,
}
