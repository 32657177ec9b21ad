"""The LoRA linear op on a CUDA GPU: every backend, in the dtypes that people train in."""

import pytest
import torch

import peft_kernels as pk
from peft_kernels.ops.core import dropout, native
from peft_kernels.testing import make_case
from tests.checks import lora_linear as checks
from tests.checks.common import captured

pytestmark = pytest.mark.gpu
BACKENDS = ["triton:fused", "triton:blas", "cuda:passes", "reference"]
BACKENDS_AND_WIDTHS = pytest.mark.parametrize(
    ("backend", "dtype"),
    [(backend, torch.bfloat16) for backend in BACKENDS]
    + [(backend, torch.float32) for backend in BACKENDS if backend != "cuda:passes"],
)
ON_SM_90 = pytest.mark.skipif(
    not (torch.cuda.is_available() and native.has_boxes(torch.device("cuda", 0))),
    reason="needs compute capability 9.0 and the native library: what one kernel cannot compute is refused",
)
IN_ONE_KERNEL = pytest.param("cuda:fused", marks=ON_SM_90)
DTYPES = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "float32-adapters": {"dtype": torch.bfloat16, "adapter_dtype": torch.float32, "autocast": torch.bfloat16},
    "float32-adapters-high": {"dtype": torch.bfloat16, "adapter_dtype": torch.float32, "adapter_precision": "high"},
}
SHAPES = checks.SHAPES | {
    "large": {"batch": (2, 700), "in_features": 1024, "out_features": (1536,), "rank": 16},
    "large-qkv": {"batch": (1100,), "in_features": 1024, "out_features": (1024, 256, 256), "rank": 16},
    "large-odd": {"batch": (1037,), "in_features": 1032, "out_features": (1160,), "rank": 24},
}


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        (backend, dtype)
        for backend in BACKENDS
        for dtype in DTYPES
        if not (backend == "cuda:passes" and dtype in ("float32", "float32-adapters-high"))  # refused
    ],
)
@pytest.mark.parametrize("setting", checks.SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_within_eager(backend, dtype, setting, shape):
    checks.check_within_eager(
        backend, device="cuda", **SHAPES[shape], **checks.SETTINGS[setting], **DTYPES[dtype]
    )  # fmt: skip


@ON_SM_90
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32-adapters"])
@pytest.mark.parametrize("row_scaling", [False, True])
@pytest.mark.parametrize("shape", ["one-row", "no-leading-dims", "tiles", "large", "large-odd"])
def test_one_kernel_for_the_forward_within_eager(dtype, row_scaling, shape):
    checks.check_within_eager(
        "cuda:fused", device="cuda", **SHAPES[shape], row_scaling=row_scaling, **DTYPES[dtype]
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_subsets(backend, dropout_p):
    checks.check_subsets(backend, dropout_p, device="cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("rank", checks.RANKS, ids=str)
@BACKENDS_AND_WIDTHS
def test_ranks_of_their_own(backend, dtype, rank):
    checks.check_ranks(backend, rank, device="cuda", dtype=dtype)


@pytest.mark.parametrize("backend", [*BACKENDS, "triton", "cuda", IN_ONE_KERNEL])
def test_runs(backend, monkeypatch):
    checks.check_runs(backend, "cuda", monkeypatch, torch.bfloat16)


def test_what_cuda_does_not_take_is_refused():
    weight, lora_A, lora_B = (torch.ones(size, device="cuda") for size in ((16, 24), (8, 24), (16, 8)))
    for backend in ("cuda", "cuda:passes", "cuda:fused"):
        with pk.use_backend(backend), pytest.raises(RuntimeError, match=r"expected bfloat16 or float16, got float32$"):
            pk.lora_linear(torch.ones(4, 24, device="cuda"), weight, lora_A, lora_B, 1.0)
    halves = [tensor.bfloat16() for tensor in (torch.ones(4, 24, device="cuda"), weight, lora_A, lora_B)]
    with pk.use_backend("cuda:fused"), pytest.raises(RuntimeError, match=r"expected no dropout$"):
        pk.lora_linear(*halves, 1.0, dropout_p=0.5, training=True)


def test_auto_decides_by_sizes():
    taken = pk.backends.choose("lora_linear", torch.ones(1, device="cuda", dtype=torch.bfloat16))
    assert taken == "auto"
    assert pk.backends.choose("lora_linear", torch.ones(1, device="cuda", dtype=torch.float64)) == "reference"


@BACKENDS_AND_WIDTHS
def test_layouts(backend, dtype):
    checks.check_layouts(backend, "cuda", dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    checks.check_empty(backend, "cuda", torch.bfloat16)


@BACKENDS_AND_WIDTHS
def test_same_mask(backend, dtype):
    checks.check_same_mask(backend, "cuda", dtype)


def test_same_mask_as_the_cpu():
    seed = torch.tensor([123456789])
    on_cpu = dropout.draw_mask(seed, 100, 333, 0.3, 2)
    assert torch.equal(dropout.draw_mask(seed.cuda(), 100, 333, 0.3, 2).cpu(), on_cpu)


@pytest.mark.parametrize(
    ("backend", "dropout_p"),
    [(backend, p) for backend in ("auto", "triton:fused", "triton:blas", "cuda:passes") for p in (0.0, 0.3)]
    + [pytest.param("cuda:fused", 0.0, marks=ON_SM_90)],
)
def test_cuda_graph(backend, dropout_p):
    """A captured forward and backward replays on new inputs, with a new mask at every replay."""
    case = make_case((64,), 128, (96,), 8, torch.bfloat16, device="cuda")
    weight, lora_A, lora_B, scaling, bias = case.projections[0]
    x, lora_A, lora_B = (t.clone().requires_grad_() for t in (case.x, lora_A, lora_B))

    def step():
        with pk.use_backend(backend):
            y = pk.lora_linear(x, weight, lora_A, lora_B, scaling, bias, dropout_p=dropout_p, training=True)
        return [y, *torch.autograd.grad(y, (x, lora_A, lora_B), case.grad_ys[0])]

    graph, results = captured(step)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    first = [value.clone() for value in results]
    graph.replay()
    if dropout_p:
        assert not torch.equal(first[0], results[0])
    else:
        for one, other, eager in zip(first, results, step()):
            assert torch.equal(one, other)
            assert torch.equal(one, eager)


@pytest.mark.parametrize("backend", ["triton:fused", "triton:blas", "cuda"])
def test_cuda_graph_of_projections_of_which_some_train_A(backend):
    case = make_case((64,), 128, (96, 32, 32), 8, torch.bfloat16, device="cuda")
    given = [p._replace(lora_A=p.lora_A.requires_grad_(j != 1)) for j, p in enumerate(case.projections)]
    x = case.x.requires_grad_()

    def step():
        with pk.use_backend(backend):
            ys = pk.lora_linear_shared_input(x, given, dropout_p=0.3, training=True)
        return torch.autograd.grad(ys, (x, given[0].lora_A, given[2].lora_A), case.grad_ys)

    graph, results = captured(step)
    graph.replay()
    assert all(torch.isfinite(value).all() for value in results)


@pytest.mark.time_limit(180)
@pytest.mark.parametrize("backend", ["auto", "triton", "cuda"])
def test_compile(backend):
    torch._dynamo.reset()
    case = make_case((33,), 128, (96, 32), 8, torch.bfloat16, device="cuda")
    given = [p._replace(lora_A=p.lora_A.requires_grad_(), lora_B=p.lora_B.requires_grad_()) for p in case.projections]
    leaves = [t for p in given for t in (p.lora_A, p.lora_B)]

    def function(x):
        with pk.use_backend(backend):
            return sum(y.float().square().sum() for y in pk.lora_linear_shared_input(x, given))

    compiled = torch.compile(function, fullgraph=True)
    for rows in (33, 40, 57):
        x = torch.randn(rows, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        found = torch.autograd.grad(compiled(x), [x, *leaves])
        for one, other in zip(found, torch.autograd.grad(function(x), [x, *leaves])):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.time_limit(180)
def test_more_than_2_to_the_31_elements():
    """A row past 2³¹ elements of x comes out as if it were computed alone."""
    M, K, N = (1 << 19) + 64, 4096 + 64, 64
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    x = torch.empty(M, K, device="cuda", dtype=torch.bfloat16).normal_()
    assert x.numel() > 2**31
    case = make_case((1,), K, (N,), 8, torch.bfloat16, device="cuda")
    weight, lora_A, lora_B, scaling, bias = case.projections[0]
    leaves = [x.requires_grad_(), lora_A.requires_grad_(), lora_B.requires_grad_()]
    in_one = ("cuda:fused",) if native.has_boxes(x.device) else ()
    for backend in ("triton:fused", "triton:blas", "cuda:passes", *in_one):
        with pk.use_backend(backend):
            y = pk.lora_linear(x, weight, lora_A, lora_B, scaling, bias)
            tail = pk.lora_linear(x[-64:].clone(), weight, lora_A, lora_B, scaling, bias)
        torch.testing.assert_close(y[-64:], tail, rtol=2e-2, atol=2e-2)
        dx, dA, dB = torch.autograd.grad(y, leaves, torch.ones_like(y))
        torch.testing.assert_close(dx[-1], dx[0], rtol=2e-2, atol=2e-2)
        assert torch.isfinite(dA).all()
        assert torch.isfinite(dB).all()
        del y, tail, dx


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("backend", ["triton:fused", "cuda:passes", "cuda:fused"])
def test_another_device_than_the_current(backend):
    case = make_case((40,), 64, (48,), 8, torch.bfloat16, device="cuda:1")
    with torch.cuda.device(0), pk.use_backend(backend):
        y = pk.lora_linear(case.x, *case.projections[0])
    assert y.device == torch.device("cuda:1")
