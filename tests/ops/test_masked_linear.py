"""The masked linear op on the CPU: its reference against float64 and the eager expression, what it saves, what it
refuses, and how it goes with the rest of torch."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.ops.masked_linear import MaskedLinearFunction, configs, reference
from peft_kernels.testing import saved_tensors
from peft_kernels.testing.masked_linear import NAMES, MaskedCase, eager, float64_reference, make_case, ours, run
from tests.checks import masked_linear as checks

DTYPES = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float32-scores": {"dtype": torch.bfloat16, "scores_dtype": torch.float32},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", checks.SETTINGS)
@pytest.mark.parametrize("shape", checks.SHAPES)
def test_within_eager(dtype, setting, shape):
    checks.check_within_eager("reference", **checks.SHAPES[shape], **checks.SETTINGS[setting], **DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_within_eager_in_bands(dtype, monkeypatch):
    """A weight of many bands, the last of another size, and none of the masked copies larger than a band."""
    monkeypatch.setattr(reference, "_BAND_BYTES", 3000)
    largest, mask = [], reference.mask

    def spy(values, scores, tau):
        largest.append(values.numel() * values.element_size())
        return mask(values, scores, tau)

    monkeypatch.setattr(reference, "mask", spy)
    checks.check_within_eager("reference", batch=(50,), in_features=71, out_features=53, **DTYPES[dtype])
    assert 1000 < max(largest) <= 3000


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.lists(st.integers(1, 12), max_size=3).map(tuple),
    in_features=st.integers(1, 200),
    out_features=st.integers(1, 120),
    threshold=st.floats(-2.0, 2.0),
    bias=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
)
def test_drawn_shapes(dtype, **case_arguments):
    checks.check_within_eager("reference", **case_arguments, **DTYPES[dtype])


@pytest.mark.parametrize("scores_dtype", [torch.float64, torch.float32])
def test_equals_the_definition_in_float64(scores_dtype):
    case = make_case((3, 5), 20, 12, torch.float64, scores_dtype)
    exact = float64_reference(case)
    for name, value in run(case).items():
        torch.testing.assert_close(value, exact[name].to(value.dtype))
        assert value.dtype == (scores_dtype if name == "grad of scores" else torch.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_subsets(dtype):
    checks.check_subsets("reference", **DTYPES[dtype])


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_runs(backend, monkeypatch):
    if backend == "auto":
        assert pk.backends.choose("masked_linear", torch.ones(1)) == "reference"
    else:
        checks.check_runs(backend, "cpu", monkeypatch)


def test_layouts():
    checks.check_layouts("reference")


def test_mask():
    checks.check_mask("reference", dtypes=(torch.float64, torch.float32, torch.bfloat16, torch.float16))


def test_float32_scores_keep_their_mask():
    checks.check_float32_scores_beside("reference", torch.bfloat16)


def test_a_score_of_another_mask_gets_its_gradient():
    """The gradient is straight-through: a score below the threshold is told what its weight would do."""
    case = replace(make_case(), threshold=100.0)
    results = run(case)
    assert not results["grad of weight"].any()
    expected = (case.grad_y.t() @ case.x) * case.weight
    torch.testing.assert_close(results["grad of scores"], expected)


class TestTorch:
    """torch.compile, opcheck, autocast, torch.func, graphs of autograd."""

    @pytest.mark.parametrize("tensor_threshold", [True, False])
    def test_opcheck(self, tensor_threshold):
        case = make_case((4, 5), 24, 16, torch.bfloat16, torch.float32, tensor_threshold=tensor_threshold)
        tau = (case.threshold, 0.0) if tensor_threshold else (None, case.threshold)
        ops = torch.ops.peft_kernels
        forward = (case.x, case.weight, case.scores, case.bias, *tau, "reference")
        torch.library.opcheck(ops.masked_linear_forward.default, forward)
        for needs in ([True] * 4, [False, False, True, False], [False, False, False, True]):
            tensors = [case.x, case.weight, case.scores] if needs[2] else [None] * 3
            backward = (case.grad_y, *tensors, *tau, needs, torch.float32, "reference")
            torch.library.opcheck(ops.masked_linear_backward.default, backward)

    def test_compile_with_dynamic_rows(self):
        """fullgraph; one more graph when the rows turn out to be dynamic, none after that; eager's numbers."""
        torch._dynamo.reset()
        graphs = CompileCounterWithBackend("inductor")
        leaves = make_case().leaves()
        leaves.pop("x")

        def function(x):
            return pk.masked_linear(x, leaves["weight"], leaves["scores"], 0.1, leaves["bias"])

        compiled = torch.compile(function, fullgraph=True, backend=graphs)
        for rows in (4, 6, 7, 9, 12):
            x = torch.randn(rows, 24, requires_grad=True)
            found = torch.autograd.grad(compiled(x).sum(), [x, *leaves.values()])
            for one, other in zip(found, torch.autograd.grad(function(x).sum(), [x, *leaves.values()])):
                torch.testing.assert_close(one, other)
        assert graphs.frame_count <= 2

    def test_compile_every_subset(self):
        for frozen in checks.subsets(NAMES):
            torch._dynamo.reset()
            case = make_case((5,), 16, 8, frozen=frozen)
            results = run(case, torch.compile(ours, fullgraph=True, backend="aot_eager"))
            for name, value in run(case).items():
                torch.testing.assert_close(results[name], value)

    def test_a_threshold_that_is_a_tensor_recompiles_nothing(self):
        torch._dynamo.reset()
        graphs = CompileCounter()
        case = make_case()
        compiled = torch.compile(pk.masked_linear, fullgraph=True, backend=graphs)
        for value in (-0.25, 0.0, 1.0):
            y = compiled(case.x, case.weight, case.scores, torch.tensor(value))
            torch.testing.assert_close(y, pk.masked_linear(case.x, case.weight, case.scores, value))
        assert graphs.frame_count == 1

    @pytest.mark.parametrize("compiled", [True, False])
    def test_autocast(self, compiled):
        """float32 parameters under autocast: autocast's dtype out, as F.linear; the mask is that of the float32
        scores; gradients in each one's own dtype."""
        torch._dynamo.reset()
        case = make_case((6, 3), 32, 16)
        leaves = case.leaves()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = (torch.compile(ours, fullgraph=True) if compiled else ours)(case, leaves)
            assert y.dtype == torch.nn.functional.linear(case.x, case.weight).dtype == torch.bfloat16
        for leaf, grad in zip(leaves.values(), torch.autograd.grad(y.sum(), list(leaves.values()))):
            assert grad.dtype == leaf.dtype
        if not compiled:
            checks.check_within_eager("reference", autocast=torch.bfloat16, batch=(6, 30), in_features=32)
            checks.check_float32_scores_beside("reference", torch.float32)

    def test_functional_gradients(self):
        case = make_case(dtype=torch.float64)

        def loss(weight, scores):
            return pk.masked_linear(case.x, weight, scores, case.threshold, case.bias).square().sum()

        leaves = [case.weight.clone().requires_grad_(), case.scores.clone().requires_grad_()]
        loss(*leaves).backward()
        found = torch.func.grad(loss, argnums=(0, 1))(case.weight, case.scores)
        for grad, leaf in zip(found, leaves):
            torch.testing.assert_close(grad, leaf.grad)

    def test_double_backward_is_refused(self):
        case = make_case()
        leaves = case.leaves()
        (grad,) = torch.autograd.grad(ours(case, leaves).square().sum(), leaves["x"], create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.sum().backward()

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing(self, reentrant):
        case = make_case()
        leaves, again = case.leaves(), case.leaves()
        ours(case, leaves).square().sum().backward()
        y = checkpoint(lambda x: ours(case, again | {"x": x}), again["x"], use_reentrant=reentrant)
        y.square().sum().backward()
        for name in NAMES:
            assert torch.equal(leaves[name].grad, again[name].grad)

    def test_retained_graph_gives_the_same_again(self):
        case = make_case()
        leaves = case.leaves()
        y = ours(case, leaves)
        once = torch.autograd.grad(y.sum(), list(leaves.values()), retain_graph=True)
        for one, other in zip(once, torch.autograd.grad(y.sum(), list(leaves.values()))):
            assert torch.equal(one, other)
        for name in NAMES:
            assert torch.equal(leaves[name], getattr(case, name))

    def test_nothing_is_saved_without_gradients(self):
        case = make_case()
        with saved_tensors() as saved, torch.no_grad():
            ours(case, case.leaves())
        assert not saved

    def test_function_is_an_autograd_function(self):
        assert issubclass(MaskedLinearFunction, torch.autograd.Function)

    def test_meta_tensors(self):
        case = make_case((2, 3), 16, 8)
        y = pk.masked_linear(*(t.to("meta") for t in (case.x, case.weight, case.scores)), 0.5, case.bias.to("meta"))
        assert y.shape == (2, 3, 8)


def _call(case: MaskedCase, backend: str = "auto", **changes):
    arguments = {name: getattr(case, name) for name in (*NAMES, "threshold")}
    with pk.use_backend(backend):
        return pk.masked_linear(**(arguments | changes))


BAD_INPUT = {
    "x of another width": ({"x": torch.ones(6, 23)}, r"expected weight \[N, 23\].*got \[16, 24\]"),
    "integer x": ({"x": torch.ones(6, 24, dtype=torch.int64)}, "expected a floating-point x"),
    "scalar x": ({"x": torch.tensor(1.0)}, r"expected a floating-point x of shape \[..., K\]"),
    "1-D weight": ({"weight": torch.ones(24)}, r"expected weight \[N, 24\]"),
    "weight dtype": ({"weight": torch.ones(16, 24).double()}, "in x's dtype torch.float32, got .* float64"),
    "weight device": ({"weight": torch.ones(16, 24, device="meta")}, "on x's device cpu, got .* on meta"),
    "scores shape": ({"scores": torch.ones(16, 23)}, r"expected scores \[16, 24\] .*, got \[16, 23\]"),
    "transposed scores": ({"scores": torch.ones(24, 16)}, r"expected scores \[16, 24\] .*, got \[24, 16\]"),
    "scores dtype": ({"scores": torch.ones(16, 24).bfloat16()}, "torch.float32 or float32, got .* bfloat16"),
    "a mask for scores": ({"scores": torch.ones(16, 24).bool()}, "torch.float32 or float32, got .* bool"),
    "scores device": ({"scores": torch.ones(16, 24, device="meta")}, "on x's device cpu, got .* on meta"),
    "bias shape": ({"bias": torch.ones(15)}, r"expected bias \[16\]"),
    "bias dtype": ({"bias": torch.ones(16).double()}, "expected bias .* in x's dtype"),
    "bias device": ({"bias": torch.ones(16, device="meta")}, "on x's device cpu, got .* on meta"),
    "threshold type": ({"threshold": "0"}, "expected threshold as a float or a tensor, got str"),
    "threshold shape": ({"threshold": torch.ones(1)}, r"floating-point threshold of shape \[\], got \[1\]"),
    "integer threshold": ({"threshold": torch.tensor(1)}, "floating-point threshold of shape .* int64"),
    "threshold with gradient": ({"threshold": torch.tensor(1.0, requires_grad=True)}, "that takes no gradient"),
    "threshold device": ({"threshold": torch.ones((), device="meta")}, "on x's device cpu, got .* on meta"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_one_line(name):
    changes, message = BAD_INPUT[name]
    with pytest.raises(ValueError, match=message) as error:
        _call(make_case(), **changes)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("masked_linear: ")


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("cuda", "masked_linear: expected one of the backends reference, triton, got 'cuda'"),
        ("triton", "'triton' cannot run here: expected CUDA tensors, got cpu"),
    ],
)
def test_unavailable_backend(backend, message):
    with pytest.raises(RuntimeError, match=message):
        _call(make_case(), backend)


@pytest.mark.parametrize("arch", [0, 80, 90, 100])
@pytest.mark.parametrize("element_size", [2, 4])
@pytest.mark.parametrize("aligned", [True, False])
def test_tiles(arch, element_size, aligned):
    """Powers of two that tl.dot takes, and accumulators of at most 128 values a thread."""
    for M in (1, 64, 65, 513, 8192):
        for N in (1, 512, 4096, 128256):
            for choose in (configs.gemm_tile, configs.grad_tile):
                tile = choose(M, N, element_size, arch, aligned)
                sizes = tile.block_m, tile.block_n, tile.block_k
                assert all(size >= 16 and size & (size - 1) == 0 for size in sizes)
                assert tile.block_m * tile.block_n <= 128 * 32 * tile.num_warps


def test_eager_expression_is_the_definition():
    """The yardstick of the other tests, itself against the definition."""
    case = make_case(dtype=torch.float64)
    exact = float64_reference(case)
    for name, value in eager(case).items():
        torch.testing.assert_close(value, exact[name])
