"""The Triton kernels of the sparse delta op package in Triton's interpreter. It multiplies float16 and float32 rightly,
and bfloat16 not at all, so that bfloat16 is left to the GPU suite."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_kernels.ops.sparse_delta import configs
from peft_kernels.testing.sparse_delta import make_case
from tests.checks import sparse_delta as checks

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs a process of its own with TRITON_INTERPRET=1"
)
BACKEND = "triton"
FLOAT16 = {"dtype": torch.float16, "values_dtype": torch.float32}
LAYOUTS = checks.LAYOUTS | {"entries-few": {"kind": "entries", "density": 0.001}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", checks.SHAPES)
def test_within_eager(layout, shape):
    checks.check_within_eager(BACKEND, **checks.SHAPES[shape], **LAYOUTS[layout])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_values_beside_float16(layout):
    checks.check_within_eager(BACKEND, **checks.SHAPES["odd"], **LAYOUTS[layout], **FLOAT16)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["entries", "rows", "columns", "blocks", "n_of_m"]),
    rows=st.integers(1, 100),
    in_features=st.integers(1, 25).map(lambda n: 8 * n),
    out_features=st.integers(1, 30).map(lambda n: 4 * n),
    density=st.sampled_from([0.001, 0.02, 0.5, 1.0]),
)
def test_drawn_shapes(rows, **case_arguments):
    checks.check_within_eager(BACKEND, batch=(rows,), tile=(4, 8), **case_arguments)


def test_subsets():
    checks.check_subsets(BACKEND)


def test_strides():
    checks.check_strides(BACKEND)


def test_empty():
    checks.check_empty(BACKEND)


def test_runs(monkeypatch):
    checks.check_runs(BACKEND, "cpu", monkeypatch)


@pytest.mark.parametrize("kind", ["rows", "columns", "blocks"])
def test_tokens_in_splits(kind, monkeypatch):
    """More programs than tiles: partial sums, added in a fixed order."""
    case = make_case(kind, (300,), 64, 32, 0.2, torch.float32, tile=(8, 16))
    monkeypatch.setattr("peft_kernels.ops.sparse_delta.triton_backward.sm_count", lambda device: 16)
    N, K = case.layout.values_shape[-2:]
    assert configs.token_splits(configs.thin_tile(N, K, 4), N, K, 300, 1, 32) > 1
    checks.check_within_eager(BACKEND, kind=kind, batch=(300,), in_features=64, out_features=32)


@pytest.mark.parametrize("kind", ["entries", "rows", "columns", "blocks", "n_of_m"])
def test_writing(kind):
    checks.check_writing(BACKEND, kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("decay", ["delta", "weight"])
def test_step(dtype, decay):
    checks.check_step(BACKEND, dtype=dtype, decay=decay)
