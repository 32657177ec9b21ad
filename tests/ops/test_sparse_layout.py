"""Every kind of layout against the dense mask that it stands for."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from peft_kernels import SparseLayout


def random_mask(N: int, K: int, density: float, seed: int = 0) -> torch.Tensor:
    return torch.rand(N, K, generator=torch.Generator().manual_seed(seed)) < density


def two_of_four(N: int, K: int) -> torch.Tensor:
    scores = torch.rand(N, K // 4, 4, generator=torch.Generator().manual_seed(0))
    return torch.zeros(N, K // 4, 4, dtype=torch.bool).scatter_(2, scores.topk(2).indices, True).view(N, K)


def mask_of(shape: tuple[int, int], where) -> torch.Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[where] = True
    return mask


def blocks_mask() -> torch.Tensor:
    mask = torch.zeros(12, 20, dtype=torch.bool)
    mask[4:8, 15:20] = mask[8:12, 0:5] = True
    return mask


#: A layout, and its mask.
LAYOUTS = {
    "entries": lambda: (SparseLayout.from_mask(random_mask(12, 20, 0.1)), random_mask(12, 20, 0.1)),
    "no entries": lambda: (SparseLayout.from_mask(random_mask(12, 20, 0.0)), random_mask(12, 20, 0.0)),
    "all entries": lambda: (SparseLayout.from_mask(random_mask(12, 20, 2.0)), random_mask(12, 20, 2.0)),
    "a wide weight": lambda: (SparseLayout.from_mask(random_mask(2, 40000, 0.01)), random_mask(2, 40000, 0.01)),
    "rows": lambda: (SparseLayout.rows((12, 20), torch.tensor([7, 2])), mask_of((12, 20), [2, 7])),
    "no rows": lambda: (SparseLayout.rows((12, 20), torch.tensor([], dtype=torch.long)), mask_of((12, 20), [])),
    "columns": lambda: (
        SparseLayout.columns((12, 20), torch.tensor([19, 0, 3])), mask_of((12, 20), (slice(None), [0, 3, 19])),
    ),
    "blocks": lambda: (SparseLayout.blocks((12, 20), (4, 5), torch.tensor([8, 7])), blocks_mask()),
    "2 of 4": lambda: (SparseLayout.n_of_m(two_of_four(12, 20), 2, 4), two_of_four(12, 20)),
}  # fmt: skip


@pytest.mark.parametrize("kind", LAYOUTS)
def test_positions_and_values(kind):
    layout, mask = LAYOUTS[kind]()
    shape, positions = layout.shape, mask.flatten().nonzero().flatten()
    assert layout.nnz == len(positions) and layout.density == pytest.approx(mask.float().mean())
    assert torch.equal(layout.mask(), mask)
    indices = layout.indices()
    if kind == "blocks":  # block by block
        assert indices[:5].tolist() == [95, 96, 97, 98, 99] and indices[20:25].tolist() == [160, 161, 162, 163, 164]
        indices = indices.sort().values
    assert torch.equal(indices, positions)
    weight = torch.randn(shape)
    before = weight.clone()
    values = layout.take(weight)
    assert torch.equal(values, weight.flatten()[layout.indices()])
    assert layout.put_(weight, -values) is weight
    assert torch.equal(weight, torch.where(mask, -before, before))
    assert torch.equal(layout.put_(weight, values), before)
    assert torch.equal(layout.put_(weight, 0.5), before.masked_fill(mask, 0.5))


@pytest.mark.parametrize("kind", LAYOUTS)
def test_weights_of_any_stride_and_dtype(kind):
    layout, mask = LAYOUTS[kind]()
    N, K = layout.shape
    for weight in (torch.randn(K, N).t(), torch.randn(N, 2 * K)[:, ::2], torch.randn(N, K).bfloat16()):
        before, values = weight.clone(), torch.randn(layout.nnz)
        layout.put_(weight, values)
        assert torch.equal(layout.take(weight), values.to(weight.dtype))
        assert torch.equal(weight[~mask], before[~mask])


@pytest.mark.parametrize("kind", LAYOUTS)
def test_file(kind, tmp_path):
    layout, _ = LAYOUTS[kind]()
    layout.save(tmp_path / "layout.safetensors")
    found = SparseLayout.load(tmp_path / "layout.safetensors")
    assert found == layout and repr(found) == repr(layout)
    assert torch.equal(found.indices(), layout.indices())
    assert {name: t.dtype for name, t in found.tensors.items()} == {name: t.dtype for name, t in layout.tensors.items()}


def test_ways_to_the_same_entries():
    mask = random_mask(12, 20, 0.2)
    layout = SparseLayout.from_mask(mask)
    flat = mask.flatten().nonzero().flatten()
    order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))
    dense = torch.randn(12, 20) * mask
    rows, columns = mask.nonzero().t()
    places = torch.stack([rows, columns])[:, order]
    coo = torch.sparse_coo_tensor(places, torch.zeros(len(flat)), (12, 20), check_invariants=True)
    for other in (
        SparseLayout.from_indices((12, 20), flat[order]),
        SparseLayout.from_indices((12, 20), flat.to(torch.int16)),
        SparseLayout.from_sparse(dense.to_sparse()),
        SparseLayout.from_sparse(dense.to_sparse_csr()),
        SparseLayout.from_sparse(coo),
    ):
        assert other == layout
    assert SparseLayout.from_mask(~mask) != layout


@given(N=st.integers(0, 9), K=st.integers(0, 9), density=st.sampled_from([0.0, 0.3, 1.1]), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_any_shape(N, K, density, seed):
    mask = random_mask(N, K, density, seed)
    layout = SparseLayout.from_mask(mask)
    assert torch.equal(layout.indices(), mask.flatten().nonzero().flatten())
    assert torch.equal(layout.mask(), mask)
    for kind, end in (("rows", N), ("columns", K)):
        index = torch.arange(end)[::2]
        layout = getattr(SparseLayout, kind)((N, K), index)
        assert torch.equal(layout.mask(), mask_of((N, K), index if kind == "rows" else (slice(None), index)))


def test_bytes():
    """16-bit columns where they fit, 32-bit row starts: of these, and nothing else."""
    layout = SparseLayout.from_mask(random_mask(1024, 4096, 0.01))
    assert layout.nbytes == 2 * layout.nnz + 4 * 1025
    assert SparseLayout.columns((1024, 4096), torch.arange(40)).nbytes == 8 * 40
    assert SparseLayout.n_of_m(two_of_four(12, 20), 2, 4).nbytes == 12 * 10
    assert SparseLayout.from_mask(random_mask(2, 40000, 0.5)).tensors["columns"].dtype == torch.int32


def test_what_it_prints():
    layout = SparseLayout.blocks((12, 20), (4, 5), torch.tensor([7, 8]))
    expected = "SparseLayout(blocks of 4 × 5 in [12, 20]: 40 values, density 16.667%, 16 bytes of indices on cpu)"
    assert repr(layout) == expected
    assert repr(SparseLayout.n_of_m(two_of_four(4, 8), 2, 4)).startswith("SparseLayout(n of m, 2 of 4 in [4, 8]: 16 ")


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values)


REFUSED = {
    "float mask": (lambda: SparseLayout.from_mask(torch.zeros(3, 4)), "a mask, bool"),
    "flat mask": (lambda: SparseLayout.from_mask(torch.zeros(3, dtype=torch.bool)), "a mask, bool"),
    "past the end": (lambda: SparseLayout.from_indices((3, 4), numbers(0, 12)), "from 0 to 11, got 0 to 12"),
    "negative": (lambda: SparseLayout.from_indices((3, 4), numbers(-1)), "from 0 to 11, got -1 to -1"),
    "twice": (lambda: SparseLayout.from_indices((3, 4), numbers(5, 2, 5)), "once, got 5 more than once"),
    "floats": (lambda: SparseLayout.from_indices((3, 4), torch.ones(2)), "as integers"),
    "bools": (lambda: SparseLayout.rows((3, 4), torch.ones(3, dtype=torch.bool)), "as integers"),
    "3 dimensions": (lambda: SparseLayout.from_indices((3, 4, 5), numbers(1)), "the shape \\(N, K\\)"),
    "dense": (lambda: SparseLayout.from_sparse(torch.ones(3, 4)), "a COO or CSR tensor"),
    "row": (lambda: SparseLayout.rows((3, 4), numbers(3)), "rows of \\[3, 4\\] from 0 to 2, got 3 to 3"),
    "column": (lambda: SparseLayout.columns((3, 4), numbers(1, 1)), "columns of .* got 1 more than once"),
    "block size": (lambda: SparseLayout.blocks((3, 4), (2, 2), numbers(0)), "blocks that fill"),
    "block": (lambda: SparseLayout.blocks((4, 4), (2, 2), numbers(4)), "from 0 to 3, got 4 to 4"),
    "2 of 4": (lambda: SparseLayout.n_of_m(random_mask(4, 8, 0.5), 2, 4), "2 entries among every 4"),
    "m of K": (lambda: SparseLayout.n_of_m(random_mask(4, 6, 0.5), 2, 4), "m divides 6 columns"),
    "weight": (lambda: SparseLayout.rows((3, 4), numbers(1)).take(torch.ones(4, 3)), "a weight \\[3, 4\\]"),
    "values": (lambda: SparseLayout.rows((3, 4), numbers(1)).put_(torch.ones(3, 4), torch.ones(3)), r"values \[4\]"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_one_line(kind):
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=rf"^expected .*{message}") as caught:
        make()
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    path = tmp_path / "layout.safetensors"
    SparseLayout.from_mask(random_mask(12, 20, 0.2)).save(path)
    whole = path.read_bytes()
    for damaged in (whole[:-3], whole[:20], b"", whole.replace(b"columns", b"colonnes"[:7]), b"no such thing"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"^expected a SparseLayout in .* damaged file"):
            SparseLayout.load(path)
    save_file({"columns": torch.ones(3)}, path)
    with pytest.raises(ValueError, match="without the mark"):
        SparseLayout.load(path)
    path.write_bytes(whole[:-2] + b"\xff\x7f")  # the last column
    with pytest.raises(ValueError, match="positions from 0 to 239"):
        SparseLayout.load(path)
