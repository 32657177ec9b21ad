"""Every kernel of the masked linear room with every configuration that `configs.py` can pick, as compilations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peft_kernels.ops.masked_linear import configs
from peft_kernels.ops.masked_linear.triton_backward import masked_grad_kernel
from peft_kernels.ops.masked_linear.triton_forward import masked_gemm_kernel
from tests.aot.case import INT, WIDE, Case

#: dtype of x and weight, dtype of the scores: each of both kinds once.
DTYPES = [("fp16", "fp32"), ("bf16", "bf16"), ("fp32", "fp32")]
SHAPES = [(8192, 4096), (256, 4096), (64, 4096)]  # M, and N = K
SMALL = 576  # N = K of a layer whose gradient takes the smaller tile


def cases(architecture: int | str) -> Iterator[Case]:
    arch = architecture if isinstance(architecture, int) else 0
    for dtype, scores in DTYPES:
        size = 4 if dtype == "fp32" else 2
        for M, N in SHAPES:
            for dx in (False, True):
                yield _gemm(dtype, scores, configs.gemm_tile(M, N, size, arch, True), dx)
        for N in (4096, SMALL):
            for needs in ("weight", "scores", "both"):
                yield _grad(dtype, scores, configs.grad_tile(N, N, size, arch, True), needs)
        for case in (
            _gemm(dtype, scores, configs.gemm_tile(8192, 4097, size, arch, False), False),
            _gemm(dtype, scores, configs.gemm_tile(8192, 4097, size, arch, False), True),
            _grad(dtype, scores, configs.grad_tile(4097, 4097, size, arch, False), "both"),
        ):
            yield case._replace(name=f"{case.name}-unaligned", arguments=_unaligned(case.arguments))


def candidates(architecture: int | str) -> Iterator[Case]:
    """Of 16-bit operands."""
    arch = architecture if isinstance(architecture, int) else 0
    for dtype, scores in DTYPES[:2]:
        for M, N in SHAPES:
            for tile in configs.gemm_candidates(M, N, 2, True, arch):
                yield from (_gemm(dtype, scores, tile, dx) for dx in (False, True))
        for N in (4096, SMALL):
            for tile in configs.grad_candidates(N, N, 2, True, arch):
                yield from (_grad(dtype, scores, tile, needs) for needs in ("weight", "scores", "both"))


def _unaligned(arguments: dict[str, Any]) -> dict[str, Any]:
    """As of N and K that are no multiples of 16."""
    return {name: INT if value == WIDE else value for name, value in arguments.items()}


def _gemm(dtype: str, scores: str, tile: configs.Tile, dx: bool) -> Case:
    """Forward reads W along the sum and has a bias; dx reads W across it, and τ from a tensor."""
    along, across = (WIDE, 1) if dx else (1, WIDE)
    arguments = {
        "p_ptr": f"*{dtype}:16", "q_ptr": f"*{dtype}:16", "s_ptr": f"*{scores}:16",
        "bias_ptr": None if dx else f"*{dtype}:16", "out_ptr": f"*{dtype}:16", **_threshold(dx),
        "M": INT, "N": WIDE, "K": WIDE, "stride_pm": WIDE, "stride_pk": 1, "stride_qk": along, "stride_qn": across,
        "stride_sk": along, "stride_sn": across, "stride_om": WIDE, "stride_on": 1,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "GROUP_M": tile.group_m,
        "PRECISION": "ieee",
    }  # fmt: skip
    return _case(masked_gemm_kernel, dtype, scores, "dx" if dx else "forward", tile, arguments)


def _grad(dtype: str, scores: str, tile: configs.Tile, needs: str) -> Case:
    of_weight, of_scores = needs != "scores", needs != "weight"
    arguments = {
        "dy_ptr": f"*{dtype}:16", "x_ptr": f"*{dtype}:16", "w_ptr": f"*{dtype}:16" if of_scores else None,
        "s_ptr": f"*{scores}:16" if of_weight else None, "dw_ptr": f"*{dtype}:16" if of_weight else None,
        "ds_ptr": f"*{scores}:16" if of_scores else None, **_threshold(needs == "both"),
        "M": INT, "N": WIDE, "K": WIDE, "stride_dym": WIDE, "stride_dyn": 1, "stride_xm": WIDE, "stride_xk": 1,
        "stride_wn": WIDE, "stride_wk": 1, "stride_sn": WIDE, "stride_sk": 1,
        "BLOCK_N": tile.block_m, "BLOCK_K": tile.block_n, "BLOCK_M": tile.block_k, "GROUP_N": tile.group_m,
        "PRECISION": "ieee",
    }  # fmt: skip
    return _case(masked_grad_kernel, dtype, scores, needs, tile, arguments)


def _threshold(tensor: bool) -> dict[str, str | None]:
    return {"threshold": "fp32", "threshold_ptr": "*fp32:16" if tensor else None}


def _case(kernel: Any, dtype: str, scores: str, what: str, tile: configs.Tile, arguments: dict[str, Any]) -> Case:
    name = f"{kernel.__name__}-{what}-{dtype}-scores-{scores}-{tile.block_m}x{tile.block_n}x{tile.block_k}"
    return Case(name, kernel, arguments, tile.num_warps, tile.num_stages, dtype != "fp32")
