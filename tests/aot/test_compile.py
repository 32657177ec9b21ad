"""Every Triton kernel as the launchers launch it, compiled ahead of time without a GPU: for sm_90 at every kind of call
and shape, one compilation a kernel elsewhere (all of them, and all candidates of a measurement, with
PEFT_KERNELS_AOT=all, `make aot-all`)."""

from __future__ import annotations

import os

import pytest

from peft_kernels.testing.aot import SHARED_MEMORY, compile_launch
from tests.aot.cases import SPILLED_AT_ODD_SIZES, candidates, cases, first_of_each_kernel, scenarios
from tests.aot.phantom import GPUS

EVERYTHING = os.environ.get("PEFT_KERNELS_AOT") == "all"
#: Which instruction shows that the tensor cores are used.
MATRIX = {80: ("mma.sync",), 90: ("wgmma", "mma.sync"), 100: ("tcgen05", "mma.sync"), "gfx942": ("mfma",)}
#: Kernels that multiply no matrices.
WITHOUT_MATRICES = {"scale_columns_kernel", "reduce_partials_kernel", "sampled_kernel", "write_kernel", "adamw_kernel"}


def to_compile(architecture):
    every = scenarios()
    if EVERYTHING:
        tuned = candidates(GPUS[architecture], [one for one in every if one.regular and one.compiled != "all"])
        known = {case.launch.key: case for case in (*cases(GPUS[architecture], every), *tuned)}
        return list(known.values())
    if architecture == 90:
        return cases(GPUS[90], [one for one in every if one.compiled != "all"])
    return first_of_each_kernel(cases(GPUS[architecture], [one for one in every if one.compiled == "everywhere"]))


def parameters(*architectures):
    return pytest.mark.parametrize(
        "case",
        [
            pytest.param(case, id=f"{architecture}-{case.name}-{number}")
            for architecture in architectures
            for number, case in enumerate(to_compile(architecture))
        ],
    )


def multiplies(case):
    """Whether the tensor cores have to show: not for float32, which they would round."""
    return case.launch.name not in WITHOUT_MATRICES and case.scenario.dtype != "fp32"


@parameters(80, 90, 100)
def test_nvidia(case):
    architecture = case.launch.target.arch
    compiled, used = compile_launch(case.launch)
    assert used.shared <= SHARED_MEMORY[architecture], used
    assert not used.serialised, used
    allowed = 0 if case.scenario.regular else SPILLED_AT_ODD_SIZES.get(case.launch.name, 0)
    assert used.spilled <= allowed, used
    if multiplies(case):
        assert any(instruction in compiled.asm["ptx"] for instruction in MATRIX[architecture])


@parameters("gfx942")
def test_amd(case):
    """The pointer kernels are not CUDA only."""
    compiled, _ = compile_launch(case.launch)
    assert compiled.metadata.shared <= SHARED_MEMORY["gfx942"]
    if multiplies(case):
        assert any(instruction in compiled.asm["amdgcn"] for instruction in MATRIX["gfx942"])
