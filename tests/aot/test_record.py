"""What the suite compiles is what is launched: the recording itself, and the count of blocks a multiprocessor."""

from __future__ import annotations

import importlib
import itertools
import pkgutil
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.runtime import JITFunction

import peft_kernels as pk
from peft_kernels import ops
from peft_kernels.testing.aot import blocks_per_processor
from tests.aot import table
from tests.aot.lora_linear import Layer
from tests.aot.phantom import GPUS
from tests.aot.record import recording


@pytest.fixture(scope="module")
def shown():
    return table.to_show()


def launches(layer: Layer, architecture=90, way="fused"):
    gpu = GPUS[architecture]
    with recording(gpu) as found, pk.use_backend(f"triton:{way}"):
        layer.run(gpu.device)
    return found


def test_every_kernel_of_the_package_is_launched(shown):
    """Kernels are the jitted functions whose names say so; the others are called by them."""
    known = set()
    for module in pkgutil.walk_packages(ops.__path__, f"{ops.__name__}."):
        members = vars(importlib.import_module(module.name)).items()
        known |= {name for name, one in members if isinstance(one, JITFunction) and name.endswith("_kernel")}
    assert {case.launch.name for case in shown} == known


@pytest.mark.parametrize("rank", [8, 16])
def test_triton_decides_what_is_known_of_an_argument(rank):
    """A rank of 8 is no multiple of 16, and nor are the strides of what is R wide; K is not looked at, nor is M."""
    shrink = next(launch for launch in launches(Layer(rank=rank)) if launch.name == "shrink_kernel")
    known = {name: shrink.attributes.get((place,)) for place, name in enumerate(shrink.kernel.arg_names)}
    divisible = [["tt.divisibility", 16]]
    assert known["K"] == known["stride_xm"] == known["x_ptr"] == divisible
    assert (known["R"] == divisible) == (rank == 16)
    assert not known["M"]
    assert shrink.constant("stride_xk") == 1
    assert shrink.constant("mask_ptr") is None


def test_the_way_and_the_architecture_decide():
    fused, blas, ampere = launches(Layer()), launches(Layer(), way="blas"), launches(Layer(), 80)
    assert sum(launch.name == "extended_gemm_tma_kernel" for launch in fused) == 2  # y and dx
    assert not any("extended_gemm" in launch.name for launch in blas)
    assert sum(launch.name == "extended_gemm_kernel" for launch in ampere) == 2
    assert {launch.target.arch for launch in ampere} == {80}


def test_phantoms_hold_no_values_and_leave_nothing_behind():
    gpu = GPUS[90]
    with recording(gpu) as found:
        x = torch.randn(4, 6, device=gpu.device)
        assert (x.is_cuda, x.device, x[1:, 2:].data_ptr() - x.data_ptr()) == (True, gpu.device, 32)
        with pytest.raises(RuntimeError, match="meta"):
            x[0, 0].item()
        with pytest.raises(RuntimeError, match="to cpu"):
            x.to("cpu")
        assert torch.empty(2).device.type == "cpu"
    assert found == []
    with pytest.raises((AssertionError, RuntimeError)):
        torch.empty(2, device=gpu.device)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "architecture", "expected"),
    [
        (32, 0, 4, 90, 16),  # 64 warps
        (32, 0, 1, 90, 32),  # 32 blocks
        (154, 40960, 8, 90, 1),  # 160 registers a thread are three warps in each part
        (128, 110592, 8, 90, 2),
        (168, 229440, 12, 90, 1),
        (64, 83000, 8, 90, 2),  # by shared memory
        (64, 83000, 8, 80, 1),  # of which sm_80 has less
    ],
)
def test_blocks_per_processor(registers, shared, warps, architecture, expected):
    assert blocks_per_processor(registers, shared, warps, architecture) == expected


OCCUPANCY = r"""
#include <stdio.h>
#include "cuda_occupancy.h"

int main() {
  int registers, shared, warps, architecture;
  while (scanf("%d %d %d %d", &registers, &shared, &warps, &architecture) == 4) {
    const size_t kib = 1024, all = (architecture == 80 ? 164 : 228) * kib;
    cudaOccDeviceProp gpu;
    gpu.computeMajor = architecture / 10;
    gpu.maxThreadsPerBlock = 1024;
    gpu.maxThreadsPerMultiprocessor = 2048;
    gpu.regsPerBlock = gpu.regsPerMultiprocessor = 65536;
    gpu.warpSize = 32;
    gpu.sharedMemPerBlock = 48 * kib;
    gpu.sharedMemPerMultiprocessor = all;
    gpu.numSms = 1;
    gpu.sharedMemPerBlockOptin = all - kib;
    gpu.reservedSharedMemPerBlock = kib;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = shared;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &gpu, &kernel, &state, warps * 32, shared)) return 1;
    printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


def test_blocks_per_processor_as_nvidia_counts(tmp_path):
    """By the header of the CUDA toolkit, which Triton's wheel carries."""
    header = Path(triton.__file__).parent / "backends" / "nvidia" / "include" / "cuda_occupancy.h"
    if not header.exists() or shutil.which("c++") is None:
        pytest.skip("needs cuda_occupancy.h in Triton's wheel, and a C++ compiler")
    (tmp_path / "count.cpp").write_text(OCCUPANCY)
    subprocess.check_call(["c++", "-w", f"-I{header.parent}", tmp_path / "count.cpp", "-o", tmp_path / "count"])
    asked = list(
        itertools.product(
            (16, 32, 40, 64, 96, 128, 154, 168, 200, 255), (0, 1, 8192, 20480, 49152, 81920, 83000, 110592, 166912),
            (1, 2, 4, 8), (80, 90, 100),
        )
    )  # fmt: skip
    lines = "\n".join(" ".join(map(str, one)) for one in asked)
    counted = subprocess.check_output([tmp_path / "count"], input=lines, text=True).split()
    assert [blocks_per_processor(*one) for one in asked] == list(map(int, counted))
