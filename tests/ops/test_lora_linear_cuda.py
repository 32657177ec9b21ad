"""How `cuda.py` puts the native kernels together, without a GPU (`tests/checks/native.py`)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_kernels as pk
from peft_kernels import _native, backends
from peft_kernels.ops.core import native
from peft_kernels.ops.lora_linear import configs, cuda, op, reference
from peft_kernels.testing import make_case, run
from tests.checks import lora_linear as checks
from tests.checks.common import record_calls
from tests.checks.native import (
    HALVES,
    lora_forward,
    lora_gemm,
    lora_grads,
    lora_outer,
    lora_shrink,
    reduce_partials,
    standing_in,
)

pytestmark = pytest.mark.skipif(not _native.LIBRARY.exists(), reason="needs the native library")
DTYPES = {
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "float32-adapters": {"dtype": torch.bfloat16, "adapter_dtype": torch.float32, "autocast": torch.bfloat16},
}
REFUSED = {
    "float32": ({"dtype": torch.float32}, "expected bfloat16 or float16, got float32"),
    "high": (
        {"dtype": torch.float16, "adapter_dtype": torch.float32, "adapter_precision": "high"},
        "expected adapter_precision default, got high",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def kernels():
    with standing_in(lora_forward, lora_gemm, lora_grads, lora_shrink, lora_outer, reduce_partials):
        yield


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", checks.SETTINGS)
@pytest.mark.parametrize("shape", checks.SHAPES)
def test_within_eager(dtype, setting, shape):
    checks.check_within_eager("cuda", **checks.SHAPES[shape], **checks.SETTINGS[setting], **DTYPES[dtype])


@pytest.mark.parametrize("backend", ["cuda", "cuda:fused", "cuda:passes"])
@pytest.mark.parametrize("refused", REFUSED)
def test_what_its_kernels_do_not_multiply_is_refused(refused, backend, called):
    options, line = REFUSED[refused]
    case = make_case((40,), 72, (48,), 8, **options)
    with pk.use_backend(backend), pytest.raises(RuntimeError, match=f"{backend!r} cannot run here: {line}$"):
        run(case)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 150),
    in_features=st.integers(8, 150),
    out_features=st.lists(st.integers(8, 100), min_size=1, max_size=3).map(tuple),
    rank=st.integers(1, 70),
    dropout_p=st.sampled_from([0.0, 0.3]),
)
def test_drawn_shapes(rows, in_features, out_features, rank, dropout_p):
    checks.check_within_eager(
        "cuda", batch=(rows,), in_features=in_features, out_features=out_features, rank=rank, dropout_p=dropout_p,
        dtype=torch.float16,
    )  # fmt: skip


@pytest.mark.parametrize("rank", [3, 40, 70])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_subsets(dropout_p, rank):
    checks.check_subsets("cuda", dropout_p, rank=rank, dtype=torch.bfloat16)


@pytest.mark.parametrize("rank", checks.RANKS, ids=str)
@pytest.mark.parametrize("dtype", HALVES)
def test_ranks_of_their_own(dtype, rank):
    checks.check_ranks("cuda", rank, dtype=dtype)


class Recorder:
    """The native ops, and the names of those that are called."""

    def __init__(self):
        self.names = []

    def __getattr__(self, name):
        self.names.append(name)
        return getattr(torch.ops.peft_kernels_native, name)


@pytest.fixture
def called(monkeypatch):
    """Runs a case by the backend "cuda": the names of the native ops, in order."""

    def names(*args, **kwargs):
        recorder = Recorder()
        for module in (cuda, native):
            monkeypatch.setattr(module, "native", lambda: recorder)
        with pk.use_backend("cuda"):
            run(make_case(*args, dtype=torch.bfloat16, frozen=("weight", "bias"), **kwargs))
        return recorder.names

    return names


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("projections", [1, 3])
def test_launches(projections, dropout_p, called):
    """By the op package's README: what several projections share, with masks of their own too."""
    forward = ["lora_shrink", "reduce_partials"] + ["lora_gemm"] * projections
    backward = ["lora_outer"] * projections + ["reduce_partials", "lora_grads", "reduce_partials"]
    assert called((40,), 72, (48, 24, 24)[:projections], 8, dropout_p=dropout_p) == forward + backward


def test_launches_at_large_ranks(called):
    """Above 32 dH and dB have a pass each; above 64 they and dA are cuBLAS products."""
    backward = ["lora_outer", "lora_shrink", "reduce_partials", "lora_grads", "reduce_partials"]
    assert called((40,), 72, (48,), 40) == ["lora_shrink", "reduce_partials", "lora_gemm", *backward]
    assert called((40,), 72, (48,), 70) == ["lora_gemm", "lora_gemm"]
    # A mask is applied to tiles of x: one pass, in streams.
    masked = ["lora_shrink", "reduce_partials", "lora_gemm", "lora_grads", "reduce_partials"]
    assert called((40,), 72, (48,), 70, dropout_p=0.25) == masked
    # Three of 40 beside each other too.
    backward = ["lora_outer", "lora_shrink"] * 3 + ["reduce_partials", "lora_grads", "reduce_partials"]
    shared = called((40,), 72, (48, 24, 24), 40)
    assert shared == ["lora_shrink", "reduce_partials", *["lora_gemm"] * 3, *backward]


@pytest.mark.parametrize("trained", [(), (0,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("shared_dropout", [False, True])
def test_some_of_several_train_A(trained, shared_dropout):
    """The gradients of all, by the masks of their own."""
    case = make_case(
        (50,), 72, (48, 24, 24), 6, torch.bfloat16, dropout_p=0.25, shared_dropout=shared_dropout, frozen=("weight",)
    )

    def results(projections):
        leaves = [case.x, *(p.lora_A for p in projections if p.lora_A.requires_grad)]
        torch.manual_seed(case.seed)
        with pk.use_backend("cuda"):
            ys = pk.lora_linear_shared_input(
                case.x, projections, dropout_p=case.dropout_p, training=True, shared_dropout=shared_dropout
            )
        return torch.autograd.grad(ys, leaves, case.grad_ys)

    case.x.requires_grad_()
    everything = results([p._replace(lora_A=p.lora_A.detach().requires_grad_()) for p in case.projections])
    some = results(
        [p._replace(lora_A=p.lora_A.detach().requires_grad_(j in trained)) for j, p in enumerate(case.projections)]
    )
    for one, other in zip(some, [everything[0], *(everything[1 + j] for j in trained)]):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("backend", ["cuda", "cuda:passes"])
def test_runs(backend, monkeypatch):
    checks.check_runs(backend, "cpu", monkeypatch, torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES)
def test_layouts(dtype):
    checks.check_layouts("cuda", dtype=dtype)


def test_empty():
    checks.check_empty("cuda", dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", HALVES)
def test_same_mask(dtype):
    checks.check_same_mask("cuda", dtype=dtype)


@pytest.fixture
def in_one(monkeypatch):
    """As on a GPU whose code the kernel of S and y is; the layers that it took, by their ranks."""
    taken, in_one = [], cuda._in_one
    monkeypatch.setattr(cuda, "has_boxes", lambda _: True)
    monkeypatch.setattr(cuda, "_in_one", lambda x, *rest: taken.append(len(rest[2])) or in_one(x, *rest))
    return taken


class TestOneKernelForTheForward:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("setting", ["plain", "no-bias", "row-scaling"])
    @pytest.mark.parametrize("shape", ["one-row", "no-leading-dims", "tiles"])
    def test_within_eager(self, dtype, setting, shape, in_one):
        options = checks.SETTINGS[setting] | {"dropout_p": 0.0}
        checks.check_within_eager("cuda:fused", **checks.SHAPES[shape], **options, **DTYPES[dtype])
        assert in_one

    @pytest.mark.parametrize(
        ("sizes", "line"),
        [
            ({"dropout_p": 0.25}, "expected no dropout"),
            ({"out_features": (48, 24)}, "expected one projection, got 2"),
            ({"out_features": (42,)}, "expected out_features of a multiple of 8 and a rank up to 64, got 42 and 8"),
            ({"rank": 65}, "expected out_features of a multiple of 8 and a rank up to 64, got 48 and 65"),
            ({"in_features": 71}, r"expected a weight whose rows .* start on 16 bytes, got strides \(71, 1\)"),
            ({}, "expected compute capability 9.0, and a native library with code for sm_90a"),
        ],
        ids=lambda value: "" if isinstance(value, str) else "-".join(value) or "device",
    )
    def test_what_one_kernel_cannot_compute_is_refused_or_left_to_passes(self, sizes, line, in_one, monkeypatch):
        sizes = {"batch": (40,), "in_features": 72, "out_features": (48,), "rank": 8, "dropout_p": 0.0} | sizes
        case = make_case(**sizes, dtype=torch.bfloat16)
        monkeypatch.setattr(cuda, "has_boxes", lambda _: "capability" not in line)
        with pk.use_backend("cuda:fused"), pytest.raises(RuntimeError, match=f"cannot run this layer: {line}$"):
            run(case)
        monkeypatch.setattr(configs, "tuned", lambda _: {("cuda_fused_from", 2): 0})
        with pk.use_backend("cuda"):
            run(case)
        assert not in_one

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(
        rows=st.integers(1, 150),
        in_features=st.integers(1, 18).map(lambda n: 8 * n),
        eighths=st.integers(1, 12),
        rank=st.integers(1, 64),
        row_scaling=st.booleans(),
    )
    def test_drawn_shapes(self, rows, in_features, eighths, rank, row_scaling):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "has_boxes", lambda _: True)
            checks.check_within_eager(
                "cuda:fused", batch=(rows,), in_features=in_features, out_features=(8 * eighths,), rank=rank,
                row_scaling=row_scaling, dtype=torch.bfloat16,
            )  # fmt: skip

    def test_subsets(self, in_one):
        checks.check_subsets("cuda:fused", 0.0, out_features=(24,), dtype=torch.bfloat16)
        assert in_one

    def test_layouts(self, in_one):
        with pytest.raises(RuntimeError, match="expected a weight whose rows"):  # the second is transposed
            checks.check_layouts("cuda:fused", dtype=torch.bfloat16, dropout_p=0.0)
        assert len(in_one) == 1

    def test_runs(self, in_one, monkeypatch):
        checks.check_runs("cuda:fused", "cpu", monkeypatch, torch.bfloat16)

    def test_empty(self, in_one):
        case = make_case((0,), 24, (16,), 4, dtype=torch.bfloat16)
        with pk.use_backend("cuda:fused"):
            assert run(case)["y0"].shape == (0, 16)

    def test_taken_from_the_size_that_was_measured(self, in_one, monkeypatch):
        case = make_case(batch=(40,), in_features=72, out_features=(48,), rank=8, dtype=torch.bfloat16)

        def took(backend, least):
            in_one.clear()
            monkeypatch.setattr(configs, "tuned", lambda _: {("cuda_fused_from", 2): least})
            with pk.use_backend(backend):
                pk.lora_linear(case.x, *case.projections[0])
            return bool(in_one)

        assert took("cuda", 40 * 72 * 48)
        assert not took("cuda", 40 * 72 * 48 + 1)
        assert not took("cuda:passes", 0)
        monkeypatch.setattr(cuda, "has_boxes", lambda _: False)
        assert not took("cuda", 0)


def test_auto_takes_the_native_kernels_from_the_size_that_was_measured(monkeypatch):
    case = make_case((40,), 72, (48,), 8, torch.bfloat16)
    monkeypatch.setattr(backends, "choose", lambda *_: "auto")  # as on a GPU
    table = {("cuda_from", 2): 40 * 72 * 48, ("triton_from", 2): 0, ("triton_from", 4): 0}
    monkeypatch.setattr(configs, "tuned", lambda _: table)
    calls = record_calls(monkeypatch, [cuda])
    weight, lora_A, lora_B, *_ = case.projections[0]
    pk.lora_linear(case.x, weight, lora_A.requires_grad_(), lora_B, 2.0).sum().backward()
    assert [direction for direction, *_ in calls] == ["forward", "backward"]
    assert op._fastest(case.x, 48, 72, False, False) == "cuda"
    assert op._fastest(case.x[1:], 48, 72, False, False) == op._fastest(case.x, 48, 72, False, True) == "triton"
    assert op._fastest(case.x.float(), 48, 72, False, False) == "triton"
    table["triton_from", 2] = 40 * 72 * 48
    assert op._fastest(case.x[1:], 48, 72, False, False) == "reference"
    assert op._fastest(case.x[1:], 48, 72, True, False) == "triton"  # with a mask torch takes many passes


def test_auto_takes_torchs_products_where_launches_rule(monkeypatch):
    """The same numbers as by the reference, whichever of the two directions it runs; without a launch of ours."""
    case = make_case(batch=(40,), in_features=72, out_features=(48, 24), rank=8, dtype=torch.bfloat16)
    expected = run(case)
    monkeypatch.setattr(backends, "choose", lambda *_: "auto")  # as on a GPU
    calls = record_calls(monkeypatch, [reference])
    for name, value in run(case).items():
        assert torch.equal(value, expected[name])
    assert [direction for direction, *_ in calls] == ["forward", "backward"]
