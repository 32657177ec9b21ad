"""A job as something to run: a launcher that takes a tile, and the same in plain torch.

Where a kernel serves both directions, both are launched (y = x·Wᵀ reads W along its rows, dx = dy·W across them), so
that the tile that is kept is good for a training step. `Inputs.depth` stands for every size that a key leaves open:
the length of a GEMM's sum, the tokens of a weight's gradient, a weight's sides where its rows or blocks are the key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import _native
from ..ops.blocks.reduce import reduce_partials
from ..ops.core import dropout
from ..ops.core.machine import architecture
from ..ops.lora_linear import configs as lora_configs
from ..ops.lora_linear import cuda, triton_backward, triton_forward
from ..ops.lora_linear import reference as lora_reference
from ..ops.lora_linear.reference import add_base
from ..ops.lora_linear.triton_backward import grad_lora_A, grad_x_of, sums_over_dy
from ..ops.lora_linear.triton_forward import shrink
from ..ops.lora_linear.triton_gemm import extended_gemm
from ..ops.masked_linear.triton_backward import masked_grad
from ..ops.masked_linear.triton_forward import masked_gemm
from ..ops.sparse_delta import SparseLayout
from ..ops.sparse_delta import configs as sparse_configs
from ..ops.sparse_delta.reference import gather_columns, grad_values
from ..ops.sparse_delta.triton_backward import gathered_grad, sampled_grad, thin_grad
from .plan import PACKAGES, Job

_DTYPES = {2: torch.bfloat16, 4: torch.float32}
_RANK = 16  # of the layer at which "fused" and "blas" are compared
_DROPOUT = 0.1
_SAMPLED, _BLOCKS = 0.001, 0.01  # densities of what is sampled, and of blocks


class Problem(NamedTuple):
    """`launch(candidate)` and `expression(*inputs)` give the same tensors."""

    launch: Callable[[Any], tuple[torch.Tensor, ...]]
    expression: Callable[..., tuple[torch.Tensor, ...]]
    inputs: tuple[torch.Tensor, ...]


class Inputs:
    """Seeded operands on one device, of one dtype."""

    def __init__(self, device: str, dtype: torch.dtype, depth: int) -> None:
        self.device, self.dtype, self.depth = torch.device(device), dtype, depth
        self.generator = torch.Generator(device).manual_seed(0)

    def normal(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=self.generator, device=self.device) * scale).to(self.dtype)

    def below(self, end: int, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.randint(end, shape, generator=self.generator, device=self.device, dtype=dtype)

    def some(self, count: int, end: int) -> torch.Tensor:
        """`count` different numbers below `end`."""
        return torch.randperm(end, generator=self.generator, device=self.device)[:count]

    def entries(self, N: int, K: int, density: float) -> SparseLayout:
        return SparseLayout.from_mask(torch.rand(N, K, generator=self.generator, device=self.device) < density)


def problem(
    job: Job, table: dict[tuple, Any], device: str, dtype: torch.dtype | None = None, depth: int = 4096
) -> Problem:
    """The :class:`Problem` of a job.

    Args:
        table: what was found so far; crossovers are measured with its tiles.
        dtype: bfloat16 or float32, as the key says, unless given.
    """
    key = dict(zip(PACKAGES[job.op].CHOICES[job.choice].fields, job.key))
    inputs = Inputs(device, dtype or _DTYPES[key["element_size"]], depth)
    build = _PROBLEMS[job.op, job.choice]
    return build(inputs, job.at, table, **key) if job.at else build(inputs, **key)


def _shrink(inputs: Inputs, M, K, width, dropping, **_) -> Problem:
    x, lora_A = inputs.normal(M, K), inputs.normal(width, K, scale=K**-0.5)
    seed = inputs.below(2**62, 1) if dropping else None
    kept = dropout.unpack_mask(dropout.draw_mask(seed, M, K, _DROPOUT, 1)[0], K) if dropping else 1

    def launch(tile):
        return shrink(x, lora_A, [1.0], [None], seed, _DROPOUT, False, dropping, False, tile)[:1]

    return Problem(launch, lambda x, lora_A: ((x * kept) @ lora_A.t(),), (x, lora_A))


def _dy_pass(inputs: Inputs, M, N, R, **_) -> Problem:
    dy, lora_B, s = inputs.normal(M, N), inputs.normal(N, R, scale=N**-0.5), inputs.normal(M, R)

    def launch(tile):
        dh = torch.empty_like(s)
        grad_B, sums = sums_over_dy(dy, lora_B, s, dh, 1.0, None, dy.dtype, False, tile)
        reduce_partials(sums, M)
        return dh, grad_B

    return Problem(launch, lambda dy, lora_B, s: (dy @ lora_B, dy.t() @ s), (dy, lora_B, s))


def _x_pass(inputs: Inputs, M, K, width, **_) -> Problem:
    x, dh = inputs.normal(M, K), inputs.normal(M, width)

    def launch(tile):
        return tuple(grad_lora_A(x, dh, None, [width], [True], x.dtype, False, tile))

    return Problem(launch, lambda x, dh: (dh.t() @ x,), (x, dh))


def _gemm(inputs: Inputs, M, N, R, masks, base, **_) -> Problem:
    """Forward, which has no mask, and dx; onto dx without `base` cuBLAS would be added."""
    K = inputs.depth
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
    """y and dx of a layer without dropout, each way."""
    (M, N, K), R = at, _RANK
    x, dy, s, dh = inputs.normal(M, K), inputs.normal(M, N), inputs.normal(M, R), inputs.normal(M, R)
    weight, lora_A = inputs.normal(N, K, scale=K**-0.5), inputs.normal(R, K)
    lora_B = inputs.normal(N, R)
    arch = architecture(inputs.device)

    def tile(columns: int) -> lora_configs.GemmTile:
        return lora_configs.gemm_tile(M, columns, R, element_size, arch, arch >= 90, table=table)

    def launch(way):
        if way == "blas":
            y = add_base(s, lora_B, x, weight, None)
            return y, grad_x_of([dy], [weight], [lora_A], dh, None, [R], False, "triton:blas")
        y = extended_gemm([x], [weight.t()], [s], [lora_B.t()], x.new_empty(M, N), tile=tile(N))
        return y, extended_gemm([dy], [weight], [dh], [lora_A], x.new_empty(M, K), tile=tile(K))

    def expression(x, dy, s, dh, weight, lora_A, lora_B):
        return x @ weight.t() + s @ lora_B.t(), dy @ weight + dh @ lora_A

    return Problem(launch, expression, (x, dy, s, dh, weight, lora_A, lora_B))


def _cuda_fused_from(inputs: Inputs, at, table, element_size) -> Problem:
    """Output and S of a layer without dropout, each way."""
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
    """Output and every gradient of a layer without dropout, by each backend, the way that was found for it; Triton's
    tiles are those of the tables in force."""
    (M, N, K), R, arch = at, _RANK, architecture(inputs.device)
    x, dy, weight = inputs.normal(M, K), inputs.normal(M, N), inputs.normal(N, K, scale=K**-0.5)
    lora_A, lora_B = inputs.normal(R, K, scale=K**-0.5), inputs.normal(N, R, scale=R**-0.5)

    def launch(backend):
        if backend == "reference or triton":
            backend = lora_configs.reference_or_triton(M, N, K, x.dtype, table)
        if backend == "cuda":
            if not _native.load(cuda=True):
                raise RuntimeError(_native.why_not(cuda=True))
            forward = backward = cuda
            backend = f"cuda:{lora_configs.cuda_path(M, N, K, x.dtype, arch, backend, table)}"
        elif backend == "triton":
            forward, backward = triton_forward, triton_backward
            backend = f"triton:{lora_configs.expand_path(M, N, K, R, x.dtype, arch, backend, table)}"
        else:
            forward = backward = lora_reference
        operands = [weight], [None], [lora_A], [lora_B], [None]
        y, s = forward.forward(x, *operands, [1.0], None, 0.0, False, [True], False, False, backend)
        needs, operands = [True, False, False, True, True], ([weight], [lora_A], [lora_B], [None])
        return y, *backward.backward([dy], x, s, None, *operands, [1.0], [R], 0.0, needs, x.dtype, False, backend)

    def expression(x, dy, weight, lora_A, lora_B):
        s, dh = x @ lora_A.t(), dy @ lora_B
        return x @ weight.t() + s @ lora_B.t(), dy @ weight + dh @ lora_A, dh.t() @ x, dy.t() @ s

    return Problem(launch, expression, (x, dy, weight, lora_A, lora_B))


def _masked_gemm(inputs: Inputs, M, N, **_) -> Problem:
    """Forward and dx with the same output [M, N]."""
    K = inputs.depth
    p, q, scores = inputs.normal(M, K), inputs.normal(K, N, scale=K**-0.5), inputs.normal(K, N)
    weight, its_scores = q.t().contiguous(), scores.t().contiguous()

    def launch(tile):
        y = masked_gemm(p, weight.t(), its_scores.t(), None, 0.0, None, tile)
        return y, masked_gemm(p, q, scores, None, 0.0, None, tile)

    return Problem(launch, lambda p, q, scores: (p @ (q * (scores >= 0)),) * 2, (p, q, scores))


def _masked_grad(inputs: Inputs, N, K, **_) -> Problem:
    dy, x = inputs.normal(inputs.depth, N), inputs.normal(inputs.depth, K)
    weight, scores = inputs.normal(N, K), inputs.normal(N, K)

    def launch(tile):
        grads = torch.empty_like(weight), torch.empty_like(scores)
        masked_grad(dy, x, weight, scores, *grads, 0.0, None, tile)
        return grads

    def expression(dy, x, weight, scores):
        product = dy.t() @ x
        return product * (scores >= 0), product * weight

    return Problem(launch, expression, (dy, x, weight, scores))


def _gathered(inputs: Inputs, N, K, per_64, **_) -> Problem:
    return _of_layout(inputs, inputs.entries(N, K, per_64 / 64), gathered_grad)


def _thin(inputs: Inputs, N, K, **_) -> Problem:
    """Rows where K is anything wide, columns where N is, else blocks of N × K."""
    side = inputs.depth
    shape = side, side
    if sparse_configs.THIN.most == K:
        layout = SparseLayout.rows(shape, inputs.some(N, side))
    elif sparse_configs.THIN.most == N:
        layout = SparseLayout.columns(shape, inputs.some(K, side))
    else:
        count = side // N * (side // K)
        layout = SparseLayout.blocks(shape, (N, K), inputs.some(max(1, int(_BLOCKS * count)), count))
    return _of_layout(inputs, layout, thin_grad)


def _sampled(inputs: Inputs, element_size) -> Problem:
    return _of_layout(inputs, inputs.entries(inputs.depth, inputs.depth, _SAMPLED), sampled_grad)


def _sampled_up_to(inputs: Inputs, at, table, element_size) -> Problem:
    N, arch = inputs.depth, architecture(inputs.device)
    layout = inputs.entries(N, N, *at)

    def gradient(dy, x, layout, dtype, way):
        if way == "sampled":
            return sampled_grad(dy, x, layout, dtype, sparse_configs.sampled_tile(element_size, table))
        tile = sparse_configs.grad_tile(N, N, layout.density, element_size, arch, table)
        return gathered_grad(dy, x, layout, dtype, tile)

    return _of_layout(inputs, layout, gradient)


def _of_layout(inputs: Inputs, layout: SparseLayout, gradient: Callable[..., torch.Tensor]) -> Problem:
    """The gradient of a layout's values by `gradient(dy, x, layout, dtype, candidate)`."""
    N, K = layout.shape
    dy, x = inputs.normal(inputs.depth, N), inputs.normal(inputs.depth, K)
    x = gather_columns(x, layout) if layout.kind == "columns" else x
    return Problem(
        lambda candidate: (gradient(dy, x, layout, dy.dtype, candidate),),
        lambda dy, x: (grad_values(dy, x, layout, dy.dtype),),
        (dy, x),
    )


_PROBLEMS: dict[tuple[str, str], Callable[..., Problem]] = {
    ("lora_linear", "shrink_tile"): _shrink,
    ("lora_linear", "dh_db_tile"): _dy_pass,
    ("lora_linear", "da_tile"): _x_pass,
    ("lora_linear", "gemm_tile"): _gemm,
    ("lora_linear", "fused_from"): _fused_from,
    ("lora_linear", "cuda_fused_from"): _cuda_fused_from,
    ("lora_linear", "triton_from"): _backend_from,
    ("lora_linear", "cuda_from"): _backend_from,
    ("masked_linear", "gemm_tile"): _masked_gemm,
    ("masked_linear", "grad_tile"): _masked_grad,
    ("sparse_delta", "grad_tile"): _gathered,
    ("sparse_delta", "thin_tile"): _thin,
    ("sparse_delta", "sampled_tile"): _sampled,
    ("sparse_delta", "sampled_up_to"): _sampled_up_to,
}
