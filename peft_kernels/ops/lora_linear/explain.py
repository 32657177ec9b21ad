"""Say in words what `lora_linear` takes for given sizes: the path of the low-rank product, the tiles of kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ... import _native
from ..core.tuning import UNTUNED, Table
from . import configs, cuda


class Sizes(NamedTuple):
    """M tokens, K in_features, N out_features, R rank."""

    M: int
    K: int
    N: int
    R: int


def explain(
    sizes: Sizes, dtype: torch.dtype, arch: int, backend: str = "auto", table: Table = UNTUNED
) -> Iterator[tuple[str, str]]:
    """Label and text of each choice on a GPU, for one projection whose adapters are of `dtype`: which backend `auto`
    takes, then what Triton's launchers take.

    Args:
        arch: compute capability times 10, as 90.
        backend: "auto", "triton", or one that forces a path ("triton:fused", "triton:blas").
        table: what was measured on that GPU; the rules stand where it has nothing.
    """
    M, K, N, R = sizes
    size = dtype.itemsize
    if backend == "auto":
        least = configs.cuda_from(size, table)
        reason = f"M·N·K = {M * N * K}, triton from {configs.triton_from(size, table)} on, "
        reason += f"no crossover to cuda was measured on sm_{arch}" if least is None else f"cuda from {least} on"
        chosen = configs.gpu_backend(M, N, K, dtype, arch, table)
        yield "backend", f"{chosen} ({reason}){', with dropout triton' if chosen == 'reference' else ''}"
    path = configs.expand_path(M, N, K, R, dtype, arch, backend, table)
    forced = backend.partition(":")[2]
    measured = configs.fused_from(size, table)
    if forced:
        reason = f"asked for: {backend}"
    elif measured is None:
        reason = f"no crossover was measured on sm_{arch}"
    else:
        reason = f"M·N·K = {M * N * K}, fused from {measured} on"
    yield "low-rank product", f"{path} ({reason})"
    yield "S, pass over x", _text(configs.shrink_tile(M, K, R, size, False, False, table=table))
    if path == "fused":
        tma = arch >= 90 and size == 2 and K % 8 == 0 and N % 8 == 0
        for product, columns in (("y", N), ("dx", K)):
            yield product, _text(configs.gemm_tile(M, columns, R, size, arch, tma, table=table))
    else:
        yield "y and dx", "S·Bᵀ or dH·A first, then cuBLAS with beta = 1"
    if size in configs.LARGEST_RANK_OF_DH_DB and configs.LARGEST_RANK_OF_DH_DB[size] >= R:
        yield "dH and dB, pass over dy", _text(configs.dh_db_tile(M, N, R, size, False, arch, table=table))
    else:
        yield "dH and dB", "two products by cuBLAS: the rank is above that of the pass over dy"
    yield "dA, pass over x", _text(configs.da_tile(M, K, R, size, False, table=table))


def explain_native(
    sizes: Sizes, dtype: torch.dtype, arch: int, processors: int, table: Table = UNTUNED
) -> Iterator[tuple[str, str]]:
    """The same of the backend "cuda", on a GPU of so many SMs."""
    M, K, N, R = sizes
    size = dtype.itemsize
    if size != 2:
        yield "backend cuda", "refused: its kernels multiply 16-bit operands"
        return
    least = configs.cuda_fused_from(size, table)
    if R > cuda.LARGEST_RANK_OF_PASS:
        path = "cuBLAS, as the rank is above that of a pass; with dropout a pass over x"
    elif arch != 90 or K % 8 or not cuda.fits_one_kernel(N, R):
        path = "a pass over x: one kernel for S and y takes sm_90, K and N of multiples of 8, ranks up to 64"
    elif least is None:
        path = f"a pass over x (no crossover to one kernel for S and y was measured on sm_{arch})"
    else:
        fused = configs.cuda_path(M, N, K, dtype, arch, "cuda", table) == "fused"
        path = "in one kernel with y" if fused else "a pass over x"
        path += f" (M·N·K = {M * N * K}, one kernel from {least} on)"
    yield "backend cuda, S", path
    for product, columns in (("y", N), ("dx", K)):
        tile = _native.gemm_tile(M, columns, processors, arch == 90 and columns % 8 == 0)
        text = f"tile {tile[0]} × {tile[1]} of {tile[2]} on {processors} SMs" if tile else "not known to this Python"
        yield f"backend cuda, {product}", text
    if R > cuda.LARGEST_RANK_OF_PASS:
        path = "cuBLAS each; with dropout a pass over x for dA"
    else:
        path = "one pass over dy" if R <= cuda.LARGEST_RANK_OF_JOINT_PASS else "two passes over dy"
        path += ", one over x" + " beside the last tiles of dx" * (arch == 90)
    yield "backend cuda, dH, dB, dA", path


def _text(tile: NamedTuple) -> str:
    return ", ".join(f"{name} {value}" for name, value in tile._asdict().items())
