"""The low-rank products of the native library; csrc/selftest proves their index arithmetic without a GPU."""

import itertools

import pytest
import torch

from peft_kernels import _native
from peft_kernels.ops.core import dropout

pytestmark = pytest.mark.skipif(not _native.LIBRARY.exists(), reason="needs the native library")


def lora_gemm(left, right, low_left, low_right, keep, *rest):
    """Of one pair, or of lists; of no mask, one, or a list."""
    assert _native.load(), _native.why_not()
    pairs = [given if isinstance(given, list) else [given] for given in (left, right, low_left, low_right)]
    masks = keep if isinstance(keep, list) else [] if keep is None else [keep]
    return torch.ops.peft_kernels_native.lora_gemm(*pairs, masks, *rest)


def lora_forward(*args):
    assert _native.load(), _native.why_not()
    return torch.ops.peft_kernels_native.lora_forward(*args)


def lora_shrink(*args):
    assert _native.load(), _native.why_not()
    return torch.ops.peft_kernels_native.lora_shrink(*args)


def lora_outer(*args):
    assert _native.load(), _native.why_not()
    return torch.ops.peft_kernels_native.lora_outer(*args)


def lora_grads(left, right, low_left, low_right, keep, *rest):
    """Of one pair, and of no mask or one."""
    assert _native.load(), _native.why_not()
    masks = [] if keep is None else [keep]
    return torch.ops.peft_kernels_native.lora_grads([left], [right], [low_left], [low_right], masks, *rest)


def matrix(height, width, dtype=torch.bfloat16, device="cuda", scale=1.0):
    """Rows that start on 16 bytes, whatever their length."""
    return (torch.randn(height, -(-width // 8) * 8, device=device) * scale).to(dtype)[:, :width]


def operands(rows, columns, depth, rank, by_feature, dtype=torch.bfloat16, device="cuda"):
    """left, right, low_left, low_right."""
    torch.manual_seed(0)
    right, low_right = ((columns, depth), (columns, rank)) if by_feature else ((depth, columns), (rank, columns))
    return (
        matrix(rows, depth, dtype, device),
        matrix(*right, dtype, device, max(depth, 1) ** -0.5),
        matrix(rows, rank, dtype, device),
        matrix(*low_right, dtype, device, max(rank, 1) ** -0.5),
    )


def test_refuses_cpu_tensors():
    with pytest.raises(NotImplementedError, match="CPU"):
        lora_gemm(*operands(4, 8, 8, 2, True, device="cpu"), None, None, True)
    x, lora_A, *_ = operands(4, 2, 8, 2, True, device="cpu")
    with pytest.raises(NotImplementedError, match="CPU"):
        lora_shrink(x, lora_A, None, 0, 1, None, True)
    with pytest.raises(NotImplementedError, match="CPU"):
        lora_outer(x, x, None, None, 1, False)
    with pytest.raises(NotImplementedError, match="CPU"):
        lora_forward(x, x, lora_A, lora_A, None, 1.0, None)
    with pytest.raises(NotImplementedError, match="CPU"):
        lora_grads(*operands(4, 8, 8, 2, False, device="cpu"), None, False, x, x, None, 1)


@pytest.fixture(scope="module")
def tile():
    facts = _native._facts()
    if facts is None:
        pytest.skip("the facts were built for another Python")
    return facts.gemm_tile


class TestTile:
    @pytest.mark.parametrize("processors", [108, 132])  # A100, H200
    def test_large_for_large_and_small_for_small(self, tile, processors):
        assert tile(8192, 4096, processors, False)[:2] in {(128, 256), (128, 128)}
        assert tile(8192, 14336, processors, False)[:2] in {(128, 256), (128, 128)}
        for boxes in (False, True):
            assert tile(64, 1024, processors, boxes) == (64, 64, "sm_80")
            assert tile(1, 1, processors, boxes) == (64, 64, "sm_80")

    def test_by_wgmma_where_it_can_and_there_is_enough_to_do(self, tile):
        for rows, columns in itertools.product((2048, 8192, 16384), (1024, 4096, 14336)):
            assert tile(rows, columns, 132, True)[2] == "sm_90a", (rows, columns)
            assert tile(rows, columns, 132, False)[2] == "sm_80"
        assert tile(8192, 4096, 132, True) == (128, 256, "sm_90a")

    @pytest.mark.parametrize(("processors", "boxes"), [(108, False), (132, True)])
    def test_no_tile_leaves_most_processors_idle_where_a_smaller_one_would_not(self, tile, processors, boxes):
        for rows, columns in itertools.product((256, 512, 1024, 2048), (576, 1024, 1536, 4096)):
            height, width, architecture = tile(rows, columns, processors, boxes)
            blocks = -(-rows // height) * -(-columns // width)
            small = -(-rows // 64) * -(-columns // 64)
            # A tile for sm_90a takes half the time of its size.
            share = 4 if architecture == "sm_90a" else 2
            assert blocks * share >= min(processors, small), (rows, columns)

    def test_depends_on_nothing_else(self, tile):
        assert len({tile(512, 1536, 108, False) for _ in range(5)}) == 1

    def test_refuses_nothing_to_do(self, tile):
        with pytest.raises(ValueError, match="expected sizes of at least 1"):
            tile(0, 8, 108, False)


# --- On a GPU -----------------------------------------------------------------------------------------------


def exact(left, right, low_left, low_right, keep, bias, by_feature):
    left, right, low_left, low_right = (tensor.double() for tensor in (left, right, low_left, low_right))
    low = low_left @ (low_right.mT if by_feature else low_right)
    if keep is not None:
        bits = torch.arange(8, device=keep.device)
        low = low * ((keep[..., None] >> bits) & 1).flatten(1)[:, : low.shape[1]]
    out = left @ (right.mT if by_feature else right) + low
    return out if bias is None else out + bias.double()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("by_feature", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 8, 8, 1), (130, 71, 200, 6), (512, 1536, 576, 16), (1000, 1024, 4096, 64), (2048, 4096, 4096, 512)],
    ids=str,
)  # fmt: skip
def test_is_the_rounded_sum(shape, masked, by_feature, dtype):
    rows, columns, depth, rank = shape
    given = operands(*shape, by_feature, dtype)
    keep = torch.randint(256, (rows, -(-columns // 8)), dtype=torch.uint8, device="cuda") if masked else None
    bias = torch.randn(columns, device="cuda").to(dtype)
    out = lora_gemm(*given, keep, bias, by_feature)
    wanted = exact(*given, keep, bias, by_feature)
    # One rounding to the output's dtype, and float32's along the sum, of which the parts are of size 1.
    bound = torch.finfo(dtype).eps / 2 * wanted.abs() + (depth + rank) * 2**-23
    assert bool(((out.double() - wanted).abs() <= bound).all())
    repeats = 50 if rows == 1000 else 5
    assert all(torch.equal(out, lora_gemm(*given, keep, bias, by_feature)) for _ in range(repeats))


@pytest.mark.gpu
@pytest.mark.parametrize("by_feature", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(7, 72), (64, 4096), (1000, 1024), (2048, 4096)])
@pytest.mark.parametrize("number", [1, 3], ids=["one-mask", "masks-apart"])
def test_several_pairs(rows, columns, by_feature, number):
    """Of q, k and v: the sum of all, masked where it is low-rank."""
    sizes = [(4096, 16), (1024, 6), (200, 70)]
    pairs = [operands(rows, columns, depth, rank, by_feature) for depth, rank in sizes]
    masks = list(torch.randint(256, (number, rows, columns // 8), dtype=torch.uint8, device="cuda"))
    out = lora_gemm(*map(list, zip(*pairs)), masks, None, by_feature)
    wanted = sum(exact(*pair, mask, None, by_feature) for pair, mask in zip(pairs, masks * (3 // number)))
    bound = torch.finfo(out.dtype).eps / 2 * wanted.abs() + sum(map(sum, sizes)) * 2**-23
    assert bool(((out.double() - wanted).abs() <= bound).all())


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(0, 8, 8, 2), (8, 0, 8, 2)])
def test_nothing_to_compute(shape):
    assert lora_gemm(*operands(*shape, True), None, None, True).shape == shape[:2]


@pytest.mark.gpu
@pytest.mark.slow
def test_past_2_to_the_31_elements():
    rows = 2**31 // 4096 + 5
    left, right, low_left, low_right = operands(rows, 4096, 8, 8, True)
    out = lora_gemm(left, right, low_left, low_right, None, None, True)
    torch.testing.assert_close(out[-5:], lora_gemm(left[-5:], right, low_left[-5:], low_right, None, None, True))


@pytest.mark.gpu
def test_runs_on_the_current_stream():
    given = operands(64, 64, 64, 8, True)
    lora_gemm(*given, None, None, True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a launch on any other stream would make the capture fail
        out = lora_gemm(*given, None, None, True)
    given[0].zero_()
    given[2].zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert not out.any()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"left": t["left"].float()}, "expected left bfloat16 or float16"),
        (lambda t: t | {"right": t["right"][:, :-8]}, r"expected right \[64, 64\], got \[64, 56\]"),
        (lambda t: t | {"low_right": t["low_right"].half()}, "expected every operand in one dtype, got low_right"),
        (lambda t: t | {"left": t["left"].mT}, r"expected rows of left that start on 16 bytes, got strides \(1, 64\)"),
        (lambda t: t | {"left": torch.randn(64, 65, device="cuda").bfloat16()[:, 1:]}, "start on 16 bytes"),
        (lambda t: t | {"low_left": t["low_left"].cpu()}, "expected low_left on CUDA device 0"),
        (lambda t: t | {"dropout_mask": t["dropout_mask"][:, :4]}, "expected a contiguous dropout_mask, uint8"),
        (lambda t: t | {"bias": t["bias"][:3]}, r"expected a contiguous bias \[64\]"),
        (lambda t: t | {"dropout_mask": [t["dropout_mask"]] * 2}, "expected no mask, one, or 1, got 2"),
        (lambda t: t | {"right": [t["right"]] * 2}, "expected 1 to 3 operands of each kind, got 1, 2, 1 and 1"),
    ],
)
def test_says_what_it_expected(change, message):
    names = ("left", "right", "low_left", "low_right")
    given = dict(zip(names, operands(64, 64, 64, 8, True)))
    given |= {
        "dropout_mask": torch.zeros(64, 8, dtype=torch.uint8, device="cuda"),
        "bias": torch.zeros(64, dtype=torch.bfloat16, device="cuda"),
    }
    with pytest.raises(RuntimeError, match=message) as caught:
        lora_gemm(*change(given).values(), True)
    assert "\n" not in str(caught.value).strip()


class TestForward:
    """S and y by one kernel, on compute capability 9.0 only."""

    pytestmark = pytest.mark.gpu

    @pytest.fixture(autouse=True)
    def hopper(self):
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs compute capability 9.0")

    @staticmethod
    def given(rows, columns, depth, rank):
        x, weight, _, lora_B = operands(rows, columns, depth, rank, True)
        return [x, weight, matrix(rank, depth, scale=depth**-0.5), lora_B]

    @pytest.mark.parametrize(
        "shape", [(1, 8, 1, 1), (130, 264, 200, 6), (1000, 1536, 576, 32), (8192, 4096, 4096, 16)], ids=str
    )
    def test_as_a_pass_and_the_gemm(self, shape):
        given, row_scale = self.given(*shape), torch.randn(shape[0], device="cuda")
        bias = torch.randn(shape[1], device="cuda").bfloat16()
        y, s = lora_forward(*given, row_scale, 0.5, bias)
        x, weight, lora_A, lora_B = given
        wanted = 0.5 * row_scale[:, None].double() * (x.double() @ lora_A.double().mT)
        rank, eps = shape[3], torch.finfo(torch.bfloat16).eps
        slack = (shape[2] / 8 + 2) * 2**-23 * wanted.abs().max()  # as assert_summed has it
        assert bool(((s[:, :rank].double() - wanted).abs() <= eps / 2 * wanted.abs() + slack).all())
        assert not s[:, rank:].any()
        wanted = exact(x, weight, s[:, :rank], lora_B, None, bias, True)
        bound = eps / 2 * wanted.abs() + (shape[2] + rank) * 2**-23
        assert bool(((y.double() - wanted).abs() <= bound).all())
        for _ in range(50 if shape[0] == 1000 else 5):
            again = lora_forward(*given, row_scale, 0.5, bias)
            assert torch.equal(again[0], y)
            assert torch.equal(again[1], s)

    def test_on_the_current_stream(self):
        given = self.given(300, 512, 128, 8)
        lora_forward(*given, None, 1.0, None)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # a launch on any other stream would make the capture fail
            y, s = lora_forward(*given, None, 1.0, None)
        given[0].zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert not y.any()
        assert not s.any()

    @pytest.mark.parametrize(
        ("place", "change", "message"),
        [
            (0, torch.Tensor.float, "expected x bfloat16 or float16"),
            (1, lambda weight: weight[:60], "expected K of at least 1, N a positive multiple of 8 and R from 1 to 64"),
            (2, lambda lora_A: lora_A[:, :8], r"expected lora_A \[8, 128\], got \[8, 8\]"),
            (3, torch.Tensor.half, "expected every operand in one dtype, got lora_B in another"),
            (4, lambda _: torch.ones(3, device="cuda"), r"expected a contiguous row_scale, float32 \[64\], got \[3\]"),
            (6, lambda _: torch.ones(64, device="cuda"), r"expected a contiguous bias \[64\]"),
        ],
    )
    def test_says_what_it_expected(self, place, change, message):
        given = [*self.given(64, 64, 128, 8), None, 1.0, None]
        given[place] = change(given[place])
        with pytest.raises(RuntimeError, match=message) as caught:
            lora_forward(*given)
        assert "\n" not in str(caught.value).strip()


def assert_summed(found, wanted, terms):
    """Float32 sums of as many products. A tensor core cuts off what does not fit beside a partial sum, 8 or 16 products
    at a time: errors of one sign, which add up."""
    assert (found.double() - wanted).abs().max() <= (terms / 8 + 2) * 2**-23 * wanted.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(
    "shape",
    [(1, 8, 1, 1), (130, 71, 6, 1), (512, 4096, 16, 3), (8192, 4096, 16, 1), (300, 1000, 24, 2), (300, 1000, 130, 2)],
    ids=str,
)
def test_shrink_is_the_product_of_what_is_kept(shape, p, dtype):
    rows, depth, width, streams = shape
    torch.manual_seed(0)
    x, lora_A = matrix(rows, depth, dtype), matrix(streams * width, depth, dtype)
    seed = torch.tensor([7], device="cuda") if p else None
    mask = torch.empty(streams, rows, -(-depth // 8), dtype=torch.uint8, device="cuda") if p else None
    partials = lora_shrink(x, lora_A, seed, dropout.threshold(p), streams, mask, True)
    assert partials.shape[1:] == (rows, streams * width)
    wide = x.double().expand(streams, rows, depth)
    if p:
        assert torch.equal(mask, dropout.draw_mask_by_torch(seed, rows, depth, p, streams))
        wide = wide * torch.stack([dropout.unpack_mask(bits, depth, torch.float64) for bits in mask])
    wanted = torch.einsum("smk,swk->msw", wide, lora_A.double().unflatten(0, (streams, width))).flatten(1)
    assert_summed(partials.double().sum(0), wanted, depth)
    assert all(
        torch.equal(partials, lora_shrink(x, lora_A, seed, dropout.threshold(p), streams, mask, True)) for _ in range(5)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 8, 1), (130, 71, 6), (130, 71, 24), (2048, 4096, 64)], ids=str)
def test_shrink_by_depth(shape):
    rows, depth, rank = shape
    dy, lora_B = matrix(rows, depth), matrix(depth, rank)
    partials = lora_shrink(dy, lora_B, None, 0, 1, None, False)
    assert_summed(partials.double().sum(0), dy.double() @ lora_B.double(), depth)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(0, 8, 2), (8, 0, 2)])
def test_shrink_of_nothing(shape):
    rows, depth, rank = shape
    partials = lora_shrink(matrix(rows, depth), matrix(rank, depth), None, 0, 1, None, True)
    assert partials.shape[1:] == (rows, rank)
    assert not partials.sum(0).any()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((8, 16), (4, 8), None, 1, True), r"expected rank_factor \[4, 16\], got \[4, 8\]"),
        (((8, 16), (4, 16), None, 3, True), "expected streams that divide the columns of rank_factor"),
        (((8, 16), (16, 4), 1, 1, False), r"expected seed int64 \[1\], and rank_factor by feature"),
    ],
)
def test_shrink_says_what_it_expected(arguments, message):
    wide, narrow, seed, streams, by_feature = arguments
    seed = None if seed is None else torch.tensor([seed], device="cuda")
    with pytest.raises(RuntimeError, match=message) as caught:
        lora_shrink(matrix(*wide), matrix(*narrow), seed, 0, streams, None, by_feature)
    assert "\n" not in str(caught.value).strip()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8, 1), (130, 71, 6), (2048, 4096, 16), (8192, 1000, 32), (300, 576, 24)])
def test_outer_and_shrunk(shape, dtype):
    rows, columns, width = shape
    torch.manual_seed(0)
    dy, s, lora_B = matrix(rows, columns, dtype), matrix(rows, width, dtype), matrix(columns, width, dtype)
    sums, shrunk = lora_outer(dy, s, lora_B, None, 1, False)
    assert_summed(sums.double().sum(0), dy.double().mT @ s.double(), rows)
    assert_summed(shrunk.double().sum(0), dy.double() @ lora_B.double(), columns)
    again = lora_outer(dy, s, lora_B, None, 1, False)
    assert torch.equal(sums, again[0]) and torch.equal(shrunk, again[1])


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 1), (130, 71, 6), (2048, 4096, 16)], ids=str)
def test_outer_transposed(shape, masked):
    rows, columns, width = shape
    torch.manual_seed(0)
    x, dh = matrix(rows, columns), matrix(rows, width)
    keep = torch.randint(256, (1, rows, -(-columns // 8)), dtype=torch.uint8, device="cuda") if masked else None
    sums, shrunk = lora_outer(x, dh, None, keep, 1, True)
    kept = x.double() if keep is None else x.double() * dropout.unpack_mask(keep[0], columns, torch.float64)
    assert_summed(sums.double().sum(0), dh.double().mT @ kept, rows)
    assert not shrunk.numel()


@pytest.mark.gpu
@pytest.mark.parametrize("masks", [None, 1, 2, 4])
@pytest.mark.parametrize("shape", [(1, 8, 8), (130, 71, 16), (2048, 4096, 64)], ids=str)
def test_outer_of_several_streams(shape, masks):
    rows, columns, width = shape
    torch.manual_seed(0)
    x, dh = matrix(rows, columns), matrix(rows, 4 * width)
    keep = None
    if masks:
        keep = torch.randint(256, (masks, rows, -(-columns // 8)), dtype=torch.uint8, device="cuda")
    sums, _ = lora_outer(x, dh, None, keep, 4, True)
    for j, its_sums in enumerate(sums.double().sum(0).split(width)):
        kept = x.double()
        if masks:
            kept = kept * dropout.unpack_mask(keep[j * masks // 4], columns, torch.float64)
        assert_summed(its_sums, dh[:, j * width : (j + 1) * width].double().mT @ kept, rows)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(0, 8, 2), (8, 0, 2)])
def test_outer_of_nothing(shape):
    rows, columns, width = shape
    sums, _ = lora_outer(matrix(rows, columns), matrix(rows, width), None, None, 1, False)
    assert sums.shape[1:] == (columns, width)
    assert not sums.sum(0).any()


@pytest.mark.gpu
def test_outer_says_what_it_expected():
    with pytest.raises(RuntimeError, match="lora_outer: expected a rank of at most 64, got 72"):
        lora_outer(matrix(8, 16), matrix(8, 72), None, None, 1, False)
    with pytest.raises(RuntimeError, match="lora_outer: expected a rank of at most 32 with lora_B, got 40"):
        lora_outer(matrix(8, 16), matrix(8, 40), matrix(16, 40), None, 1, False)
    with pytest.raises(RuntimeError, match=r"lora_outer: expected rank_factor \[8, 8\], got \[4, 8\]"):
        lora_outer(matrix(8, 16), matrix(4, 8), None, None, 1, False)
    keep = torch.zeros(2, 8, 2, dtype=torch.uint8, device="cuda")
    with pytest.raises(RuntimeError, match="expected one stream, or of several a multiple of 8 columns of rank_factor"):
        lora_outer(matrix(8, 16), matrix(8, 8), None, keep, 2, True)
    with pytest.raises(RuntimeError, match="expected masks that divide the 3 streams, got 2"):
        lora_outer(matrix(8, 16), matrix(8, 24), None, keep, 3, True)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 8, 8, 1),
        (130, 71, 40, 6),  # by sm_80's tiles
        (64, 4096, 4096, 16),  # the GEMM's depth is split
        (1000, 1024, 1536, 64),
        (8192, 4096, 4096, 16),
        (1024, 1024, 65536, 16),  # the pass ends long before the GEMM
    ],
    ids=str,
)
def test_grads_are_those_of_both(shape, masked, dtype):
    """Bit for bit, whatever of the pass over x has run before the GEMM has ended. What follows in the stream finds both
    done: also the memory of the operands, which the allocator hands out again."""
    rows, columns, _, rank = shape
    given, x, dh = operands(*shape, False, dtype), matrix(rows, columns, dtype), matrix(rows, rank, dtype)
    keep = torch.randint(256, (rows, -(-columns // 8)), dtype=torch.uint8, device="cuda") if masked else None
    over_x = None if keep is None else keep[None]
    out, (sums, _) = lora_gemm(*given, keep, None, False), lora_outer(x, dh, None, over_x, 1, True)
    for _ in range(50):
        copies = [one._base.clone()[:, : one.shape[1]] for one in (*given, x, dh)]  # rows start as they did
        found = lora_grads(*copies[:4], keep, False, *copies[4:], over_x, 1)
        found = [one.clone() for one in found]
        del copies
        others = [torch.full_like(one._base, torch.nan) for one in (*given, x, dh)]
        assert torch.equal(found[0], out) and torch.equal(found[1], sums)
        del others


@pytest.mark.gpu
def test_grads_of_nothing():
    for rows, columns in ((0, 8), (8, 0)):
        out, sums = lora_grads(
            *operands(rows, columns, 8, 2, False), None, False, matrix(rows, columns), matrix(rows, 2), None, 1
        )
        assert out.shape == (rows, columns) and not sums.sum(0).any()


@pytest.mark.gpu
def test_grads_say_what_they_expected():
    given = operands(8, 16, 16, 8, False)
    with pytest.raises(RuntimeError, match=r"lora_outer: expected rank_factor \[8, 8\], got \[4, 8\]"):
        lora_grads(*given, None, False, matrix(8, 16), matrix(4, 8), None, 1)
    with pytest.raises(RuntimeError, match="lora_gemm: expected every operand in one dtype"):
        lora_grads(given[0], given[1].half(), *given[2:], None, False, matrix(8, 16), matrix(8, 8), None, 1)
    with pytest.raises(RuntimeError, match=r"lora_grads: expected activation \[8, 16\], as out, got \[8, 24\]"):
        lora_grads(*given, None, False, matrix(8, 24), matrix(8, 8), None, 1)
    with pytest.raises(RuntimeError, match="expected activation on CUDA device 0, got a tensor that is not on CUDA"):
        lora_grads(*given, None, False, matrix(8, 16, device="cpu"), matrix(8, 8), None, 1)


@pytest.mark.gpu
def test_grads_in_a_graph():
    given, x, dh = operands(300, 520, 72, 16, False), matrix(300, 520), matrix(300, 16)
    out, sums = lora_grads(*given, None, False, x, dh, None, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = lora_grads(*given, None, False, x, dh, None, 1)
    for one in found:
        one.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found[0], out) and torch.equal(found[1], sums)
