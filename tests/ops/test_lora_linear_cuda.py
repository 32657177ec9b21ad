"""How `cuda.py` puts the native kernels together, without a GPU (`tests/checks/native.py`)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_kernels as pk
from peft_kernels import _native, backends
from peft_kernels.ops.lora_linear import configs, cuda, op
from peft_kernels.testing import make_case
from tests.checks import lora_linear as checks
from tests.checks.common import record_calls
from tests.checks.native import HALVES, lora_gemm, lora_outer, lora_shrink, split_reduce, standing_in

pytestmark = pytest.mark.skipif(not _native.LIBRARY.exists(), reason="needs the native library")
DTYPES = {
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "float32-adapters": {"dtype": torch.bfloat16, "adapter_dtype": torch.float32, "autocast": torch.bfloat16},
    "float32-adapters-high": {"dtype": torch.float16, "adapter_dtype": torch.float32, "adapter_precision": "high"},
    "float32": {"dtype": torch.float32},
}


@pytest.fixture(scope="module", autouse=True)
def kernels():
    with standing_in(lora_gemm, lora_shrink, lora_outer, split_reduce):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", checks.SETTINGS)
@pytest.mark.parametrize("shape", checks.SHAPES)
def test_within_eager(dtype, setting, shape):
    checks.check_within_eager("cuda", **checks.SHAPES[shape], **checks.SETTINGS[setting], **DTYPES[dtype])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 150),
    in_features=st.integers(8, 150),
    out_features=st.lists(st.integers(8, 100), min_size=1, max_size=3).map(tuple),
    rank=st.integers(1, 70),
    dropout_p=st.sampled_from([0.0, 0.3]),
)
def test_drawn_shapes(rows, in_features, out_features, rank, dropout_p):
    checks.check_within_eager(
        "cuda", batch=(rows,), in_features=in_features, out_features=out_features, rank=rank, dropout_p=dropout_p,
        dtype=torch.float16,
    )  # fmt: skip


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_subsets(dropout_p):
    checks.check_subsets("cuda", dropout_p, dtype=torch.bfloat16)


def test_runs(monkeypatch):
    checks.check_runs("cuda", "cpu", monkeypatch, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES)
def test_layouts(dtype):
    checks.check_layouts("cuda", dtype=dtype)


def test_empty():
    checks.check_empty("cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES)
def test_same_mask(dtype):
    checks.check_same_mask("cuda", dtype=dtype)


def test_auto_takes_it_from_the_size_that_was_measured(monkeypatch):
    case = make_case(batch=(40,), in_features=72, out_features=(48,), rank=8, dtype=torch.bfloat16)
    monkeypatch.setattr(backends, "choose", lambda *_: "auto")  # as on a GPU
    monkeypatch.setattr(configs, "tuned", lambda _: {("cuda_from", 2): 40 * 72 * 48})
    calls = record_calls(monkeypatch, [cuda])
    weight, lora_A, lora_B, *_ = case.projections[0]
    pk.lora_linear(case.x, weight, lora_A.requires_grad_(), lora_B, 2.0).sum().backward()
    assert [direction for direction, *_ in calls] == ["forward", "backward"]
    assert op._faster(case.x[1:], 48, 72, False) == op._faster(case.x, 48, 72, True) == "triton"
    assert op._faster(case.x.float(), 48, 72, False) == "triton"
