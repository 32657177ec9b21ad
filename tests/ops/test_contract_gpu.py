"""Every op with one x and one y on a CUDA GPU: both backends, in the dtypes that people train in."""

import pytest
import torch

import peft_kernels as pk
from tests.checks import contract as checks
from tests.checks.common import captured
from tests.checks.contract import CONTRACTS, SETTINGS

pytestmark = pytest.mark.gpu
PRECISIONS = ["bfloat16", "float16", "float32", "float32-operand"]
SHAPES = checks.SHAPES | {
    "large": {"batch": (2, 700), "in_features": 1024, "out_features": 1536},
    "large-few-rows": {"batch": (300,), "in_features": 1024, "out_features": 1536},
    "large-odd": {"batch": (1037,), "in_features": 1033, "out_features": 1161},
}
every_backend = pytest.mark.parametrize("backend", ["triton", "reference"])
every_op = pytest.mark.parametrize("op", CONTRACTS)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
every_setting = pytest.mark.parametrize(("op", "setting"), SETTINGS)


def arguments_of(op, setting, precision):
    contract = CONTRACTS[op]
    dtypes = contract.dtypes(torch.bfloat16, torch.float16, torch.float32)[precision]
    return {"device": "cuda"} | contract.settings[setting] | dtypes


@every_backend
@every_precision
@every_setting
@pytest.mark.parametrize("shape", SHAPES)
def test_within_eager(op, setting, shape, precision, backend):
    arguments = SHAPES[shape] | arguments_of(op, setting, precision)
    checks.check_within_eager(CONTRACTS[op], backend, **arguments)


@every_backend
@every_precision
@every_setting
def test_subsets(op, setting, precision, backend):
    checks.check_subsets(CONTRACTS[op], backend, **arguments_of(op, setting, precision))


@every_backend
@every_op
def test_runs(op, backend, monkeypatch):
    checks.check_runs(CONTRACTS[op], backend, "cuda", monkeypatch)


@every_op
def test_auto_takes_triton(op):
    assert pk.backends.choose(op, torch.ones(1, device="cuda", dtype=torch.bfloat16)) == "triton"
    assert pk.backends.choose(op, torch.ones(1, device="cuda", dtype=torch.float64)) == "reference"


@every_backend
@every_op
def test_layouts(op, backend):
    checks.check_layouts(CONTRACTS[op], backend, "cuda")


@every_backend
@every_setting
def test_registration(op, setting, backend):
    arguments = arguments_of(op, setting, "float32-operand")
    checks.check_registration(CONTRACTS[op], backend, **arguments)


@every_backend
@every_setting
def test_no_synchronisation(op, setting, backend):
    """Whatever is on the device is read there: the CPU never waits for it."""
    cases = CONTRACTS[op].cases
    case = cases.make_case((64,), 128, 96, **arguments_of(op, setting, "bfloat16"))
    leaves = case.leaves()
    before = torch.cuda.get_sync_debug_mode()
    with pk.use_backend(backend):
        cases.ours(case, leaves).backward(case.grad_y)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            cases.ours(case, leaves).backward(case.grad_y)
        finally:
            torch.cuda.set_sync_debug_mode(before)


@every_backend
@every_setting
def test_cuda_graph(op, setting, backend):
    """A captured forward and backward replays on new inputs."""
    cases = CONTRACTS[op].cases
    case = cases.make_case((64,), 128, 96, **arguments_of(op, setting, "float32-operand"))
    leaves = case.leaves()
    wanted = [leaf for leaf in leaves.values() if leaf is not None]

    def step():
        with pk.use_backend(backend):
            y = cases.ours(case, leaves)
        return [y, *torch.autograd.grad(y, wanted, case.grad_y)]

    graph, results = captured(step)
    with torch.no_grad():
        leaves["x"].copy_(torch.randn_like(leaves["x"]))
    graph.replay()
    for one, eager in zip(results, step(), strict=True):
        assert torch.equal(one, eager)


@pytest.mark.time_limit(180)
@every_op
def test_compile(op):
    torch._dynamo.reset()
    contract = CONTRACTS[op]
    arguments = arguments_of(op, next(iter(contract.settings)), "float32-operand")
    case = contract.cases.make_case((33,), 128, 96, **arguments)
    leaves = case.leaves()

    def loss(x):
        return contract.cases.ours(case, leaves | {"x": x}).float().square().sum()

    compiled = torch.compile(loss, fullgraph=True)
    for rows in (33, 40, 57):
        x = torch.randn(rows, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        wanted = [x, *(leaf for name, leaf in leaves.items() if name != "x")]
        found, expected = torch.autograd.grad(compiled(x), wanted), torch.autograd.grad(loss(x), wanted)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


@every_op
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_device_than_the_current(op):
    cases = CONTRACTS[op].cases
    case = cases.make_case((40,), 64, 48, torch.bfloat16, device="cuda:1")
    with torch.cuda.device(0), pk.use_backend("triton"):
        y = cases.ours(case, case.leaves())
    assert y.device == torch.device("cuda:1")
