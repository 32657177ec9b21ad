"""Compile a Triton kernel for a GPU that is not there, and read what it takes."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

#: Shared memory that one block can have, in bytes (CUDA programming guide, table of compute capabilities).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}


class Resources(NamedTuple):
    """Of a compiled kernel: registers a thread, spills (stores to local memory in its machine code), bytes of
    shared memory a block."""

    registers: int
    spills: int
    shared: int


def compile_kernel(kernel, arguments: dict[str, Any], architecture: int | str, num_warps: int, num_stages: int):
    """Compile as a launch with such arguments would.

    Args:
        arguments: for each parameter a type as a string ("i32", "fp32", "*bf16", "tensordesc<…>"; "*bf16:16" and
            "i32:16" are divisible by 16), a constant (None, an int, a bool, a str), or a tuple of these.
        architecture: 80, 90, 100, … or "gfx942".

    Returns:
        triton.compiler.CompiledKernel, with `asm` and `metadata`.
    """
    signature, constants, attributes = {}, {}, {}

    def describe(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(describe(item, (*path, i)) for i, item in enumerate(value))
        if not isinstance(value, str) or value in _STRING_CONSTANTS:
            constants[path] = value
            return "constexpr"
        kind, _, divisible = value.partition(":")
        if divisible:
            attributes[path] = [["tt.divisibility", int(divisible)]]
        return kind

    for position, name in enumerate(kernel.arg_names):
        signature[name] = describe(arguments[name], (position,))
    target = (
        GPUTarget("hip", architecture, 64) if isinstance(architecture, str) else GPUTarget("cuda", architecture, 32)
    )
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": num_warps, "num_stages": num_stages})


_STRING_CONSTANTS = ("ieee", "tf32", "bf16x6")  # values of `input_precision`, not types


def resources(compiled) -> Resources:
    """Registers and spills as the disassembler reports them, shared memory as Triton asks for it.

    Raises:
        RuntimeError: where cuobjdump, which Triton's wheel carries, cannot be found.
    """
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    cuobjdump = shutil.which("cuobjdump", path=str(folder)) or shutil.which("cuobjdump")
    if cuobjdump is None:
        raise RuntimeError(f"expected cuobjdump in {folder} or on PATH, found none")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = subprocess.check_output([cuobjdump, "--dump-resource-usage", cubin.name], text=True)
        found = {key: int(value) for key, value in re.findall(r"\b(REG|LOCAL|STACK):(\d+)", usage)}
        spills = 0
        if found["LOCAL"] + found["STACK"] > 0:  # a stack frame may also be alignment only
            code = subprocess.check_output([cuobjdump, "--dump-sass", cubin.name], text=True)
            spills = len(re.findall(r"\bSTL\b", code))
    return Resources(found["REG"], spills, compiled.metadata.shared)
