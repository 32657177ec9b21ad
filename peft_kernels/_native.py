"""The native library: loaded when it is first asked for, and where it cannot be, the real reason kept.

It registers its ops in the namespace `peft_kernels_native`; `backends.py` decides who calls them.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from types import ModuleType

import torch

#: By the runtime's major version, from NVIDIA's table of minor version compatibility.
_LEAST_DRIVERS = {12: 525, 13: 580}
LIBRARY = Path(__file__).with_name("_lib") / "libpeft_kernels.so"


def load(cuda: bool = False) -> bool:
    """Load the library, once, and say whether its ops can be called; `cuda`: those on CUDA tensors, which a build by a
    C++ compiler alone is without."""
    return not why_not(cuda)


def why_not(cuda: bool = False) -> str:
    """Why the native ops cannot be called, in one line; empty where they can."""
    missing = _load(LIBRARY)
    if cuda and not missing and not cuda_version():
        return "the library was built without them, by a C++ compiler alone: they take nvcc"
    return missing


def cuda_version() -> int:
    """The CUDA whose runtime the loaded library's kernels bring, as 13000 for 13.0; 0 where it has none."""
    return torch.ops.peft_kernels_native.cuda_version()


def least_driver() -> int | None:
    """The first driver that runs the loaded library's kernels; None without kernels, or for a CUDA later than these."""
    return _LEAST_DRIVERS.get(cuda_version() // 1000)


def build_facts() -> dict[str, str]:
    """How the library was built: `cuda` and `architectures` ("none" without nvcc), `torch`, `compiler`. Empty
    where the facts were built for another Python: the ops need no Python, the facts do."""
    module = _facts()
    return module.build_facts() if module else {}


def kernels() -> list[dict[str, str | int]]:
    """Every native kernel's `name`, `registers`, `shared_bytes`, `dynamic_bytes`, `local_bytes` (spills) and
    `max_threads`, as this GPU runs it.

    Raises:
        RuntimeError: where the library, its kernels or its facts are missing, or there is no GPU.
    """
    if not load(cuda=True):
        raise RuntimeError(f"expected native CUDA kernels, got none: {why_not(cuda=True)}")
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
        return "it was not built: that takes a C++ compiler, cmake, ninja and `pip install --no-build-isolation`"
    try:
        torch.ops.load_library(library)
    except OSError as error:  # the loader's own words: a missing symbol, a wrong architecture
        return " ".join(str(error).split())
    if not hasattr(torch.ops.peft_kernels_native, "cuda_version"):
        return f"{library} was built from other sources than these: build it anew"
    return ""


@functools.cache
def _facts() -> ModuleType | None:
    try:
        return importlib.import_module("peft_kernels._lib._C")
    except ModuleNotFoundError:
        return None
