"""One ahead-of-time compilation, and the types that the arguments of most kernels have."""

from __future__ import annotations

from typing import Any, NamedTuple

INT, WIDE = "i32", "i32:16"
FLOAT32, BYTES, SEED = "*fp32:16", "*u8:16", "*i64:16"


class Case(NamedTuple):
    """One compilation. `matrix` says whether the tensor cores must show in the code."""

    name: str
    kernel: Any
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    matrix: bool
