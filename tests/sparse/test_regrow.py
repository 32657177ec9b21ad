"""Dropping and growing against lists of positions, one by one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_kernels import SparseLayout
from peft_kernels.sparse import candidates, drop_grow
from tests.sparse.live_memory import LiveMemory


def expected(positions, values, offered, scores, count):
    """The positions of the new layout, each with where its value comes from."""
    by_size = sorted(range(len(positions)), key=lambda i: (-abs(values[i]), i))
    by_score = sorted(range(len(offered)), key=lambda j: (-scores[j], offered[j]))
    kept = [(positions[i], i) for i in by_size[: len(positions) - count]]
    return sorted(kept + [(offered[j], -1 - j) for j in by_score[:count]])


def draw(N, K, seed, share, ties):
    """A layout, its values, and candidates in any order with scores: few different numbers if `ties`."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(N * K, generator=generator)
    nnz = round(share * N * K)
    layout = SparseLayout.from_indices((N, K), order[:nnz])
    offered = order[nnz : nnz + (N * K - nnz + 1) // 2]
    if ties:
        values = torch.randint(-2, 3, (nnz,), generator=generator).float()
        return layout, values, offered, torch.randint(-1, 2, offered.shape, generator=generator).float()
    values = torch.randn(nnz, generator=generator)
    return layout, values, offered, torch.randn(len(offered), generator=generator)


@given(
    N=st.integers(0, 8),
    K=st.integers(0, 9),
    seed=st.integers(0, 99),
    share=st.floats(0, 1),
    part=st.floats(0, 1),
    ties=st.booleans(),
)
@settings(deadline=None, max_examples=250)
def test_like_lists(N, K, seed, share, part, ties):
    layout, values, offered, scores = draw(N, K, seed, share, ties)
    count = round(part * min(layout.nnz, len(offered)))
    new, source = drop_grow(layout, values, offered, scores, count)
    pairs = expected(layout.indices().tolist(), values.tolist(), offered.tolist(), scores.tolist(), count)
    assert [position for position, _ in pairs] == new.indices().tolist()
    assert [origin for _, origin in pairs] == source.tolist() and source.dtype == torch.int64
    assert new == SparseLayout.from_indices((N, K), new.indices())


def test_equal_values_and_scores():
    layout = SparseLayout.from_indices((2, 5), torch.tensor([0, 2, 4, 6]))
    values = torch.tensor([-1.0, 1.0, 0.0, -0.0])
    # Of equal values the earlier stay; of equal scores the lower positions grow, in whatever order they come.
    new, source = drop_grow(layout, values, torch.tensor([9, 3, 1]), torch.tensor([2.0, 2.0, 2.0]), 1)
    assert new.indices().tolist() == [0, 1, 2, 4] and source.tolist() == [0, -3, 1, 2]
    new, source = drop_grow(layout, values, torch.tensor([9, 3, 1]), torch.tensor([2.0, 2.0, 1.0]), 3)
    assert new.indices().tolist() == [0, 1, 3, 9] and source.tolist() == [0, -3, -2, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_carry(dtype):
    layout, values, offered, scores = draw(9, 11, 0, 0.3, ties=False)
    regrown = drop_grow(layout, values, offered, scores, 8)
    dense = layout.put_(torch.zeros(9, 11, dtype=dtype), values)
    parameter = torch.nn.Parameter(values.to(dtype))
    seeds = torch.randn(len(offered))
    for grown in (0.0, 2.5, seeds, seeds.requires_grad_(True)):
        carried = regrown.carry(parameter, grown)
        assert carried.dtype == dtype and not carried.requires_grad
        at_all = dense.clone().view(-1)
        at_all[offered] = grown.detach().to(dtype) if isinstance(grown, torch.Tensor) else grown
        assert torch.equal(carried, at_all[regrown.layout.indices()])
    assert torch.equal(regrown.carry(values), regrown.carry(values, 0.0))
    assert torch.equal(regrown.carry(torch.arange(layout.nnz), -1), regrown.source.clamp(min=-1))
    # Nothing is shared with what was carried.
    before = values.clone()
    drop_grow(layout, values, offered, scores, 0).carry(values).zero_()
    assert torch.equal(values, before)


@given(
    N=st.integers(0, 8), K=st.integers(0, 9), seed=st.integers(0, 99), share=st.floats(0, 1), part=st.floats(0, 1),
    ties=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
@settings(deadline=None, max_examples=250)
def test_candidates_like_sorting(N, K, seed, share, part, ties, dtype):
    layout, *_ = draw(N, K, seed, share, ties)
    generator = torch.Generator().manual_seed(seed + 1000)
    gradient = torch.randint(-2, 3, (N, K), generator=generator) if ties else torch.randn(N, K, generator=generator)
    gradient = gradient.to(dtype)
    count = round(part * (N * K - layout.nnz))
    positions, gradients = candidates(gradient, layout, count)
    outside = (~layout.mask()).flatten().nonzero().flatten()
    best = outside[gradient.flatten()[outside].abs().argsort(descending=True, stable=True)[:count]].sort().values
    assert torch.equal(positions, best) and positions.dtype == torch.int64
    assert torch.equal(gradients, gradient.flatten()[best]) and gradients.dtype == dtype


def test_candidates_of_any_stride():
    layout = SparseLayout.from_indices((30, 20), torch.arange(0, 600, 7))
    gradient = torch.randn(20, 30, generator=torch.Generator().manual_seed(0)).t()
    found, same = candidates(gradient, layout, 50), candidates(gradient.contiguous(), layout, 50)
    assert torch.equal(found[0], same[0]) and torch.equal(found[1], same[1])


def test_finds_the_entries_that_matter():
    """Drop and grow as SpIEL does it, on a target whose difference is on 40 positions: they are found."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randperm(400, generator=generator)[:40]
    target = torch.zeros(400).index_fill_(0, places, 1.0).view(20, 20)
    target *= 1 + torch.rand(20, 20, generator=generator)
    layout = SparseLayout.from_indices((20, 20), torch.arange(40))
    values = torch.zeros(40)
    for _ in range(12):
        for _ in range(30):
            values -= 0.3 * layout.take(layout.put_(torch.zeros(20, 20), values) - target)
        gradient = layout.put_(torch.zeros(20, 20), values) - target
        offered, gradients = candidates(gradient, layout, 20)
        regrown = drop_grow(layout, values, offered, gradients.abs(), 10)
        layout, values = regrown.layout, regrown.carry(values)
        assert layout.nnz == 40
    assert int(torch.isin(layout.indices(), places).sum()) >= 30  # ten were grown just now


def test_memory():
    """Of the values and candidates, not of the weight."""
    layout = SparseLayout.from_indices((2000, 2000), torch.arange(0, 4_000_000, 4000))
    values, offered = torch.randn(1000), torch.arange(1, 4_000_000, 4000)
    with LiveMemory() as memory:
        drop_grow(layout, values, offered, values, 100)
    assert memory.peak < 32 * 8 * 1000 + 8 * 8 * 2000
    gradient = torch.randn(2000, 2000)
    with LiveMemory() as memory:
        candidates(gradient, layout, 1000)
    # In pieces of 2²¹ of the 4 · 10⁶ entries, as `select` has them.
    assert memory.peak < 40 * (1 << 21) and memory.largest <= 8 * (1 << 21)


@pytest.mark.gpu
def test_gpu_like_cpu():
    layout, values, offered, scores = draw(90, 110, 0, 0.1, ties=True)
    gradient = torch.randn(90, 110)
    here = drop_grow(layout, values, offered, scores, 80)
    there = drop_grow(layout.to("cuda"), values.cuda(), offered.cuda(), scores.cuda(), 80)
    assert there.layout == here.layout and torch.equal(there.source.cpu(), here.source)
    assert torch.equal(there.carry(values.cuda()).cpu(), here.carry(values))
    for one, other in zip(candidates(gradient, layout, 99), candidates(gradient.cuda(), layout.to("cuda"), 99)):
        assert torch.equal(one, other.cpu())


# --- What is refused -------------------------------------------------------------------------------------------


def regrow(**changed):
    arguments = {
        "layout": SparseLayout.from_indices((3, 4), torch.tensor([1, 5, 6])), "values": torch.ones(3),
        "candidates": torch.tensor([2, 0]), "candidate_scores": torch.ones(2), "count": 2,
    }  # fmt: skip
    return drop_grow(**{**arguments, **changed})


def of_gradient(gradient=None, layout=None, count=1):
    gradient = torch.ones(3, 4) if gradient is None else gradient
    return candidates(gradient, layout or SparseLayout.from_indices((3, 4), torch.tensor([1, 5, 6])), count)


ROWS = SparseLayout.rows((3, 4), torch.tensor([1]))
NAN = float("nan")
REFUSED = {
    "rows": (lambda: regrow(layout=ROWS), "a layout of entries, got SparseLayout.rows in"),
    "values": (lambda: regrow(values=torch.ones(4)), r"values \[3\], got \[4\]"),
    "candidates": (lambda: regrow(candidates=torch.ones(2, 1).long()), r"int64 \[c\], got \[2, 1\]"),
    "int32": (lambda: regrow(candidates=torch.tensor([2, 0]).int()), r"int64 \[c\], got \[2\] int32"),
    "scores": (lambda: regrow(candidate_scores=torch.ones(3)), "for each of 2 candidates, got"),
    "count": (lambda: regrow(count=3), "from 0 to 2 entries, got 3"),
    "more than there are": (
        lambda: regrow(candidates=torch.arange(7, 12), candidate_scores=torch.ones(5), count=4), "from 0 to 3 .* got 4",
    ),
    "negative": (lambda: regrow(count=-1), "from 0 to 2 entries, got -1"),
    "past the end": (lambda: regrow(candidates=torch.tensor([12, 0])), "candidates from 0 to 11, got 0 to 12"),
    "before": (lambda: regrow(candidates=torch.tensor([2, -1])), "candidates from 0 to 11, got -1 to 2"),
    "twice": (lambda: regrow(candidates=torch.tensor([2, 2])), "each candidate once, got 2 more than once"),
    "inside": (lambda: regrow(candidates=torch.tensor([2, 6])), "outside of the layout, got 6, which is in it"),
    "inside, not grown": (lambda: regrow(candidates=torch.tensor([1, 2]), count=0), "outside .*, got 1"),
    "nan value": (lambda: regrow(values=torch.tensor([1, NAN, 1])), "numbers, got NaN in values"),
    "nan score": (lambda: regrow(candidate_scores=torch.tensor([1, NAN])), "numbers, got NaN in candidate_scores"),
    "carry": (lambda: regrow().carry(torch.ones(2)), r"as \[3\], got \[2\]"),
    "grown": (lambda: regrow().carry(torch.ones(3), torch.ones(1)), r"for each candidate, got \[1\]"),
    "grown in 2": (lambda: regrow().carry(torch.ones(3), torch.ones(2, 1)), r"for each candidate, got \[2, 1\]"),
    "of rows": (lambda: of_gradient(layout=ROWS), "a layout of entries"),
    "gradient": (lambda: of_gradient(torch.ones(4, 3)), r"a gradient \[3, 4\] on cpu, got \[4, 3\]"),
    "too many": (lambda: of_gradient(count=10), "from 0 to 9 candidates, got 10"),
    "fewer than none": (lambda: of_gradient(count=-1), "from 0 to 9 candidates, got -1"),
    "nan gradient": (lambda: of_gradient(torch.full((3, 4), NAN)), "numbers, got NaN in 'gradient'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_line(kind):
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=rf"^expected .*{message}") as caught:
        make()
    assert "\n" not in str(caught.value)
