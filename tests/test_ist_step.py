"""The benchmark of whole training steps at its shortest, and that it catches what is wrong."""

import csv
import json

import pytest
import torch

from benchmarks import ist_step, run, sparse_delta
from benchmarks.authors_ist import AuthorsIST
from benchmarks.ist_providers import (
    ACCELERATED,
    AT_LABELS,
    AUTHORS,
    BUDGET,
    LORA,
    OURS,
    at_depth,
    check,
    load,
    make_lanes,
)
from benchmarks.ist_providers import saved_bytes as saved
from benchmarks.registry import OPS
from tests.ist.transcription import ist as transcribed


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    return load("cpu", 16, tiny=True)


@pytest.fixture
def lanes(case):
    return {lane.name: lane for lane in make_lanes(case.base)}


def test_a_tiny_run(tmp_path, capsys):
    ist_step.main(["--cpu", "--tiny", "--tokens", "16", "--rounds", "4", "--minutes", "5", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for words in ("relative differences", "labels on a quarter", "with loop every 20", "lm_head and loss"):
        assert words in " ".join(printed.split())
    assert max(map(len, printed.splitlines())) <= 100
    document = json.loads((tmp_path / "ist_step_cpu.json").read_text())
    rows = {(row["setting"], row["provider"]): row for row in document["rows"]}
    for setting in ist_step.LABELLED:
        assert len(document["parts_ms"][setting]) == 3
        for name in (LORA, AUTHORS, ACCELERATED, OURS, AT_LABELS, BUDGET):
            row = rows[setting, name]
            assert row["rounds"] == 4
            expected = 1e3 * 2 * 16 / (row["step_ms"] + row["loop_ms"] / 10)
            assert row["tokens_per_s"] == pytest.approx(expected)
            assert (row["loop_ms"] > 0) == name.startswith("IST")
        # 2 of 8 layers: the lowest is number 2 on average.
        assert rows[setting, AUTHORS]["backward_skipped"] == pytest.approx(2 / 8, abs=0.05)
        assert rows[setting, BUDGET]["backward_skipped"] > 0.4
        assert 0 < rows[setting, BUDGET]["saved_in_layers_mib"] < rows[setting, OURS]["saved_in_layers_mib"]
    with open(tmp_path / "ist_step_cpu.csv") as file:
        assert len(list(csv.DictReader(file))) == len(document["rows"])
    assert (tmp_path / "ist_step_cpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_time_of_a_whole_run_is_shared(monkeypatch):
    called = []
    monkeypatch.setattr(run, "measure_layers", lambda options: called.append((options.ops, options.minutes)))
    for command in (sparse_delta, ist_step):
        parse = command.parse_arguments
        monkeypatch.setattr(command, "main", lambda arguments, parse=parse: called.append(parse(arguments)))
    run.main(["--cpu", "--minutes", "11"])
    (ops, minutes), deltas, steps = called
    assert ops == list(OPS)
    assert [minutes, deltas.minutes, steps.minutes] == pytest.approx([4, 3, 4])
    assert deltas.device == steps.device == "cpu"
    run.main(["--op", "ist_step", "--minutes", "2", "--quick"])
    assert called[3].minutes == 2
    assert called[3].rounds == 3
    run.main(["--op", "sparse_delta", "--minutes", "2"])
    assert called[4].minutes == 2
    run.main(["--op", "lora_linear", "--minutes", "3"])
    assert called[5:] == [(["lora_linear"], 3)]


def test_the_authors_ist_is_the_algorithm(case, lanes):
    theirs, plain = lanes[AUTHORS], lanes[LORA]
    ist = AuthorsIST(theirs.model, interval=2, seed=3)
    scalings = [[m.scaling for m in block.modules() if hasattr(m, "lora_A")] for block in plain.blocks]
    batches = [case.batch(number, 4, 1.0) for number in range(4)]
    estimates = 0
    for update, sets, unimportance in transcribed(plain.model, scalings, batches, 9, seed=3, interval=2):
        ist.before_step(batches[min(estimates, 3)])
        estimates += bool(sets)
        assert set(ist.active) == update
        torch.testing.assert_close(ist.unimportance, unimportance)
        for block, adapters in enumerate(ist.adapters):
            assert all(parameter.requires_grad == (block in update) for parameter in adapters)
    assert estimates == 4
    assert ist.unimportance.abs().max() > 0


@pytest.mark.parametrize("wrong", [ACCELERATED, AT_LABELS])
def test_a_wrong_provider_is_caught(case, lanes, wrong):
    assert "gradients" in check(list(lanes.values()), case, 1.0)
    for block in lanes[wrong].blocks:
        block.mlp.up_proj.scaling["default"] *= 1.05
    with pytest.raises(RuntimeError, match=rf"{wrong}: .*expected a relative error"):
        check(list(lanes.values()), case, 1.0)


def test_lanes_share_the_base_alone(lanes):
    one, other = (dict(lanes[name].model.named_parameters()) for name in (LORA, OURS))
    assert {name for name in one if one[name] is not other[name]} == {name for name in one if "lora_" in name}


def test_logits_at_labels_alone(case, lanes):
    batch, rows = case.batch(0, 2, 0.25), {}
    for name in (OURS, AT_LABELS):
        logits = lanes[name].model(**batch).logits
        rows[name] = logits.shape[:2].numel()
    assert rows == {OURS: 2 * 16, AT_LABELS: 2 * 4}


def test_times_are_carried_to_a_depth():
    points = [(10.0 + 2 * depth, depth) for depth in (1, 4, 5, 8)]
    assert at_depth(points, 6.0) == [22.0] * 4
    assert sorted(at_depth([*points, (90.0, 8)], 6.0))[2] == pytest.approx(22.0)  # a hiccup moves no median
    assert at_depth([(3.0, 8), (5.0, 8)], 2.0) == [3.0, 5.0]


def test_saved_bytes(case, lanes):
    batch, ours = case.batch(0, 2, 1.0), lanes[OURS]
    total, in_layers = {}, {}
    for lowest in (0, 6):
        ours.ist.set_active([lowest, 7])
        total[lowest], in_layers[lowest] = saved(ours, batch)
    # Below the lowest layer nothing is kept, and what is kept outside of the layers does not depend on it.
    assert in_layers[6] < 0.5 * in_layers[0]
    assert total[0] - in_layers[0] == pytest.approx(total[6] - in_layers[6], rel=0.05)
