"""The benchmark's own arithmetic, that it catches what is wrong, and that nothing is lost when it is ended."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import compare, host, kernels, lora, providers, run, sparse_providers, specs
from benchmarks import guard as guarding
from benchmarks.guard import Guard
from benchmarks.lora import Shape, base_flops, bytes_moved, check, flops, make_inputs
from benchmarks.measure import peak_bytes, quantile, rows_of, saved_bytes
from benchmarks.model import launches
from benchmarks.providers import BARE, EAGER, PEFT, Provider, all_providers
from benchmarks.registry import BACKWARD, BOTH, FORWARD, STEP, Request
from benchmarks.resultfile import ResultFile
from benchmarks.specs import SPECS
from peft_kernels.testing.timing import Timer, interleaved, whole

REFERENCE = Shape(8192, 4096, (4096,), 16, torch.bfloat16)
SMALL = Shape(12, 24, (16,), 4, torch.float32)
CEILINGS = {"torch.float32": 1e11, "torch.bfloat16": 1e11, "bytes": 1e10}
ONE_AT_A_TIME = ("torch.compile", "torch.compile, max-autotune")  # take seconds each


class TestCounting:
    def test_flops_and_bytes_by_hand(self):
        gemm = 2 * 8192 * 4096 * 4096
        low_rank = 2 * 8192 * 4096 * 16
        assert base_flops(REFERENCE, FORWARD) == base_flops(REFERENCE, BACKWARD) == gemm == 274877906944
        assert flops(REFERENCE, FORWARD) == gemm + 2 * low_rank
        assert flops(REFERENCE, BACKWARD) == gemm + 4 * low_rank
        assert flops(REFERENCE, BOTH) == 2 * gemm + 6 * low_rank
        matrix, weight, adapter, s = 8192 * 4096 * 2, 4096 * 4096 * 2, 4096 * 16 * 2, 8192 * 16 * 2
        forward = 2 * matrix + weight + 2 * adapter
        assert matrix == 67108864
        assert bytes_moved(REFERENCE, FORWARD) == forward
        backward = 2 * s + 3 * matrix + weight + 4 * adapter
        assert bytes_moved(REFERENCE, BOTH) == forward + backward
        mask = 8192 * 4096 // 8
        assert bytes_moved(replace(REFERENCE, p=0.1), BOTH) == forward + backward + 2 * mask

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.parametrize("op", SPECS)
    def test_cases_are_distinct(self, op, device):
        cases = SPECS[op].cases(device)
        assert len(set(map(str, cases))) == len(cases) > 1
        assert {case.dtype for case in cases} <= {torch.float32, torch.bfloat16, torch.float16}


class TestProviders:
    @pytest.mark.parametrize("shape", [SMALL, replace(SMALL, Ns=(16, 8), p=0.25), replace(SMALL, dtype=torch.bfloat16)])
    def test_every_one_is_right(self, shape):
        shape, names = replace(shape, K=64), []
        for provider in all_providers("cpu"):
            if not lora.why_not(provider, shape) and provider.name not in ONE_AT_A_TIME:
                assert check(provider, shape, "cpu") is None, provider.name
                names.append(provider.name)
        assert {BARE, EAGER, PEFT, "Axolotl-style", "LoRAFusion-style", "ours, reference"} <= set(names)
        assert ("PEFT f32" in names) == (shape.dtype == torch.bfloat16)

    def test_one_that_is_wrong_is_caught(self):
        (right,) = (p for p in all_providers("cpu") if p.name == "ours, reference")

        def wrong(case):
            scaled = [p._replace(scaling=p.scaling * 1.001) for p in case.projections]
            return right.build(replace(case, projections=scaled))

        assert check(right, SMALL, "cpu") is None
        assert "error" in check(replace(right, build=wrong), SMALL, "cpu")

    def test_one_that_is_not_here_says_why(self):
        assert providers.why_not_installed("no-such-package") == "no-such-package is not installed"
        (unsloth,) = (p for p in all_providers("cpu") if p.name == "Unsloth")
        assert "unsloth" in unsloth.why_not

    def test_accelerated_is_accelerated(self):
        case = make_inputs(SMALL, "cpu")
        nodes = {
            p.name: type(p.build(case).forward()[0].grad_fn).__name__
            for p in all_providers("cpu")
            if PEFT in p.name and not p.base
        }
        assert "LoRALinear" in nodes["PEFT, accelerated"] and "LoRALinear" in nodes["PEFT f32, accelerated"]
        assert "LoRALinear" not in nodes["PEFT"] + nodes["PEFT f32"]

    def test_what_is_saved_and_taken(self):
        case = make_inputs(replace(SMALL, R=2), "cpu")
        built = {p.name: p.build(case) for p in all_providers("cpu") if p.name in (BARE, "ours, reference")}
        x, y, s = 12 * 24 * 4, 12 * 16 * 4, 12 * 2 * 4
        assert saved_bytes(built[BARE].forward, built[BARE].kept) == 0
        assert saved_bytes(built["ours, reference"].forward, built["ours, reference"].kept) == x + s
        assert peak_bytes(built[BARE].both, "cpu") == x + y


class TestTiming:
    @pytest.mark.parametrize(("us", "untimed"), [(1.0, 5), (1e6, 1)])
    def test_interleaving(self, us, untimed):
        """Short calls each right after an untimed one of their own, long ones in the first round only."""
        called = []
        calls = {name: whole(lambda name=name: called.append(name)) for name in "ab"}
        times = interleaved(calls, lambda call, repeats: call(lambda: None) or (us,), seconds=0.0, least=3)
        assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
        doubled = called[: 4 * untimed]
        assert doubled[::2] == doubled[1::2]
        turns = doubled[::2] + called[4 * untimed :]
        assert [set(turns[at : at + 2]) for at in range(0, len(turns), 2)] == [{"a", "b"}] * 5
        assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0

    def test_marks(self):
        def call(mark):
            mark()
            mark()

        first, second = Timer("cpu")(call, repeats=3)
        assert 0 <= first <= second

    def test_rows(self):
        times = {"a": [(1.0, 3.0, 4.0), (2.0, 4.0, 6.0)], "b": [(2.0, 6.0, 8.0), (2.0, 8.0, 12.0)]}
        rows = {(r["provider"], r["mode"]): r for r in rows_of(times, (FORWARD, BOTH, STEP), {"a": "a", "none": "c"})}
        assert set(rows) == {(name, mode) for name in "ab" for mode in (FORWARD, BACKWARD, BOTH, STEP)}
        assert rows["b", BACKWARD]["p50_us"] == 6.0
        assert rows["b", STEP] == {
            "provider": "b", "mode": STEP, "p20_us": 8.0, "p50_us": 12.0, "p80_us": 12.0, "rounds": 2, "of_a": 2.0,
        }  # fmt: skip
        assert [(r["provider"], r["mode"]) for r in rows_of(times, (FORWARD,), {})] == [("a", FORWARD), ("b", FORWARD)]


class TestGuard:
    def test_what_is_raised_is_kept(self):
        guard = Guard()
        with guard("one"):
            raise ValueError("expected that, got this\nand more")
        with guard("other"):
            pass
        assert guard.failed == {"one": "ValueError: expected that, got this"}
        with pytest.raises(KeyboardInterrupt), guard("one"):
            raise KeyboardInterrupt

    def test_a_lost_gpu_ends_the_process(self, monkeypatch):
        lost = []
        monkeypatch.setattr(guarding, "device_fault", lambda: "CUDA error: an illegal memory access was encountered")
        guard = Guard(lose=lambda *what: lost.append(what))
        with guard("one"):
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
        assert lost == [("one", "CUDA error: an illegal memory access was encountered")]

    def test_what_does_not_come_back(self, monkeypatch):
        """The time of the inner one counts, not of what it is part of."""
        ended, lost, statuses = threading.Event(), [], []

        def exit_(status):
            statuses.append(status)
            guard.close()
            ended.set()

        monkeypatch.setattr(guarding.os, "_exit", exit_)
        guard = Guard(0.2, lambda *what: lost.append(what))
        with guard("all"), guard("one"):
            assert ended.wait(60)
        assert lost == [("one", "it did not come back within 0.2 s")]
        assert statuses == [guarding.LOST]

    def test_in_rounds(self):
        """One that raises in the third round is over; the others go on, in the order that they would have had."""
        called, guard = [], Guard()

        def call(name):
            called.append(name)
            if name == "b" and called.count("b") == 6:
                raise ZeroDivisionError("later")

        calls = {name: whole(partial(call, name)) for name in "abc"}

        def timer(call, repeats):
            call(lambda: None)
            return (1.0,)

        times = interleaved(calls, timer, seconds=0.0, least=5, guard=guard)
        assert {name: len(values) for name, values in times.items()} == {"a": 5, "c": 5}
        assert guard.failed == {"b": "ZeroDivisionError: later"}

        def raise_(mark):
            raise ZeroDivisionError

        assert interleaved({"b": raise_}, timer, seconds=0.0, guard=guard) == {}
        with pytest.raises(ZeroDivisionError):
            interleaved({"b": raise_}, timer, seconds=0.0)


class TestOrder:
    """On a GPU, by what the ops say of themselves."""

    @staticmethod
    def units(*arguments):
        options = command.parsed(["run", "--device", "cuda", *arguments])
        return [unit for name in options.op or SPECS for unit in run.asked_for(SPECS[name], "cuda", options)]

    def test_the_bars_come_first_and_compilers_last(self):
        units = self.units()
        stages = sorted({unit.part.stage for unit in units})
        assert stages == [0, 1, 2, 3]
        first = [unit for unit in units if unit.part.stage == 0]
        assert [str(unit) for unit in first] == [f"lora_linear M=8192 4096→4096 R=16 bf16 p={p}" for p in ("0", "0.1")]
        names = SPECS["lora_linear"].providers("cuda")
        wanted = {name for name in names if first[0].part.wants(name)}
        assert wanted == {BARE, EAGER, PEFT, *(name for name in names if name.startswith("ours"))}
        assert {unit.spec.name for unit in units if unit.part.stage == 2} == {"ist_step"}
        last = [unit for unit in units if unit.part.stage == 3]
        assert {name for unit in last for name in names if unit.part.wants(name)} == set(ONE_AT_A_TIME)
        assert all(unit.part.seconds == (2.0, 4.0) for unit in units if unit.spec.name != "ist_step")

    def test_every_provider_is_of_one_part_of_a_case(self):
        for spec in SPECS.values():
            for case in spec.cases("cuda"):
                for name in spec.providers("cuda"):
                    assert sum(part.wants(name) for part in spec.parts(case, "cuda")) == 1, (str(case), name)

    def test_a_part_without_a_provider_that_was_asked_for_is_left_out(self):
        assert {unit.part.name for unit in self.units("--op", "lora_linear", "--provider", "ours")} == {"bars", "grid"}
        assert {unit.part.name for unit in self.units("--op", "host", "--provider", "PEFT")} == {"all"}

    def test_native_providers_ask_for_the_library(self, monkeypatch):
        monkeypatch.setattr(providers.ours._native, "why_not", lambda cuda=False: "it was not built")
        found = {p.name: p.why_not for p in providers.ours.providers("cuda")}
        assert found["ours, cuda:passes"] == found["ours, cuda:fused"] == "it was not built"
        assert found["ours, reference"] is None
        assert sparse_providers.absent("cuda") == {
            "ours, cuda": "it was not built", "ours, Δ apart, cuda": "it was not built",
        }  # fmt: skip


class TestResultFile:
    FACTS: ClassVar = {"device": "cpu", "cpu": "a processor", "threads": "2", "commit": "abc"}

    def begun(self, path, **facts):
        file = ResultFile(path)
        return file, file.begin("lora_linear", self.FACTS | facts, CEILINGS)

    def test_round_trip(self, tmp_path):
        path = tmp_path / "folder" / "results.jsonl"
        file, aside = self.begun(path)
        file.add("one", [{"provider": "a", "mode": BOTH, "p50_us": 1.5}, {"provider": "µ", "error": "wrong"}])
        again = ResultFile(path)
        assert (again.op, again.machine, again.ceilings) == ("lora_linear", self.FACTS, CEILINGS)
        assert again.rows == file.rows
        assert again.rows[0] == {"op": "lora_linear", "case": "one", "provider": "a", "mode": BOTH, "p50_us": 1.5}
        assert aside is None

    def test_parts_of_a_case(self, tmp_path):
        """The first rows of a provider count; a lost one leaves the case to do."""
        path = tmp_path / "results.jsonl"
        file, _ = self.begun(path)
        file.add("one", [{"provider": "a", "p50_us": 1.0}, {"provider": "b", "p50_us": 2.0}], "bars")
        file.add("one", [{"provider": "c", "failed": "it took the process with it: gone"}], None)
        for found in (file, ResultFile(path)):
            assert found.done == {("one", "bars")}
            assert found.lost == {"c": "it took the process with it: gone (at one)"}
        file.add("one", [{"provider": "a", "p50_us": 3.0}, {"provider": "c", "skipped": "it took …"}], "grid")
        found = ResultFile(path)
        assert found.done == {("one", "bars"), ("one", "grid")}
        assert [(row["provider"], row.get("p50_us"), row.get("failed")) for row in found.rows] == [
            ("a", 1.0, None), ("b", 2.0, None), ("c", None, "it took the process with it: gone"),
        ]  # fmt: skip

    @pytest.mark.parametrize("cut", [1, 30])
    def test_what_a_kill_cut_off_is_dropped(self, tmp_path, cut):
        path = tmp_path / "results.jsonl"
        file, _ = self.begun(path)
        file.add("one", [{"provider": "a"}])
        whole = path.read_bytes()
        file.add("two", [{"provider": "b"}])
        path.write_bytes(path.read_bytes()[:-cut])
        file, aside = self.begun(path)
        assert list(file.cases) == ["one"]
        assert aside is None
        assert path.read_bytes() == whole
        file.add("two", [{"provider": "c"}])
        assert list(ResultFile(path).cases) == ["one", "two"]

    def test_of_another_commit_is_moved_aside(self, tmp_path):
        path = tmp_path / "results.jsonl"
        file, _ = self.begun(path)
        file.add("one", [{"provider": "a"}])
        file, aside = self.begun(path, commit="def")
        assert aside == tmp_path / "results.abc.jsonl"
        assert list(ResultFile(aside).cases) == ["one"]
        assert not file.cases and not ResultFile(path).cases

    def test_another_file(self, tmp_path):
        path = tmp_path / "results.jsonl"
        path.write_text("not a result\nat all\n")
        with pytest.raises(ValueError, match=r"expected a result file in .*results.jsonl, got in line 1: not a result"):
            ResultFile(path)


@pytest.fixture
def tiny(monkeypatch):
    """The command, with two tiny cases of one op, and ceilings that are not measured."""
    cases = [SMALL, replace(SMALL, M=5)]
    spec = replace(SPECS["lora_linear"], cases=lambda device: cases)
    monkeypatch.setitem(specs.SPECS, "lora_linear", spec)
    monkeypatch.setattr(run, "ceilings", lambda device, dtypes: CEILINGS)
    monkeypatch.setattr(lora, "interleaved", partial(interleaved, least=2, most=2))
    found = [p for p in all_providers("cpu") if p.name not in ONE_AT_A_TIME]
    monkeypatch.setattr(lora, "all_providers", lambda device: found)
    return found


ARGUMENTS = ["run", "--op", "lora_linear", "--device", "cpu", "--minutes", "100", "--out"]


class TestCommand:
    def rows(self, folder):
        (path,) = folder.glob("lora_linear*.jsonl")
        return ResultFile(path).rows

    def test_a_run(self, tmp_path, tiny, capsys):
        command.main([*ARGUMENTS, str(tmp_path)])
        printed = capsys.readouterr().out
        assert max(map(len, printed.splitlines())) <= 100
        rows = self.rows(tmp_path)
        timed = {(row["case"], row["provider"], row["mode"]): row for row in rows if "mode" in row}
        for mode in (FORWARD, BACKWARD, BOTH):
            row = timed[str(SMALL), "ours, reference", mode]
            assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
            assert row["of_floor"] == pytest.approx(row["p50_us"] / lora.floor_us(SMALL, mode, CEILINGS))
        assert timed[str(SMALL), BARE, BOTH]["of_bare"] == 1.0
        assert {row["provider"] for row in rows if row.get("skipped")} >= {"Unsloth", "PEFT f32"}
        assert next(tmp_path.glob("*.png")).read_bytes().startswith(b"\x89PNG")

    def test_killed_and_gone_on_with(self, tmp_path, tiny, monkeypatch, capsys):
        command.main([*ARGUMENTS, str(tmp_path / "whole")])
        measure, done = SPECS["lora_linear"].measure, []

        def killed(case, request):
            if done:
                raise KeyboardInterrupt
            done.append(case)
            return measure(case, request)

        whole_spec = specs.SPECS["lora_linear"]
        monkeypatch.setitem(specs.SPECS, "lora_linear", replace(whole_spec, measure=killed))
        with pytest.raises(KeyboardInterrupt):
            command.main([*ARGUMENTS, str(tmp_path / "parts")])
        assert len({row["case"] for row in self.rows(tmp_path / "parts")}) == 1
        first = self.rows(tmp_path / "parts")
        monkeypatch.setitem(specs.SPECS, "lora_linear", whole_spec)
        capsys.readouterr()
        command.main([*ARGUMENTS, str(tmp_path / "parts")])
        assert "1 of 2 cases are there already" in capsys.readouterr().out

        def keys(folder):
            return [(row["case"], row["provider"], row.get("mode")) for row in self.rows(folder)]

        assert self.rows(tmp_path / "parts")[: len(first)] == first
        assert keys(tmp_path / "parts") == keys(tmp_path / "whole")

    def test_a_wrong_provider_gets_no_time(self, tmp_path, tiny, capsys):
        right = next(p for p in tiny if p.name == EAGER)
        tiny.append(Provider("wrong on purpose", lambda case: right.build(replace(case, x=1.001 * case.x))))
        command.main([*ARGUMENTS, str(tmp_path)])
        assert "wrong on purpose: wrong, not timed" in capsys.readouterr().out
        found = [row for row in self.rows(tmp_path) if row["provider"] == "wrong on purpose"]
        assert len(found) == 2
        assert all("max error" in row["error"] and "p50_us" not in row for row in found)

    @pytest.mark.parametrize("where", ["its building", "its check", "the rounds", "its memory"])
    def test_a_provider_that_raises_gets_a_row(self, tmp_path, tiny, capsys, monkeypatch, where):
        right, calls = next(p for p in tiny if p.name == EAGER), []

        def build(case):
            built = right.build(case)

            def forward():
                calls.append(None)
                if where == "its check" or (where == "the rounds" and len(calls) > 3):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more")
                return built.forward()

            if where == "its building":
                raise ImportError("no module of that name")
            return replace(built, forward=forward)

        tiny.append(Provider("raises on purpose", build))
        if where == "its memory":
            counted = lora.saved_bytes

            def saved(forward, kept):
                if calls:
                    raise RuntimeError("no hooks here")
                return counted(forward, kept)

            monkeypatch.setattr(lora, "saved_bytes", saved)
        command.main([*ARGUMENTS, str(tmp_path)])
        assert "raises on purpose: failed: " in capsys.readouterr().out
        rows = self.rows(tmp_path)
        (failed, _) = [row for row in rows if row["provider"] == "raises on purpose" and row.get("failed")]
        assert failed["failed"] in (
            "ImportError: no module of that name", "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB",
            "RuntimeError: no hooks here",
        )  # fmt: skip
        others = {row["provider"] for row in rows if row["case"] == str(SMALL) and row.get("mode") == BOTH}
        assert {BARE, EAGER, PEFT, "ours, reference"} <= others

    def test_a_case_that_raises_gets_a_row(self, tmp_path, tiny, monkeypatch, capsys):
        measure = specs.SPECS["lora_linear"].measure

        def raising(case, request):
            if case is SMALL:
                raise RuntimeError("no inputs")
            return measure(case, request)

        monkeypatch.setitem(specs.SPECS, "lora_linear", replace(specs.SPECS["lora_linear"], measure=raising))
        command.main([*ARGUMENTS, str(tmp_path)])
        assert "every provider: failed: RuntimeError: no inputs" in " ".join(capsys.readouterr().out.split())
        assert {row["case"] for row in self.rows(tmp_path) if "mode" in row} == {"M=5 24→16 R=4 f32 p=0"}

    def test_without_pictures(self, tmp_path, tiny):
        command.main([*ARGUMENTS, str(tmp_path), "--no-plots"])
        assert [path.suffix for path in tmp_path.iterdir()] == [".jsonl"]

    def test_choice(self, tmp_path, tiny):
        command.main([*ARGUMENTS, str(tmp_path), "--provider", "ours", "--mode", "forward", "--case", "M=5"])
        rows = [row for row in self.rows(tmp_path) if "mode" in row]
        assert {row["provider"] for row in rows} == {BARE, EAGER, PEFT, "ours, reference"}
        assert {(row["case"], row["mode"]) for row in rows} == {("M=5 24→16 R=4 f32 p=0", FORWARD)}

    def test_list(self, capsys):
        command.main(["list", "--device", "cpu", "--cases"])
        printed = capsys.readouterr().out
        for words in (*SPECS, "not here: unsloth", "M=512 576→1536 R=16 bf16 p=0.1", "labels on a quarter"):
            assert words in printed

    def test_no_gpu(self, tmp_path):
        if not torch.cuda.is_available():
            with pytest.raises(SystemExit, match="expected a CUDA GPU that torch can use, got none"):
                command.main(["run", "--device", "cuda", "--out", str(tmp_path)])


class TestCompare:
    def result(self, path, time, mode=BOTH, ratio=None):
        file = ResultFile(path)
        file.begin("lora_linear", {"commit": path.stem, "cpu": "one", "threads": "2"}, {})
        row = {"provider": "ours, reference", "mode": mode, "p50_us": time, "of_bare": ratio}
        file.add("case", [row | {"p20_us": 0.95 * time, "p80_us": 1.05 * time}])
        return str(path)

    @pytest.mark.parametrize(
        ("time", "ratio", "verdict"),
        [(50.0, None, "1 faster"), (200.0, None, "1 slower"), (105.0, None, "1 within"), (200.0, 1.0, "1 within")],
    )
    def test_files(self, tmp_path, capsys, time, ratio, verdict):
        before = self.result(tmp_path / "a.jsonl", 100.0, ratio=ratio)
        command.main(["compare", before, self.result(tmp_path / "b.jsonl", time, ratio=ratio)])
        assert verdict in capsys.readouterr().out

    def test_nothing_in_common(self, tmp_path):
        before, after = self.result(tmp_path / "a.jsonl", 1.0), self.result(tmp_path / "b.jsonl", 1.0, mode=FORWARD)
        with pytest.raises(SystemExit, match="expected rows of 'ours' for the same cases in both, got none"):
            command.main(["compare", before, after])
        with pytest.raises(SystemExit, match="expected two result files or two revisions, got"):
            command.main(["compare", before, "HEAD"])

    def test_a_revision_that_is_not_there(self, tmp_path):
        with pytest.raises(SystemExit, match="expected a result file or a revision of git, got 'no-such-revision'"):
            compare.checked_out("no-such-revision", tmp_path / "tree")


def test_through_pytest_benchmark(tmp_path):
    pytest_ = [
        sys.executable,
        "-m",
        "pytest",
        "benchmarks",
        "--benchmark-only",
        "-q",
        f"--benchmark-storage={tmp_path}",
    ]
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}  # beside it nothing is timed
    for option, words in (("--benchmark-autosave", "Saved benchmark data"), ("--benchmark-compare", "(NOW)")):
        command = [*pytest_, "-k", "lora_linear-eager", option]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, env=alone)
        assert done.returncode == 0, done.stdout
        assert words in done.stdout + done.stderr
        assert "2 passed" in done.stdout


def test_host_costs():
    rows = host.measure(host.LAYER, Request("cpu", seconds=0.1))
    found = {(row["provider"], row["mode"]): row for row in rows}
    assert found["PEFT", FORWARD]["of_peft"] == 1.0
    assert found["ours, nn.LoRALinear", FORWARD]["p50_us"] < found["ours, nn.LoRALinear", BOTH]["p50_us"]
    assert "× PEFT's forward: ours, nn.LoRALinear" in host.summary([row | {"case": "c"} for row in rows])


def test_a_machine_without_peft_has_the_other_providers():
    code = (
        "import sys; sys.modules['peft'] = sys.modules['transformers'] = None\n"
        "from benchmarks import ist_step, host\nfrom benchmarks.registry import Request\n"
        "rows = host.measure(host.LAYER, Request('cpu', seconds=0.01))\n"
        "print([row.get('failed', row['provider']) for row in rows if row.get('mode') != 'forward'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert "'nn.Linear', 'ours, nn.LoRALinear'" in done.stdout, done.stderr
    assert done.stdout.count("ModuleNotFoundError: ") == 2


def test_rows_are_json():
    rows = lora.measure(SMALL, Request("cpu", CEILINGS, 0.1, providers=("ours",)))
    assert json.loads(json.dumps(rows)) == rows


class TestKernels:
    @staticmethod
    def events(late: float) -> list[kernels.Event]:
        """A pass, a GEMM, and another pass that starts before the GEMM has ended, as `late` as that."""
        spans = {
            "pass": (0, 10),
            "gemm": (12, 100),
            "beside": (90 + late, 104 + late),
            "reduce": (106 + late, 107 + late),
        }
        return [kernels.Event(name, *span) for name, span in spans.items()]

    def test_medians_by_position(self):
        found = kernels.rows([self.events(late) for late in (0.0, 1.0, 5.0)])
        assert [(row.name, row.time, row.gap, row.launch) for row in found] == [
            ("pass", 10, 0, None), ("gemm", 88, 2, None), ("beside", 14, -9, None), ("reduce", 1, 2, None),
        ]  # fmt: skip

    def test_beside_the_launches_that_they_are(self):
        ceilings = {"torch.bfloat16": 1e12, "bytes": 1e9, "gap_us": 9.0}
        gemm = launches.beside(launches.gemm("dx", 100, 100, 200, 2), launches.elementwise("x pass", 200, 0))
        model = [launches.elementwise("dy pass", 5000, 0), gemm, launches.elementwise("reduce", 0, 500)]
        found = kernels.rows([self.events(0.0)], model)
        assert [(row.name, row.time, row.launch) for row in found] == [
            ("pass", 10, model[0]), ("gemm + beside", 92, gemm), ("reduce", 1, model[2]),
        ]  # fmt: skip
        made = kernels.table(found, kernels.span([self.events(0.0)]), torch.bfloat16, ceilings)
        columns = {column.header: list(column.cells)[:-1] for column in made.columns}
        assert columns["predicted"] == ["5.00 µs", "100 µs", "0.50 µs"]
        assert columns["×"] == ["2.00", "0.92", "2.00"]
        assert columns["what"] == ["dy pass", "dx, x pass", "reduce"]
        assert list(made.columns[2].cells)[-1] == "107 µs"

    def test_the_whole_ends_with_what_ends_last(self):
        events = [kernels.Event("gemm", 0.0, 100.0), kernels.Event("within", 90.0, 95.0)]
        assert kernels.span([events]) == 100.0

    def test_other_launches_than_the_model_has(self):
        found = kernels.rows([self.events(0.0)], [launches.elementwise("one", 1, 1)])
        assert [row.launch for row in found] == [None] * 4

    def test_a_gpu_is_needed(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(SystemExit, match="expected a CUDA GPU that torch can use, got none"):
            command.main(["kernels"])

    @pytest.mark.gpu
    @pytest.mark.time_limit(180)
    @pytest.mark.parametrize("options", [[], ["--once"]])
    def test_on_a_gpu(self, options, capsys):
        command.main(["kernels", "--case", "M=256 ", "--provider", "bare", "--provider", "ours, triton", *options])
        assert ("ours, triton:fused on M=256" in capsys.readouterr().out) == (not options)
