"""The recipes of sparse fine-tuning at their shortest: each of them once, and what they leave behind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import peft_kernels as pk

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory, smollm2):
    output = tmp_path_factory.mktemp("sparse")
    done = subprocess.run(
        [sys.executable, "-m", "examples.sparse_training", "--steps", "4", "--batch-size", "4",
         "--model", smollm2, "--output", str(output)],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "80"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, output


def test_every_recipe_lowers_the_held_out_loss(finished):
    printed, _ = finished
    rows = [line.strip("│ ").split("│") for line in printed.splitlines() if "→" in line and "│" in line]
    assert len(rows) == 8
    for name, losses, *_ in rows:
        before, after = (float(number) for number in losses.split("→"))
        assert after < before, name
    assert max(map(len, printed.splitlines())) <= 80


def test_files(finished, smollm2):
    """LT-SFT's is read back as it was; SHiRA's loads in plain PEFT."""
    from examples.sparse_training import Sums, load_model, parse_arguments

    _, output = finished
    ours = pk.sparse.load(output / "lt_sft" / "deltas.safetensors")
    theirs = pk.sparse.import_lt_sft(output / "lt_sft")
    assert ours.keys() == theirs.keys() and len(ours) > 100
    for name, delta in ours.items():
        assert torch.equal(delta.values, theirs[name].values) and delta.layout == theirs[name].layout
    sys.argv = ["test", "--model", smollm2]
    options = parse_arguments("")
    sums = Sums(options, *load_model(options))
    before = sums.held_out_loss()
    sums.model = PeftModel.from_pretrained(sums.model, output / "shira")
    assert sums.held_out_loss() < before
