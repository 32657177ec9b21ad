"""Deltas of whole models, and their files."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, ShiraConfig, get_peft_model
from torch import nn

import peft_kernels as pk
from peft_kernels.testing.sparse_delta import make_layout

KINDS = ["entries", "rows", "columns", "blocks", "n_of_m"]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.body, self.head = nn.Embedding(20, 16), nn.Linear(16, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.body(self.embedding(x)).relu())


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Sequential(nn.Linear(48, 16, bias=False)))


def make_deltas(model, kind="entries"):
    torch.manual_seed(1)
    layouts = {name: make_layout(kind, *weight.shape, 0.1, tile=(8, 8)) for name, weight in weights_of(model).items()}
    return {name: pk.SparseDelta(layout, torch.randn(layout.nnz)) for name, layout in layouts.items()}


def weights_of(model):
    return pk.sparse.linear_weights(model)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, delta in found.items():
        assert delta.layout == expected[name].layout and torch.equal(delta.values, expected[name].values)


class TestModels:
    @pytest.mark.parametrize("kind", KINDS)
    def test_in_and_out(self, kind):
        model, plain = make_model(), make_model()
        model.requires_grad_(False)
        given = make_deltas(model, kind)
        layers = pk.sparse.add_deltas(model, given)
        assert list(layers) == ["0", "2.0"] == list(pk.sparse.sparse_layers(model))
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [
            f"{name}.deltas.default.values" for name in layers
        ]
        for name, delta in given.items():
            expected = plain.get_submodule(name).weight + delta.to_dense()
            torch.testing.assert_close(model.get_submodule(name).weight, expected)
        assert_same(pk.sparse.deltas(model), given)
        x = torch.randn(4, 32)
        trained = model(x)
        assert_same(pk.sparse.remove_deltas(model), given)
        assert torch.equal(model(x), plain(x)) and str(model) == str(plain)
        pk.sparse.add_deltas(model, given)
        pk.sparse.merge_deltas(model)
        assert torch.equal(model(x), trained) and str(model) == str(plain)

    def test_several_deltas_of_one_model(self):
        model = make_model()
        one, two = make_deltas(model), make_deltas(model, "rows")
        pk.sparse.add_deltas(model, one, "one")
        pk.sparse.add_deltas(model, two, "two")
        assert_same(pk.sparse.deltas(model), two)
        assert_same(pk.sparse.deltas(model, "one"), one)
        assert pk.sparse.deltas(model, "three") == {}

    def test_an_empty_layout_is_left_out(self):
        model = make_model()
        layouts = {
            "0": make_layout("entries", 48, 32, 0.1),
            "2.0": pk.SparseLayout.rows((16, 48), torch.tensor([]).long()),
        }
        assert list(pk.sparse.add_deltas(model, layouts)) == ["0"]
        assert type(model[2][0]) is nn.Linear

    def test_bad_input_changes_nothing(self):
        layout, other = make_layout("rows", 48, 32, 0.1), make_layout("rows", 16, 48, 0.1)
        for deltas, message in (
            ({"0": layout, "1": layout}, "expected the name of an nn.Linear, got '1', ReLU"),
            ({"0": layout, "none": layout}, "expected the name of an nn.Linear, got 'none', NoneType"),
            ({"0": layout, "2.0": layout}, r"expected a delta of \[16, 48\] for '2.0'"),
        ):
            model = make_model()
            with pytest.raises(ValueError, match=message):
                pk.sparse.add_deltas(model, deltas)
            assert not pk.sparse.sparse_layers(model)
        model = make_model()
        pk.sparse.add_deltas(model, {"0": layout})
        with pytest.raises(ValueError, match="expected a new name, got 'default', which '0' has"):
            pk.sparse.add_deltas(model, {"2.0": other, "0": layout})
        assert list(pk.sparse.sparse_layers(model)) == ["0"]
        with pytest.raises(ValueError, match="got 'head', whose weight is 'embedding''s too"):
            pk.sparse.add_deltas(Tied(), {"head": make_layout("rows", 20, 16, 0.1)})

    def test_regrowing_a_layer(self):
        """Values, moments and weights go along; what grew begins at 0 with the moments it is given; W₀ stays."""
        model, plain = make_model(), make_model()
        (layer, _) = pk.sparse.add_deltas(model, make_deltas(model)).values()
        optimizer = pk.optim.SparseAdamW(layer, lr=1e-2)
        layer(torch.randn(8, 32)).square().sum().backward()
        optimizer.step()
        values, layout, before = layer.values, layer.layout, layer.delta().to_dense().clone()
        average = pk.SparseDelta(layout, optimizer.state[values]["exp_avg"].clone()).to_dense()
        positions, gradients = pk.sparse.candidates(torch.randn(48, 32), layout, 50)
        regrown = pk.sparse.drop_grow(layout, values, positions, gradients.abs(), 20)
        pk.sparse.regrow(layer, regrown, optimizer, gradients, gradients.square())
        assert layer.values is values and layer.layout.nnz == layout.nnz
        grew = layer.layout.mask() & ~layout.mask()
        assert int(grew.sum()) == 20
        stayed = layer.layout.mask() & layout.mask()
        after = layer.delta().to_dense()
        assert torch.equal(after[stayed], before[stayed]) and not after[grew].any()
        moved = pk.SparseDelta(layer.layout, optimizer.state[values]["exp_avg"]).to_dense()
        assert torch.equal(moved[stayed], average[stayed])
        expected = torch.zeros(48 * 32).index_put((positions,), gradients).view(48, 32)
        assert torch.equal(moved[grew], expected[grew])
        layer.restore()
        assert torch.equal(layer.weight, plain[0].weight)
        layer.apply_delta("default")
        with pytest.raises(ValueError, match="expected a layout as SparseLayout"):
            layer.move_delta(make_layout("rows", 48, 32, 0.1), torch.zeros(160))


class TestFiles:
    @pytest.mark.parametrize("kind", KINDS)
    def test_round_trip(self, kind, tmp_path):
        deltas = make_deltas(make_model(), kind)
        pk.sparse.save(deltas, tmp_path / "deltas.safetensors")
        assert_same(pk.sparse.load(tmp_path / "deltas.safetensors"), deltas)

    @settings(max_examples=20, deadline=None, derandomize=True)
    @given(N=st.integers(1, 30), K=st.integers(1, 30), density=st.floats(0.0, 1.0), seed=st.integers(0, 9))
    def test_lt_sft(self, N, K, density, seed, tmp_path_factory):
        """Read as its own reader reads it: steps are added up, then counted column by column."""
        folder = tmp_path_factory.mktemp("lt_sft")
        layout = make_layout("entries", N, K, density, seed)
        delta = pk.SparseDelta(layout, torch.randn(layout.nnz, generator=torch.Generator().manual_seed(seed)))
        pk.sparse.export_lt_sft({"a.b": delta}, folder)
        content = torch.load(folder / "pytorch_diff.bin", weights_only=True)
        diff = content["diffs"]["a.b.weight"]
        place = torch.tensor(diff["index_steps"]).cumsum(0)
        dense = torch.sparse_coo_tensor(torch.stack([place % N, place // N]), diff["values"], diff["size"]).to_dense()
        assert torch.equal(dense, delta.to_dense()) and content["abs"] == {}
        assert_same(pk.sparse.import_lt_sft(folder), {"a.b": delta})

    @pytest.mark.parametrize("kind", ["entries", "rows"])
    def test_shira_goes_to_peft(self, kind, tmp_path):
        model, plain = make_model(), make_model()
        pk.sparse.add_deltas(model, make_deltas(model, kind))
        x = torch.randn(4, 32)
        pk.sparse.export_shira(pk.sparse.deltas(model), tmp_path)
        theirs = PeftModel.from_pretrained(plain, tmp_path)
        torch.testing.assert_close(theirs(x), model(x))
        back = pk.sparse.import_shira(tmp_path, weights_of(make_model()))
        for name, delta in pk.sparse.deltas(model).items():
            assert torch.equal(back[name].to_dense(), delta.to_dense())
            N, K = delta.layout.shape
            assert back[name].layout.nnz % (N + K) == 0

    def test_shira_comes_from_peft(self, tmp_path):
        torch.manual_seed(2)
        model = get_peft_model(make_model(), ShiraConfig(r=3, target_modules=["0", "2.0"], init_weights=False))
        x = torch.randn(4, 32)
        model.save_pretrained(tmp_path)
        ours = make_model()
        pk.sparse.add_deltas(ours, pk.sparse.import_shira(tmp_path, weights_of(ours)))
        torch.testing.assert_close(ours(x), model(x))

    def test_what_cannot_be_exported(self, tmp_path):
        layout = make_layout("entries", 16, 16, 1.0)
        with pytest.raises(ValueError, match=r"expected weights that hold 8 · \(N \+ K\) values, got \[8, 8\] for 'b'"):
            small = make_layout("entries", 8, 8, 0.5)
            deltas = {"a": pk.SparseDelta(layout, torch.zeros(256)), "b": pk.SparseDelta(small, torch.zeros(32))}
            pk.sparse.export_shira(deltas, tmp_path / "shira")
        with pytest.raises(ValueError, match="expected at least one delta"):
            pk.sparse.export_shira({}, tmp_path / "shira")
        huge = pk.SparseLayout.rows((1 << 16, 1 << 15), torch.tensor([5]))
        with pytest.raises(ValueError, match="less than 2³¹ entries"):
            pk.sparse.export_lt_sft({"a": pk.SparseDelta(huge, torch.zeros(1 << 15))}, tmp_path / "lt_sft")
        assert not list(tmp_path.iterdir())

    def test_damaged_and_foreign_files_get_one_line(self, tmp_path):
        deltas = make_deltas(make_model())
        whole = tmp_path / "whole"
        pk.sparse.save(deltas, tmp_path / "deltas")
        pk.sparse.export_lt_sft(deltas, whole)
        pk.sparse.export_shira(deltas, whole)
        bytes_of = {
            "ours": (tmp_path / "deltas").read_bytes(),
            "lt_sft": (whole / "pytorch_diff.bin").read_bytes(),
            "shira": (whole / "adapter_model.safetensors").read_bytes(),
        }
        targets = {
            "ours": (tmp_path / "broken", lambda: pk.sparse.load(tmp_path / "broken")),
            "lt_sft": (tmp_path / "pytorch_diff.bin", lambda: pk.sparse.import_lt_sft(tmp_path)),
            "shira": (
                tmp_path / "adapter_model.safetensors",
                lambda: pk.sparse.import_shira(tmp_path, weights_of(make_model())),
            ),
        }
        torch.save({"weight": torch.ones(3)}, tmp_path / "other.bin")
        foreign = (tmp_path / "other.bin").read_bytes()
        for name, (path, load) in targets.items():
            contents = [bytes_of[name][: len(bytes_of[name]) * part // 10] for part in (0, 1, 5, 9)]
            contents += [foreign, b"text", bytes_of["shira" if name == "ours" else "ours"]]
            for content in contents:
                path.write_bytes(content)
                with pytest.raises(ValueError, match="expected") as error:
                    load()
                assert "\n" not in str(error.value) and str(path) in str(error.value), (name, content[:20])

    def test_positions_out_of_range(self, tmp_path):
        layout = make_layout("rows", 8, 8, 0.2)
        layout.tensors["index"] += 8
        pk.sparse.save({"a": pk.SparseDelta(layout, torch.zeros(layout.nnz))}, tmp_path / "deltas")
        with pytest.raises(ValueError, match=r"got a damaged file .*expected positions from 0 to 63"):
            pk.sparse.load(tmp_path / "deltas")

    def test_whole_parameters_are_no_deltas(self, tmp_path):
        torch.save({"diffs": {}, "abs": {"head.weight": torch.ones(3, 3)}}, tmp_path / "pytorch_diff.bin")
        with pytest.raises(ValueError, match=r"expected differences only in .*, got 'head.weight' as a whole"):
            pk.sparse.import_lt_sft(tmp_path)

    def test_shira_of_another_model(self, tmp_path):
        pk.sparse.export_shira(make_deltas(make_model()), tmp_path)
        with pytest.raises(ValueError, match=r"expected modules of the model in .*, got"):
            pk.sparse.import_shira(tmp_path, {"0": (48, 32)})
