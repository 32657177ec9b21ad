"""The gradient of sparse entries by the native library; csrc/selftest proves its index arithmetic without a GPU."""

import pytest
import torch

from peft_kernels import SparseLayout, _native
from peft_kernels.testing.sparse_delta import make_layout
from tests.checks.common import captured

pytestmark = pytest.mark.skipif(not _native.LIBRARY.exists(), reason="needs the native library")


def sparse_gathered(*args):
    assert _native.load(), _native.why_not()
    return torch.ops.peft_kernels_native.sparse_gathered(*args)


def matrix(tokens, width, dtype=torch.bfloat16, device="cuda"):
    """Rows that start on 16 bytes, whatever their length."""
    return torch.randn(tokens, -(-width // 8) * 8, device=device).to(dtype)[:, :width]


def held(layout):
    """row_starts, columns, n, m of `sparse_gathered`."""
    *starts, columns = layout.tensors.values()
    return starts[0] if starts else None, columns, *(layout.tile or (1, 1))


def test_refuses_cpu_tensors():
    layout = make_layout("entries", 16, 24, 0.1)
    with pytest.raises(NotImplementedError, match="CPU"):
        sparse_gathered(matrix(4, 16, device="cpu"), matrix(4, 24, device="cpu"), *held(layout))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["entries", "n_of_m"])
@pytest.mark.parametrize("density", [0.002, 0.05, 1.0])
@pytest.mark.parametrize(
    "shape", [(1, 8, 8), (130, 71, 200), (512, 1536, 576), (1000, 1024, 4096), (4100, 4096, 4096)], ids=str
)
def test_is_the_sum_in_float32(shape, density, kind, dtype):
    torch.manual_seed(0)
    tokens, rows, columns = shape
    layout = make_layout(kind, rows, columns, density).to("cuda")
    dy, x = matrix(tokens, rows, dtype), matrix(tokens, columns, dtype)
    first = sparse_gathered(dy, x, *held(layout))
    assert first.dtype == torch.float32 and first.shape[1] == layout.nnz
    found = layout.take(dy.double().t() @ x.double())
    size = layout.take(dy.double().abs().t() @ x.double().abs())
    # Each of M products is added in float32, by tensor cores that may cut a bit off where others round it.
    assert bool(((first.double().sum(0) - found).abs() <= (tokens + 2) * 2**-23 * size).all())
    for _ in range(50 if tokens == 1000 else 2):
        assert torch.equal(sparse_gathered(dy, x, *held(layout)), first)


@pytest.mark.gpu
def test_columns_of_32_bits_and_starts_of_64():
    layout = make_layout("entries", 64, 40000, 0.01).to("cuda")
    dy, x = matrix(70, 64), matrix(70, 40000)
    starts, columns, *rest = held(layout)
    assert columns.dtype == torch.int32
    narrow = sparse_gathered(dy, x, starts, columns, *rest)
    assert torch.equal(sparse_gathered(dy, x, starts.long(), columns, *rest), narrow)
    torch.testing.assert_close(narrow.sum(0), layout.take(dy.float().t() @ x.float()), rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_of_nothing():
    empty = SparseLayout.from_indices((16, 24), torch.tensor([], dtype=torch.long)).to("cuda")
    assert sparse_gathered(matrix(4, 16), matrix(4, 24), *held(empty)).sum(0).shape == (0,)
    some = make_layout("entries", 16, 24, 0.1).to("cuda")
    assert not sparse_gathered(matrix(0, 16), matrix(0, 24), *held(some)).sum(0).any()


@pytest.mark.gpu
def test_runs_on_the_current_stream():
    layout = make_layout("entries", 256, 256, 0.05).to("cuda")
    dy, x = matrix(64, 256), matrix(64, 256)
    graph, out = captured(lambda: sparse_gathered(dy, x, *held(layout)))
    dy.mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, sparse_gathered(dy, x, *held(layout)))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dy": torch.ones(4, 16)}, "expected dy bfloat16 or float16"),
        ({"x": torch.ones(5, 24).bfloat16()}, r"expected x \[4, 24\], got \[5, 24\]"),
        ({"x": torch.ones(4, 24).half()}, "expected every operand in one dtype, got x in another"),
        ({"x": torch.ones(4, 25).bfloat16()[:, 1:]}, r"expected rows of x that start on 16 bytes"),
        ({"starts": torch.zeros(16).int()}, r"expected a contiguous row_starts, int32 or int64 \[17\], got \[16\]"),
        (
            {"columns": torch.zeros(3)},
            r"expected contiguous columns, int16 or int32 \[nnz\], got \[3\] or another dtype",
        ),
        ({"starts": None, "n": 3, "m": 5}, "expected 1 <= n <= m <= 128 where m divides 24, got 3 of 5"),
        (
            {"starts": None, "n": 2, "m": 4},
            r"expected contiguous offsets, int8 \[16, 6, 2\], got \[3\] or another dtype",
        ),
    ],
)
def test_says_what_it_expected(change, message):
    given = {
        "dy": torch.ones(4, 16).bfloat16(), "x": torch.ones(4, 24).bfloat16(), "starts": torch.zeros(17).int(),
        "columns": torch.zeros(3).short(), "n": 1, "m": 1,
    } | change  # fmt: skip
    with pytest.raises(RuntimeError, match=message) as caught:
        sparse_gathered(*(value.cuda() if isinstance(value, torch.Tensor) else value for value in given.values()))
    assert "\n" not in str(caught.value).strip()
