"""Every kernel of the sparse delta room with every configuration that `configs.py` can pick, as compilations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton.language as tl

from peft_kernels.ops.sparse_delta import configs
from peft_kernels.ops.sparse_delta.triton_backward import gathered_tile_kernel, sampled_kernel, thin_kernel
from peft_kernels.ops.sparse_delta.triton_step import adamw_kernel
from peft_kernels.ops.sparse_delta.triton_write import KINDS, write_kernel
from tests.aot.case import FLOAT32, INT, WIDE, Case

WEIGHTS = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
DTYPES = tuple(WEIGHTS)
SHAPES = [(4096, 4096), (48, 4096)]  # N, K
DENSITIES = (0.01, 0.1)
#: Thin products: N, K of rows, columns and blocks at 1 %, and of what is smaller than a tile.
THIN = [(41, 4096), (4096, 41), (64, 64), (8, 16)]


def cases(architecture: int | str) -> Iterator[Case]:
    arch = architecture if isinstance(architecture, int) else 0
    for dtype in DTYPES:
        size = 4 if dtype == "fp32" else 2
        for N, K in SHAPES:
            for density in DENSITIES:
                for entries in (True, False):
                    yield _gathered(dtype, configs.grad_tile(N, K, density, size, arch), entries)
        for N, K in THIN:
            yield _thin(dtype, configs.thin_tile(N, K, size), N, K)
        yield _sampled(dtype, configs.sampled_tile(size))
        for kind in KINDS:
            yield _write(dtype, kind)
            yield _step(dtype, kind)


def candidates(architecture: int | str) -> Iterator[Case]:
    arch = architecture if isinstance(architecture, int) else 0
    for dtype in DTYPES:
        size = 4 if dtype == "fp32" else 2
        for tile in configs.grad_candidates(4096, 4096, 1, size, arch):
            yield from (_gathered(dtype, tile, entries) for entries in (True, False))
        for N, K in THIN:
            for tile in configs.thin_candidates(N, K, size, arch):
                yield _thin(dtype, tile, N, K)
        for tile in configs.sampled_candidates(size, arch):
            yield _sampled(dtype, tile)


def _gathered(dtype: str, tile: configs.GradTile, entries: bool) -> Case:
    arguments = {
        "dy_ptr": f"*{dtype}:16", "x_ptr": f"*{dtype}:16", "out_ptr": FLOAT32,
        "starts_ptr": "*i32:16" if entries else "*i8:16", "columns_ptr": "*i16:16" if entries else "*i8:16",
        "M": INT, "N": WIDE, "K": WIDE, "n": 1 if entries else INT, "m": 1 if entries else INT, "steps": INT,
        "stride_dym": WIDE, "stride_dyn": 1, "stride_xm": WIDE, "stride_xk": 1,
        "ENTRIES": entries, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_M": tile.block_m,
        "GATHERED": tile.gathered, "GROUP_N": tile.group_n, "PRECISION": "ieee",
    }  # fmt: skip
    return _case(gathered_tile_kernel, dtype, "entries" if entries else "n-of-m", tile, arguments)


def _thin(dtype: str, tile: configs.ThinTile, N: int, K: int) -> Case:
    rows, blocks = K > 64 > N, N <= 64 and K <= 64
    arguments = {
        "dy_ptr": f"*{dtype}:16", "x_ptr": f"*{dtype}:16", "out_ptr": FLOAT32, "index_ptr": "*i64:16",
        "M": INT, "N": WIDE if N % 16 == 0 else INT, "K": WIDE if K % 16 == 0 else INT, "across": INT,
        "tokens_per_split": INT, "stride_dym": WIDE, "stride_dyn": 1, "stride_xm": WIDE, "stride_xk": 1,
        "stride_split": INT, "ROWS": rows, "BLOCKS": blocks,
        "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "BLOCK_M": tile.block_m, "PRECISION": "ieee",
    }  # fmt: skip
    return _case(thin_kernel, dtype, f"{N}x{K}", tile, arguments)


def _sampled(dtype: str, tile: configs.SampledTile) -> Case:
    arguments = {
        "dyt_ptr": f"*{dtype}:16", "xt_ptr": f"*{dtype}:16", "out_ptr": FLOAT32, "starts_ptr": "*i32:16",
        "columns_ptr": "*i16:16", "M": INT, "N": INT, "nnz": INT, "steps": INT,
        "ENTRIES": tile.entries, "BLOCK_M": tile.block_m,
    }  # fmt: skip
    return Case(f"sampled_kernel-{dtype}", sampled_kernel, arguments, tile.num_warps, 3, False)


def _write(dtype: str, kind: str) -> Case:
    first, second = {"entries": ("*i32:16", "*i16:16"), "n_of_m": ("*i8:16", "*i8:16")}.get(kind, ("*i64:16",) * 2)
    arguments = {
        "target_ptr": f"*{dtype}:16", "source_ptr": f"*{dtype}:16", "values_ptr": FLOAT32, "first_ptr": first,
        "second_ptr": second, "nnz": INT, "K": WIDE, "count": INT, "tile_rows": INT, "tile_columns": INT, "steps": INT,
        "row_start": INT, "row_stop": INT, "column_start": INT, "column_stop": INT,
        "stride_tn": WIDE, "stride_tk": 1, "stride_sn": WIDE, "stride_sk": 1,
        "KIND": KINDS[kind], "BY_NUMBER": dtype == "bf16", "BLOCK": configs.WRITTEN,
    }  # fmt: skip
    return Case(f"write_kernel-{kind}-{dtype}", write_kernel, arguments, 4, 3, False)


def _step(dtype: str, kind: str) -> Case:
    starts, columns = {"entries": (tl.int32, tl.int16), "n_of_m": (tl.int8, tl.int8)}.get(kind, (tl.int64,) * 2)
    numbers = ("log_beta1", "log_beta2", "rest1", "rest2", "eps", "weight_decay")
    arguments = {
        "table_ptr": "*i64:16", "chunks_ptr": "*i32:16", "lr": "fp32", "lr_ptr": None, **dict.fromkeys(numbers, "fp32"),
        "FIELDS": 17, "KIND": KINDS[kind], "WEIGHT": WEIGHTS[dtype], "STARTS": starts, "COLUMNS": columns,
        "DECAYS_WEIGHT": True, "MAXIMIZE": False, "BLOCK": configs.WRITTEN,
    }  # fmt: skip
    return Case(f"adamw_kernel-{kind}-{dtype}", adamw_kernel, arguments, 4, 3, False)


def _case(kernel: Any, dtype: str, what: str, tile: Any, arguments: dict[str, Any]) -> Case:
    name = f"{kernel.__name__}-{what}-{dtype}-{tile.block_n}x{tile.block_k}x{tile.block_m}"
    if kernel is gathered_tile_kernel:
        name += f"-{tile.gathered}"
    return Case(name, kernel, arguments, tile.num_warps, tile.num_stages, dtype != "fp32")
