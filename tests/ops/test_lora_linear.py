"""The LoRA linear op on the CPU: its reference against float64 and Hugging Face PEFT, what it saves, what it refuses,
and how it goes with the rest of torch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels.ops.core import dropout
from peft_kernels.ops.lora_linear import LoRALinearFunction
from peft_kernels.testing import LoRACase, make_case, run, saved_tensors
from tests.checks import lora_linear as checks

DTYPES = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float32-adapters-high": {
        "dtype": torch.bfloat16, "adapter_dtype": torch.float32, "adapter_precision": "high",
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", checks.SETTINGS)
@pytest.mark.parametrize("shape", checks.SHAPES)
def test_within_eager(dtype, setting, shape):
    checks.check_within_eager("reference", **checks.SHAPES[shape], **checks.SETTINGS[setting], **DTYPES[dtype])


@pytest.mark.parametrize("shape", checks.SHAPES)
@pytest.mark.parametrize("setting", ["plain", "dropout"])
def test_float32_adapters_beside_a_16_bit_base(shape, setting):
    """The yardstick is PEFT under autocast: that is how they are trained."""
    checks.check_within_eager(
        "reference", autocast=torch.bfloat16, dtype=torch.bfloat16, adapter_dtype=torch.float32,
        **checks.SHAPES[shape], **checks.SETTINGS[setting],
    )  # fmt: skip


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    batch=st.lists(st.integers(1, 12), max_size=3).map(tuple),
    in_features=st.integers(8, 200),
    out_features=st.lists(st.integers(8, 120), min_size=1, max_size=4).map(tuple),
    rank=st.integers(1, 200),
    dropout_p=st.sampled_from([0.0, 0.3]),
    shared_dropout=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_drawn_shapes(**case_arguments):
    checks.check_within_eager("reference", **case_arguments)


@pytest.mark.parametrize("shape", [(3, 1), (1, 5), (3, 5)])
def test_a_scaling_that_rows_share(shape):
    """1 in place of what rows share, forward and gradients, against the expression with the scaling broadcast."""
    torch.manual_seed(0)
    x, weight, a, b = (torch.randn(*s, dtype=torch.float64) for s in ((3, 5, 7), (6, 7), (2, 7), (6, 2)))
    scaling = torch.rand(shape, dtype=torch.float64)
    leaves = [x.requires_grad_(), a.requires_grad_(), b.requires_grad_()]
    expected = x @ weight.t() + (x @ a.t() @ b.t()) * scaling.unsqueeze(-1)
    y = pk.lora_linear(x, weight, a, b, scaling)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("projections", [1, 3])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("row_scaling", [False, True])
def test_gradcheck(projections, dropout_p, row_scaling):
    case = make_case((2, 3), 7, (5, 4, 6)[:projections], 2, torch.float64, row_scaling=row_scaling)
    leaves = [case.x] + [getattr(p, name) for p in case.projections for name in case.fields]

    def function(x, *flat):
        torch.manual_seed(3)
        given = [
            pk.Projection(flat[4 * j], *flat[4 * j + 2 : 4 * j + 4], p.scaling, flat[4 * j + 1])
            for j, p in enumerate(case.projections)
        ]
        return pk.lora_linear_shared_input(x, given, dropout_p=dropout_p, training=True)

    assert torch.autograd.gradcheck(function, [leaf.requires_grad_() for leaf in leaves])


@pytest.mark.parametrize("bias", [True, False])
def test_equals_peft(bias):
    """Hugging Face PEFT's own layer, in float64: the same operation, so the same numbers to rounding."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 12, bias=bias, dtype=torch.float64))
    config = LoraConfig(r=4, lora_alpha=10, target_modules=["0"], init_lora_weights=False)
    layer = get_peft_model(model, config).base_model.model[0].double()
    base, lora_A, lora_B = layer.base_layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 5, 20, dtype=torch.float64, requires_grad=True)
    leaves, grad = [x, lora_A, lora_B], torch.randn(3, 5, 12, dtype=torch.float64)
    theirs = layer(x)
    ours = pk.lora_linear(x, base.weight, lora_A, lora_B, layer.scaling["default"], base.bias)
    torch.testing.assert_close(ours, theirs)
    pairs = zip(torch.autograd.grad(ours, leaves, grad), torch.autograd.grad(theirs, leaves, grad))
    for mine, peft in pairs:
        torch.testing.assert_close(mine, peft)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_subsets(dropout_p, dtype):
    checks.check_subsets("reference", dropout_p, dtype=dtype)


@pytest.mark.parametrize("rank", checks.RANKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ranks_of_their_own(dtype, rank):
    checks.check_ranks("reference", rank, dtype=dtype)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_runs(backend, monkeypatch):
    if backend == "auto":
        assert pk.backends.choose("lora_linear", torch.ones(1)) == "reference"
    else:
        checks.check_runs(backend, "cpu", monkeypatch)


def test_layouts():
    checks.check_layouts("reference")


def test_empty():
    checks.check_empty("reference")


def test_same_mask():
    checks.check_same_mask("reference")


class TestDropout:
    def test_philox_known_answers(self):
        """Random123's known answer for philox4x32-7, counter and key zero."""
        zero = torch.zeros(1, dtype=torch.int64)
        words = [int(word) for word in dropout._philox(zero, (zero,) * 4)]
        assert words == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]

    @pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.9])
    def test_rate(self, p):
        """Within six standard deviations of a binomial; the streams are independent of one another."""
        rows, columns = 700, 1003
        mask = dropout.draw_mask(torch.tensor([7]), rows, columns, p, 2)
        one, other = (dropout.unpack_mask(m, columns).logical_not() for m in mask)
        for dropped, probability in ((one, p), (other, p), (one & other, p * p)):
            n = dropped.numel()
            deviation = math.sqrt(n * probability * (1 - probability)) + n / 65536
            assert abs(int(dropped.sum()) - n * probability) < 6 * deviation

    def test_mask_does_not_depend_on_the_shape_around(self):
        whole = dropout.draw_mask(torch.tensor([9]), 3000, 4096, 0.5, 1)
        assert torch.equal(dropout.draw_mask(torch.tensor([9]), 11, 800, 0.5, 3)[0], whole[0, :11, :100])

    def test_pack_and_unpack(self):
        kept = torch.rand(5, 8, 8) < 0.5
        packed = dropout._pack(kept)
        assert int(packed[0, 0]) == sum(int(bit) << i for i, bit in enumerate(kept[0, 0]))
        assert torch.equal(dropout.unpack_mask(packed, 61), kept.view(5, 64)[:, :61])

    def test_off_in_evaluation(self):
        case = make_case(dropout_p=0.5)
        weight, lora_A, lora_B, scaling, bias = case.projections[0]
        arguments = (case.x, weight, lora_A, lora_B, scaling, bias)
        plain = pk.lora_linear(*arguments)
        assert torch.equal(pk.lora_linear(*arguments, dropout_p=0.5), plain)
        assert not torch.equal(pk.lora_linear(*arguments, dropout_p=0.5, training=True), plain)

    @pytest.mark.parametrize("reentrant", [True, False])
    @pytest.mark.parametrize("compiled", [True, False])
    def test_checkpointing_recomputes_the_same_mask(self, reentrant, compiled):
        if compiled and reentrant:
            pytest.skip("torch.compile takes non-reentrant checkpointing only")
        case = make_case((12,), 24, (24,), 4, dropout_p=0.4)
        weight, lora_A, lora_B, scaling, _ = case.projections[0]
        x, lora_A, lora_B = (t.clone().requires_grad_() for t in (case.x, lora_A, lora_B))

        def block(x):
            return pk.lora_linear(x, weight, lora_A, lora_B, scaling, dropout_p=0.4, training=True).tanh()

        def function(x):
            return checkpoint(block, x, use_reentrant=reentrant)

        if compiled:
            torch._dynamo.reset()
            function = torch.compile(function, fullgraph=True)
        torch.manual_seed(11)
        y = block(x)
        expected = torch.autograd.grad(y.sum(), (x, lora_A, lora_B))
        x.grad = lora_A.grad = lora_B.grad = None
        torch.manual_seed(11)
        function(x).sum().backward()
        if compiled:  # inductor draws seeds of its own: the mask differs from eager's, not forward's from backward's
            numeric = _mask_consistency(function, x, lora_B)
            torch.testing.assert_close(lora_B.grad.shape, expected[2].shape)
            assert numeric
        else:
            for leaf, grad in zip((x, lora_A, lora_B), expected):
                torch.testing.assert_close(leaf.grad, grad)


def _mask_consistency(function, x, lora_B) -> bool:
    """dL/dB from backward equals the finite difference of the same seed's forward: one mask in both."""
    lora_B.grad = None
    torch.manual_seed(2)
    function(x).sum().backward()
    grad, direction, step = lora_B.grad, torch.randn_like(lora_B), 1e-2
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            lora_B.add_(direction, alpha=sign * step)
        torch.manual_seed(2)
        values.append(function(x).sum().item())
        with torch.no_grad():
            lora_B.sub_(direction, alpha=sign * step)
    difference = (values[0] - values[1]) / (2 * step)
    return math.isclose(difference, (grad * direction).sum().item(), rel_tol=2e-2)


class TestTorch:
    """torch.compile, opcheck, autocast, torch.func, graphs of autograd."""

    def test_opcheck(self):
        for count, dropout_p, high in ((1, 0.0, False), (3, 0.3, False), (1, 0.3, True)):
            case = make_case((4, 5), 24, (16, 8, 8)[:count], 3, dropout_p=dropout_p)
            if high:
                case = make_case((4, 5), 24, (16,), 3, torch.bfloat16, torch.float32, dropout_p=dropout_p)
            fields = dict(zip(pk.Projection._fields, map(list, zip(*case.projections))))
            weights, biases, lora_As, lora_Bs = (fields[name] for name in ("weight", "bias", "lora_A", "lora_B"))
            rest = [None] * count, [0.5] * count
            seed = torch.tensor([5]) if dropout_p else None
            forward = (
                case.x, weights, biases, lora_As, lora_Bs, *rest, seed, dropout_p, False, [True] * count, True, high,
                "reference",
            )  # fmt: skip
            torch.library.opcheck(torch.ops.peft_kernels.lora_linear_forward.default, forward)
            kept = torch.ops.peft_kernels.lora_linear_forward.default(*forward)[count:]
            backward = (
                case.grad_ys, case.x, kept[0], kept[1] if dropout_p else None,
                weights, lora_As, lora_Bs, *rest, [3] * count, dropout_p, [True] * (1 + 4 * count), lora_As[0].dtype,
                high, "reference",
            )  # fmt: skip
            torch.library.opcheck(torch.ops.peft_kernels.lora_linear_backward.default, backward)

    @pytest.mark.parametrize("projections", [1, 2])
    def test_compile_with_dynamic_rows(self, projections):
        """fullgraph; one more graph when the rows turn out to be dynamic, none after that; eager's numbers."""
        torch._dynamo.reset()
        graphs = CompileCounterWithBackend("inductor")
        case = make_case((4,), 24, (16, 8)[:projections], 3)
        given = [
            p._replace(lora_A=p.lora_A.requires_grad_(), lora_B=p.lora_B.requires_grad_()) for p in case.projections
        ]
        leaves = [t for p in given for t in (p.lora_A, p.lora_B)]

        def function(x):
            return sum(y.sum() for y in pk.lora_linear_shared_input(x, given))

        compiled = torch.compile(function, fullgraph=True, backend=graphs)
        for rows in (4, 6, 7, 9, 12):
            x = torch.randn(rows, 24, requires_grad=True)
            found = torch.autograd.grad(compiled(x), [x, *leaves])
            for one, other in zip(found, torch.autograd.grad(function(x), [x, *leaves])):
                torch.testing.assert_close(one, other)
        assert graphs.frame_count <= 2

    def test_compile_every_subset(self):
        torch._dynamo.reset()
        for frozen in checks.subsets(("x", "weight", "bias", "lora_A", "lora_B")):
            torch._dynamo.reset()
            case = make_case((5,), 16, (8,), 2, frozen=frozen)

            def compiled(case, x, projections):
                (weight, lora_A, lora_B, scaling, bias) = projections[0]

                @torch.compile(fullgraph=True, backend="aot_eager")
                def function(x, weight, lora_A, lora_B, bias):
                    return pk.lora_linear(x, weight, lora_A, lora_B, scaling, bias)

                return (function(x, weight, lora_A, lora_B, bias),)

            for name, value in run(case).items():
                torch.testing.assert_close(run(case, compiled)[name], value)

    def test_a_scaling_that_is_a_tensor_recompiles_nothing(self):
        torch._dynamo.reset()
        graphs = CompileCounter()
        case = make_case((6,), 16, (8,), 2)
        weight, lora_A, lora_B, _, _ = case.projections[0]
        compiled = torch.compile(pk.lora_linear, fullgraph=True, backend=graphs)
        for value in (0.25, 1.0, 2.0):
            scaling = torch.tensor(value)
            y = compiled(case.x, weight, lora_A, lora_B, scaling)
            torch.testing.assert_close(y, pk.lora_linear(case.x, weight, lora_A, lora_B, value))
        assert graphs.frame_count == 1

    @pytest.mark.parametrize("compiled", [True, False])
    def test_autocast(self, compiled):
        """float32 parameters under autocast: autocast's dtype out, as F.linear; gradients in each one's own dtype."""
        torch._dynamo.reset()
        case = make_case((6, 3), 32, (16,), 4)
        leaves = [t.clone().requires_grad_() for t in (case.x, *case.projections[0][:3], case.projections[0].bias)]

        def function(x, weight, lora_A, lora_B, bias):
            return pk.lora_linear(x, weight, lora_A, lora_B, 0.5, bias)

        if compiled:
            function = torch.compile(function, fullgraph=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = function(*leaves)
            assert y.dtype == torch.nn.functional.linear(case.x, case.projections[0].weight).dtype == torch.bfloat16
        for leaf, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves)):
            assert grad.dtype == leaf.dtype
        if not compiled:
            checks.check_within_eager("reference", autocast=torch.bfloat16, batch=(6, 30), in_features=32)

    def test_functional_gradients(self):
        case = make_case((6,), 16, (8,), 2, torch.float64)
        weight, lora_A, lora_B, scaling, bias = case.projections[0]

        def loss(lora_A):
            return pk.lora_linear(case.x, weight, lora_A, lora_B, scaling, bias).square().sum()

        leaf = lora_A.clone().requires_grad_()
        loss(leaf).backward()
        torch.testing.assert_close(torch.func.grad(loss)(lora_A), leaf.grad)

    def test_double_backward_is_refused(self):
        case = make_case()
        x = case.x.requires_grad_()
        (y,) = pk.lora_linear_shared_input(x, case.projections)
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.sum().backward()

    def test_retained_graph_gives_the_same_again(self):
        case = make_case(dropout_p=0.3)
        lora_A = case.projections[0].lora_A.requires_grad_()
        x = case.x.requires_grad_()
        (y,) = pk.lora_linear_shared_input(x, case.projections, dropout_p=0.3, training=True)
        before = case.x.detach().clone()
        once = torch.autograd.grad(y.sum(), (x, lora_A), retain_graph=True)
        for one, other in zip(once, torch.autograd.grad(y.sum(), (x, lora_A))):
            assert torch.equal(one, other)
        assert torch.equal(before, case.x)

    def test_an_output_that_nobody_uses(self):
        """Of three projections only the second takes part in the loss."""
        case = make_case((6,), 16, (8, 12, 4), 2)
        given = [p._replace(lora_A=p.lora_A.requires_grad_()) for p in case.projections]
        x = case.x.requires_grad_()
        _, y, _ = pk.lora_linear_shared_input(x, given)
        shared = torch.autograd.grad(y.sum(), [x, given[1].lora_A])
        alone = torch.autograd.grad(pk.lora_linear(x, *given[1]).sum(), [x, given[1].lora_A])
        for one, other in zip(shared, alone):
            torch.testing.assert_close(one, other)

    def test_what_follows_may_write_in_place(self):
        case = make_case((2, 3))
        lora_A = case.projections[0].lora_A.requires_grad_()
        y = pk.lora_linear(case.x, *case.projections[0]).add_(1).relu_()
        assert torch.autograd.grad(y.sum(), lora_A)[0].any()

    def test_nothing_is_saved_without_gradients(self):
        case = make_case()
        with saved_tensors() as saved, torch.no_grad():
            pk.lora_linear(case.x.requires_grad_(), *case.projections[0])
        assert not saved

    def test_function_is_an_autograd_function(self):
        assert issubclass(LoRALinearFunction, torch.autograd.Function)

    def test_meta_tensors(self):
        case = make_case((2, 3), 16, (8,), 2)
        weight, lora_A, lora_B, scaling, bias = case.projections[0]
        y = pk.lora_linear(*(t.to("meta") for t in (case.x, weight, lora_A, lora_B)), scaling, bias.to("meta"))
        assert y.shape == (2, 3, 8)


def _call(case: LoRACase, backend: str = "auto", **changes):
    weight, lora_A, lora_B, scaling, bias = case.projections[0]
    arguments = {
        "x": case.x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B, "scaling": scaling, "bias": bias,
    }  # fmt: skip
    with pk.use_backend(backend):
        return pk.lora_linear(**(arguments | changes))


BAD_INPUT = {
    "x of another width": ({"x": torch.ones(6, 23)}, r"expected weight \[N, 23\].*got \[16, 24\]"),
    "integer x": ({"x": torch.ones(6, 24, dtype=torch.int64)}, "expected a floating-point x"),
    "scalar x": ({"x": torch.tensor(1.0)}, r"expected a floating-point x of shape \[..., K\]"),
    "1-D weight": ({"weight": torch.ones(24)}, r"expected weight \[N, 24\]"),
    "weight dtype": ({"weight": torch.ones(16, 24).double()}, "in x's dtype torch.float32, got .* float64"),
    "weight device": ({"weight": torch.ones(16, 24, device="meta")}, "on x's device cpu, got .* on meta"),
    "rank 0": ({"lora_A": torch.ones(0, 24), "lora_B": torch.ones(16, 0)}, r"with R ≥ 1, got \[0, 24\]"),
    "lora_A width": ({"lora_A": torch.ones(4, 25)}, r"expected lora_A \[R, 24\]"),
    "lora_B shape": ({"lora_B": torch.ones(16, 5)}, r"expected lora_B \[16, 4\], got \[16, 5\]"),
    "lora_B dtype": ({"lora_B": torch.ones(16, 4).bfloat16()}, "expected adapters of one dtype"),
    "adapters wider than x": (
        {"lora_A": torch.ones(4, 24).double(), "lora_B": torch.ones(16, 4).double()},
        "in x's dtype torch.float32 or float32, got torch.float64",
    ),
    "lora_B device": ({"lora_B": torch.ones(16, 4, device="meta")}, "on x's device cpu"),
    "bias shape": ({"bias": torch.ones(15)}, r"expected bias \[16\]"),
    "bias dtype": ({"bias": torch.ones(16).double()}, "expected bias .* in x's dtype"),
    "scaling shape": ({"scaling": torch.ones(5)}, r"expected scaling of shape \[\] or \[6\] .*, got \[5\]"),
    "scaling type": ({"scaling": "2"}, "expected scaling as a float or a tensor, got str"),
    "scaling with gradient": ({"scaling": torch.tensor(1.0, requires_grad=True)}, "that takes no gradient"),
    "scaling device": ({"scaling": torch.ones((), device="meta")}, "scaling on x's device cpu"),
    "negative dropout": ({"dropout_p": -0.1}, "expected dropout_p between 0 and 1, got -0.1"),
    "dropout above 1": ({"dropout_p": 1.5}, "expected dropout_p between 0 and 1, got 1.5"),
    "dropout NaN": ({"dropout_p": float("nan")}, "expected dropout_p between 0 and 1, got nan"),
    "precision": ({"adapter_precision": "low"}, "expected adapter_precision 'default' or 'high', got 'low'"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_one_line(name):
    changes, message = BAD_INPUT[name]
    with pytest.raises(ValueError, match=message) as error:
        _call(make_case(), **changes)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("lora_linear: ")


def test_no_projection():
    with pytest.raises(ValueError, match="expected at least one projection, got none"):
        pk.lora_linear_shared_input(torch.ones(2, 3), [])


@pytest.mark.parametrize(
    ("backend", "error", "message"),
    [
        ("nonsense", ValueError, "expected a backend among auto, reference, .*, got 'nonsense'"),
        ("cuda", RuntimeError, "lora_linear: the backend 'cuda' cannot run here"),
        ("triton", RuntimeError, "'triton' cannot run here: expected CUDA tensors, got cpu"),
    ],
)
def test_unavailable_backend(backend, error, message):
    with pytest.raises(error, match=message) as caught:
        _call(make_case(), backend)
    assert "\n" not in str(caught.value)


def test_backend_is_restored_after_an_exception():
    before = pk.backends.explain("lora_linear", "cpu", torch.float32)
    with pytest.raises(KeyError), pk.use_backend("reference"):
        raise KeyError
    assert pk.backends.explain("lora_linear", "cpu", torch.float32) == before
