"""The Triton kernel of the scaled linear op in Triton's interpreter, in all dtypes but bfloat16, which it rounds to
otherwise."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checks import scaled_linear as checks

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs a process of its own with TRITON_INTERPRET=1"
)
DTYPES = {
    "float32": {"dtype": torch.float32},
    "float16": {"dtype": torch.float16},
    "float32-scale": {"dtype": torch.float16, "scale_dtype": torch.float32},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", checks.SETTINGS)
@pytest.mark.parametrize("shape", checks.SHAPES)
def test_within_eager(dtype, setting, shape):
    checks.check_within_eager("triton", **checks.SHAPES[shape], **checks.SETTINGS[setting], **DTYPES[dtype])


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 300),
    in_features=st.integers(8, 150),
    out_features=st.integers(8, 300),
    scale_input=st.booleans(),
)
def test_drawn_shapes(rows, **case_arguments):
    checks.check_within_eager("triton", batch=(rows,), **case_arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_input", [False, True])
def test_subsets(dtype, scale_input):
    checks.check_subsets("triton", scale_input=scale_input, **DTYPES[dtype])


def test_runs(monkeypatch):
    checks.check_runs("triton", "cpu", monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_layouts(dtype):
    checks.check_layouts("triton", dtype=dtype)
