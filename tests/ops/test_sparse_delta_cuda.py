"""How `cuda.py` puts the native kernels together, without a GPU (`tests/checks/native.py`)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_kernels as pk
from peft_kernels import _native
from peft_kernels.testing.sparse_delta import make_case
from tests.checks import sparse_delta as checks
from tests.checks.native import HALVES, reduce_partials, sparse_gathered, standing_in

pytestmark = pytest.mark.skipif(not _native.LIBRARY.exists(), reason="needs the native library")
DTYPES = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float32-values": {"dtype": torch.bfloat16, "values_dtype": torch.float32},
}


@pytest.fixture(scope="module", autouse=True)
def kernels():
    with standing_in(sparse_gathered, reduce_partials):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", checks.layouts_of("cuda"))
@pytest.mark.parametrize("shape", checks.SHAPES)
def test_within_eager(dtype, layout, shape):
    checks.check_within_eager("cuda", **checks.SHAPES[shape], **checks.LAYOUTS[layout], **DTYPES[dtype])


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["entries", "n_of_m"]),
    batch=st.lists(st.integers(1, 12), max_size=3).map(tuple),
    in_features=st.integers(1, 25).map(lambda n: 4 * n),
    out_features=st.integers(1, 50),
    density=st.floats(0.01, 1.0),
    dtype=st.sampled_from(HALVES),
)
def test_drawn_shapes(kind, batch, in_features, out_features, density, dtype):
    checks.check_within_eager(
        "cuda", kind=kind, batch=batch, in_features=in_features, out_features=out_features, density=density,
        tile=(2, 4), dtype=dtype,
    )  # fmt: skip


def test_subsets():
    checks.check_subsets("cuda", dtype=torch.bfloat16)


def test_strides():
    checks.check_strides("cuda", dtype=torch.float16)


def test_empty():
    checks.check_empty("cuda", dtype=torch.bfloat16)


def test_runs(monkeypatch):
    checks.check_runs("cuda", "cpu", monkeypatch, torch.bfloat16)


@pytest.mark.parametrize("kind", checks.kinds_of("cuda"))
@pytest.mark.parametrize("dtype", HALVES)
def test_writing(kind, dtype):
    checks.check_writing("cuda", kind, "cpu", dtype)


def test_kinds_without_a_kernel_are_refused():
    checks.check_refusals("cuda", dtype=torch.bfloat16)


def test_float32_is_refused():
    case = make_case("entries", dtype=torch.float32)
    expected = "the backend 'cuda' cannot run here: expected bfloat16 or float16, got float32$"
    with pk.use_backend("cuda"), pytest.raises(RuntimeError, match=expected):
        pk.sparse_delta_linear(case.x, case.weight, case.values, case.layout)
