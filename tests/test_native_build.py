"""How the native library is built: by a C++ compiler alone where there is no nvcc, and not at all where ptxas
serialises products. What is built where nvcc is, test_native.py reads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
#: The folders of PATH but for those with nvcc.
PATH = [folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / "nvcc").exists()]
WITHOUT_NVCC = {"PATH": os.pathsep.join(PATH), "CUDA_HOME": "/nowhere", "CUDACXX": ""}


def run(*command, **environment):
    result = subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=600, env=os.environ | environment
    )
    return result.returncode, result.stdout, result.stderr


class TestWithoutNvcc:
    """PATH without nvcc, and CUDA_HOME that leads nowhere."""

    @pytest.fixture(scope="class")
    def built(self, tmp_path_factory):
        """The folder of a package built here, and what the build printed."""
        for tool in ("c++", "cmake", "ninja"):
            if not shutil.which(tool, path=os.pathsep.join([str(Path(sys.executable).parent), *PATH])):
                pytest.skip(f"needs {tool}")
        base = tmp_path_factory.mktemp("build")
        command = ["setup.py", "-q", "build", "--build-base", base, "--build-lib", base / "lib"]
        code, printed, errors = run(sys.executable, *command, PEFT_KERNELS_NATIVE="", **WITHOUT_NVCC)
        assert code == 0, printed + errors
        return base / "lib", printed

    @staticmethod
    def python(built, code):
        status, printed, errors = run(sys.executable, "-c", code, PYTHONPATH=str(built[0]), PYTHONSAFEPATH="1")
        assert status == 0, errors
        return printed.strip()

    def test_prints_what_was_built_and_what_was_not(self, built):
        assert "built the native library for the CPU, without CUDA kernels: nvcc was not found" in built[1]

    def test_is_taken(self, built):
        code = """
import torch, peft_kernels as pk
from peft_kernels import _native
from peft_kernels.ops.core import dropout
print(pk.__file__, _native.why_not(), _native.cuda_version(), pk.backends.choose("sparse_delta_linear", torch.ones(1)))
seed = torch.tensor([7])
expected = dropout.draw_mask_by_torch(seed, 33, 71, 0.1, 2)
dropout.draw_mask_by_torch = None
assert torch.equal(dropout.draw_mask(seed, 33, 71, 0.1, 2), expected)
layout = pk.SparseLayout.from_indices((8, 16), torch.arange(0, 128, 5))
x, weight, values = torch.randn(6, 16), torch.randn(8, 16), torch.randn(layout.nnz, requires_grad=True)
y = pk.sparse_delta_linear(x, weight, values, layout)
dense = weight.flatten().index_add(0, layout.indices(), values).view(8, 16)
torch.testing.assert_close(y, x @ dense.t())
(grad,) = torch.autograd.grad(y.square().sum(), values)
torch.testing.assert_close(grad, layout.take((2 * (x @ dense.t())).t() @ x))
"""
        assert self.python(built, code) == f"{built[0]}/peft_kernels/__init__.py  0 cpu"

    def test_refuses_cuda_in_one_line_and_auto_does_not_take_it(self, built):
        code = """
import torch, peft_kernels as pk
print([pk.backends.takes(op, "cuda", "cuda", torch.bfloat16) for op in ("lora_linear", "sparse_delta_linear")])
with pk.use_backend("cuda"):
    try:
        pk.backends.choose("lora_linear", torch.ones(1))
    except RuntimeError as error:
        print(error)
"""
        found, refused = self.python(built, code).split("\n")
        assert found == "[False, False]"  # which is what `auto` asks
        assert refused == (
            "lora_linear: the backend 'cuda' cannot run here: no native CUDA kernels: the library was built without "
            "them, by a C++ compiler alone: they take nvcc"
        )

    def test_env_says_so(self, built):
        code = "from peft_kernels.__main__ import env; print(env())"
        words = " ".join(self.python(built, code).split())
        assert "CUDA kernels none: the library was built without them" in words
        assert "built: cuda none" in words or "built: cuda not known" in words

    def test_all_of_it_can_be_demanded(self):
        code, _, errors = run(sys.executable, "setup.py", "build", PEFT_KERNELS_NATIVE="1", **WITHOUT_NVCC)
        assert code
        assert "expected to build the whole native library, but nvcc was not found" in errors


def test_refuses_an_unknown_request():
    code, _, errors = run(sys.executable, "setup.py", "--version", PEFT_KERNELS_NATIVE="gpu")
    assert code
    assert errors.strip() == "expected PEFT_KERNELS_NATIVE of 0, 1 or cpu, got 'gpu'"


class TestPtxasGate:
    """csrc/ptxas_gate.py, before every compilation of CUDA."""

    KERNEL = """
    __global__ void kernel(float* out, unsigned long long a, unsigned long long b) {
      float s[4] = {};
      asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
      for (int i = 0; i < 4; ++i) {
        asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
                     : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]) : "l"(a), "l"(b));
        TOUCH
      }
      asm volatile("wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
                   : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]) :: "memory");
      for (int i = 0; i < 4; ++i) out[threadIdx.x * 4 + i] = s[i];
    }
    """

    @staticmethod
    def gate(*command):
        return run(sys.executable, ROOT / "csrc/ptxas_gate.py", *command)

    @pytest.mark.skipif(NVCC is None, reason="needs nvcc")
    @pytest.mark.parametrize("serialised", [False, True])
    def test_a_kernel_that_serialises_its_products_does_not_build(self, tmp_path, serialised):
        # A sum that is read while products are under way: the next one has to wait.
        (tmp_path / "kernel.cu").write_text(self.KERNEL.replace("TOUCH", "s[0] += out[i];" if serialised else ""))
        built = tmp_path / "kernel.o"
        code, _, errors = self.gate(
            NVCC, "-gencode=arch=compute_90a,code=sm_90a", "-c", tmp_path / "kernel.cu", "-o", built
        )
        assert (code != 0, built.exists()) == (serialised, not serialised), errors
        assert ("error: ptxas serialises products" in errors) == serialised

    @pytest.mark.parametrize("number", [7508, 7510, 7514, 7515])
    def test_each_thing_that_ptxas_says(self, number, tmp_path):
        built = tmp_path / "kernel.o"
        line = f"ptxas info    : (C{number}) Potential Performance Loss: for a reason in function 'kernel'"
        says = f"import sys; open(sys.argv[2], 'w'); print({line!r}, file=sys.stderr)"
        code, _, errors = self.gate(sys.executable, "-c", says, "-o", built)
        assert (code, built.exists()) == (1, False)
        assert errors.count(line) == 2  # as it was said, and in the error

    def test_lets_pass_what_the_compiler_says_otherwise(self):
        says = "import sys; print('ptxas info    : Used 168 registers', file=sys.stderr); sys.exit(%d)"
        for code in (0, 3):
            assert self.gate(sys.executable, "-c", says % code) == (code, "", "ptxas info    : Used 168 registers\n")

    @pytest.mark.skipif(NVCC is None, reason="needs nvcc")
    @pytest.mark.parametrize("source", [".", "csrc/selftest"])
    def test_stands_before_every_compilation_of_cuda(self, tmp_path, source):
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        cmake, ninja = shutil.which("cmake", path=path), shutil.which("ninja", path=path)
        if not cmake or not ninja:
            pytest.skip("needs cmake and ninja")
        command = [cmake, "-S", ROOT / source, "-B", tmp_path, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        code, printed, errors = run(*command, f"-DCMAKE_CUDA_COMPILER={NVCC}", PATH=path)
        assert code == 0, printed + errors
        code, printed, errors = run(ninja, "-C", tmp_path, "-t", "commands")
        compilations = [command for command in printed.splitlines() if " -x cu -c " in command]
        assert compilations, errors
        assert all("ptxas_gate.py" in command for command in compilations)
