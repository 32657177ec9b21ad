"""The linear layer with a sparse delta on the CPU: its reference against float64, what it saves, what it refuses, and
how it goes with the rest of torch."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import peft_kernels as pk
from peft_kernels import _native
from peft_kernels.ops.sparse_delta import SparseDeltaLinearFunction, SparseGradientFunction, cpu, reference
from peft_kernels.testing import saved_tensors
from peft_kernels.testing.sparse_delta import make_case, make_layout, run, scatter_expression
from tests.checks import sparse_delta as checks

DTYPES = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float32-values": {"dtype": torch.bfloat16, "values_dtype": torch.float32},
}


NATIVE = pytest.mark.skipif(not _native.load(), reason=_native.why_not())
BACKENDS = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=NATIVE)])
BACKENDS_AND_LAYOUTS = pytest.mark.parametrize(
    ("backend", "layout"),
    [("reference", layout) for layout in checks.LAYOUTS]
    + [pytest.param("cpu", layout, marks=NATIVE) for layout in checks.layouts_of("cpu")],
)


@BACKENDS_AND_LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", checks.SHAPES)
def test_within_eager(backend, dtype, layout, shape):
    checks.check_within_eager(backend, **checks.SHAPES[shape], **checks.LAYOUTS[layout], **DTYPES[dtype])


@BACKENDS_AND_LAYOUTS
def test_within_eager_under_autocast(backend, layout):
    checks.check_within_eager(
        backend, autocast=torch.bfloat16, **checks.SHAPES["odd"], **checks.LAYOUTS[layout], dtype=torch.float32
    )


@BACKENDS
@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(checks.KINDS),
    batch=st.lists(st.integers(1, 12), max_size=3).map(tuple),
    in_features=st.integers(1, 25).map(lambda n: 8 * n),
    out_features=st.integers(1, 30).map(lambda n: 4 * n),
    density=st.floats(0.01, 1.0),
    tile=st.sampled_from([(1, 1), (4, 8), (2, 4)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
)
@example(  # bands of two rows, which MKL sums in one chain
    kind="entries", batch=(3, 7, 10), in_features=16, out_features=4, density=1.0, tile=(1, 1), dtype=torch.float32,
    bias=False,
)  # fmt: skip
def test_drawn_shapes(backend, kind, **case_arguments):
    kind = kind if kind in checks.kinds_of(backend) else "entries"
    checks.check_within_eager(backend, kind=kind, **case_arguments)


@pytest.mark.parametrize("kind", ["entries", "rows", "columns", "blocks", "n_of_m"])
def test_small_pieces_give_the_same(kind, monkeypatch):
    """Bands, gathered blocks and sampled tokens cut small, against the expression in float64; large blocks too."""
    monkeypatch.setattr(reference, "PIECE_BYTES", 2048)
    monkeypatch.setattr(reference, "SAMPLED_TOKENS", 7)
    case = make_case(kind, (50,), 96, 64, 0.05, torch.float64, tile=(16, 32))
    expected = run(case, scatter_expression)
    for name, value in run(case).items():
        torch.testing.assert_close(value, expected[name])


@pytest.mark.parametrize("kind", ["entries", "rows", "columns", "blocks", "n_of_m"])
def test_gradcheck(kind):
    case = make_case(kind, (2, 3), 8, 8, 0.3, torch.float64, tile=(4, 4))
    leaves = [leaf.requires_grad_() for leaf in (case.x, case.weight, case.values, case.bias)]
    assert torch.autograd.gradcheck(lambda x, w, v, b: pk.sparse_delta_linear(x, w, v, case.layout, b), leaves)


@BACKENDS
def test_subsets(backend):
    checks.check_subsets(backend)


@BACKENDS
def test_strides(backend):
    checks.check_strides(backend)


@BACKENDS
def test_empty(backend):
    checks.check_empty(backend)


@BACKENDS
def test_runs(backend, monkeypatch):
    checks.check_runs(backend, "cpu", monkeypatch)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_writing(backend, dtype):
    for kind in checks.kinds_of(backend):
        checks.check_writing(backend, kind, "cpu", dtype)


@NATIVE
def test_kinds_without_a_native_kernel_are_refused():
    checks.check_refusals("cpu")


def test_what_auto_takes():
    for kind in checks.KINDS:
        taken = pk.backends.choose("sparse_delta_linear", torch.ones(1), kind)
        assert taken == ("cpu" if _native.load() and kind == "entries" else "reference")
    assert pk.backends.choose("sparse_delta_linear", torch.ones(1, dtype=torch.float64)) == "reference"
    assert pk.backends.choose("lora_linear", torch.ones(1)) == "reference"


@NATIVE
class TestSampledByTheNativeLibrary:
    """The gradient of entries as dot products: many blocks of tokens, strips that are cut off, dense rows."""

    @pytest.mark.parametrize("tokens", [1, 31, 128, 129, 1000])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("features", [(1, 1), (17, 40), (100, 33), (5, 40000)])
    def test_beside_dense(self, tokens, dtype, features):
        N, K = features
        torch.manual_seed(0)
        layout = pk.SparseLayout.from_mask(torch.rand(N, K) < 0.04)
        dy, x = (torch.randn(tokens, size + 3).to(dtype)[:, 1 : size + 1] for size in features)
        found = cpu.grad_values(dy, x, layout, torch.float32)
        dense = dy.double().t() @ x.double()
        error = (found - layout.take(dense)).abs()
        magnitude = layout.take(dy.double().abs().t() @ x.double().abs())
        assert bool((error <= 2**-24 * (tokens / 16 + 5) * magnitude).all())  # 16 partial sums, then a tree

    def test_the_same_bits_with_other_threads(self):
        torch.manual_seed(0)
        layout = pk.SparseLayout.from_mask(torch.rand(300, 200) < 0.05)
        dy, x = torch.randn(700, 300), torch.randn(700, 200)
        threads, results = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(cpu.grad_values(dy, x, layout, torch.float32))
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"x": torch.ones(3, 8)}, r"of as many tokens and of one dtype, got \[4, 6\] and \[3, 8\]"),
            ({"x": torch.ones(4, 8).double(), "dy": torch.ones(4, 6).double()}, "expected x in float32, bfloat16 or"),
            ({"dy": torch.ones(4, 7)}, r"expected contiguous row_starts, int64 \[8\], got \[7\]"),
            ({"columns": torch.zeros(4, dtype=torch.int16)}, "expected 5 columns, got 4"),
            ({"columns": torch.zeros(5)}, "expected contiguous columns, int16 or int32"),
        ],
    )  # fmt: skip
    def test_says_what_it_expected(self, change, message):
        starts = torch.tensor([0, 1, 2, 3, 4, 5, 5])
        given = {"dy": torch.ones(4, 6), "x": torch.ones(4, 8), "row_starts": starts,
                 "columns": torch.zeros(5, dtype=torch.int16)} | change  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            torch.ops.peft_kernels_native.sparse_sampled(*given.values())


@pytest.mark.parametrize("layout", checks.LAYOUTS)
def test_no_tensor_as_large_as_the_weight(layout):
    """Forward without a dense copy of W, backward without a dense dW."""
    case = make_case(**checks.LAYOUTS[layout], batch=(8,), in_features=256, out_features=512, frozen=("weight",))
    with largest_allocation() as largest:
        run(case)
    for leaf in (case.weight, case.weight):  # `run` clones its leaves: those are the only ones
        largest.remove(leaf.numel()) if leaf.numel() in largest else None
    assert max(largest) <= case.weight.numel() / 2, sorted(largest)[-5:]


class largest_allocation(torch.utils._python_dispatch.TorchDispatchMode):
    """Collects the number of elements of every tensor that an operation returns."""

    def __enter__(self):
        super().__enter__()
        self.sizes = []
        return self.sizes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor._is_view():
                self.sizes.append(tensor.numel())
        return result


class TestTorch:
    """torch.compile, opcheck, autocast, torch.func, checkpointing, graphs of autograd."""

    @pytest.mark.parametrize(
        ("backend", "kind"),
        [("reference", kind) for kind in ("entries", "columns", "blocks", "n_of_m")]
        + [pytest.param("cpu", "entries", marks=NATIVE)],
    )
    def test_opcheck(self, backend, kind):
        case = make_case(kind, (4, 5), 24, 16, tile=(4, 8))
        layout = list(case.layout.tensors.values()), case.layout.kind, case.layout.tile
        ops = torch.ops.peft_kernels
        torch.library.opcheck(
            ops.sparse_delta_linear_forward.default, (case.x, case.weight, case.values, case.bias, *layout, backend)
        )
        x, dy = case.x.view(20, 24), case.dy.view(20, 16)
        torch.library.opcheck(
            ops.sparse_delta_linear_backward.default,
            (dy, x, case.weight, case.values, *layout, [16, 24], [True] * 4, torch.float32, backend),
        )
        base = case.layout.take(case.weight)
        torch.library.opcheck(
            ops.sparse_delta_write.default, (case.weight.clone(), base, case.values, *layout, backend)
        )

    @pytest.mark.parametrize("kind", ["entries", "columns"])
    def test_compile_with_dynamic_rows(self, kind):
        torch._dynamo.reset()
        graphs = CompileCounterWithBackend("inductor")
        case = make_case(kind, (4,), 24, 16)
        values = case.values.requires_grad_()

        def function(x, values):
            return pk.sparse_delta_linear(x, case.weight, values, case.layout, case.bias).sin().sum()

        compiled = torch.compile(function, fullgraph=True, backend=graphs)
        for rows in (4, 6, 7, 9, 12):
            x = torch.randn(rows, 24, requires_grad=True)
            found = torch.autograd.grad(compiled(x, values), [x, values])
            for one, other in zip(found, torch.autograd.grad(function(x, values), [x, values])):
                torch.testing.assert_close(one, other)
        assert graphs.frame_count <= 2

    def test_compile_every_subset(self):
        for kind in ("entries", "columns"):
            for frozen in ((), ("x",), ("weight",), ("values",), ("x", "weight"), ("values", "weight"), ("bias",)):
                torch._dynamo.reset()
                case = make_case(kind, (5,), 16, 8, frozen=frozen)
                function = torch.compile(pk.sparse_delta_linear, fullgraph=True, backend="aot_eager")
                for name, value in run(case, lambda *args, function=function: function(*args)).items():
                    torch.testing.assert_close(run(case)[name], value)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointing(self, reentrant):
        case = make_case(batch=(12,))
        x, values = case.x.requires_grad_(), case.values.requires_grad_()

        def block(x):
            return pk.sparse_delta_linear(x, case.weight, values, case.layout, case.bias).tanh()

        expected = torch.autograd.grad(block(x).sum(), (x, values))
        checkpoint(block, x, use_reentrant=reentrant).sum().backward()
        for leaf, grad in zip((x, values), expected):
            torch.testing.assert_close(leaf.grad, grad)

    @pytest.mark.parametrize("kind", ["entries", "columns"])
    def test_functional_gradients(self, kind):
        case = make_case(kind, dtype=torch.float64)

        def loss(values):
            return pk.sparse_delta_linear(case.x, case.weight, values, case.layout, case.bias).square().sum()

        leaf = case.values.clone().requires_grad_()
        loss(leaf).backward()
        torch.testing.assert_close(torch.func.grad(loss)(case.values), leaf.grad)

    def test_double_backward_is_refused(self):
        case = make_case()
        y = pk.sparse_delta_linear(case.x.requires_grad_(), case.weight, case.values, case.layout)
        (grad,) = torch.autograd.grad(y.square().sum(), case.x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            grad.sum().backward()

    def test_gradients_add_up_in_float32(self):
        """Of many micro-batches beside a bfloat16 weight: as exact as their sum, not as a bfloat16 one."""
        case = make_case("entries", (16,), 64, 32, 0.01, torch.bfloat16, torch.float32)
        values = case.values.requires_grad_()
        assert values.grad is None
        exact = torch.zeros(len(values), dtype=torch.float64)
        for draw in range(64):
            x = make_case("entries", (16,), 64, 32, dtype=torch.bfloat16, draw=draw).x
            pk.sparse_delta_linear(x, case.weight, values, case.layout).backward(case.dy)
            exact += (case.dy.double().t() @ x.double()).flatten()[case.layout.indices()]
        assert values.grad.dtype == torch.float32
        error = (values.grad - exact).abs().max() / exact.abs().max()
        assert error < 1e-5

    def test_functions_are_autograd_functions(self):
        assert issubclass(SparseDeltaLinearFunction, torch.autograd.Function)
        assert issubclass(SparseGradientFunction, torch.autograd.Function)

    def test_meta_tensors(self):
        case = make_case(batch=(2, 3))
        x, weight, values = (t.to("meta") for t in (case.x, case.weight, case.values))
        assert pk.sparse_delta_linear(x, weight, values, case.layout.to("meta")).shape == (2, 3, 16)


class TestSparseGradient:
    """`with_sparse_gradient_`."""

    @pytest.mark.parametrize("kind", ["entries", "columns", "rows"])
    def test_beside_a_lora_layer(self, kind):
        """One layer with both: the gradients of the adapter, of x and of the values."""
        case = make_case(kind, (7, 2), 24, 16, dtype=torch.float64)
        lora_A, lora_B = torch.randn(3, 24, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
        leaves = [leaf.requires_grad_() for leaf in (case.x, case.values, lora_A, lora_B)]
        expected = scatter_expression(case.x, case.weight, case.values, case.layout, None)
        expected = expected + case.x @ lora_A.t() @ lora_B.t()
        with torch.no_grad():
            case.layout.put_(case.weight, case.layout.take(case.weight) + case.values)
        y = pk.lora_linear(case.x, case.weight, lora_A, lora_B, 1.0)
        assert pk.with_sparse_gradient_(y, case.x, case.values, case.layout) is y
        torch.testing.assert_close(y, expected)
        for one, other in zip(torch.autograd.grad(y, leaves, case.dy), torch.autograd.grad(expected, leaves, case.dy)):
            torch.testing.assert_close(one, other)

    def test_what_is_saved(self):
        for kind, elements in (("entries", 6 * 32), ("columns", 6 * 3)):
            case = make_case(kind)
            y = torch.nn.functional.linear(case.x, case.weight)
            with saved_tensors() as saved:
                pk.with_sparse_gradient_(y, case.x, case.values.requires_grad_(), case.layout)
            assert [tensor.numel() for tensor in saved] == [elements]

    def test_nothing_without_gradients(self):
        case = make_case()
        y = torch.nn.functional.linear(case.x, case.weight)
        with saved_tensors() as saved:
            assert pk.with_sparse_gradient_(y, case.x, case.values, case.layout).grad_fn is None
        assert not saved

    def test_what_follows_may_write_in_place(self):
        case = make_case(batch=(2, 3))
        values = case.values.requires_grad_()
        y = pk.sparse_delta_linear(case.x, case.weight, values, case.layout).add_(1).relu_()
        assert torch.autograd.grad(y.sum(), values)[0].any()
        y = torch.nn.functional.linear(case.x, case.weight)
        y = pk.with_sparse_gradient_(y, case.x, case.values.requires_grad_(), case.layout).add_(1).relu_()
        assert torch.autograd.grad(y.sum(), case.values)[0].any()


BAD_INPUT = {
    "x of another width": ({"x": torch.ones(6, 31)}, r"expected a floating-point x \[..., 32\], got \[6, 31\]"),
    "integer x": ({"x": torch.ones(6, 32, dtype=torch.int64)}, "expected a floating-point x"),
    "scalar x": ({"x": torch.tensor(1.0)}, "expected a floating-point x"),
    "weight shape": ({"weight": torch.ones(15, 32)}, r"expected weight \[16, 32\], as the layout's.*got \[15, 32\]"),
    "weight dtype": ({"weight": torch.ones(16, 32).double()}, "in x's dtype torch.float32 .*got .* float64"),
    "weight device": ({"weight": torch.ones(16, 32, device="meta")}, "on cpu, got .* on meta"),
    "values shape": ({"values": torch.ones(5)}, r"expected values \[51\] in x's dtype torch.float32, got \[5\]"),
    "values dtype": ({"values": torch.ones(51).half()}, r"expected values \[51\] in x's dtype torch.float32, got"),
    "values device": ({"values": torch.ones(51, device="meta")}, "expected values and layout on x's device cpu"),
    "layout device": ({"layout": make_layout("entries", 16, 32, 0.1).to("meta")}, "got cpu and meta"),
    "layout type": ({"layout": torch.ones(16, 32)}, "expected a SparseLayout, got Tensor"),
    "bias shape": ({"bias": torch.ones(15)}, r"expected bias \[16\]"),
    "bias dtype": ({"bias": torch.ones(16).double()}, "expected bias .* in x's dtype"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gets_one_line(name):
    changes, message = BAD_INPUT[name]
    case = make_case()
    given = {key: getattr(case, key) for key in ("x", "weight", "values", "layout", "bias")} | changes
    with pytest.raises(ValueError, match=message) as error:
        pk.sparse_delta_linear(**given)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("sparse_delta_linear: ")


def test_bad_input_of_the_gradient_alone():
    case = make_case()
    with pytest.raises(ValueError, match=r"with_sparse_gradient_: expected y \[6, 16\] .*got \[6, 15\]"):
        pk.with_sparse_gradient_(torch.ones(6, 15), case.x, case.values, case.layout)
