"""The package itself: what importing it does not do, its versions, and `python -m peft_kernels env`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import peft_kernels
from peft_kernels import _native, backends
from peft_kernels.__main__ import env

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


def test_version_is_the_one_in_pyproject():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{peft_kernels.__version__}"\n' in pyproject


def test_every_public_name_exists_and_is_documented():
    for name in peft_kernels.__all__:
        assert getattr(peft_kernels, name).__doc__, name


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


def test_env_says_what_an_impossible_request_would_meet():
    if torch.cuda.is_available():
        pytest.skip("the request is possible here")
    with peft_kernels.use_backend("triton"):
        assert "refused" in " ".join(env().split())


def test_a_missing_library_is_explained(tmp_path):
    assert _native._load(tmp_path / "nowhere.so").startswith("it was not built")


def test_a_broken_library_keeps_the_loaders_words(tmp_path):
    broken = tmp_path / "libpeft_kernels.so"
    broken.write_bytes(b"\x7fELF" + bytes(60))
    reason = _native._load(broken)
    assert str(broken) in reason
    assert "\n" not in reason
