"""The demo at its shortest: every part of it once."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-m", "examples.finetune_smollm2", "--device", "cpu", "--steps", "2", "--batch-size", "2",
         "--held-out", "2", "--rounds", "1", "--output", str(output), "--report", str(output / "report" / "demo.md")],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, output


def test_ends_with_its_table(finished):
    printed, _ = finished
    for words in (
        "training loss", "held-out loss", "exact match", "time of a step", "peak resident memory",
        "activations for backward", "layer updates, min/mean/max", "backward skipped", "with its estimates",
        "largest difference of the training losses", "1 interleaved rounds", "210 of 210 LoRA layers",
        "IST estimated importance by ", "of their time for a CPU",
    ):  # fmt: skip
        assert words in " ".join(printed.split())
    assert "steps/s" not in printed and "tokens/s" not in printed
    assert max(map(len, printed.splitlines())) <= 80


def cells(printed, label):
    """Of the three trainings, in order."""
    (line,) = [line for line in printed.splitlines() if line.startswith(f"│ {label}")]
    return [cell.strip() for cell in line.strip("│").split("│")[1:]]


def test_the_row_of_ist(finished):
    """7 of 30 layers in each of 2 steps; the estimate before the second."""
    printed, output = finished
    plain, accelerated, updates = cells(printed, "layer updates")
    least, mean, most = updates.split(" / ")
    assert plain == accelerated == "–"
    assert mean == "0.5"
    assert least == "0"
    assert most in ("1", "2")
    seconds = [float(cell.removesuffix(" s")) for cell in cells(printed, "time of a step")]
    one, accelerated, sparse = cells(printed, "… / PEFT's, median")
    assert one == "–"
    assert float(accelerated) == pytest.approx(seconds[1] / seconds[0], abs=0.02)
    assert float(sparse) == pytest.approx(seconds[2] / seconds[0], abs=0.02)
    assert cells(printed, "… least–most") == ["–", f"{accelerated}–{accelerated}", f"{sparse}–{sparse}"]  # one round
    assert float(cells(printed, "… with its estimates")[2]) > float(sparse)
    _, all_layers, some_layers = (int(cell.removesuffix(" MiB")) for cell in cells(printed, "activations for backward"))
    assert 0 < some_layers < all_layers
    before, after = zip(*(cell.split(" → ") for cell in cells(printed, "held-out loss")))
    assert len(set(before)) == 1
    assert all(float(loss) < float(before[0]) for loss in after)
    assert (output / "importance.png").read_bytes().startswith(b"\x89PNG")
    assert "2 steps" in (output / "importance.txt").read_text()


def test_both_full_runs_compute_the_same(finished):
    printed, _ = finished
    (line,) = [line for line in printed.splitlines() if line.startswith("largest difference of the training")]
    assert float(line.rpartition(" ")[2]) < 1e-4


def test_the_report_is_the_table_and_the_facts(finished):
    _, output = finished
    text = (output / "report" / "demo.md").read_text()
    assert text == (output / "results.md").read_text()
    head, *_ = text.splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        "2 steps of 2, before → after", "PEFT", "accelerated", "IST",
    ]  # fmt: skip
    assert "\n\nIST estimated importance by " in text


def test_plot_and_adapter_are_written(finished):
    _, output = finished
    assert (output / "losses.png").read_bytes().startswith(b"\x89PNG")
    adapter = load_file(output / "accelerated" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 210
    assert not any("base_layer" in name for name in adapter)


def test_tasks():
    from examples.finetune_smollm2 import make_tasks

    options = Namespace(seed=3, steps=25, batch_size=4, held_out=40)
    train, held_out = make_tasks(options)
    again, _ = make_tasks(options)
    assert len(train) == 100
    assert len({task["question"] for task in held_out}) == 40
    assert [task["question"] for task in train] == [task["question"] for task in again]
    assert not {task["question"] for task in train} & {task["question"] for task in held_out}
