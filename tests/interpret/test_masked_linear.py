"""The Triton kernels of the masked linear op in Triton's interpreter. It multiplies float16 and float32 rightly, and
bfloat16 not at all, so that bfloat16 is left to the GPU suite."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checks import masked_linear as checks

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs a process of its own with TRITON_INTERPRET=1"
)
DTYPES = {
    "float32": {"dtype": torch.float32},
    "float16": {"dtype": torch.float16},
    "float32-scores": {"dtype": torch.float16, "scores_dtype": torch.float32},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", checks.SHAPES)
def test_within_eager(dtype, shape):
    checks.check_within_eager("triton", **checks.SHAPES[shape], **DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", checks.SETTINGS)
def test_settings(dtype, setting):
    checks.check_within_eager("triton", **checks.SHAPES["odd"], **checks.SETTINGS[setting], **DTYPES[dtype])


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 150),
    in_features=st.integers(8, 150),
    out_features=st.integers(8, 100),
    threshold=st.floats(-2.0, 2.0),
    bias=st.booleans(),
)
def test_drawn_shapes(rows, **case_arguments):
    checks.check_within_eager("triton", batch=(rows,), **case_arguments)


def test_several_groups_of_tiles():
    """More rows of tiles than a group has, in both kernels."""
    checks.check_within_eager("triton", batch=(530,), in_features=24, out_features=530)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subsets(dtype):
    checks.check_subsets("triton", **DTYPES[dtype])


def test_runs(monkeypatch):
    checks.check_runs("triton", "cpu", monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layouts(dtype):
    checks.check_layouts("triton", dtype=dtype)


def test_mask():
    checks.check_mask("triton", dtypes=(torch.float32, torch.float16))


def test_float32_scores_keep_their_mask():
    checks.check_float32_scores_beside("triton", torch.float16)
