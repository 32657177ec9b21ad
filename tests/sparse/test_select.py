"""The best by score against sorting all of them, and what is drawn at random against the odds."""

import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import peft_kernels as pk
from peft_kernels import SparseLayout
from peft_kernels.sparse import random, select
from tests.sparse.live_memory import LiveMemory

module = importlib.import_module("peft_kernels.sparse.select")  # its name stands for the function in the package
#: What makes the host wait for a GPU.
WAITING = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "equal", "is_nonzero"}


def unit_means(scores: torch.Tensor, tile: tuple[int, int]) -> torch.Tensor:
    """float32, of each tile."""
    if not scores.numel():
        return torch.empty(0)
    tiles = scores.double().unflatten(0, (-1, tile[0])).unflatten(2, (-1, tile[1]))
    return tiles.mean((1, 3)).float().flatten()


def expected(scores, *, density=None, count=None, scope="global", structure="entries", block=None):
    """The same by sorting everything: masks by name."""
    tiles, means = {}, {}
    for name, tensor in scores.items():
        N, K = tensor.shape
        tiles[name] = {"entries": (1, 1), "rows": (1, K), "columns": (N, 1), "blocks": block}[structure]
        means[name] = unit_means(tensor, tiles[name])
    masks = {}
    for group in [list(scores)] if scope == "global" else [[name] for name in scores]:
        if not group:
            continue
        sizes = torch.cat([torch.full((len(means[name]),), math.prod(tiles[name])) for name in group])
        order = torch.cat([means[name] for name in group]).double().neg().argsort(stable=True)
        if count is not None:
            taken = count
        else:
            # Of all numbers of units the one with which the number of entries comes nearest, the lower of two.
            common = math.gcd(*sizes.tolist()) or 1
            target = common * round(density * int(sizes.sum()) / common)
            reached = torch.cat([torch.zeros(1, dtype=torch.long), sizes[order].cumsum(0)])
            taken = int((reached - target).abs().argmin())
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[:taken]] = True
        for name, part in zip(group, chosen.split([len(means[name]) for name in group])):
            (N, K), (height, width) = scores[name].shape, tiles[name]
            if not part.numel():
                masks[name] = torch.zeros(N, K, dtype=torch.bool)
                continue
            units = part.view(N // height, K // width)
            masks[name] = units.repeat_interleave(height, 0).repeat_interleave(width, 1)
    return masks


def check(scores, **arguments):
    layouts, masks = select(scores, **arguments), expected(scores, **arguments)
    assert list(layouts) == list(scores)
    for name, layout in layouts.items():
        assert layout.kind == arguments.get("structure", "entries") and layout.device == scores[name].device
        assert torch.equal(layout.mask(), masks[name]), name
        if layout.kind == "entries":
            assert layout == SparseLayout.from_mask(masks[name])  # columns ascend, dtypes are right
    return layouts


def draw_scores(shapes, values: str, dtype, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = {
        "equal": lambda shape: torch.ones(shape),
        "few": lambda shape: torch.randint(-2, 3, shape, generator=generator) * torch.tensor([1.0, -1.0])[seed % 2],
        "many": lambda shape: torch.randn(shape, generator=generator),
    }[values]
    return {f"{i}": draw(shape).to(dtype) for i, shape in enumerate(shapes)}


SHAPES = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 9)), max_size=4)


@given(
    shapes=SHAPES,
    values=st.sampled_from(["equal", "few", "many"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    structure=st.sampled_from(["entries", "rows", "columns", "blocks"]),
    scope=st.sampled_from(["global", "tensor"]),
    share=st.floats(0, 1),
    by_count=st.booleans(),
    piece=st.sampled_from([1, 3, 8, 1 << 21]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=250)
def test_like_sorting(shapes, values, dtype, structure, scope, share, by_count, piece, seed):
    block = (2, 3) if structure == "blocks" else None
    if block:
        shapes = [(2 * N, 3 * K) for N, K in shapes]
    scores = draw_scores(shapes, values, dtype, seed)
    units = [
        {"entries": N * K, "rows": K and N, "columns": N and K, "blocks": N * K // 6}[structure] for N, K in shapes
    ]
    arguments = {"density": share}
    if by_count:
        most = sum(units) if scope == "global" else min(units, default=0)
        arguments = {"count": round(share * most)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", piece)
        check(scores, scope=scope, structure=structure, block=block, **arguments)


def test_every_bit_of_a_score_counts():
    """Neighbours in float32, both infinities, the smallest numbers, both zeros, in every place of the order."""
    inf = float("inf")
    ends = [-inf, -3.4028234663852886e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.1754943508222875e-38, 1.0, 3.4e38, inf]
    near = torch.tensor(2.5).view(torch.int32) + torch.arange(-40, 40, dtype=torch.int32)
    numbers = torch.cat([torch.tensor(ends), near.view(torch.float32), -near.view(torch.float32)])
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(0))
    scores = {"w": numbers[order].view(1, -1).repeat(2, 1)}
    for count in range(scores["w"].numel() + 1):
        check(scores, count=count)


def test_equal_scores_are_taken_in_order():
    scores = {"b": torch.tensor([[0.0, 1.0], [-0.0, 1.0]]), "a": torch.tensor([[1.0, 0.0, 2.0]])}
    positions = {
        count: [layout.indices().tolist() for layout in select(scores, count=count).values()] for count in range(8)
    }
    assert positions == {
        0: [[], []], 1: [[], [2]], 2: [[1], [2]], 3: [[1, 3], [2]], 4: [[1, 3], [0, 2]], 5: [[0, 1, 3], [0, 2]],
        6: [[0, 1, 2, 3], [0, 2]], 7: [[0, 1, 2, 3], [0, 1, 2]],
    }  # fmt: skip


def test_units_of_different_size_compete_by_their_means():
    """A short row with a large mean is before a long one with a larger sum."""
    scores = {"long": torch.tensor([[3.0] * 10, [1.0] * 10]), "short": torch.tensor([[5.0] * 4, [2.0] * 4])}
    for count, chosen in ((1, ([], [0])), (2, ([0], [0])), (3, ([0], [0, 1]))):
        layouts = select(scores, count=count, structure="rows")
        assert tuple(layout.tensors["index"].tolist() for layout in layouts.values()) == chosen
    # 28 entries. 4, 14, 18 and 28 of them can be had.
    for wanted, got in ((0, 0), (2, 0), (4, 4), (8, 4), (10, 14), (16, 14), (18, 18), (24, 28), (22, 18)):
        layouts = select(scores, density=wanted / 28, structure="rows")
        assert sum(layout.nnz for layout in layouts.values()) == got, wanted


def test_scores_of_any_stride():
    torch.manual_seed(0)
    for tensor in (torch.randn(30, 20).t(), torch.randn(20, 60)[:, ::2], torch.randn(30).expand(20, 30)):
        for structure, block in (("entries", None), ("rows", None), ("columns", None), ("blocks", (4, 5))):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "PIECE", 100)
                check({"w": tensor, "v": torch.randn(4, 5)}, density=0.23, structure=structure, block=block)


def test_larger_weights():
    torch.manual_seed(0)
    scores = {"q": torch.randn(700, 900).abs(), "v": torch.randn(30, 40000).bfloat16().abs()}
    for scope in ("global", "tensor"):
        first = check(scores, density=0.013, scope=scope)
        assert select(scores, density=0.013, scope=scope) == first
    assert sum(layout.nnz for layout in select(scores, density=0.013).values()) == round(0.013 * (630_000 + 1_200_000))


def test_nothing_of_autograd():
    weight = torch.nn.Parameter(torch.randn(5, 6))
    layout = select({"w": weight * 2}, density=0.5)["w"]
    assert not any(tensor.requires_grad for tensor in layout.tensors.values())


@pytest.mark.parametrize("structure", ["entries", "rows", "columns", "blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory(structure, dtype, monkeypatch):
    """40 bytes for an entry of a piece, some histograms, and the result; nothing in the size of the scores."""
    monkeypatch.setattr(module, "PIECE", 1 << 14)
    scores = {name: torch.randn(1024, 2048).to(dtype) for name in "ab"}
    block = (16, 16) if structure == "blocks" else None
    with LiveMemory() as memory:
        layouts = select(scores, density=0.01, structure=structure, block=block)
    result = sum(layout.nbytes for layout in layouts.values())
    assert memory.peak < 40 * (1 << 14) + 6 * 8 * module.BINS + 4 * result < sum(t.nbytes for t in scores.values()) / 2
    assert memory.largest <= 8 * module.BINS


@pytest.mark.parametrize("structure", ["entries", "rows", "columns", "blocks"])
def test_one_transfer(structure, monkeypatch):
    transfers = []
    to_list = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: transfers.append(tensor.numel()) or to_list(tensor))
    monkeypatch.setattr(module, "PIECE", 1000)
    scores = {name: torch.randn(40, 100) for name in "abc"}
    for scope in ("global", "tensor"):
        transfers.clear()
        with LiveMemory() as memory:
            select(
                scores, density=0.1, scope=scope, structure=structure, block=(4, 4) if structure == "blocks" else None
            )
        assert len(transfers) == 1 and transfers[0] <= 3 * 3 * 4, transfers
        assert not memory.ops & WAITING


@pytest.mark.gpu
def test_gpu_like_cpu():
    torch.manual_seed(0)
    scores = {"q": torch.randn(700, 900).abs(), "v": torch.randn(300, 4000).bfloat16().abs()}
    on_gpu = {name: tensor.cuda() for name, tensor in scores.items()}
    for structure, block in (("entries", None), ("rows", None), ("columns", None), ("blocks", (4, 4))):
        for scope in ("global", "tensor"):
            arguments = {"density": 0.013, "scope": scope, "structure": structure, "block": block}
            assert select(on_gpu, **arguments) == select(scores, **arguments)
            layouts = random(on_gpu, seed=3, **arguments)
            assert layouts == random(scores, seed=3, **arguments)
            assert all(layout.device.type == "cuda" for layout in layouts.values())


# --- Drawn at random -------------------------------------------------------------------------------------------


@given(
    shapes=SHAPES,
    structure=st.sampled_from(["entries", "rows", "columns", "blocks"]),
    scope=st.sampled_from(["global", "tensor"]),
    density=st.floats(0, 1),
    seed=st.integers(-3, 2**40),
)
@settings(deadline=None, max_examples=200)
def test_as_many_as_asked_for(shapes, structure, scope, density, seed):
    block = (2, 3) if structure == "blocks" else None
    if block:
        shapes = [(2 * N, 3 * K) for N, K in shapes]
    named = {f"{i}": shape for i, shape in enumerate(shapes)}
    arguments = {"structure": structure, "scope": scope, "block": block, "seed": seed}
    layouts = random(named, density=density, **arguments)
    units = []
    for name, (N, K) in named.items():
        layout = layouts[name]
        tile = {"entries": 1, "rows": K, "columns": N, "blocks": 6}[structure]
        number = layout.nnz // max(1, tile)
        units.append((number, N * K // max(1, tile)))
        assert (layout.kind, layout.shape) == (structure, (N, K))
        mask = layout.mask()  # refuses what is out of range
        assert int(mask.sum()) == layout.nnz  # none twice
        if structure == "entries":
            assert layout == SparseLayout.from_mask(mask)
        else:
            index = layout.tensors["index"]
            assert index.dtype == torch.int64 and bool((index.diff() > 0).all())
        if scope == "tensor":
            assert number == round(density * units[-1][1])
    if scope == "global":
        assert sum(number for number, _ in units) == round(density * sum(most for _, most in units))
    assert random(named, density=density, **arguments) == layouts


def test_seeds_tensors_and_devices_of_random():
    shapes = {"a": (40, 50), "b": (40, 50)}
    first, second = random(shapes, density=0.1), random(shapes, density=0.1, seed=1)
    four = [first["a"], first["b"], second["a"], second["b"]]
    assert all(four[i] != four[j] for i in range(4) for j in range(i))
    # A tensor's own draw does not depend on what comes after it.
    assert random({"a": (40, 50)}, density=0.1)["a"] == first["a"]
    assert random({name: torch.empty(shape) for name, shape in shapes.items()}, density=0.1) == first
    meta = random({"a": torch.empty(40, 50, device="meta")}, count=7, device="cpu")["a"]
    assert meta.nnz == 7 and meta.device.type == "cpu"
    state = torch.get_rng_state()
    random(shapes, density=0.1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("count", [1, 12, 31, 48])
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_every_position_is_as_likely(count, scope):
    """60 positions, 800 seeds: each within six standard deviations of its share. So is each pair of neighbours."""
    seeds, shapes = 800, {"w": (6, 10)} if scope == "tensor" else {"a": (2, 10), "b": (4, 10)}
    masks = []
    for seed in range(seeds):
        layouts = random(shapes, count=count, scope=scope, seed=seed)
        masks.append(torch.cat([layout.mask().flatten() for layout in layouts.values()]))
    drawn = torch.stack(masks).double()
    assert bool((drawn.sum(1) == count).all())
    pairs = drawn * drawn.roll(1, 1)
    for seen, share in ((drawn.sum(0), count / 60), (pairs.sum(0), count * (count - 1) / (60 * 59))):
        assert float((seen - seeds * share).abs().max()) <= 6 * math.sqrt(seeds * share * (1 - share))


def test_memory_of_random():
    """Of what is drawn, not of the weight."""
    with LiveMemory() as memory:
        layout = random({"w": (1 << 15, 1 << 17)}, density=1e-6)["w"]
    assert layout.nnz == 4295
    # Row by row, 2¹⁵ rows.
    assert memory.peak < 64 * layout.nnz + 32 * (1 << 15)
    with LiveMemory() as memory:
        layout = random({"w": (100, 10_000)}, density=0.4)["w"]
    assert memory.peak < 64 * layout.nnz


# --- What is refused -------------------------------------------------------------------------------------------

ONE = {"w": torch.ones(4, 6)}
REFUSED = {
    "neither": (lambda: select(ONE), "either a density or a count, got neither"),
    "both": (lambda: select(ONE, density=0.1, count=1), "either a density or a count, got both"),
    "density": (lambda: select(ONE, density=1.1), "a density from 0 to 1, got 1.1"),
    "no density": (lambda: select(ONE, density=float("nan")), "a density from 0 to 1, got nan"),
    "count": (lambda: select(ONE, count=25), "a count from 0 to the 24 entries of all, got 25"),
    "negative": (lambda: select(ONE, count=-1), "a count from 0 to the 24 entries"),
    "half": (lambda: select(ONE, count=0.5), "a count from 0 to .*, got 0.5"),
    "rows": (lambda: select(ONE, count=5, structure="rows"), "the 4 rows of all, got 5"),
    "of one": (
        lambda: select({**ONE, "v": torch.ones(1, 2)}, count=3, scope="tensor"), "the 2 entries of 'v', got 3",
    ),
    "scope": (lambda: select(ONE, count=1, scope="layer"), "the scope global or tensor, got 'layer'"),
    "structure": (lambda: select(ONE, count=1, structure="row"), "a structure among .*, got 'row'"),
    "no block": (lambda: select(ONE, count=1, structure="blocks"), "a block for blocks .*, got None"),
    "a block": (lambda: select(ONE, count=1, block=(2, 2)), r"a block for blocks .*, got \(2, 2\) for entries"),
    "block size": (lambda: select(ONE, count=1, structure="blocks", block=(3, 2)), r"that fill \[4, 6\] of 'w'"),
    "block of none": (lambda: select(ONE, count=1, structure="blocks", block=(0, 2)), "blocks .* that fill"),
    "block in 3": (lambda: select(ONE, count=1, structure="blocks", block=(1, 1, 2)), "blocks .* that fill"),
    "integers": (lambda: select({"w": torch.ones(4, 6).int()}, count=1), "floating point, got .* for 'w'"),
    "flat": (lambda: select({"w": torch.ones(4)}, count=1), r"scores \[N, K\] .*, got \[4\] float32"),
    "shape": (lambda: random({"w": (4, 5, 6)}, count=1), r"the shape \(N, K\) .* for 'w'"),
    "random count": (lambda: random({"w": (4, 6)}, count=25), "the 24 entries of 'w', got 25"),
    "random both": (lambda: random({"w": (4, 6)}, count=2, density=0.1), "either a density or a count"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_line(kind):
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=rf"^expected .*{message}") as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("structure", ["entries", "rows", "columns", "blocks"])
@pytest.mark.parametrize("nan", [float("nan"), -float("nan")])
def test_nan_is_refused(structure, nan):
    scores = {"fine": torch.ones(4, 6), "bad": torch.ones(4, 6)}
    scores["bad"][2, 3] = nan
    for density in (0.0, 0.1, 1.0):
        with pytest.raises(ValueError, match=r"^expected numbers, got NaN in 'bad'$"):
            select(scores, density=density, structure=structure, block=(2, 2) if structure == "blocks" else None)


def test_names():
    assert set(pk.sparse.__all__) >= {"linear_weights", "select", "random", "magnitude", "change", "gradient", "fisher"}
    assert all(getattr(pk.sparse, name).__doc__ for name in pk.sparse.__all__)
