"""The benchmark of whole training steps at its shortest, and that it catches what is wrong."""

import pytest
import torch
from rich.console import Console

from benchmarks import ist_providers, ist_step, run, tables
from benchmarks.authors_ist import AuthorsIST
from benchmarks.guard import Guard
from benchmarks.ist_providers import (
    ACCELERATED,
    AT_LABELS,
    AUTHORS,
    BUDGET,
    HALF,
    LORA,
    OURS,
    PARTS,
    at_depth,
    check,
    load,
    make_lanes,
)
from benchmarks.ist_providers import saved_bytes as saved
from benchmarks.registry import Part, Request
from benchmarks.specs import SPECS
from peft_kernels.ist import IST, ISTConfig


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    return load("cpu", 16, tiny=True)


@pytest.fixture
def lanes(case):
    return {lane.name: lane for lane in make_lanes(case.base, Guard())}


def test_a_tiny_run(tmp_path):
    rows = []
    for name, labelled in ist_step.LABELLED.items():
        setting = ist_step.Setting(name, labelled, torch.float32, 16, tiny=True)
        found = ist_step.measure(setting, Request("cpu", seconds=100.0), most=4)
        rows += [{"op": "ist_step", "case": name} | row for row in found]
    ist_step.prepared.cache_clear()
    of = {(row["case"], row["provider"]): row for row in rows}
    for setting in ist_step.LABELLED:
        assert len(of[setting, PARTS]["parts_us"]) == 3
        for name in (LORA, AUTHORS, ACCELERATED, OURS, AT_LABELS, BUDGET):
            row = of[setting, name]
            assert row["rounds"] == 4
            loop = row["loop_us"] or 0.0
            assert row["tokens_per_s"] == pytest.approx(1e6 * 2 * 16 / (row["p50_us"] + loop / 10))
            assert (loop > 0) == name.startswith("IST")
        assert of[setting, HALF]["tokens_per_s"] > of[setting, BUDGET]["tokens_per_s"]
        # 2 of 8 layers: the lowest is number 2 on average.
        assert of[setting, AUTHORS]["backward_skipped_share"] == pytest.approx(2 / 8, abs=0.05)
        assert of[setting, BUDGET]["backward_skipped_share"] > 0.4
        assert 0 < of[setting, BUDGET]["saved_in_layers_bytes"] < of[setting, OURS]["saved_in_layers_bytes"]
    console = Console(width=100, record=True)
    console.print(tables.terminal([row for row in rows if row["case"] == "labels on a quarter"], ist_step.COLUMNS))
    assert HALF in console.export_text()
    assert "labels on a quarter: an accelerated step" in ist_step.summary(rows)
    assert ist_step.plot(rows, "here", tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_time_is_shared():
    specs = [SPECS["lora_linear"], SPECS["ist_step"]]
    left = [run.Unit(spec, case, Part()) for spec in specs for case in range(2)]
    shares = [spec.share for spec in specs]
    assert run.seconds_of(left[0], left, 70.0) == pytest.approx(70.0 * shares[0] / sum(shares) / 2)
    assert run.seconds_of(left[3], left[3:], 70.0) == 70.0
    later = [unit._replace(part=Part("later", 2, seconds=(2.0, 4.0))) for unit in left]
    assert run.seconds_of(left[3], [left[3], *later], 70.0) == 70.0  # what is later gets what is left
    assert [run.seconds_of(later[0], later[:2], remaining) for remaining in (1.0, 6.0, 70.0)] == [2.0, 3.0, 4.0]


def test_the_next_case_is_of_the_op_that_has_had_least():
    lora, ist = SPECS["lora_linear"], SPECS["ist_step"]
    one, other, whole = left = [
        run.Unit(lora, "one", Part()),
        run.Unit(lora, "other", Part()),
        run.Unit(ist, "", Part()),
    ]
    took = {one.kind: [], whole.kind: []}
    assert run.next_unit(left, took, 9.0) is one
    took[one.kind] = [2.0, 3.0]
    assert run.next_unit(left, took, 9.0) is whole
    took[whole.kind] = [5.0 / lora.share * ist.share + 0.1]
    assert run.next_unit(left, took, 99.0) is one
    assert run.next_unit(left[2:], took, 5.0) is None  # its first took longer
    assert run.next_unit(left, took, 2.9) is None
    assert run.next_unit([], took, 9.0) is None
    first, last = (one._replace(part=Part(name, stage, least=20.0)) for name, stage in (("bars", 0), ("compiled", 3)))
    took |= {first.kind: [], last.kind: []}
    assert run.next_unit([last, other, first], took, 99.0) is first
    assert run.next_unit([last, other, first], took, 9.0) is other  # which takes less than the 20 s that both need
    assert run.next_unit([last], took, 19.0) is None


def test_the_authors_ist_and_ours_choose_the_same(case, lanes):
    """The same losses by one forward per candidate: then both have the same importance and draw the same layers."""
    theirs = AuthorsIST(lanes[AUTHORS].model, interval=2, seed=3)
    ours = IST(lanes[LORA].model, ISTConfig(interval=2, seed=3, estimator="one-by-one"))
    batches = [case.batch(number, 4, 1.0) for number in range(4)]
    for _ in range(9):
        batch = batches[min(theirs.estimates, 3)]
        theirs.before_step(batch)
        update = set(ours.before_step(batch))
        assert theirs.estimates == ours.estimates
        assert set(theirs.active) == update
        torch.testing.assert_close(theirs.unimportance, ours.unimportance)
        for block, adapters in enumerate(theirs.adapters):
            assert all(parameter.requires_grad == (block in update) for parameter in adapters)
    assert theirs.estimates == 4
    assert theirs.unimportance.abs().max() > 0


@pytest.mark.parametrize("wrong", [ACCELERATED, AT_LABELS])
def test_a_wrong_provider_is_caught(case, lanes, wrong):
    assert check(list(lanes.values()), case, 1.0, Guard()) == {}
    for block in lanes[wrong].blocks:
        block.mlp.up_proj.scaling["default"] *= 1.05
    (found,) = check(list(lanes.values()), case, 1.0, Guard()).items()
    assert found[0] == wrong
    assert "expected a relative error" in found[1]


def test_a_lane_that_raises_or_is_wrong_costs_its_own_row(monkeypatch):
    """In its first step, and in the middle of the rounds."""
    steps = {LORA: 0, OURS: 0}
    step, loss = ist_providers.Lane.step, ist_providers.Lane.loss

    def failing_step(lane, batch):
        steps[lane.name] = steps.get(lane.name, 0) + 1
        if lane.name == OURS and steps[OURS] == 2:
            raise ZeroDivisionError("in the middle")
        return step(lane, batch)

    def failing_loss(lane, batch):
        if lane.name == AUTHORS:
            raise RuntimeError("at once")
        return loss(lane, batch) * (1.5 if lane.name == ACCELERATED else 1.0)

    monkeypatch.setattr(ist_providers.Lane, "step", failing_step)
    monkeypatch.setattr(ist_providers.Lane, "loss", failing_loss)
    setting = ist_step.Setting("labels everywhere", 1.0, torch.float32, 16, tiny=True)
    rows = ist_step.measure(setting, Request("cpu", seconds=100.0), most=4)
    of = {row["provider"]: row for row in rows}
    assert of[OURS]["failed"] == "ZeroDivisionError: in the middle"
    assert of[AUTHORS]["failed"] == "RuntimeError: at once"
    assert "loss: expected a relative error" in of[ACCELERATED]["error"]
    assert "p50_us" not in of[OURS] | of[AUTHORS] | of[ACCELERATED]
    assert of[LORA]["rounds"] == of[BUDGET]["rounds"] == 4
    assert of[BUDGET]["of_authors"] is None and of[BUDGET]["of_lora"] > 0
    assert ist_step.summary([row | {"case": "one"} for row in rows]) == ""


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
