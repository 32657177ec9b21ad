"""The small examples of IST: each trains, is cut off, and goes on to the bit."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture
def run(monkeypatch, capsys, smollm2) -> Callable[..., str]:
    """Runs an example with these options, and returns what it printed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # to the bit on the CPU only
    fixed = ("--batch-size", "2", "--model", smollm2)

    def run(example: str, output: Path, *options: str) -> str:
        monkeypatch.setattr(sys, "argv", [example, *fixed, "--output", str(output), *options])
        importlib.import_module(f"examples.{example}").main()
        return capsys.readouterr().out

    return run


def adapter(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "adapter" / "adapter_model.safetensors")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert len(one) == 2 * 210
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_trainer(tmp_path, run):
    options = ("--steps", "4", "--backward-budget", "0.6")
    printed = run("ist_trainer", tmp_path, *options)
    for words in ("starting anew", "4 steps", "3 estimates", "importance over time"):
        assert words in printed
    assert (tmp_path / "importance.png").read_bytes().startswith(b"\x89PNG")
    uninterrupted = adapter(tmp_path)
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()  # as if killed while it saved
    assert f"going on from {tmp_path / 'checkpoint-3'}" in run("ist_trainer", tmp_path, *options)
    assert_equal(adapter(tmp_path), uninterrupted)


def test_loop(tmp_path, run):
    printed = run("ist_loop", tmp_path / "whole", "--steps", "6")
    assert "6 steps" in printed
    assert "1 estimate of importance" in printed
    run("ist_loop", tmp_path / "cut", "--steps", "3")
    (tmp_path / "cut" / "state.unfinished").write_bytes(b"killed while it saved")
    assert "going on from step 3" in run("ist_loop", tmp_path / "cut", "--steps", "6")
    assert_equal(adapter(tmp_path / "cut"), adapter(tmp_path / "whole"))
    assert not (tmp_path / "cut" / "state.unfinished").exists()
