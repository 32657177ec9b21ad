"""The scaled linear op on the CPU: its reference against float64 and PEFT, what it saves, what it refuses, and how it
goes with the rest of torch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.ops.scaled_linear import ScaledLinearFunction
from peft_kernels.testing.scaled_linear import NAMES, make_case, ours, run
from tests.checks import scaled_linear as checks

DTYPES = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float32-scale": {"dtype": torch.bfloat16, "scale_dtype": torch.float32},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", checks.SETTINGS)
@pytest.mark.parametrize("shape", checks.SHAPES)
def test_within_eager(dtype, setting, shape):
    checks.check_within_eager("reference", **checks.SHAPES[shape], **checks.SETTINGS[setting], **DTYPES[dtype])


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.lists(st.integers(1, 12), max_size=3).map(tuple),
    in_features=st.integers(1, 200),
    out_features=st.integers(1, 120),
    scale_input=st.booleans(),
    bias=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_drawn_shapes(dtype, **case_arguments):
    checks.check_within_eager("reference", **case_arguments, **DTYPES[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("setting", checks.SETTINGS)
def test_autocast(dtype, setting):
    """Everything in float32, the scale too, as PEFT keeps it."""
    checks.check_within_eager("reference", autocast=dtype, batch=(40,), **checks.SETTINGS[setting])
    case = make_case()
    with torch.autocast("cpu", dtype=dtype):
        assert ours(case, case.leaves()).dtype == dtype


@pytest.mark.parametrize("scale_input", [False, True])
def test_gradcheck(scale_input):
    case = make_case((3,), 5, 4, torch.float64, scale_input=scale_input)

    def function(*tensors):
        return ours(case, dict(zip(NAMES, tensors)))

    assert torch.autograd.gradcheck(function, tuple(case.leaves().values()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale_input", [False, True])
def test_subsets(dtype, scale_input):
    checks.check_subsets("reference", scale_input=scale_input, **DTYPES[dtype])


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_runs(backend, monkeypatch):
    if backend == "auto":
        assert pk.backends.choose("scaled_linear", torch.ones(1)) == "reference"
    else:
        checks.check_runs(backend, "cpu", monkeypatch)


def test_layouts():
    checks.check_layouts("reference")


@pytest.mark.parametrize("feedforward", [False, True])
def test_equals_peft(feedforward):
    """Its IA3 layer: on the output, or on the input of a feed-forward layer."""
    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(24, 16)).double()
    config = IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else [], init_ia3_weights=False)
    model = get_peft_model(base, config).double()
    layer = model.get_base_model()[0]
    scale = layer.ia3_l["default"]
    x = torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), [x, scale])
    y = pk.scaled_linear(x, layer.base_layer.weight, scale.flatten(), layer.base_layer.bias, scale_input=feedforward)
    torch.testing.assert_close(y, model(x))
    for one, other in zip(torch.autograd.grad(y.square().sum(), [x, scale]), expected):
        torch.testing.assert_close(one, other)


class TestTorch:
    """torch.compile, opcheck, checkpointing, graphs of autograd."""

    @pytest.mark.parametrize("scale_input", [False, True])
    def test_opcheck(self, scale_input):
        case = make_case((4, 5), 24, 16, torch.bfloat16, torch.float32, scale_input=scale_input)
        ops = torch.ops.peft_kernels
        forward = (case.x, case.weight, case.scale, case.bias, scale_input, not scale_input, "reference")
        torch.library.opcheck(ops.scaled_linear_forward.default, forward)
        z = None if scale_input else case.grad_y
        for needs in ([True] * 4, [False, False, True, False], [True, False, False, True]):
            backward = (case.grad_y, case.x, case.weight, case.scale, z, scale_input, needs, torch.float32, "reference")
            torch.library.opcheck(ops.scaled_linear_backward.default, backward)

    @pytest.mark.parametrize("scale_input", [False, True])
    def test_compile_with_dynamic_rows(self, scale_input):
        """fullgraph; one more graph when the rows turn out to be dynamic, none after that; eager's numbers."""
        torch._dynamo.reset()
        graphs = CompileCounterWithBackend("inductor")
        leaves = make_case(scale_input=scale_input).leaves()
        leaves.pop("x")

        def function(x):
            return pk.scaled_linear(x, **leaves, scale_input=scale_input)

        compiled = torch.compile(function, fullgraph=True, backend=graphs)
        for rows in (4, 6, 7, 9, 12):
            x = torch.randn(rows, 24, requires_grad=True)
            found = torch.autograd.grad(compiled(x).sum(), [x, *leaves.values()])
            for one, other in zip(found, torch.autograd.grad(function(x).sum(), [x, *leaves.values()])):
                torch.testing.assert_close(one, other)
        assert graphs.frame_count <= 2

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpoint(self, reentrant):
        case = make_case()
        leaves = case.leaves()
        y = checkpoint(lambda x: ours(case, leaves | {"x": x}), leaves["x"], use_reentrant=reentrant)
        grads = torch.autograd.grad if not reentrant else None
        if grads:
            found = dict(zip(leaves, grads(y, list(leaves.values()), case.grad_y)))
        else:
            y.backward(case.grad_y)
            found = {name: leaf.grad for name, leaf in leaves.items()}
        for name, value in run(case).items():
            if name != "y":
                torch.testing.assert_close(found[name.removeprefix("grad of ")], value)

    def test_differentiated_twice(self):
        case = make_case()
        leaves = case.leaves()
        (grad,) = torch.autograd.grad(ours(case, leaves).sum(), [leaves["x"]], create_graph=True)
        with pytest.raises(RuntimeError, match="scaled_linear: expected a first derivative"):
            grad.sum().backward()

    def test_is_a_function(self):
        assert issubclass(ScaledLinearFunction, torch.autograd.Function)


x, weight, bias = torch.ones(2, 4), torch.ones(3, 4), torch.ones(3)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((x.long(), weight, bias), {}, "expected a floating-point x of shape [..., K], got [2, 4] int64 on cpu"),
        ((torch.tensor(1.0), weight, bias), {}, "expected a floating-point x of shape [..., K], got [] float32"),
        ((x, weight.t(), bias), {}, "expected weight [N, 4] in x's dtype torch.float32, got [4, 3] float32"),
        ((x, weight.half(), bias), {}, "expected weight [N, 4] in x's dtype torch.float32, got [3, 4] float16"),
        ((x, weight, torch.ones(4)), {}, "expected scale [3] in x's dtype torch.float32, got [4] float32"),
        ((x, weight, bias), {"scale_input": True}, "expected scale [4] in x's dtype torch.float32, got [3] float32"),
        ((x, weight, bias[:, None]), {}, "expected scale [3] in x's dtype torch.float32, got [3, 1] float32"),
        ((x, weight, bias.double()), {}, "expected scale [3] in x's dtype torch.float32, got [3] float64"),
        ((x.half(), weight.half(), bias.bfloat16()), {}, "in x's dtype torch.float16 or float32, got [3] bfloat16"),
        ((x, weight, bias, torch.ones(4)), {}, "expected bias [3] in x's dtype torch.float32, got [4] float32"),
        ((x, weight, bias.to("meta")), {}, "expected every tensor on x's device cpu, got [3] float32 on meta"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ValueError) as error:
        pk.scaled_linear(*arguments, **options)
    assert str(error.value).startswith("scaled_linear: ") and message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_backend_that_is_not_there():
    with pk.use_backend("triton"), pytest.raises(RuntimeError, match="scaled_linear: the backend 'triton' cannot run"):
        pk.scaled_linear(x, weight, bias)
    with pk.use_backend("cuda"), pytest.raises(RuntimeError, match="expected one of the backends reference, triton"):
        pk.scaled_linear(x, weight, bias)
