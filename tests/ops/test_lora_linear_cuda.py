"""How `cuda.py` puts the native kernels together, without a GPU (`tests/checks/native.py`)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_kernels import _native
from peft_kernels.ops.common import dropout
from tests.checks import lora_linear as checks
from tests.checks.native import HALVES, parts, split_reduce, standing_in, taken

pytestmark = pytest.mark.skipif(not _native.LIBRARY.exists(), reason="needs the native library")
DTYPES = {
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "float32-adapters": {"dtype": torch.bfloat16, "adapter_dtype": torch.float32, "autocast": torch.bfloat16},
    "float32-adapters-high": {"dtype": torch.float16, "adapter_dtype": torch.float32, "adapter_precision": "high"},
    "float32": {"dtype": torch.float32},
}


def lora_gemm(left, right, low_left, low_right, keep, bias, by_feature):
    (M, K), R, dtype = left.shape, low_left.shape[1], left.dtype
    N = right.shape[0 if by_feature else 1]
    right = taken(right, *((N, K) if by_feature else (K, N)), dtype)
    low_right = taken(low_right, *((N, R) if by_feature else (R, N)), dtype)
    out = taken(low_left, M, R, dtype) @ (low_right.mT if by_feature else low_right)
    if keep is not None:
        assert keep.shape == (M, dropout.mask_bytes(N)) and keep.is_contiguous()
        out = out * dropout.unpack_mask(keep, N, torch.float32)
    out = out + taken(left, M, K, dtype) @ (right.mT if by_feature else right)
    if bias is not None:
        assert bias.shape == (N,) and bias.is_contiguous() and bias.dtype == dtype
        out = out + bias
    return out.to(dtype)


def lora_shrink(wide, narrow, seed, threshold, streams, mask, by_feature):
    (M, K), dtype = wide.shape, wide.dtype
    C = narrow.shape[0 if by_feature else 1]
    narrow = taken(narrow, *((C, K) if by_feature else (K, C)), dtype)
    narrow = narrow.mT if by_feature else narrow
    wide = taken(wide, M, K, dtype)
    if seed is None:
        assert mask is None
        return parts(wide, narrow, 2)
    assert by_feature and C % streams == 0
    drawn = dropout.draw_mask_by_torch(seed, M, K, (threshold + 32768) / 65536, streams)
    if mask is not None:
        mask.copy_(drawn)
    kept = [wide * dropout.unpack_mask(bits, K, torch.float32) for bits in drawn]
    return torch.cat([parts(one, a, 2) for one, a in zip(kept, narrow.tensor_split(streams, dim=1))], dim=2)


def lora_outer(wide, narrow, right, keep, transposed):
    (M, F), R, dtype = wide.shape, narrow.shape[1], wide.dtype
    assert R <= 64
    wide, narrow = taken(wide, M, F, dtype), taken(narrow, M, R, dtype)
    shrunk = wide.new_empty(0, M, R) if right is None else parts(wide, taken(right, F, R, dtype), 3)
    if keep is not None:
        assert right is None and keep.shape == (M, dropout.mask_bytes(F)) and keep.is_contiguous()
        wide = wide * dropout.unpack_mask(keep, F, torch.float32)
    sums = parts(wide.mT, narrow, 2)
    return sums.mT.contiguous() if transposed else sums, shrunk


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
