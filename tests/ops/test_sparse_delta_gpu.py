"""The linear layer with a sparse delta on a CUDA GPU: every backend, in the dtypes that people train in; what is
allocated, what a CUDA graph holds, and the step of the optimizer."""

import pytest
import torch

import peft_kernels as pk
from peft_kernels.testing.sparse_delta import make_layout
from tests.checks import sparse_delta as checks
from tests.checks.common import captured

pytestmark = pytest.mark.gpu
BACKENDS = ["triton", "cuda", "reference"]
DTYPES = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "float32-values": {"dtype": torch.bfloat16, "values_dtype": torch.float32},
}
SHAPES = checks.SHAPES | {
    "large": {"batch": (2, 700), "in_features": 1024, "out_features": 1536},
    "large-odd": {"batch": (1037,), "in_features": 1032, "out_features": 1160},
}
LAYOUTS = checks.LAYOUTS | {"entries-few": {"kind": "entries", "density": 0.001}}


@pytest.mark.parametrize(
    ("backend", "layout", "dtype"),
    [
        (backend, layout, dtype)
        for backend in BACKENDS
        for layout, options in LAYOUTS.items()
        for dtype in DTYPES
        if options["kind"] in checks.kinds_of(backend) and (backend, dtype) != ("cuda", "float32")
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_within_eager(backend, dtype, layout, shape):
    checks.check_within_eager(backend, device="cuda", **SHAPES[shape], **LAYOUTS[layout], **DTYPES[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_subsets(backend):
    checks.check_subsets(backend, "cuda", torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend):
    checks.check_strides(backend, "cuda", torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty(backend):
    checks.check_empty(backend, "cuda", torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs(backend, monkeypatch):
    checks.check_runs(backend, "cuda", monkeypatch, torch.bfloat16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_writing(backend, dtype):
    for kind in checks.kinds_of(backend):
        checks.check_writing(backend, kind, "cuda", dtype)


def test_kinds_without_a_kernel_are_refused():
    checks.check_refusals("cuda", "cuda", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", ["delta", "weight"])
def test_step(dtype, decay):
    checks.check_step("triton", "cuda", dtype, decay)


def make_training(kind: str, size: int = 2048, density: float = 0.01):
    torch.manual_seed(0)
    linear = torch.nn.Linear(size, size, bias=False, device="cuda", dtype=torch.bfloat16)
    layer = pk.nn.SparseDeltaLinear.from_linear(linear, make_layout(kind, size, size, density).to("cuda"))
    return layer, torch.randn(256, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)


@pytest.mark.parametrize("kind", checks.KINDS)
def test_nothing_as_large_as_the_weight_is_allocated(kind):
    layer, x = make_training(kind)
    optimizer = pk.optim.SparseAdamW(layer, lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        layer(x).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    x.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layer(x).sum().backward()
    optimizer.step()
    activations = 4 * x.nbytes + 16 * layer.layout.nnz
    assert torch.cuda.max_memory_allocated() - before < activations + layer.weight.nbytes / 2


@pytest.mark.parametrize("kind", checks.KINDS)
def test_cuda_graph(kind):
    """A whole step captured: forward, backward and SparseAdamW; replays train as eager steps do."""
    layer, x = make_training(kind)
    other, _ = make_training(kind)
    optimizers = [pk.optim.SparseAdamW(one, lr=1e-3, capturable=True) for one in (layer, other)]

    def step(one, optimizer):
        optimizer.zero_grad(set_to_none=True)
        one(x).square().mean().backward()
        optimizer.step()

    graph, _ = captured(lambda: step(layer, optimizers[0]), warm_up=3)
    for _ in range(4):
        graph.replay()
    for _ in range(7):
        step(other, optimizers[1])
    torch.cuda.synchronize()
    torch.testing.assert_close(layer.values, other.values)
    torch.testing.assert_close(layer.weight, other.weight)


@pytest.mark.parametrize("kind", checks.KINDS)
def test_training_never_waits(kind):
    layer, x = make_training(kind)
    optimizer = pk.optim.SparseAdamW(layer, lr=1e-3)
    for number in range(3):
        torch.cuda.set_sync_debug_mode("error" if number else "default")
        try:
            optimizer.zero_grad()
            layer(x).sum().backward()
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.time_limit(180)
def test_past_two_to_the_31():
    """A weight of 2³¹ entries and more: positions, gradient and step in its last row."""
    N, K = 65538, 32768
    layout = pk.SparseLayout.rows((N, K), torch.tensor([0, N - 1], device="cuda"))
    flat = layout.indices()
    entries = pk.SparseLayout.from_indices((N, K), flat[::97])
    for one in (layout, entries):
        weight = torch.zeros(N, K, device="cuda", dtype=torch.bfloat16)
        linear = torch.nn.Linear(K, N, bias=False, device="meta")
        linear.weight = torch.nn.Parameter(weight)
        layer = pk.nn.SparseDeltaLinear.from_linear(linear, one)
        x = torch.randn(4, K, device="cuda", dtype=torch.bfloat16)
        layer(x).sum().backward()
        torch.testing.assert_close(layer.values.grad, x.float().sum(0)[one.indices() % K], rtol=2e-2, atol=2e-2)
        pk.optim.SparseAdamW(layer, lr=0.5).step()
        assert layer.weight[N - 1].any() and not layer.weight[1 : N - 1].any()
