"""Every Triton kernel compiled ahead of time, without a GPU: every sm_90 configuration, one a kernel elsewhere
(all of them, and all candidates of a measurement, with PEFT_KERNELS_AOT=all, `make aot-all`)."""

import os

import pytest

from peft_kernels.testing.aot import SHARED_MEMORY, compile_kernel, resources
from tests.aot.cases import cases

EVERYTHING = os.environ.get("PEFT_KERNELS_AOT") == "all"
#: Which instruction shows that the tensor cores are used.
MATRIX = {80: ("mma.sync",), 90: ("wgmma", "mma.sync"), 100: ("tcgen05", "mma.sync"), "gfx942": ("mfma",)}


@pytest.mark.parametrize(
    ("architecture", "case"),
    [
        pytest.param(architecture, case, id=f"{architecture}-{case.name}-{number}")
        for architecture in (80, 90, 100)
        for number, case in enumerate(cases(architecture, EVERYTHING or architecture == 90, EVERYTHING))
    ],
)
def test_nvidia(architecture, case):
    compiled = compile_kernel(case.kernel, case.arguments, architecture, case.num_warps, case.num_stages)
    used = resources(compiled)
    assert used.spills == 0, f"{used} of {case.name}"
    assert used.shared <= SHARED_MEMORY[architecture], f"{used} of {case.name}"
    if case.matrix:
        assert any(instruction in compiled.asm["ptx"] for instruction in MATRIX[architecture])


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{case.name}-{number}")
        for number, case in enumerate(cases("gfx942", EVERYTHING, EVERYTHING))
        if "desc" not in str(case.arguments)
    ],
)
def test_amd(case):
    """The pointer kernels are not CUDA only."""
    compiled = compile_kernel(case.kernel, case.arguments, "gfx942", case.num_warps, case.num_stages)
    assert compiled.metadata.shared <= SHARED_MEMORY["gfx942"]
    if case.matrix:
        assert any(instruction in compiled.asm["amdgcn"] for instruction in MATRIX["gfx942"])
