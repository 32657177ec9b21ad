"""The native library: loaded when it is first asked for, and where it cannot be, the real reason kept.

It registers its ops in the namespace `peft_kernels_native`; `backends.py` decides who calls them.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

import torch

LIBRARY = Path(__file__).with_name("_lib") / "libpeft_kernels.so"


def load() -> bool:
    """Load the library, once, and say whether its ops can be called."""
    return not why_not()


def why_not() -> str:
    """Why the native ops cannot be called, in one line; empty where they can."""
    return _load(LIBRARY)


def build_facts() -> dict[str, str]:
    """What the library was built with: `cuda`, `torch`, `architectures`, `compiler`. Empty where the facts
    were built for another Python: the ops need no Python, the facts do."""
    module = _facts()
    return module.build_facts() if module else {}


def kernels() -> list[dict[str, str | int]]:
    """Every native kernel's `name`, `registers`, `shared_bytes`, `dynamic_bytes`, `local_bytes` (spills) and
    `max_threads`, as this GPU runs it.

    Raises:
        RuntimeError: where the library or its facts are missing, or there is no GPU.
    """
    if not load():
        raise RuntimeError(f"expected the native library, got none: {why_not()}")
    module = _facts()
    if module is None:
        raise RuntimeError(f"expected the build's facts beside {LIBRARY}, got none for this Python")
    return module.kernels(str(LIBRARY))


def gemm_tile(rows: int, columns: int, processors: int, boxes: bool) -> tuple[int, int, str] | None:
    """The tile of out [rows, columns] that `lora_gemm` takes on so many SMs, and the architecture whose instructions
    multiply it; `boxes`: whether the tiles for sm_90a can be taken. None without the build's facts."""
    module = _facts()
    return module.gemm_tile(rows, columns, processors, boxes) if module else None


@functools.cache
def _load(library: Path) -> str:
    if not library.exists():
        return "it was not built: that takes nvcc and `pip install --no-build-isolation`"
    try:
        torch.ops.load_library(library)
    except OSError as error:  # the loader's own words: a missing symbol, a wrong architecture
        return " ".join(str(error).split())
    return ""


@functools.cache
def _facts() -> ModuleType | None:
    try:
        return importlib.import_module("peft_kernels._lib._C")
    except ModuleNotFoundError:
        return None
