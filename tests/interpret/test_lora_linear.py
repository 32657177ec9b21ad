"""The Triton kernels of the LoRA linear op in Triton's interpreter. It multiplies float16 and float32 rightly, and
bfloat16 not at all, so that bfloat16 is left to the GPU suite."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checks import lora_linear as checks

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs a process of its own with TRITON_INTERPRET=1"
)
BACKENDS = ["triton:fused", "triton:blas"]
DTYPES = {
    "float32": {"dtype": torch.float32},
    "float16": {"dtype": torch.float16},
    "float32-adapters-high": {
        "dtype": torch.float16, "adapter_dtype": torch.float32, "adapter_precision": "high",
    },
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", checks.SETTINGS)
@pytest.mark.parametrize("shape", checks.SHAPES)
def test_within_eager(backend, dtype, setting, shape):
    checks.check_within_eager(backend, **checks.SHAPES[shape], **checks.SETTINGS[setting], **DTYPES[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 150),
    in_features=st.integers(8, 150),
    out_features=st.lists(st.integers(8, 100), min_size=1, max_size=3).map(tuple),
    rank=st.integers(1, 70),
    dropout_p=st.sampled_from([0.0, 0.3]),
)
def test_drawn_shapes(backend, rows, in_features, out_features, rank, dropout_p):
    checks.check_within_eager(
        backend, batch=(rows,), in_features=in_features, out_features=out_features, rank=rank, dropout_p=dropout_p
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_subsets(backend):
    checks.check_subsets(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_of_their_own(backend):
    checks.check_ranks(backend, checks.RANKS[0])


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
def test_runs(backend, monkeypatch):
    checks.check_runs(backend, "cpu", monkeypatch)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    checks.check_layouts(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    checks.check_empty(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_mask(backend):
    checks.check_same_mask(backend)


def test_persistent_gemm():
    """The kernel with TMA descriptors, which `extended_gemm` takes on sm_90: forward and a dx of two projections
    with masks, against the pointer kernel's operands in plain PyTorch."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    from peft_kernels.ops.core import dropout
    from peft_kernels.ops.lora_linear.triton_gemm import extended_gemm_tma_kernel

    torch.manual_seed(0)
    M, N, R = 150, 96, 16
    for depths, transposed, masked, split in (((80,), True, False, True), ((80, 64), False, True, False)):
        n = len(depths)
        ps = [torch.randn(M, K).half() for K in depths]
        qs = [torch.randn(K, N).half() for K in depths]
        es, fs = [torch.randn(M, R).half() for _ in depths], [torch.randn(R, N).half() for _ in depths]
        bias = torch.randn(N).half()
        masks = dropout.draw_mask(torch.tensor([3]), M, N, 0.5, n) if masked else None
        out = torch.full((M, N), float("nan")).half()
        extended_gemm_tma_kernel[(3,)](
            *(TensorDescriptor.from_tensor(p, [64, 16]) for p in ps),
            *[None] * (3 - n),
            *(
                TensorDescriptor.from_tensor(q.t().contiguous(), [32, 16])
                if transposed
                else TensorDescriptor.from_tensor(q, [16, 32])
                for q in qs
            ),
            *[None] * (3 - n),
            TensorDescriptor.from_tensor(out, [64, 16 if split else 32]),
            tuple(es), tuple(fs), bias, masks, M, N, depths, R, (R,) * n, (N,) * n, (1,) * n,
            masks.stride(0) if masked else 0, masks.stride(1) if masked else 0,
            NUM=n, Q_TRANSPOSED=transposed, HIGH=None, PREFETCH=n == 1,
            R_DIVISOR=16, FN_DIVISOR=1, MASK_DIVISOR=4, BLOCK_M=64, BLOCK_N=32, BLOCK_K=16,
            BLOCK_R=16, GROUP_M=2, SPLIT_EPILOGUE=split, PRECISION="ieee",
        )  # fmt: skip
        expected = bias.double().expand(M, N).clone()
        for j in range(n):
            low_rank = es[j].double() @ fs[j].double()
            kept = dropout.unpack_mask(masks[j], N) if masked else 1.0
            expected += ps[j].double() @ qs[j].double() + low_rank * kept
        torch.testing.assert_close(out.double(), expected, rtol=2e-3, atol=2e-2)
