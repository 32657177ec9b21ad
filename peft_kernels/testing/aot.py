"""Compile a Triton kernel for a GPU that is not there, as a launch would, and read what it takes."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

#: Shared memory that one block can have, in bytes (CUDA programming guide, table of compute capabilities).
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, "gfx942": 64 * 1024}
#: The same of all blocks on a multiprocessor.
_SHARED_MEMORY_OF_ALL = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
#: ptxas says by these that it serialises what wgmma computes: the multiplications of a tile wait for one another.
SERIALISED = ("C7508", "C7510", "C7514", "C7515")


class Launch(NamedTuple):
    """The compilation that a launch asks Triton for: the arguments' types, what is constant among them by its place,
    what is known of the others, and the options."""

    kernel: Any
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    num_warps: int
    num_stages: int
    target: GPUTarget

    @property
    def name(self) -> str:
        return self.kernel.__name__

    @property
    def key(self) -> tuple:
        """Equal where the same would be compiled."""
        return (self.name, str(self.signature), str(self.constants), str(self.attributes), *self[4:])

    def constant(self, name: str) -> Any:
        """Describe a parameter that is constant."""
        return self.constants[(self.kernel.arg_names.index(name),)]


class Resources(NamedTuple):
    """The resources of a compiled kernel, by ptxas: registers a thread; bytes that a thread spills; bytes of shared
    memory and warps a block; blocks a multiprocessor; the warnings that wgmma is serialised."""

    registers: int
    spilled: int
    shared: int
    warps: int
    blocks: int
    serialised: tuple[str, ...]


def compile_launch(launch: Launch) -> tuple[Any, Resources | None]:
    """Compile what a launch would compile, whether or not it is in Triton's cache.

    Returns:
        triton.compiler.CompiledKernel, with `asm` and `metadata`; its resources on an NVIDIA GPU.
    """
    source = ASTSource(launch.kernel, launch.signature, constexprs=launch.constants, attrs=launch.attributes)
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    log = io.StringIO()
    with knobs.compilation.scope(), knobs.nvidia.scope(), contextlib.redirect_stdout(log):
        knobs.compilation.always_compile = True  # what lies in the cache has no log
        knobs.nvidia.dump_ptxas_log = True
        compiled = triton.compile(source, target=launch.target, options=options)
    if launch.target.backend != "cuda":
        return compiled, None
    text = log.getvalue()
    registers = int(re.search(r"Used (\d+) registers", text).group(1))
    spilled = sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text).groups()))
    shared, warps = compiled.metadata.shared, compiled.metadata.num_warps
    blocks = blocks_per_processor(registers, shared, warps, launch.target.arch)
    serialised = tuple(line for line in text.splitlines() if any(number in line for number in SERIALISED))
    return compiled, Resources(registers, spilled, shared, warps, blocks, serialised)


def blocks_per_processor(registers: int, shared: int, warps: int, architecture: int) -> int:
    """How many blocks (CTAs) of `warps` warps fit on a multiprocessor of sm_80, sm_90 or sm_100 at a time.

    As `cuda_occupancy.h` of the CUDA toolkit counts: 64 warps and 32 blocks; 16,384 registers in each of four parts,
    given by the warp in units of 256, to as many warps in each part; shared memory in units of 128 bytes, of which the
    system takes 1 KiB a block.
    """
    registers_of_warp = -(-max(registers, 1) * 32 // 256) * 256
    by_registers = 16384 // registers_of_warp * 4 // warps
    by_shared = _SHARED_MEMORY_OF_ALL[architecture] // (-(-(shared + 1024) // 128) * 128)
    return min(32, 64 // warps, by_registers, by_shared)
