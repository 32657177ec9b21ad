"""The masked linear op on a CUDA GPU: both backends, in the dtypes that people train in."""

import pytest
import torch

import peft_kernels as pk
from peft_kernels.testing.masked_linear import NAMES, make_case, ours
from tests.checks import masked_linear as checks
from tests.checks.common import captured

pytestmark = pytest.mark.gpu
BACKENDS = ["triton", "reference"]
DTYPES = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "float32-scores": {"dtype": torch.bfloat16, "scores_dtype": torch.float32},
}
SHAPES = checks.SHAPES | {
    "large": {"batch": (2, 700), "in_features": 1024, "out_features": 1536},
    "large-few-rows": {"batch": (300,), "in_features": 1024, "out_features": 1536},
    "large-odd": {"batch": (1037,), "in_features": 1033, "out_features": 1161},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", checks.SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_within_eager(backend, dtype, setting, shape):
    checks.check_within_eager(backend, device="cuda", **SHAPES[shape], **checks.SETTINGS[setting], **DTYPES[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_subsets(backend, dtype):
    checks.check_subsets(backend, device="cuda", **DTYPES[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs(backend, monkeypatch):
    checks.check_runs(backend, "cuda", monkeypatch)


def test_auto_takes_triton():
    assert pk.backends.choose("masked_linear", torch.ones(1, device="cuda", dtype=torch.bfloat16)) == "triton"
    assert pk.backends.choose("masked_linear", torch.ones(1, device="cuda", dtype=torch.float64)) == "reference"


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    checks.check_layouts(backend, "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask(backend):
    checks.check_mask(backend, "cuda", (torch.float32, torch.bfloat16, torch.float16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_scores_keep_their_mask(backend):
    checks.check_float32_scores_beside(backend, torch.bfloat16, "cuda")


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_synchronisation(backend):
    """A threshold that is a tensor is read by the device: the host never waits for it."""
    case = make_case((64,), 128, 96, torch.bfloat16, tensor_threshold=True, device="cuda")
    leaves = case.leaves()
    before = torch.cuda.get_sync_debug_mode()
    with pk.use_backend(backend):
        ours(case, leaves).backward(case.grad_y)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours(case, leaves).backward(case.grad_y)
        finally:
            torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graph(backend):
    """A captured forward and backward replays on new inputs and a new threshold."""
    case = make_case((64,), 128, 96, torch.bfloat16, torch.float32, tensor_threshold=True, device="cuda")
    leaves = case.leaves()

    def step():
        with pk.use_backend(backend):
            y = ours(case, leaves)
        return [y, *torch.autograd.grad(y, list(leaves.values()), case.grad_y)]

    graph, results = captured(step)
    with torch.no_grad():
        leaves["x"].copy_(torch.randn_like(leaves["x"]))
        case.threshold.fill_(0.7)
    graph.replay()
    for one, eager in zip(results, step()):
        assert torch.equal(one, eager)


@pytest.mark.time_limit(180)
def test_compile():
    torch._dynamo.reset()
    case = make_case((33,), 128, 96, torch.bfloat16, torch.float32, device="cuda")
    leaves = case.leaves()
    compiled = torch.compile(lambda x: ours(case, leaves | {"x": x}).float().square().sum(), fullgraph=True)
    for rows in (33, 40, 57):
        x = torch.randn(rows, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        wanted = [x, *(leaves[name] for name in NAMES[1:])]
        found = torch.autograd.grad(compiled(x), wanted)
        expected = torch.autograd.grad(ours(case, leaves | {"x": x}).float().square().sum(), wanted)
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@pytest.mark.time_limit(180)
def test_more_than_2_to_the_31_elements():
    """A row past 2³¹ elements of x comes out as if it were computed alone."""
    M, K, N = (1 << 19) + 64, 4096 + 64, 64
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    x = torch.empty(M, K, device="cuda", dtype=torch.bfloat16).normal_().requires_grad_()
    assert x.numel() > 2**31
    case = make_case((1,), K, N, torch.bfloat16, device="cuda")
    leaves = case.leaves() | {"x": x}
    with pk.use_backend("triton"):
        y = ours(case, leaves)
        tail = ours(case, leaves | {"x": x.detach()[-64:].clone()})
    torch.testing.assert_close(y[-64:], tail, rtol=2e-2, atol=2e-2)
    dx, dweight, dscores, _ = torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y))
    torch.testing.assert_close(dx[-1], dx[0])
    torch.testing.assert_close(dscores, torch.ones_like(y).t() @ x.detach() * case.weight, rtol=2e-2, atol=2.0)
    assert torch.isfinite(dweight).all()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current():
    case = make_case((40,), 64, 48, torch.bfloat16, device="cuda:1")
    with torch.cuda.device(0), pk.use_backend("triton"):
        y = ours(case, case.leaves())
    assert y.device == torch.device("cuda:1")
