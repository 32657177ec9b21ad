"""Every kernel of the LoRA linear room with every configuration that `configs.py` can pick, as compilations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from peft_kernels.ops.common.reduce import blocks, split_reduce_kernel
from peft_kernels.ops.lora_linear import configs
from peft_kernels.ops.lora_linear.triton_backward import dy_pass_kernel, x_pass_kernel
from peft_kernels.ops.lora_linear.triton_forward import shrink_kernel
from peft_kernels.ops.lora_linear.triton_gemm import extended_gemm_kernel, extended_gemm_tma_kernel
from tests.aot.case import BYTES, FLOAT32, INT, SEED, WIDE, Case


class Variant(NamedTuple):
    """What beside the tile makes another program: `n` projections, dropout, float32 adapters, their precision."""

    dtype: str = "bf16"
    adapter: str = "bf16"
    n: int = 1
    dropout: bool = False
    high: bool = False

    @property
    def pointer(self) -> str:
        return f"*{self.dtype}:16"

    @property
    def size(self) -> int:
        return 4 if self.dtype == "fp32" else 2

    @property
    def precision(self) -> dict[str, Any]:
        return {"HIGH": "bf16x6" if self.high else None, "PRECISION": "ieee"}

    @property
    def low_rank_pointer(self) -> str:
        """Of S and dH."""
        return FLOAT32 if self.high else self.pointer

    def name(self) -> str:
        words = [self.dtype, f"adapters-{self.adapter}", f"x{self.n}"]
        return "-".join(words + ["dropout"] * self.dropout + ["high"] * self.high)


VARIANTS = [
    Variant(),
    Variant(dropout=True),
    Variant(n=3),
    Variant(n=3, dropout=True),
    Variant(adapter="fp32"),
    Variant(adapter="fp32", high=True),
    Variant(adapter="fp32", high=True, n=3, dropout=True),
    Variant(dtype="fp16", adapter="fp16", dropout=True),
    Variant(dtype="fp32", adapter="fp32"),
    Variant(dtype="fp32", adapter="fp32", n=3, dropout=True),
]
SHAPES = [(1, 4096), (64, 4096), (256, 4096), (2048, 256), (8192, 4096)]  # M, and N = K
RANKS = [8, 32, 64, 512]


def cases(architecture: int | str) -> Iterator[Case]:
    for variant in VARIANTS:
        for M, N in SHAPES[::-1]:
            for R in RANKS:
                yield from _cases_of(architecture, variant, M, N, R)


def candidates(architecture: int | str) -> Iterator[Case]:
    """Of 16-bit layers, at a large and at a small shape. A tile that was measured on one layer serves three as well."""
    arch = architecture if isinstance(architecture, int) else 0
    shapes = itertools.product((SHAPES[-1], SHAPES[1]), RANKS[:3])
    for v, ((M, N), R) in itertools.product([v for v in VARIANTS if v.size == 2 and not v.high], shapes):
        width, masks = R if v.dropout else v.n * R, v.n * v.dropout
        for tile in configs.shrink_candidates(M, N, width, v.size, v.dropout, v.high, arch):
            yield _shrink(v, tile)
        for tile in configs.x_pass_candidates(M, N, width, v.size, v.high, arch):
            yield _x_pass(v, tile)
        for tile in configs.dy_pass_candidates(M, N, R, v.size, v.high, arch):
            yield _dy_pass(v, tile)
        for tile in configs.gemm_candidates(M, N, R, v.size, False, masks, v.high, True, arch):
            yield _gemm(v, tile, base=True)
            yield _gemm(v, tile, base=False)
        for tile in configs.gemm_candidates(M, N, R, v.size, True, masks, v.high, True, arch) if arch >= 90 else ():
            yield from (_gemm_tma(v, tile, R, transposed) for transposed in (True, False))


def _cases_of(architecture: int | str, v: Variant, M: int, N: int, R: int) -> list[Case]:
    arch = architecture if isinstance(architecture, int) else 0
    masks = v.n * v.dropout
    tile = configs.gemm_tile(M, N, R, v.size, arch, False, masks, v.high)
    made = [
        _shrink(v, configs.shrink_tile(M, N, R if v.dropout else v.n * R, v.size, v.dropout, v.high)),
        _gemm(v, tile, base=True),
        _gemm(v, tile, base=False),
        _x_pass(v, configs.x_pass_tile(M, N, R if v.dropout else v.n * R, v.size, v.high)),
        _reduce(v, R),
        _reduce(v, N),
    ]
    if configs.LARGEST_RANK_OF_DY_PASS[v.size] >= R:
        made.append(_dy_pass(v, configs.dy_pass_tile(M, N, R, v.size, v.high, arch)))
    if arch >= 90 and v.size == 2:
        tile = configs.gemm_tile(M, N, R, v.size, arch, True, masks, v.high)
        made += [_gemm_tma(v, tile, R, transposed) for transposed in (True, False)]
    return made


def _case(kernel: Any, v: Variant, tile: Any, arguments: dict[str, Any], matrix: bool = True) -> Case:
    blocks = "x".join(str(arguments[name]) for name in arguments if name.startswith("BLOCK_"))
    name = f"{kernel.__name__}-{v.name()}-{blocks}"
    return Case(name, kernel, arguments, tile.num_warps, tile.num_stages, matrix and v.dtype != "fp32")


def _shrink(v: Variant, tile: configs.ShrinkTile) -> Case:
    arguments = {
        "x_ptr": v.pointer, "a_ptr": f"*{v.adapter}:16", "s_ptr": v.low_rank_pointer,
        "mask_ptr": BYTES if v.dropout else None, "seed_ptr": SEED if v.dropout else None,
        "scales": ("fp32",) * v.n, "row_scale_ptrs": (None,) * v.n, "row_scale_strides": (INT,) * v.n,
        "M": INT, "K": WIDE, "C": WIDE, "R": WIDE, "width": WIDE, "k_per_split": WIDE,
        "stride_xm": WIDE, "stride_xk": 1, "stride_ac": WIDE, "stride_ak": 1, "stride_split": WIDE,
        "mask_stride_stream": WIDE, "mask_stride_row": WIDE, "threshold": INT,
        "NUM": v.n, "DROPOUT": v.dropout, "SPLIT": False,
        "BLOCK_M": tile.block_m, "BLOCK_C": tile.block_c, "BLOCK_K": tile.block_k, **v.precision,
    }  # fmt: skip
    return _case(shrink_kernel, v, tile, arguments)


def _gemm_common(v: Variant, tile: configs.GemmTile) -> dict[str, Any]:
    n = v.n
    return {
        "e_ptrs": (v.low_rank_pointer,) * n, "f_ptrs": (f"*{v.adapter}:16",) * n,
        "bias_ptr": v.pointer if n == 1 else None, "mask_ptr": BYTES if v.dropout else None,
        "M": INT, "N": WIDE, "Ks": (WIDE,) * n, "R": WIDE,
        "strides_em": (WIDE,) * n, "strides_fr": (1,) * n, "strides_fn": (WIDE,) * n,
        "mask_stride_stream": INT, "mask_stride_row": INT, "NUM": n,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_R": tile.block_r,
        "GROUP_M": tile.group_m, **v.precision,
    }  # fmt: skip


def _gemm(v: Variant, tile: configs.GemmTile, base: bool) -> Case:
    n = v.n
    arguments = {
        "p_ptrs": (v.pointer,) * n, "q_ptrs": (v.pointer,) * n, "out_ptr": v.pointer,
        "strides_pm": (WIDE,) * n, "strides_pk": (1,) * n, "strides_qk": (1,) * n, "strides_qn": (WIDE,) * n,
        "stride_om": WIDE, "stride_on": 1, "BASE": base, **_gemm_common(v, tile),
    }  # fmt: skip
    return _case(extended_gemm_kernel, v, tile, arguments)


def _gemm_tma(v: Variant, tile: configs.GemmTile, R: int, transposed: bool) -> Case:
    n, q_block = v.n, (tile.block_n, tile.block_k) if transposed else (tile.block_k, tile.block_n)

    def descriptors(name: str, *block: int) -> dict[str, str | None]:
        kind = f"tensordesc<{v.dtype}[{block[0]}, {block[1]}]>"
        return {f"{name}{j}": kind if j < n else None for j in range(3)}

    out_columns = tile.block_n // 2 if tile.split_epilogue else tile.block_n
    arguments = {
        **descriptors("p_desc", tile.block_m, tile.block_k),
        **descriptors("q_desc", *q_block),
        "out_desc": f"tensordesc<{v.dtype}[{tile.block_m}, {out_columns}]>",
        "Q_TRANSPOSED": transposed,
        "PREFETCH": n == 1 and not v.dropout and not v.high and tile.block_r >= R,
        "SPLIT_EPILOGUE": tile.split_epilogue, **_gemm_common(v, tile),
    }  # fmt: skip
    if not transposed:  # as for dx: F is A, row by row, and there is no bias
        arguments |= {"strides_fr": (WIDE,) * n, "strides_fn": (1,) * n, "bias_ptr": None}
    return _case(extended_gemm_tma_kernel, v, tile, arguments)


def _dy_pass(v: Variant, tile: configs.PassTile) -> Case:
    arguments = {
        "dy_ptr": v.pointer, "b_ptr": f"*{v.adapter}:16", "s_ptr": v.low_rank_pointer,
        "dh_ptr": FLOAT32, "db_ptr": FLOAT32, "M": INT, "N": WIDE, "R": WIDE, "rows_per_chunk": WIDE,
        "stride_dym": WIDE, "stride_dyn": 1, "stride_bn": WIDE, "stride_br": 1, "stride_sm": WIDE,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_R": tile.block_r, **v.precision,
    }  # fmt: skip
    return _case(dy_pass_kernel, v, tile, arguments)


def _x_pass(v: Variant, tile: configs.PassTile) -> Case:
    arguments = {
        "x_ptr": v.pointer, "dh_ptr": v.low_rank_pointer, "da_ptr": FLOAT32,
        "mask_ptr": BYTES if v.dropout else None, "M": INT, "K": WIDE, "C": WIDE, "width": WIDE,
        "rows_per_chunk": WIDE, "stride_xm": WIDE, "stride_xk": 1, "stride_dhm": WIDE,
        "mask_stride_stream": WIDE, "mask_stride_row": WIDE,
        "BLOCK_M": tile.block_m, "BLOCK_C": tile.block_c, "BLOCK_K": tile.block_k, **v.precision,
    }  # fmt: skip
    return _case(x_pass_kernel, v, tile, arguments)


def _reduce(v: Variant, columns: int) -> Case:
    block_m, block_n = blocks(columns)
    arguments = {
        "partial_ptr": FLOAT32, "out_ptr": v.low_rank_pointer, "scales": ("fp32",) * v.n,
        "row_scale_ptrs": (FLOAT32,) * v.n, "row_scale_strides": (1,) * v.n,
        "rows_total": INT, "columns_total": WIDE, "splits": INT, "stride_split": WIDE, "stride_row": WIDE,
        "stride_om": WIDE, "stride_on": 1, "R": WIDE, "NUM": v.n, "BLOCK_M": block_m, "BLOCK_N": block_n,
    }  # fmt: skip
    return _case(split_reduce_kernel, v, configs.GemmTile(0, 0, 0, 0, 0, 4, 3), arguments, matrix=False)
