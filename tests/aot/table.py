"""Writes docs/kernels.md: what every kernel takes, as it is launched. `python -m tests.aot.table`, `make resources`."""

from __future__ import annotations

import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.nvidia.compiler import get_ptxas

from peft_kernels import _native
from peft_kernels.testing.aot import SERIALISED, Launch, Resources, compile_launch
from tests.aot import native
from tests.aot.cases import SPILLED_AT_ODD_SIZES, Case, cases, scenarios
from tests.aot.phantom import GPUS

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"
WORKERS = 2
HEAD = """\
# Registers, spills and shared memory of every kernel, as it is launched

`make resources` writes this page on a machine without a GPU: nothing here is a speed. The public functions run forward
and backward on tensors without values, and what their launchers pass to Triton is compiled: types, which sizes and
strides are multiples of 16, what is absent, tiles, warps and stages (`tests/aot/`).

Triton {triton} for sm_90, ptxas {ptxas}; the native library by CUDA {cuda}. Other versions take other registers. With
Triton 3.6 and the newest the tests allow no serialised wgmma, and no spill at regular sizes, which are multiples of 16
(of 128 under a dropout mask), and ranks of 8. At other sizes, where elements of a matrix or bytes of a mask are loaded
one by one, they allow a thread to spill: {spilled}.

A call is named by x's dtype, the rank, M × K × N, the adapters' dtype, how many layers share x, dropout masks, and the
way to expand. Of calls that are compiled alike but for ranks and sizes a row has the one that takes the most.
*Spilled*: bytes that a thread stores and loads. *Shared*: bytes a block. *CTAs an SM*: how many blocks a multiprocessor
holds, by registers, shared memory and warps.
"""
_HEADING = "call | blocks | warps, stages | multiplied by | registers | spilled | shared | CTAs an SM"


class Row(NamedTuple):
    """A kernel as one kind of call launches it: of what else is compiled alike (other ranks, other sizes), what takes
    the most."""

    kernel: str
    call: str
    blocks: str
    options: str
    instruction: str
    used: Resources

    @property
    def cells(self) -> str:
        numbers = sorted({number for line in self.used.serialised for number in SERIALISED if number in line})
        instruction = self.instruction + "".join(f", serialised ({number})" for number in numbers)
        return " | ".join(
            [self.call, self.blocks, self.options, instruction, str(self.used.registers), str(self.used.spilled),
             str(self.used.shared), str(self.used.blocks)]
        )  # fmt: skip


def kind(case: Case) -> tuple:
    """What makes a row: the kernel, its tile and options, and the constants that choose what it does."""
    launch, names = case.launch, case.launch.kernel.arg_names
    chosen = [(name, str(launch.constants.get((place,)))) for place, name in enumerate(names) if name.isupper()]
    absent = [name for place, name in enumerate(names) if name.endswith("_ptr") and (place,) in launch.constants]
    return (launch.name, launch.num_warps, launch.num_stages, case.scenario.dtype, *chosen, *absent)


def blocks(launch: Launch) -> str:
    return " × ".join(str(launch.constant(name)) for name in launch.kernel.arg_names if name.startswith("BLOCK"))


def to_show() -> list[Case]:
    """What the tests compile in every run of regular calls in bfloat16."""
    shown = [one for one in scenarios() if one.compiled != "all" and one.regular and one.dtype == "bf16"]
    return cases(GPUS[90], shown)


def _measured(part: int) -> list[tuple[tuple, Row]]:
    found = []
    for case in to_show()[part::WORKERS]:
        compiled, used = compile_launch(case.launch)
        instruction = next((one for one in ("wgmma", "mma.sync") if one in compiled.asm["ptx"]), "")
        options = f"{case.launch.num_warps}, {case.launch.num_stages}"
        row = Row(case.launch.name, case.scenario.name, blocks(case.launch), options, instruction, used)
        found.append((kind(case), row))
    return found


def measure() -> list[Row]:
    """Compile everything; by kernel, in the order of the scenarios."""
    with ProcessPoolExecutor(WORKERS, mp_context=get_context("spawn")) as pool:
        parts = [iter(part) for part in pool.map(_measured, range(WORKERS))]
    everything = [next(parts[number % WORKERS]) for number in range(len(to_show()))]
    rows: dict[tuple, Row] = {}
    for key, row in everything:
        known = rows.setdefault(key, row)
        if (row.used.serialised, row.used.spilled, row.used.registers) > (
            known.used.serialised, known.used.spilled, known.used.registers
        ):  # fmt: skip
            rows[key] = row
    return list(rows.values())


def page(rows: list[Row]) -> str:
    facts = _native.build_facts()
    spilled = ", ".join(f"`{kernel}` {most} bytes" for kernel, most in SPILLED_AT_ODD_SIZES.items())
    versions = {"triton": triton.__version__, "ptxas": get_ptxas(90).version, "cuda": facts.get("cuda", "?")}
    lines = [HEAD.format(**versions, spilled=spilled)]
    for kernel in dict.fromkeys(row.kernel for row in rows):
        lines += [f"## {kernel}", "", f"| {_HEADING} |", "|" + "---|" * len(_HEADING.split("|"))]
        lines += [f"| {row.cells} |" for row in rows if row.kernel == kernel]
        lines.append("")
    heading = "kernel | warps | registers | spilled | shared | CTAs an SM"
    for architecture in ("sm_80", "sm_90a"):
        lines += [f"## The native library on {architecture}", ""]
        lines += [f"| {heading} |", "|" + "---|" * len(heading.split("|"))]
        for one in native.kernels(architecture):
            numbers = one.warps, one.registers, one.spilled, one.shared, one.blocks
            lines.append(f"| `{one.name}` | " + " | ".join(map(str, numbers)) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PAGE
    target.parent.mkdir(exist_ok=True)
    target.write_text(page(measure()))
    print(target)
