"""The example for several processes, as a user starts it, and its other ways."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

ROOT = Path(__file__).parents[2]


def start(*command, **environment):
    """What it printed; it ended well."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_torchrun():
    launch = "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    printed = start(*launch, "-m", "examples.ist_torchrun", "--fsdp", "--steps", "12", CUDA_VISIBLE_DEVICES="")
    assert printed.count("12 steps, ") == 1  # by one process
    assert printed.count("importance 0.") == 8


def other_ways(rank):
    from examples import ist_torchrun

    torch.manual_seed(0)
    tables = [str(ist_torchrun.train(6, fsdp=False, device="cpu"))]
    try:
        tables.append(str(ist_torchrun.train_with_trainer(6)[1]))
    finally:  # accelerate keeps what it found out about its processes; the next test has others
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()
    return tables


def test_ddp_and_trainer(ranks):
    one, other = ranks.run(other_ways)
    assert one == other
    assert all(table.startswith("6 steps, ") for table in one)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="accelerate shards on GPUs only, and this takes two of them")
def test_accelerate_fsdp2():
    launch = "accelerate.commands.launch", "--config-file", "examples/accelerate_fsdp2.yaml"
    printed = start(*launch, "-m", "examples.ist_torchrun", "--trainer", "--steps", "12")
    assert printed.count("12 steps, ") == 1
