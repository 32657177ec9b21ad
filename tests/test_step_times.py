"""The demo's interleaved step times on a tiny model, and what it says of a busy machine."""

import contextlib
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

import peft_kernels as pk
from benchmarks.ist_providers import TINY
from examples import step_times
from examples.step_times import ACCELERATED, IST, PLAIN, Load, LoadMeter, StepTimes


def test_a_step_of_each_in_turn(monkeypatch):
    """In rounds, on the same frozen weights; estimates apart, and none within a step."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**TINY))
    made, begun, clock = [], [], iter(range(10_000))

    def with_adapter(model):
        made.append(get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")))
        number = len(made) - 1
        made[-1].register_forward_pre_hook(lambda *_: begun.append(number))
        return made[-1]

    monkeypatch.setattr(step_times.time, "perf_counter", lambda: next(clock))
    ids = torch.randint(0, 256, (2, 9))
    config = pk.ist.ISTConfig(interval=4)
    found = step_times.step_times(
        base, with_adapter, {"input_ids": ids, "labels": ids}, 6, config, contextlib.nullcontext
    )
    assert list(found.steps) == [PLAIN, ACCELERATED, IST]
    assert [len(seconds) for seconds in found.steps.values()] == [6, 6, 6]
    assert found.steps[PLAIN] == [1] * 6 and found.interval == 4
    assert len(found.estimates) == 2
    plain, accelerated, ist = made
    frozen = [{name: p for name, p in model.named_parameters() if "lora_" not in name} for model in made]
    assert all(p is frozen[0][name] for others in frozen[1:] for name, p in others.items())
    trained = [[p for name, p in model.named_parameters() if "lora_" in name] for model in made]
    assert not {id(p) for p in trained[0]} & {id(p) for p in trained[1]}
    assert all(p.requires_grad for p in trained[2])  # closed
    for model, kind in ((plain, "Linear"), (accelerated, "FusedLoraLinear"), (ist, "FusedLoraLinear")):
        assert {type(layer).__name__ for layer in model.modules() if hasattr(layer, "lora_A")} == {kind}
    order = [number for number, before in zip(begun, [None, *begun]) if number != before]  # estimates are IST's
    first = begun.index(1)
    assert first == 1 and set(order) == {0, 1, 2}
    assert begun.count(0) == begun.count(1) == 7  # one is not timed
    assert begun.count(2) > 7


def test_ratios_are_of_a_round():
    times = StepTimes({PLAIN: [1.0, 2.0, 4.0], IST: [0.5, 2.0, 6.0]}, [3.0, 5.0], 10, Load(0.0, 0.0))
    assert times.ratios(IST) == [0.5, 1.0, 1.5]
    assert times.estimate_ratio == 4.0 / 2.0
    assert times.with_estimates == pytest.approx(1.0 + 2.0 / 10)


def test_what_others_took(monkeypatch):
    threads, cpus = iter([(100, 10), (200, 110)]), iter([(1000, 5), (2000, 15)])
    monkeypatch.setattr(step_times, "_threads", lambda: next(threads))
    monkeypatch.setattr(step_times, "_cpus", lambda: next(cpus))
    load = LoadMeter().read()
    assert load == Load(waited=0.5, stolen=0.01)
    assert str(load) == (
        "BUSY MACHINE, these times say little: our threads waited 50% of their time for a CPU, 1% of the CPUs' time "
        "was stolen"
    )
    assert load.busy and Load(0.0, 0.06).busy
    assert not Load(0.01, 0.0).busy
    assert str(Load(0.01, 0.0)).startswith("the machine meanwhile: our threads waited 1% of")
    assert "is not known" in str(Load(None, None)) and not Load(None, None).busy


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc")
def test_the_kernels_own_counts():
    before = step_times._threads(), step_times._cpus()
    torch.randn(300, 300) @ torch.randn(300, 300)
    after = step_times._threads(), step_times._cpus()
    assert all(now >= then for one, other in zip(after, before) for now, then in zip(one, other))
    assert after[0][0] > 0 and after[1][0] > 0


def test_a_busy_machine_is_said_before_anything_runs(monkeypatch):
    monkeypatch.setattr(step_times.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(step_times.os, "getloadavg", lambda: (2.1, 0.0, 0.0))
    assert step_times.busy_before().startswith(
        "BUSY MACHINE: expected one at rest, got a load average of 2.1 on 2 CPUs"
    )
    monkeypatch.setattr(step_times.os, "getloadavg", lambda: (0.3, 9.0, 9.0))
    assert step_times.busy_before() == ""
