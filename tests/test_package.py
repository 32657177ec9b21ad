"""The package itself: what importing it does not do, its versions, and `python -m peft_kernels env`."""

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import peft_kernels
from peft_kernels import _native, backends
from peft_kernels.__main__ import env, explained
from peft_kernels.ops.core import tuning
from peft_kernels.ops.lora_linear import configs
from peft_kernels.tune import session

ROOT = Path(__file__).resolve().parent.parent


def run_python(code, **environment):
    """A fresh interpreter in the checkout: what an import does shows only where nothing was imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("heavy", ["peft", "transformers", "peft_kernels._lib._C"])
def test_importing_does_not_import(heavy):
    result = run_python(f"import sys, peft_kernels; print({heavy!r} in sys.modules)")
    assert result.stdout.strip() == "False", result.stdout + result.stderr


def test_importing_leaves_torch_as_it_was():
    result = run_python(
        "import torch\n"
        "facts = lambda: (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(),\n"
        "    torch.backends.cuda.matmul.allow_tf32, torch.initial_seed(), torch.cuda.is_initialized())\n"
        "torch.manual_seed(0); before = facts(), torch.get_rng_state().tolist()\n"
        "import peft_kernels\n"
        "print(before == (facts(), torch.get_rng_state().tolist()))\n"
    )
    assert result.stdout.strip() == "True", result.stdout + result.stderr
    assert result.stderr == ""


def test_importing_needs_no_triton():
    hide = "import sys; sys.modules['triton'] = None; import peft_kernels; print('imported')"
    result = run_python(hide)
    assert result.stdout.strip() == "imported", result.stderr


def test_every_held_version_is_one_that_the_oldest_python_takes():
    """A release that needs a newer Python stands with a marker in constraints.txt; without, pip finds no way out."""
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        held = Requirement(line) if line and not line.startswith("#") else None
        if held is None or (held.marker and not held.marker.evaluate({"python_version": oldest})):
            continue
        try:
            facts = metadata(held.name)
        except PackageNotFoundError:  # of another Python, or of a set-up with less
            continue
        needs = facts.get("Requires-Python") or ""
        assert facts["Version"] not in held.specifier or f"{oldest}.99" in SpecifierSet(needs), f"{line}: {needs}"


def test_version_is_the_one_in_pyproject():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{peft_kernels.__version__}"\n' in pyproject


def test_every_public_name_exists_and_is_documented():
    for name in peft_kernels.__all__:
        assert getattr(peft_kernels, name).__doc__, name


def test_the_reference_has_every_public_name():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    shown = re.findall(r"^::: peft_kernels\.(\w+)", pages, re.MULTILINE)
    assert set(shown) >= set(peft_kernels.__all__)


def test_env_fits_80_columns_and_names_every_op():
    text = env()
    assert max(map(len, text.splitlines())) <= 80
    for op in backends.OPS:
        assert f"  {op} " in text or f"  {op}\n" in text
    assert f" {torch.__version__} " in text
    assert ("device 0" in text) == torch.cuda.is_available()


def test_env_command_prints_the_table():
    command = [sys.executable, "-m", "peft_kernels", "env"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() == env()


@pytest.mark.parametrize("op", backends.OPS)
def test_a_backend_that_an_op_lacks_is_refused(op):
    for name in set(backends.NAMES) - {"auto", *backends.OPS[op].backends}:
        with (
            peft_kernels.use_backend(name),
            pytest.raises(RuntimeError, match=f"^{op}: expected one of the backends .*, got '{name}'$"),
        ):
            backends.choose(op, torch.ones(1))


def test_a_suffix_is_not_ignored():
    one = torch.ones(2, 2)
    with peft_kernels.use_backend("triton:fused"), pytest.raises(RuntimeError, match="got 'triton:fused'"):
        peft_kernels.masked_linear(one, one, one)


def test_env_says_what_an_impossible_request_would_meet():
    if torch.cuda.is_available():
        pytest.skip("the request is possible here")
    with peft_kernels.use_backend("triton"):
        assert "refused" in " ".join(env().split())


class TestExplained:
    """`env --explain`: the same answers as the launchers', in words."""

    def test_by_the_rules_of_an_architecture(self):
        text = explained("4096", "4096", "4096", "16", "bfloat16", arch=90)
        assert max(map(len, text.split("\n"))) <= 80
        words = " ".join(text.split())
        assert words.startswith("lora_linear with M 4096, K 4096, N 4096, R 16, bfloat16")
        assert "triton from 17179869184 on, no crossover to cuda was measured on sm_90)" in words
        assert "low-rank product blas (no crossover was measured on sm_90)" in words
        tile = configs.shrink_tile(4096, 4096, 16, 2, False, False)
        assert f"S, pass over x block_m {tile.block_m}, block_c {tile.block_c}" in words
        assert "dH and dB, pass over dy" in words
        assert "backend cuda, y tile 128 × 256 of sm_90a on 132 SMs" in words or not _native.build_facts()
        ways = {16: "one pass over dy, one over x beside", 40: "two passes over dy", 70: "cuBLAS each"}
        for rank, way in ways.items():
            words = " ".join(explained("4096", "4096", "4096", str(rank), "bfloat16", arch=90).split())
            assert f"backend cuda, dH, dB, dA {way}" in words
        assert "dH and dB two products" in " ".join(explained("8", "8", "8", "64", "float16", arch=80).split())

    def test_of_the_gpu_here_with_its_table_and_what_was_asked_for(self, monkeypatch):
        gpu = tuning.Gpu("Some GPU", 90, "3.6.0")
        monkeypatch.setattr(session, "current_gpu", lambda: (gpu, ""))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=4))
        monkeypatch.setattr(tuning, "load", lambda *_: {("fused_from", 2): 1000})
        monkeypatch.setattr(backends, "explain", lambda op, *_: backends.Choice("triton", "as asked"))
        words = " ".join(explained("128", "64", "256", "8", "bfloat16").split())
        assert "on a GPU Some GPU: triton (as asked)" in words
        assert f"fused (M·N·K = {128 * 64 * 256}, fused from 1000 on)" in words
        tile = configs.gemm_tile(128, 256, 8, 2, 90, tma=True)
        assert "on 4 SMs" in words or not _native.build_facts()
        assert f"y block_m {tile.block_m}, block_n {tile.block_n}" in words

    def test_without_a_gpu(self):
        if not torch.cuda.is_available():
            assert "sees no GPU" in " ".join(explained("1", "2", "3", "4", "float32").split())

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (("0", "8", "8", "2", "float32"), "expected M, K, N and R of at least 1, got 0 8 8 2"),
            (("4", "x", "8", "2", "float32"), "expected M, K, N and R of at least 1, got 4 x 8 2"),
            (("4", "8", "8", "2", "int8"), "expected float32, bfloat16 or float16, got 'int8'"),
        ],
    )
    def test_refuses_what_it_does_not_know(self, given, message):
        with pytest.raises(ValueError, match=re.escape(message)):
            explained(*given)


class TestDriver:
    """CUDA 13's static runtime takes a driver of 580 or later: `env` says so, and whether the one here is."""

    @pytest.mark.parametrize(
        ("version", "driver", "takes", "here"),
        [
            (13000, "580.65.06", "CUDA 13.0's runtime takes a driver of 580 or later", ", 580.65.06, is new enough"),
            (13010, "570.86", "CUDA 13.1's runtime takes a driver of 580 or later", ", 570.86, is too old for it"),
            (12080, "535.1", "CUDA 12.8's runtime takes a driver of 525 or later", ", 535.1, is new enough"),
            (13000, "unknown (why)", "CUDA 13.0's runtime takes a driver of 580 or later", ": unknown (why)"),
            (14000, "700.1", "CUDA 14.0's runtime takes a driver of ? or later", ": 700.1"),
        ],
    )
    def test_env_says_whether_it_is_new_enough(self, monkeypatch, version, driver, takes, here):
        monkeypatch.setattr(_native, "_load", lambda _: "")
        monkeypatch.setattr(_native, "cuda_version", lambda: version)
        monkeypatch.setattr("peft_kernels.__main__._driver_version", lambda: driver)
        assert f"CUDA kernels {takes}; the driver here{here}" in " ".join(env().split())

    def test_without_kernels_it_takes_none(self, monkeypatch):
        monkeypatch.setattr(_native, "_load", lambda _: "")
        monkeypatch.setattr(_native, "cuda_version", lambda: 0)
        assert "CUDA kernels none: the library was built without them" in " ".join(env().split())


def test_a_missing_library_is_explained(tmp_path):
    assert _native._load(tmp_path / "nowhere.so").startswith("it was not built")


def test_a_broken_library_keeps_the_loaders_words(tmp_path):
    broken = tmp_path / "libpeft_kernels.so"
    broken.write_bytes(b"\x7fELF" + bytes(60))
    reason = _native._load(broken)
    assert str(broken) in reason
    assert "\n" not in reason
