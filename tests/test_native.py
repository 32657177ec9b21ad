"""The native library: that it is built where nvcc is, what it links, what its kernels take and compute."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from peft_kernels import _native
from peft_kernels.ops.core import dropout

HAS_NVCC = bool(shutil.which("nvcc") or os.path.exists("/usr/local/cuda/bin/nvcc"))
pytestmark = pytest.mark.skipif(
    not HAS_NVCC and not _native.LIBRARY.exists(), reason="needs nvcc, or a native library built before"
)
#: What nvcc compiles: there is a library without it where there is no nvcc.
CUDA = pytest.mark.skipif(
    not HAS_NVCC and not _native.load(cuda=True), reason="needs nvcc, or a native library built with it before"
)


def reduce_partials(partials, row_scale, scale, out_dtype):
    """Of one."""
    return torch.ops.peft_kernels_native.reduce_partials([partials], [row_scale], [scale], out_dtype)[0]


def draw_mask(*args):
    return torch.ops.peft_kernels_native.draw_mask(*args)


@pytest.fixture(scope="module", autouse=True)
def library():
    # Where nvcc is, a library that is missing, has no CUDA kernels, or does not load is a failure, not a skip.
    assert _native.load(cuda=HAS_NVCC), f"{_native.why_not(cuda=HAS_NVCC)} (`make setup` builds it)"


def test_schema():
    assert str(torch.ops.peft_kernels_native.reduce_partials.default._schema) == (
        "peft_kernels_native::reduce_partials(Tensor[] partials, Tensor?[] row_scale, float[] scale, "
        "ScalarType out_dtype) -> Tensor[]"
    )
    assert str(torch.ops.peft_kernels_native.cuda_version.default._schema) == (
        "peft_kernels_native::cuda_version() -> int"
    )
    assert str(torch.ops.peft_kernels_native.has_boxes.default._schema) == (
        "peft_kernels_native::has_boxes(int device) -> bool"
    )


def test_links_torch_cpu_and_the_system_only():
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("needs readelf")
    dynamic = subprocess.check_output([readelf, "-d", _native.LIBRARY], text=True)
    needed = {name.partition(".so")[0] for name in re.findall(r"NEEDED.*\[(.*)\]", dynamic)}
    system = {"libstdc++", "libgcc_s", "libm", "libc", "libdl", "libpthread", "librt", "ld-linux-x86-64"}
    assert needed - system == {"libtorch_cpu"}
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic


def test_loads_without_the_package():
    """No Python beyond torch's own: the ops do not need `_C`, nor this package."""
    code = (
        f"import torch; torch.ops.load_library({str(_native.LIBRARY)!r}); "
        "print(torch.ops.peft_kernels_native.reduce_partials)"
    )
    printed = subprocess.check_output([sys.executable, "-c", code], cwd="/", text=True, timeout=300)
    assert "peft_kernels_native.reduce_partials" in printed


def test_build_facts():
    facts = _native.build_facts()
    if not facts:
        pytest.skip("the facts were built for another Python")
    assert set(facts) == {"cuda", "torch", "architectures", "compiler"}
    if _native.load(cuda=True):
        major, minor = divmod(_native.cuda_version(), 1000)
        assert facts["cuda"].startswith(f"{major}.{minor // 10}.")
        assert {"sm_80", "sm_90a"} <= set(facts["architectures"].split(", "))
    else:
        assert facts["cuda"] == facts["architectures"] == "none"


@CUDA
def test_says_which_driver_its_runtime_takes():
    assert _native.least_driver() == {12: 525, 13: 580}[_native.cuda_version() // 1000]


def find_cuobjdump():
    triton = importlib.util.find_spec("triton")
    folders = [Path(triton.origin).parent / "backends/nvidia/bin"] if triton else []
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin", *map(str, folders)])
    return shutil.which("cuobjdump", path=path)


def cuobjdump(*arguments):
    program = find_cuobjdump()
    if program is None:
        pytest.skip("needs cuobjdump (the CUDA toolkit's, or Triton's)")
    # Beside it lies nvdisasm, which it calls.
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(program).parent), os.environ.get("PATH", "")])}
    return subprocess.check_output([program, *arguments, _native.LIBRARY], text=True, env=environment)


#: Part of a kernel's name -> how many there are, and the registers that a thread may take.
BUDGETS = {
    "reduction": (6, 64),  # three output dtypes, vectorised or not; 4 blocks of 256 threads an SM
    "draw_mask": (1, 64),
    "shrink_sm80": (12, 168),  # two dtypes, 16, 32 or 64 columns, two layouts; 3 blocks of 128 threads an SM
    "outer_sm80": (10, 255),  # two dtypes, ranks up to 16, 32 or 64, with dH up to 32; 2 blocks of 128 threads an SM
    "forward_sm90": (6, 168),  # two dtypes, ranks up to 16, 32 or 64; 384 threads an SM. Empty but on sm_90a
    "gemm_sm90": (8, 168),  # two dtypes, two tiles, two layouts; 384 threads an SM. Empty but on sm_90a
    "gathered_sm90": (4, 168),  # two dtypes, two tiles; the same
    "gathered_sm80": (2, 255),  # two dtypes; 128 threads, two blocks an SM
    "begins_kernel": (1, 64),
    "gemm_sm80": (12, 255),  # two dtypes, three tiles, two layouts; 256 threads an SM, in one block or two
}


@CUDA
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_89", "sm_90a"])
def test_resource_use(architecture):
    """Every kernel is there for the architecture, spills nothing, and keeps to its registers."""
    dump = cuobjdump("--dump-resource-usage")
    section = "".join(re.findall(rf"arch = {architecture}\n(.*?)(?=\nFatbin |\Z)", dump, flags=re.DOTALL))
    use = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", section)
    for part, (count, most) in BUDGETS.items():
        kernels = [kernel for kernel in use if part in kernel[0]]
        assert len(kernels) == count, part
        for name, registers, stack, local in kernels:
            assert (int(stack), int(local)) == (0, 0), name
            assert int(registers) <= most, name
    assert len(use) == sum(count for count, _ in BUDGETS.values())


@CUDA
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90a"])
def test_instructions(architecture):
    """The tensor cores multiply what cp.async brought; passes over memory are by 16 bytes."""
    _, *functions = re.split(r"Function : (\S+)\n", cuobjdump("-sass", "-arch", architecture))
    code = dict(zip(functions[::2], functions[1::2]))
    for name, sass in code.items():
        if "sm80" in name:
            wanted = {"HMMA.16816.F32", "LDSM.16.M", "LDGSTS.E.BYPASS.128"}
            wanted |= {"STG.E.128"} if "gemm" in name else set()
            assert not {instruction for instruction in wanted if instruction not in sass}, name
            # What a stage needs comes with it: operands, masks, biases. Shrink loads its seed, once, ahead of all.
            if "gathered" not in name:
                assert len(re.findall(r"\bLDG[.]", sass)) == ("shrink" in name), name
        elif "sm90" in name and architecture == "sm_90a":
            wanted = {"HGMMA.64x", "UTMALDG.2D", "USETMAXREG", "UTMALDG.2D.MULTICAST"}  # clusters share an operand
            wanted |= {"UTMASTG.2D"} if "gathered" not in name else set()
            assert not {instruction for instruction in wanted if instruction not in sass}, name
            # A stage's four products, or eight with those of S, follow one another: no reason to wait in between.
            steps = "".join(word[0] for word in re.findall(r"HGMMA|WARPGROUP[.]DEPBAR", sass))
            assert ("H" * 8 if "forward" in name else "HHHH") in steps, name
            # Products are waited for at a tile's end, S's at the first of new rows, masked ones every 64 columns.
            masked = 0 if "gemm" not in name else 4 if "Li256E" in name else 2
            assert len(re.findall(r"DEPBAR[.]LE gsb0, 0x0", sass)) == masked + (2 if "forward" in name else 1), name
            assert sass.count("MEMBAR.ALL.GPU") == 2, name  # of the cluster's barriers, not of the stages'
        elif "draw_mask" in name:
            assert "STG.E.128" in sass
        elif "reduction" in name and "Li4E" in name:  # vectorised
            assert "LDG.E.128" in sass
        if architecture == "sm_90a":  # the GEMM lets the pass over x start, whose last block waits for it
            assert ("PREEXIT" in sass) == ("gemm" in name), name
            assert ("ACQBULK" in sass) == ("outer" in name), name
    assert len(code) == sum(count for count, _ in BUDGETS.values())


class TestArchitectures:
    """TORCH_CUDA_ARCH_LIST, as CMake reads it."""

    @staticmethod
    def configure(folder, architectures):
        cmake = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
        if cmake is None:
            pytest.skip("needs cmake")
        root = Path(__file__).resolve().parents[1]
        command = [cmake, "-S", root, "-B", folder, f"-DPython_EXECUTABLE={sys.executable}"]
        environment = os.environ | {"TORCH_CUDA_ARCH_LIST": architectures}
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    @pytest.mark.parametrize("architectures", ["8.0;9.0a+PTX", "8.0 9.0a+PTX"])
    def test_honoured(self, tmp_path, architectures):
        printed = self.configure(tmp_path, architectures).stdout
        assert "native library for the CPU, sm_80, sm_90a, compute_90a\n" in printed

    @pytest.mark.parametrize(
        ("architectures", "built"),
        [("9.0", "sm_90a"), ("8.0;9.0+PTX", "sm_80, sm_90a, compute_90"), ("9.0;9.0a", "sm_90a")],
    )
    def test_9_0_is_built_as_9_0a(self, tmp_path, architectures, built):
        """What images have; without `a` there is no wgmma."""
        printed = self.configure(tmp_path, architectures).stdout
        assert "has 9.0" in printed and "built as sm_90a, as sm_90 has no wgmma" in printed
        assert f"native library for the CPU, {built}\n" in printed

    @pytest.mark.parametrize("architectures", ["7.5", "Ampere", "8.0;80"])
    def test_refused_in_one_line(self, tmp_path, architectures):
        result = self.configure(tmp_path, architectures)
        assert result.returncode
        item = architectures.split(";")[-1]
        assert f'expected TORCH_CUDA_ARCH_LIST of 8.0 and later, as in "8.0;8.9+PTX;9.0a", got "{item}"' in " ".join(
            result.stderr.split()
        )


class TestDrawMask:
    """The bits of the dropout contract, by the code that the host and the GPU share."""

    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
    @pytest.mark.parametrize("p", [0.0, 0.001, 0.1, 0.5, 1.0])
    @pytest.mark.parametrize(
        ("rows", "columns", "streams"),
        [(1, 1, 1), (3, 5, 1), (33, 71, 2), (512, 576, 3), (2, 40000, 1), (0, 8, 1), (4, 0, 2)],
    )
    def test_the_bits_of_the_definition(self, rows, columns, streams, p, device):
        for seed in (0, 7, -1, 2**63 - 1, -(2**63)):
            seed = torch.tensor([seed])
            expected = dropout.draw_mask_by_torch(seed, rows, columns, p, streams)
            assert torch.equal(draw_mask(seed.to(device), rows, columns, dropout.threshold(p), streams).cpu(), expected)

    def test_a_stream_is_the_same_beside_others(self):
        seed = torch.tensor([5])
        three = draw_mask(seed, 100, 90, 0, 3)
        assert torch.equal(three[:2], draw_mask(seed, 100, 90, 0, 2))
        assert not torch.equal(three[0], three[1])

    def test_the_cpu_draws_by_it(self, monkeypatch):
        seed = torch.tensor([5])
        expected = dropout.draw_mask(seed, 20, 30, 0.5, 1)
        monkeypatch.setattr(dropout, "draw_mask_by_torch", None)
        assert torch.equal(dropout.draw_mask(seed, 20, 30, 0.5, 1), expected)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((torch.tensor([1, 2]), 4, 8, 0, 1), r"expected seed int64 \[1\], got \[2\]"),
            ((torch.tensor([1.0]), 4, 8, 0, 1), r"expected seed int64 \[1\], got \[1\] or another dtype"),
            ((torch.tensor([1]), -4, 8, 0, 1), "expected sizes of at least 0, got rows -4, columns 8, streams 1"),
            ((torch.tensor([1]), 4, 8, 40000, 1), "expected a threshold from -32768 to 32768, got 40000"),
        ],
    )
    def test_says_what_it_expected(self, arguments, message):
        with pytest.raises(RuntimeError, match=message) as caught:
            draw_mask(*arguments)
        assert "\n" not in str(caught.value).strip()


def test_refuses_cpu_tensors():
    with pytest.raises(NotImplementedError, match="CPU"):
        reduce_partials(torch.zeros(1, 2, 3), None, 1.0, torch.float32)


# --- On a GPU -----------------------------------------------------------------------------------------------


def reference(partials, row_scale, scale):
    total = partials.double().sum(0)
    return scale * (total if row_scale is None else row_scale.double()[:, None] * total)


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("with_row_scale", [False, True])
@pytest.mark.parametrize(
    ("shape", "padding"),
    [
        ((1, 1, 1), 0),
        ((3, 5, 7), 0),  # partials that do not start on 16 bytes: one value at a time
        ((3, 5, 7), 1),  # the same, padded to 36: packs that cross rows, and a tail
        ((8, 1000, 16), 0),
        ((5, 33, 6), 0),
        ((0, 4, 8), 0),  # no partials: zeros
        ((17, 4096, 512), 0),
    ],
)
def test_reduce_partials_is_the_rounded_sum(shape, padding, with_row_scale, out_dtype):
    parts, rows, rank = shape
    torch.manual_seed(0)
    storage = torch.randn(parts, rows * rank + padding, device="cuda")
    partials = storage[:, : rows * rank].unflatten(1, (rows, rank))
    row_scale = torch.randn(rows, device="cuda") if with_row_scale else None
    out = reduce_partials(partials, row_scale, 0.75, out_dtype)
    assert (out.shape, out.dtype) == ((rows, rank), out_dtype)

    exact = reference(partials, row_scale, 0.75)
    # Summation in float32 (P - 1 additions and two products), then one rounding to the output's dtype.
    magnitude = reference(partials.abs(), None if row_scale is None else row_scale.abs(), 0.75)
    bound = (parts + 2) * 2**-24 * magnitude + torch.finfo(out_dtype).eps / 2 * (exact.abs() + 1e-6) * 1.01
    assert bool(((out.double() - exact).abs() <= bound).all())


@pytest.mark.gpu
def test_reduce_partials_repeats_bit_for_bit_and_adds_in_order():
    torch.manual_seed(0)
    partials = torch.randn(9, 257, 12, device="cuda")
    first = reduce_partials(partials, None, 1.0, torch.float32)
    in_order = torch.zeros_like(first)
    for part in partials:
        in_order += part
    assert torch.equal(first, in_order)
    assert all(torch.equal(first, reduce_partials(partials, None, 1.0, torch.float32)) for _ in range(5))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3, 0, 4), (3, 4, 0), (0, 0, 0)])
def test_reduce_partials_of_nothing(shape):
    out = reduce_partials(torch.empty(shape, device="cuda"), None, 1.0, torch.bfloat16)
    assert out.shape == shape[1:]


@pytest.mark.gpu
@pytest.mark.slow
def test_reduce_partials_past_2_to_the_31_elements():
    rows = 2**31 // 64 + 3
    partials = torch.ones(1, rows, 64, device="cuda")
    partials[0, -1] = 3
    out = reduce_partials(partials, None, 2.0, torch.bfloat16)
    assert bool((out[:-1] == 2).all())
    assert bool((out[-1] == 6).all())


@pytest.mark.gpu
def test_reduce_partials_runs_on_the_current_stream():
    partials = torch.ones(4, 64, 16, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    # A launch on any other stream would make the capture fail.
    with torch.cuda.graph(graph, stream=stream):
        out = reduce_partials(partials, None, 1.0, torch.float32)
    partials.fill_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert bool((out == 8).all())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((2, 3), None, torch.float32), r"expected partials \[P, M, R\], got \[2, 3\]"),
        (((2, 3, 4), (4,), torch.float32), r"expected a contiguous row_scale \[3\], got \[4\]"),
        (((2, 3, 4), None, torch.float64), "expected out_dtype float32, float16 or bfloat16"),
    ],
)
def test_reduce_partials_says_what_it_expected(arguments, message):
    shape, scale_shape, out_dtype = arguments
    row_scale = None if scale_shape is None else torch.ones(scale_shape, device="cuda")
    with pytest.raises(RuntimeError, match=message) as caught:
        reduce_partials(torch.ones(shape, device="cuda"), row_scale, 1.0, out_dtype)
    assert "\n" not in str(caught.value).strip()


@pytest.mark.gpu
def test_reduce_partials_refuses_strided_partials():
    with pytest.raises(RuntimeError, match=r"expected every partial \[M, R\] contiguous"):
        reduce_partials(torch.ones(2, 3, 4, device="cuda").mT, None, 1.0, torch.float32)
    with pytest.raises(RuntimeError, match="or of an R of a multiple of 4 with adjacent columns"):
        reduce_partials(torch.ones(2, 3, 8, device="cuda")[:, :, :6], None, 1.0, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
def test_reduce_partials_of_several_is_that_of_each(out_dtype):
    """More than a launch takes; of one size or another, with rows apart, empty, without 16 bytes' alignment."""
    torch.manual_seed(0)
    wide = torch.randn(3, 100, 48, device="cuda")
    partials = [*wide.split(16, dim=2), wide[:, :33], wide[:, :0], torch.randn(5, 7, 3, device="cuda")] * 2
    row_scale = [torch.randn(len(one[0]), device="cuda") if j % 3 else None for j, one in enumerate(partials)]
    scale = [0.5 + j for j in range(len(partials))]
    found = torch.ops.peft_kernels_native.reduce_partials(partials, row_scale, scale, out_dtype)
    for one, *given in zip(found, partials, row_scale, scale):
        assert torch.equal(one, reduce_partials(given[0].contiguous(), *given[1:], out_dtype))


@pytest.mark.gpu
def test_kernels_report_what_they_take():
    if not _native.build_facts():
        pytest.skip("the facts were built for another Python")
    for kernel in _native.kernels():
        assert kernel["local_bytes"] == 0, kernel
