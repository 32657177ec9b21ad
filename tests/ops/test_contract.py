"""Every op with one x and one y on the CPU: its reference against float64 and the eager expression, what it saves, what
it refuses, and how it goes with the rest of torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.testing import saved_tensors
from tests.checks import contract as checks
from tests.checks.common import subsets
from tests.checks.contract import CONTRACTS, SETTINGS, SHAPES

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
PRECISIONS = ["bfloat16", "float16", "float32", "float32-operand"]
every_setting = pytest.mark.parametrize(("op", "setting"), SETTINGS)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)


@pytest.fixture
def contract(op):
    return CONTRACTS[op]


@pytest.fixture(params=CONTRACTS)
def op(request):
    return request.param


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def dtypes(contract, precision):
    return contract.dtypes(BF16, F16, F32)[precision]


@every_precision
@every_setting
@pytest.mark.parametrize("shape", SHAPES)
def test_within_eager(contract, setting, shape, precision):
    arguments = SHAPES[shape] | contract.settings[setting] | dtypes(contract, precision)
    checks.check_within_eager(contract, "reference", **arguments)


@pytest.mark.parametrize("op", CONTRACTS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_drawn_shapes(op, data):
    contract = CONTRACTS[op]
    arguments = {
        "batch": data.draw(st.lists(st.integers(1, 12), max_size=3).map(tuple)),
        "in_features": data.draw(st.integers(1, 200)),
        "out_features": data.draw(st.integers(1, 120)),
        **{name: data.draw(strategy) for name, strategy in contract.drawn.items()},
        **dtypes(contract, data.draw(st.sampled_from(PRECISIONS))),
    }
    checks.check_within_eager(contract, "reference", **arguments)


@every_setting
def test_equals_the_definition_in_float64(contract, setting):
    """The op, and the yardstick of the other tests."""
    case = contract.cases.make_case((3, 5), 20, 12, F64, **contract.settings[setting])
    exact = contract.cases.float64_reference(case)
    for found in (contract.cases.run(case), contract.cases.eager(case)):
        for name, value in found.items():
            assert value.dtype == F64
            torch.testing.assert_close(value, exact[name])


@every_precision
@every_setting
def test_subsets(contract, setting, precision):
    checks.check_subsets(contract, "reference", **contract.settings[setting], **dtypes(contract, precision))


def test_nothing_is_saved_without_gradients(contract):
    case = contract.cases.make_case()
    with saved_tensors() as saved, torch.no_grad():
        contract.cases.ours(case, case.leaves())
    assert not saved


def test_runs(contract, monkeypatch):
    assert pk.backends.choose(contract.name, torch.ones(1)) == "reference"
    checks.check_runs(contract, "reference", "cpu", monkeypatch)


def test_layouts(contract):
    checks.check_layouts(contract, "reference")


@pytest.mark.parametrize("dtype", [BF16, F16])
@every_setting
def test_autocast(contract, setting, dtype):
    """float32 parameters under autocast: autocast's dtype out, as `F.linear`, gradients in each one's own dtype."""
    arguments = contract.settings[setting]
    checks.check_within_eager(contract, "reference", autocast=dtype, batch=(6, 30), in_features=32, **arguments)
    case = contract.cases.make_case(**arguments)
    leaves = case.leaves()
    with torch.autocast("cpu", dtype=dtype):
        y = contract.cases.ours(case, leaves)
    wanted = [leaf for leaf in leaves.values() if leaf is not None]
    assert y.dtype == dtype
    assert [grad.dtype for grad in torch.autograd.grad(y.sum(), wanted)] == [leaf.dtype for leaf in wanted]


@every_setting
def test_registration(contract, setting):
    dtypes = {"dtype": BF16, f"{contract.operand}_dtype": F32}
    checks.check_registration(contract, **contract.settings[setting], **dtypes)


@pytest.mark.parametrize(("op", "setting"), [one for one in SETTINGS if "bias" not in one[1]])
def test_compile_with_dynamic_rows(contract, setting, fresh_compiler):
    """fullgraph; one more graph when the rows turn out to be dynamic, none after that; eager's numbers."""
    graphs = CompileCounterWithBackend("inductor")
    case = contract.cases.make_case(**contract.settings[setting])
    leaves = case.leaves()
    others = [leaf for name, leaf in leaves.items() if leaf is not None and name != "x"]

    def function(x):
        return contract.cases.ours(case, leaves | {"x": x})

    compiled = torch.compile(function, fullgraph=True, backend=graphs)
    for rows in (4, 6, 7, 9, 12):
        x = torch.randn(rows, 24, requires_grad=True)
        found = torch.autograd.grad(compiled(x).sum(), [x, *others])
        for one, other in zip(found, torch.autograd.grad(function(x).sum(), [x, *others]), strict=True):
            torch.testing.assert_close(one, other)
    assert graphs.frame_count <= 2


def test_compile_every_subset(contract, fresh_compiler):
    cases = contract.cases
    for frozen in subsets(cases.NAMES):
        torch._dynamo.reset()
        case = cases.make_case((5,), 16, 8, frozen=frozen)
        results = cases.run(case, torch.compile(cases.ours, fullgraph=True, backend="aot_eager"))
        for name, value in cases.run(case).items():
            torch.testing.assert_close(results[name], value)


def test_compile_under_autocast(contract, fresh_compiler):
    case = contract.cases.make_case((6, 3), 32, 16)
    leaves = case.leaves()
    with torch.autocast("cpu", dtype=BF16):
        y = torch.compile(contract.cases.ours, fullgraph=True)(case, leaves)
    assert y.dtype == BF16
    for leaf, grad in zip(leaves.values(), torch.autograd.grad(y.sum(), list(leaves.values())), strict=True):
        assert grad.dtype == leaf.dtype


@every_setting
def test_gradcheck(contract, setting):
    """Of all operands that the definition can be differentiated by; scores are straight-through."""
    case = contract.cases.make_case((3,), 5, 4, F64, **contract.settings[setting])
    leaves = case.leaves()
    names = [name for name, leaf in leaves.items() if leaf is not None and name != "scores"]

    def function(*tensors):
        return contract.cases.ours(case, leaves | dict(zip(names, tensors)))

    assert torch.autograd.gradcheck(function, tuple(leaves[name] for name in names))


def test_functional_gradients(contract):
    case = contract.cases.make_case(dtype=F64)
    leaves = case.leaves()

    def loss(*tensors):
        return contract.cases.ours(case, dict(zip(leaves, tensors))).square().sum()

    loss(*leaves.values()).backward()
    found = torch.func.grad(loss, argnums=tuple(range(len(leaves))))(*case.operands().values())
    for grad, leaf in zip(found, leaves.values(), strict=True):
        torch.testing.assert_close(grad, leaf.grad)


@pytest.mark.parametrize("reentrant", [True, False])
@every_setting
def test_checkpointing(contract, setting, reentrant):
    case = contract.cases.make_case(**contract.settings[setting])
    leaves, again = case.leaves(), case.leaves()
    contract.cases.ours(case, leaves).square().sum().backward()
    y = checkpoint(lambda x: contract.cases.ours(case, again | {"x": x}), again["x"], use_reentrant=reentrant)
    y.square().sum().backward()
    for name, leaf in leaves.items():
        assert leaf is None or torch.equal(leaf.grad, again[name].grad)


def test_double_backward_is_refused(contract):
    case = contract.cases.make_case()
    leaves = case.leaves()
    y = contract.cases.ours(case, leaves).square().sum()
    (grad,) = torch.autograd.grad(y, leaves["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=f"{contract.name}: expected a first derivative, got asked to differentiate"):
        grad.sum().backward()


def test_retained_graph_gives_the_same_again(contract):
    case = contract.cases.make_case()
    leaves = case.leaves()
    y = contract.cases.ours(case, leaves)
    once = torch.autograd.grad(y.sum(), list(leaves.values()), retain_graph=True)
    for one, other in zip(once, torch.autograd.grad(y.sum(), list(leaves.values())), strict=True):
        assert torch.equal(one, other)
    for name, leaf in leaves.items():
        assert torch.equal(leaf, getattr(case, name))


def test_meta_tensors(contract):
    case = contract.cases.make_case((2, 3), 16, 8)
    y = contract.cases.ours(case, {name: tensor.to("meta") for name, tensor in case.operands().items()})
    assert y.shape == (2, 3, 8) and y.is_meta


BAD_INPUT = [(name, bad) for name, contract in CONTRACTS.items() for bad in contract.bad_input]


@pytest.mark.parametrize(("op", "bad"), BAD_INPUT)
def test_bad_input_gets_one_line(contract, bad):
    changes, message = contract.bad_input[bad]
    case = contract.cases.make_case()
    arguments = case.operands() | ({"threshold": case.threshold} if contract.name == "masked_linear" else {})
    with pytest.raises(ValueError) as error:
        contract.function(**(arguments | changes))
    assert str(error.value).startswith(f"{contract.name}: ") and message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("cuda", "expected one of the backends reference, triton, got 'cuda'"),
        ("triton", "the backend 'triton' cannot run here: expected CUDA tensors, got cpu"),
    ],
)
def test_unavailable_backend(contract, backend, message):
    case = contract.cases.make_case()
    with pk.use_backend(backend), pytest.raises(RuntimeError) as error:
        contract.cases.ours(case, case.leaves())
    assert str(error.value) == f"{contract.name}: {message}"
