"""The masked linear op on a CUDA GPU: what is special to it."""

import pytest
import torch

import peft_kernels as pk
from peft_kernels.testing.masked_linear import make_case, ours
from tests.checks import masked_linear as checks
from tests.checks.common import captured

pytestmark = pytest.mark.gpu
BACKENDS = ["triton", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask(backend):
    checks.check_mask(backend, "cuda", (torch.float32, torch.bfloat16, torch.float16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_scores_keep_their_mask(backend):
    checks.check_float32_scores_beside(backend, torch.bfloat16, "cuda")


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
