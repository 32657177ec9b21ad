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
         "--held-out", "2", "--rounds", "1", "--output", str(output)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, output


def test_ends_with_its_table(finished):
    printed, _ = finished
    for words in (
        "training loss", "held-out loss", "exact match", "steps/s", "tokens/s", "peak resident memory",
        "largest difference of the training losses", "interleaved rounds", "210 of 210 LoRA layers",
    ):  # fmt: skip
        assert words in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_both_runs_compute_the_same(finished):
    printed, _ = finished
    (line,) = [line for line in printed.splitlines() if line.startswith("largest difference of the training")]
    assert float(line.rpartition(" ")[2]) < 1e-4


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
