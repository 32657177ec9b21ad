"""The scaled linear op on a CUDA GPU: both backends, in the dtypes that people train in."""

import pytest
import torch

import peft_kernels as pk
from peft_kernels.testing.scaled_linear import make_case, ours
from tests.checks import scaled_linear as checks
from tests.checks.common import captured

pytestmark = pytest.mark.gpu
BACKENDS = ["triton", "reference"]
DTYPES = {
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float32": {"dtype": torch.float32},
    "float32-scale": {"dtype": torch.bfloat16, "scale_dtype": torch.float32},
}
SHAPES = checks.SHAPES | {
    "large": {"batch": (2, 700), "in_features": 1024, "out_features": 1536},
    "large-odd": {"batch": (1037,), "in_features": 1033, "out_features": 1161},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", checks.SETTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_within_eager(backend, dtype, setting, shape):
    checks.check_within_eager(backend, device="cuda", **SHAPES[shape], **checks.SETTINGS[setting], **DTYPES[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale_input", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_subsets(backend, scale_input, dtype):
    checks.check_subsets(backend, device="cuda", scale_input=scale_input, **DTYPES[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
def test_runs(backend, monkeypatch):
    checks.check_runs(backend, "cuda", monkeypatch)


def test_auto_takes_triton():
    assert pk.backends.choose("scaled_linear", torch.ones(1, device="cuda", dtype=torch.bfloat16)) == "triton"
    assert pk.backends.choose("scaled_linear", torch.ones(1, device="cuda", dtype=torch.float64)) == "reference"


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts(backend):
    checks.check_layouts(backend, "cuda")


@pytest.mark.parametrize("scale_input", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_cuda_graph(backend, scale_input):
    """A captured forward and backward replays on new inputs."""
    case = make_case((64,), 128, 96, torch.bfloat16, torch.float32, scale_input=scale_input, device="cuda")
    leaves = case.leaves()

    def step():
        with pk.use_backend(backend):
            y = ours(case, leaves)
        return [y, *torch.autograd.grad(y, list(leaves.values()), case.grad_y)]

    graph, results = captured(step)
    with torch.no_grad():
        leaves["x"].copy_(torch.randn_like(leaves["x"]))
    graph.replay()
    for one, eager in zip(results, step()):
        assert torch.equal(one, eager)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current():
    case = make_case((40,), 64, 48, torch.bfloat16, device="cuda:1")
    with torch.cuda.device(0), pk.use_backend("triton"):
        y = ours(case, case.leaves())
    assert y.device == torch.device("cuda:1")
