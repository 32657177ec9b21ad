"""What the kernels of the native library take, read from its machine code: no GPU is asked."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from triton import knobs

from peft_kernels import _native
from peft_kernels.testing.aot import blocks_per_processor

TILES = Path(__file__).parents[2] / "csrc" / "gemm" / "tiles.h"


class NativeKernel(NamedTuple):
    """`name` as the library's own table has it, with T for the dtype. Registers and bytes that do not fit in them are
    a thread's; shared memory, with what is given at the launch, and warps a block's."""

    name: str
    registers: int
    spilled: int
    shared: int
    warps: int
    blocks: int


class _Entry(ctypes.Structure):
    """`KernelResources` of csrc/common/kernel_table.h. Without a GPU only the name and `dynamic_bytes` are filled."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        *((name, ctypes.c_int) for name in ("registers", "static", "dynamic", "local", "threads")),
    ]


def kernel_table() -> dict[str, int]:
    """Every kernel of the library, and the shared memory that a launch gives a block of it."""
    if not _native.load():
        raise RuntimeError(f"expected the native library, got none: {_native.why_not()}")
    query, entry, error, found = (
        ctypes.CDLL(str(_native.LIBRARY)).peft_kernels_kernel_resources, _Entry(), ctypes.c_char_p(), {}
    )  # fmt: skip
    while query(len(found), ctypes.byref(entry), ctypes.byref(error)) == 0:
        found[entry.name.decode()] = entry.dynamic
    return found


def kernels(architecture: str) -> list[NativeKernel]:
    """Of "sm_80" or "sm_90a", those that have code for it; of several dtypes the one that takes the most.

    Raises:
        RuntimeError: there is no library, no code for the architecture, or a tool is missing.
    """
    dynamic, found = kernel_table(), {}
    usage = _cuobjdump("--dump-resource-usage", architecture)
    threads = dict(re.findall(r"\.nv\.info\.(\S+)(?:(?!\.nv\.info\.).)*?EIATTR_MAX_THREADS.*?Value:\s+(0x[0-9a-f]+)",
                              _cuobjdump("-elf", architecture), re.DOTALL))  # fmt: skip
    for mangled, *numbers in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage):
        registers, stack, static, local = map(int, numbers)
        name = _name(mangled)
        if name not in dynamic:
            raise RuntimeError(f"expected a kernel of the library's table, got {name} ({mangled})")
        if "sm90" in name and architecture != "sm_90a":  # there its body is empty
            continue
        warps = int(threads[mangled], 16) // 32
        # On sm_90a the 1 KiB that the system keeps counts as static.
        shared = dynamic[name] + static - (1024 if architecture == "sm_90a" and static else 0)
        blocks = blocks_per_processor(registers, shared, warps, int(architecture.strip("sm_a")))
        row = NativeKernel(re.sub(r"\b(__nv_bfloat16|bfloat16|__half|half|float)\b", "T", name), registers,
                           stack + local, shared, warps, blocks)  # fmt: skip
        found[row.name] = max(row, found.get(row.name, row), key=lambda one: one[1:4])
    if not found:
        raise RuntimeError(f"expected code for {architecture} in {_native.LIBRARY}, got none")
    return sorted(found.values())


def _cuobjdump(what: str, architecture: str) -> str:
    folder = Path(knobs.nvidia.cuobjdump.path).parent  # Triton's wheel carries it; nvdisasm lies beside
    environment = os.environ | {"PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [folder / "cuobjdump", what, "-arch", architecture, _native.LIBRARY]
    return subprocess.check_output(command, text=True, env=environment)


def _name(mangled: str) -> str:
    """As the library's table calls it: without namespaces and arguments, tiles by their names."""
    text = _demangled(mangled).removeprefix("void ")
    text = text.replace("peft_kernels::reduction::kernel", "reduce_partials")
    text = re.sub(r"\b\w+::", "", text).partition("(")[0].replace(" >", ">")
    for tile, alias in _tiles().items():
        text = text.replace(tile, alias)
    if text.startswith("reduce_partials"):
        text = text.replace("__nv_bfloat16", "bfloat16").replace("__half", "half")
    return text.replace("draw_mask_kernel", "draw_mask")


def _demangled(mangled: str) -> str:
    program = shutil.which("c++filt") or shutil.which("cu++filt") or shutil.which("/usr/local/cuda/bin/cu++filt")
    if program is None:
        raise RuntimeError("expected c++filt or cu++filt, got neither")
    return subprocess.check_output([program, mangled], text=True).strip()


@functools.cache
def _tiles() -> dict[str, str]:
    return {tile: name for name, tile in re.findall(r"using (\w+) = ((?:Box)?Tile<[^>]*>);", TILES.read_text())}
