"""`python -m peft_kernels tune` and the tables it makes, without a GPU: what a launch would look up, what becomes of
tables that do not fit, and runs with a fake measurement."""

import inspect
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from peft_kernels.__main__ import env
from peft_kernels.ops.core import tuning
from peft_kernels.ops.core.tuning import FEATURES, RANKS, TOKENS, Gpu
from peft_kernels.ops.masked_linear import configs as masked
from peft_kernels.ops.sparse_delta import configs as sparse
from peft_kernels.tune import jobs as planning
from peft_kernels.tune import session
from peft_kernels.tune.jobs import PACKAGES, Job

ROOT = Path(__file__).resolve().parent.parent
GPU = Gpu("NVIDIA Test 1", 90, "3.9.0")
KEY = ("gemm_tile", 8192, 4096, 2, True)
FEWER = ["masked_linear"]  # the op package with the fewest jobs


def rule():
    return masked.gemm_tile(8192, 4096, 2, 90, True)


def other():
    """Candidates that the rule does not take."""
    return masked.gemm_candidates(8192, 4096, 2, True, 90)[1:]


def load(*folders):
    return tuning.load("masked_linear", GPU, masked.CHOICES, *folders)


def write(folder, table, gpu=GPU):
    tuning.write(tuning.path_in(folder, "masked_linear", gpu), "masked_linear", gpu, masked.CHOICES, table)


def tile_of(job, table):
    """What a launch at the job's shape takes."""
    choose, key = getattr(PACKAGES[job.op], job.choice), dict(zip(PACKAGES[job.op].CHOICES[job.choice].fields, job.key))
    if "per_64" in key:
        key["density"] = key.pop("per_64") / 64
    if "arch" in inspect.signature(choose).parameters:
        key["arch"] = 90
    return choose(**key, table=table)


# --- Keys and tables -----------------------------------------------------------------------------------------


def test_buckets():
    assert [TOKENS.of(M) for M in (0, 1, 64, 65, 128, 129, 8191, 8192, 8193, 10**7)] == [
        64, 64, 64, 128, 128, 256, 8192, 8192, 8192, 8192,
    ]  # fmt: skip
    assert FEATURES.all() == [16384, 8192, 4096, 2048, 1024, 512]
    assert RANKS.all() == [64, 32, 16]
    for buckets in (TOKENS, FEATURES, RANKS, sparse.PER_64, sparse.THIN):
        assert all(buckets.of(size) == size for size in buckets.all())


@pytest.mark.parametrize("architecture", [0, 80, 90, 100])
def test_a_job_measures_what_a_launch_looks_up(architecture):
    jobs = planning.jobs(list(PACKAGES), architecture)
    assert len(set(jobs)) == len(jobs)
    for job in jobs:
        if job.at:
            assert job.candidates == PACKAGES[job.op].CHOICES[job.choice].crossover.paths
            continue
        assert len(set(job.candidates)) == len(job.candidates) > 1
        assert tile_of(job, {(job.choice, *job.key): job.candidates[-1]}) == job.candidates[-1]
        if architecture == 90:
            assert tile_of(job, {}) == job.candidates[0]


def test_sizes_between_buckets_find_a_tile():
    table = {KEY: other()[0]}
    assert masked.gemm_tile(5000, 3000, 2, 90, True, table=table) == other()[0]
    assert masked.gemm_tile(10**6, 4096, 2, 90, True, table=table) == other()[0]
    assert masked.gemm_tile(5000, 5000, 2, 90, True, table=table) == masked.gemm_tile(5000, 5000, 2, 90, True)


def test_crossovers_come_from_the_table():
    lora = PACKAGES["lora_linear"]
    size = 4096**3

    def path(backend, table):
        return lora.expand_path(4096, 4096, 4096, 16, torch.bfloat16, 90, backend, table)

    assert path("triton", {}) == "blas"
    assert path("triton", {("fused_from", 2): size}) == "fused"
    assert path("triton", {("fused_from", 2): size + 1}) == "blas"
    assert path("triton:blas", {("fused_from", 2): 0}) == "blas"
    assert path("triton", {("fused_from", 2): math.inf}) == "blas"
    assert lora.gpu_backend(4096, 4096, 4096, torch.bfloat16, 90) == "triton"
    assert lora.gpu_backend(4096, 4096, 4096, torch.bfloat16, 90, {("cuda_from", 2): size}) == "cuda"
    assert lora.gpu_backend(4095, 4096, 4096, torch.bfloat16, 90, {("cuda_from", 2): size}) == "triton"
    assert lora.gpu_backend(4096, 4096, 4096, torch.bfloat16, 90, {("cuda_from", 2): math.inf}) == "triton"

    def cuda_path(backend, table):
        return lora.cuda_path(4096, 4096, 4096, torch.bfloat16, 90, backend, table)

    assert cuda_path("cuda", {}) == "passes"
    assert cuda_path("cuda", {("cuda_fused_from", 2): size}) == "fused"
    assert cuda_path("cuda", {("cuda_fused_from", 2): size + 1}) == "passes"
    assert cuda_path("cuda:passes", {("cuda_fused_from", 2): 0}) == "passes"
    assert sparse.sampled_up_to(2) == 0.002
    assert sparse.sampled_up_to(2, {("sampled_up_to", 2): 0.01}) == 0.01


@pytest.mark.parametrize("op", PACKAGES)
def test_round_trip(op, tmp_path):
    """Every kind of entry, a size that is never reached too."""
    jobs = planning.jobs([op], 90)
    table = {(job.choice, *job.key): math.inf if job.at else job.candidates[-1] for job in jobs}
    tuning.write(tuning.path_in(tmp_path, op, GPU), op, GPU, PACKAGES[op].CHOICES, table)
    assert tuning.load(op, GPU, PACKAGES[op].CHOICES, tmp_path) == table


def test_the_users_table_comes_before_the_packages_before_the_rule(tmp_path):
    own, packaged = tmp_path / "own", tmp_path / "packaged"
    second = ("gemm_tile", 4096, 4096, 2, True)
    assert masked.gemm_tile(8192, 4096, 2, 90, True, table=load(own, packaged)) == rule()
    write(packaged, {KEY: other()[0], second: other()[0]})
    assert masked.gemm_tile(8192, 4096, 2, 90, True, table=load(own, packaged)) == other()[0]
    write(own, {KEY: other()[1]})
    assert masked.gemm_tile(8192, 4096, 2, 90, True, table=load(own, packaged)) == other()[1]
    assert masked.gemm_tile(4096, 4096, 2, 90, True, table=load(own, packaged)) == other()[0]


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("PEFT_KERNELS_CACHE")
    assert tuning.cache_folder() == tmp_path / "xdg" / "peft_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuning.cache_folder() == Path.home() / ".cache" / "peft_kernels"


def test_nothing_is_read_on_a_cpu_or_by_an_import():
    assert all(not configs.tuned(torch.device("cpu")) for configs in PACKAGES.values())
    code = (
        "import peft_kernels; from peft_kernels.tune.jobs import PACKAGES\n"
        "print([configs.tuned.cache_info().currsize for configs in PACKAGES.values()])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "[0, 0, 0]", result.stderr


# --- Tables that do not fit ----------------------------------------------------------------------------------


def changed(**changes):
    """A table that fits but for some of its head."""
    return lambda document: json.dumps(document | changes)


def entry(**changes):
    """A table whose second entry does not fit."""

    def spoil(document):
        first = document["entries"][0]
        return json.dumps(document | {"entries": [first, {**first, **changes}]})

    return spoil


def tile(**changes):
    return lambda document: entry(best={**document["entries"][0]["best"], **changes})(document)


def without_a_field(document):
    best = dict(document["entries"][0]["best"])
    del best["num_warps"]
    return entry(best=best)(document)


BAD_TABLES = {
    "damaged": (lambda document: json.dumps(document)[:-20], "damaged JSON"),
    "empty": (lambda document: "", "damaged JSON"),
    "deep": (lambda document: "[" * 100_000, "damaged JSON"),
    "binary": (lambda document: b"\xff\xfe\x00", "damaged JSON"),
    "no object": (lambda document: "[1]", "expected format 1, got None"),
    "format": (changed(format=0), "expected format 1, got 0"),
    "room": (changed(op="lora_linear"), "expected op 'masked_linear', got 'lora_linear'"),
    "gpu": (changed(gpu="NVIDIA Other"), "expected gpu 'NVIDIA Test 1', got 'NVIDIA Other'"),
    "architecture": (changed(architecture=80), "expected architecture 90, got 80"),
    "triton": (changed(triton="3.6.0"), "expected triton '3.9.0', got '3.6.0'"),
    "no entries": (changed(entries=None), "expected a list of entries, got none"),
    "entry": (changed(entries=["x"]), "expected an entry of choice, key and best, got 'x'"),
    "choice": (entry(choice="shrink_tile"), "expected one of the choices gemm_tile, grad_tile, got 'shrink_tile'"),
    "choice of a list": (entry(choice=[]), "expected one of the choices"),
    "key": (entry(key={"M": 64}), "gemm_tile: expected a key of whole M, N, element_size, aligned"),
    "key of text": (entry(key={"M": "64", "N": 1, "element_size": 2, "aligned": True}), "expected a key of whole"),
    "unknown field": (tile(block_q=1), "gemm_tile: expected a tile of block_m, block_n"),
    "missing field": (without_a_field, "gemm_tile: expected a tile of block_m, block_n"),
    "no tile": (entry(best=None), "gemm_tile: expected a tile of block_m, block_n"),
    "no candidate": (tile(block_m=512), "candidates, got {'block_m': 512"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_a_table_that_does_not_fit_is_ignored_with_one_line(name, tmp_path):
    spoil, reason = BAD_TABLES[name]
    write(tmp_path, {KEY: other()[0]})
    path = tuning.path_in(tmp_path, "masked_linear", GPU)
    text = spoil(json.loads(path.read_text()))
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = load(tmp_path, tmp_path / "nowhere")
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith(f"{path}: this tuning table is ignored: ")
    assert reason in message
    assert "\n" not in message
    assert masked.gemm_tile(8192, 4096, 2, 90, True, table=table) == rule()


def test_a_size_that_is_none_is_ignored(tmp_path):
    lora = PACKAGES["lora_linear"].CHOICES
    for bad in (-1, math.nan, "large", True, []):
        path = tuning.path_in(tmp_path, "lora_linear", GPU)
        entries = [{"choice": "fused_from", "key": {"element_size": 2}, "best": bad}]
        tuning.replace(path, json.dumps({**tuning.header("lora_linear", GPU), "entries": entries}))
        with pytest.warns(RuntimeWarning, match="fused_from: expected a size or null"):
            assert tuning.load("lora_linear", GPU, lora, tmp_path) == {}


def test_a_table_that_cannot_be_opened_is_ignored(tmp_path):
    tuning.path_in(tmp_path, "masked_linear", GPU).mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="Is a directory"):
        assert load(tmp_path) == {}


def test_the_packages_table_serves_where_the_users_is_ignored(tmp_path):
    own, packaged = tmp_path / "own", tmp_path / "packaged"
    write(packaged, {KEY: other()[0]})
    tuning.replace(tuning.path_in(own, "masked_linear", GPU), "{")
    with pytest.warns(RuntimeWarning, match="damaged JSON"):
        assert load(own, packaged) == {KEY: other()[0]}


# --- Runs ----------------------------------------------------------------------------------------------------


class FakeMeasurement:
    """A time that follows from the job alone; stops as if killed before one of the measurements."""

    def __init__(self, dies_before=None):
        self.asked: list[Job] = []
        self.dies_before = dies_before

    def __call__(self, job, table):
        if len(self.asked) == self.dies_before:
            raise KeyboardInterrupt
        self.asked.append(job)
        return [
            "skipped: OutOfResources" if number == 2 else float((7 * number + sum(map(int, job.key))) % 11)
            for number in range(len(job.candidates))
        ]


def run(folder, measure, ops=FEWER, **options):
    planned = planning.jobs(ops, GPU.architecture)
    rows = session.run(planned, folder, GPU, measure, **options)
    return planned, rows


def table_text(folder, op="masked_linear"):
    return tuning.path_in(folder, op, GPU).read_text()


@pytest.mark.parametrize("cut_off", [False, True])
def test_a_killed_run_goes_on_and_ends_at_the_same_table(tmp_path, cut_off):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    planned, _ = run(whole, FakeMeasurement())
    first, second = FakeMeasurement(dies_before=17), FakeMeasurement()
    with pytest.raises(KeyboardInterrupt):
        run(killed, first)
    if cut_off:  # in the middle of a line
        path = session.rows_path(killed, GPU, "masked_linear")
        path.write_text(path.read_text()[:-9])
    run(killed, second)
    assert first.asked[: 17 - cut_off] + second.asked == planned
    assert table_text(killed) == table_text(whole)
    assert not list(killed.rglob("*.tmp"))


def test_a_run_out_of_time_keeps_what_it_has(tmp_path):
    clock = iter([False] * 5 + [True])
    planned, rows = run(tmp_path, FakeMeasurement(), out_of_time=lambda: next(clock))
    assert list(rows) == planned[:5]
    assert load(tmp_path) == planning.best(planned, rows)
    assert len(load(tmp_path)) == 5
    _, rows = run(tmp_path, FakeMeasurement())
    assert list(rows) == planned


def test_measurements_of_another_triton_are_made_again(tmp_path):
    run(tmp_path, FakeMeasurement())
    again = FakeMeasurement()
    planned = planning.jobs(FEWER, GPU.architecture)
    session.run(planned, tmp_path, GPU._replace(triton="4.0.0"), again)
    assert again.asked == planned


def test_measurements_of_other_candidates_are_made_again(tmp_path):
    planned, _ = run(tmp_path, FakeMeasurement())
    fewer = [planned[0]._replace(candidates=planned[0].candidates[:-1]), *planned[1:]]
    again = FakeMeasurement()
    session.run(fewer, tmp_path, GPU, again)
    assert again.asked == fewer[:1]


def test_one_room_leaves_the_others_alone(tmp_path):
    run(tmp_path, FakeMeasurement(), ["sparse_delta"])
    before = table_text(tmp_path, "sparse_delta")
    run(tmp_path, FakeMeasurement())
    assert table_text(tmp_path, "sparse_delta") == before
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "NVIDIA_Test_1", "masked_linear.json", "masked_linear.rows.jsonl", "sparse_delta.json",
        "sparse_delta.rows.jsonl",
    ]  # fmt: skip


def test_the_fastest_that_is_right_wins():
    candidates = masked.gemm_candidates(8192, 4096, 2, True, 90)
    job = Job("masked_linear", *KEY[:1], KEY[1:], (), tuple(candidates))
    results = ["wrong: max error", 3.0, 2.0, "skipped: OutOfResources", *[9.0] * (len(candidates) - 4)]
    assert planning.best([job], {job: results}) == {KEY: candidates[2]}
    assert planning.best([job], {job: ["wrong: max error"] * len(candidates)}) == {}
    assert planning.best([job], {}) == {}


def test_crossovers():
    assert tuning.smallest_from([(8, True), (4, True), (2, False), (1, True)]) == 4
    assert tuning.smallest_from([(4, True), (4, False), (2, True)]) == math.inf
    assert tuning.smallest_from([(4, True), (2, True)]) == 2
    assert tuning.largest_up_to([(8, True), (4, False), (2, True), (1, True)]) == 2
    assert tuning.largest_up_to([(2, True), (1, False)]) == 0
    assert tuning.largest_up_to([(2, True), (1, True)]) == 2


def test_crossovers_come_first_from_the_end_at_which_a_bound_grows():
    jobs = planning.jobs(list(PACKAGES), 90)
    crossovers = [job for job in jobs if job.at]
    assert jobs[: len(crossovers)] == crossovers
    declared = {name: choice.crossover for one in PACKAGES.values() for name, choice in one.CHOICES.items()}
    for choice, crossover in declared.items():
        if crossover is None:
            continue
        sizes = [math.prod(job.at) for job in crossovers if job.choice == choice]
        assert len(sizes) == len(crossover.sizes)
        assert sizes == sorted(sizes, reverse=crossover.of is tuning.smallest_from)


def test_a_crossover_that_was_not_finished_is_a_bound():
    """The way in question is taken where it was seen to be faster, and nowhere else."""
    jobs = [job for job in planning.jobs(["sparse_delta"], 90) if job.at]
    rows = {job: [2.0, 1.0 if job.at[0] <= 0.005 else 3.0] for job in jobs}
    assert planning.best(jobs, rows) == {("sampled_up_to", 2): 0.005}
    rows[jobs[-1]] = [2.0, "skipped: OutOfResources"]
    assert planning.best(jobs, rows) == {("sampled_up_to", 2): 0.005}
    bounds = [planning.best(jobs, {job: rows[job] for job in jobs[:done]}) for done in range(len(jobs) + 1)]
    assert bounds == [{}, *({("sampled_up_to", 2): size} for size in (0.0005, 0.001, 0.002, 0.005, 0.005, 0.005))]
    assert planning.best(jobs, {jobs[2]: rows[jobs[2]]}) == {("sampled_up_to", 2): 0}  # below it nothing is known

    key = "fused_from", 2
    jobs = [job for job in planning.jobs(["lora_linear"], 90) if job.choice == "fused_from"]
    rows = {job: [2.0, 1.0 if math.prod(job.at) >= 2**37 else 3.0] for job in jobs}
    sizes = [planning.best(jobs, {job: rows[job] for job in jobs[:done]}).get(key) for done in range(len(jobs) + 1)]
    assert sizes[0] is None
    assert sizes[1] == math.prod(jobs[0].at) == 8192**3
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    assert sizes[-1] == 2**37
    assert planning.best(jobs, {jobs[0]: [1.0, 2.0]}) == {key: math.inf}


def test_a_job_that_loses_the_gpu_is_not_tried_again(tmp_path):
    def measure(job, table):
        if job == planned[3]:
            raise session.DeviceLost("CUDA error", ["wrong: it lost the GPU: CUDA error"] * len(job.candidates))
        return [1.0] * len(job.candidates)

    planned = planning.jobs(FEWER, GPU.architecture)
    with pytest.raises(session.DeviceLost):
        session.run(planned, tmp_path, GPU, measure)
    again = FakeMeasurement()
    _, rows = run(tmp_path, again)
    assert again.asked == planned[4:]
    assert rows[planned[3]][0] == "wrong: it lost the GPU: CUDA error"


def test_a_candidate_that_loses_the_gpu_is_named(monkeypatch):
    from peft_kernels.ops.core.problem import Problem
    from peft_kernels.tune import measure

    lost = []
    monkeypatch.setattr(measure, "device_fault", lambda: "CUDA error" if lost else "")

    def launch(candidate):
        if candidate == "does not launch":
            raise torch.AcceleratorError("CUDA error: invalid argument")
        if candidate == "kills":
            lost.append(candidate)
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")
        return (torch.ones(3),)

    problem = Problem(launch, lambda x: (x,), (torch.ones(3),))
    assert measure.check(problem, ("does not launch",)) == ["skipped: AcceleratorError: CUDA error: invalid argument"]
    with pytest.raises(session.DeviceLost) as caught:
        measure.check(problem, ("sound", "does not launch", "kills", "sound"))
    assert caught.value.results == [
        "skipped: the GPU was lost before it was timed", "skipped: AcceleratorError: CUDA error: invalid argument",
        "wrong: it lost the GPU: CUDA error", "skipped: the GPU was lost",
    ]  # fmt: skip


def test_two_ways_are_compared_with_the_tiles_that_are_known(tmp_path):
    """Those of an earlier run; in a first run the rules'."""
    tables, in_force = {}, {}

    def measure(job, table):
        tables[job] = table
        if job.at:  # whole layers take the tiles of the table that is written
            in_force[job] = tuning.load("sparse_delta", GPU, sparse.CHOICES, tmp_path)
        return [float(number) for number in range(len(job.candidates), 0, -1)]  # the last is the fastest

    planned, _ = run(tmp_path / "first", measure, ["sparse_delta"])
    crossovers = [job for job in planned if job.at]
    assert all(set(tables[job]) <= {("sampled_up_to", 2)} for job in crossovers)
    found = {(job.choice, *job.key): job.candidates[-1] for job in planned if not job.at}
    session.run([job for job in planned if not job.at], tmp_path, GPU, measure)
    run(tmp_path, measure, ["sparse_delta"])
    assert all(found.items() <= tables[job].items() for job in crossovers)
    assert all(in_force[job] == found for job in crossovers)
    assert tuning.load("sparse_delta", GPU, sparse.CHOICES, tmp_path) == {
        **found, ("sampled_up_to", 2): max(job.at[0] for job in crossovers),
    }  # fmt: skip


def test_candidates_are_held_against_float64():
    from peft_kernels.ops.core.problem import Problem
    from peft_kernels.tune.measure import check

    torch.manual_seed(0)
    left, right = torch.randn(32, 64), torch.randn(64, 16)

    def launch(candidate):
        if candidate == "too large":
            raise RuntimeError("PassManager::run failed\nsecond line")
        return (left @ right + (candidate == "off"),)

    results = check(Problem(launch, lambda left, right: (left @ right,), (left, right)), ("sound", "off", "too large"))
    assert results[0] == ""
    assert results[1].startswith("wrong: output 0: max error")
    assert results[2] == "skipped: RuntimeError: PassManager::run failed second line"


def test_summary_counts_and_names(tmp_path):
    planned = planning.jobs(FEWER, 90)
    wrong = ["wrong: max error", *[1.0] * (len(planned[0].candidates) - 1)]
    rows = {planned[0]: wrong, planned[1]: ["skipped: x"] * len(planned[1].candidates)}
    text = session.summary(planned, rows, tmp_path, GPU)
    assert f"2 of {len(planned)} are measured; {len(planned[1].candidates)} timings were skipped" in text
    assert f"dropped as wrong 1 times: masked_linear.gemm_tile {planned[0].candidates[0]}" in text


# --- The command ---------------------------------------------------------------------------------------------


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "peft_kernels", "tune", *arguments], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_one_line_says_so(tmp_path):
    result = command(PEFT_KERNELS_CACHE=str(tmp_path))
    assert result.returncode != 0
    assert result.stdout == ""
    expected = f"tune: expected a CUDA GPU and Triton, got none: torch {torch.__version__} sees no GPU\n"
    assert result.stderr == expected
    assert not list(tmp_path.iterdir())


def test_dry_run_counts_and_writes_nothing(tmp_path):
    result = command("--dry-run", "--op", "sparse_delta", PEFT_KERNELS_CACHE=str(tmp_path))
    assert (result.returncode, result.stderr) == (0, "")
    jobs = planning.jobs(["sparse_delta"], 90)
    timings = sum(len(job.candidates) for job in jobs)
    assert f"{len(jobs)} to measure, {timings} timings; 0 are there already" in result.stdout
    for choice in sparse.CHOICES:
        assert f"sparse_delta.{choice} " in result.stdout
    assert "lora_linear" not in result.stdout
    assert not list(tmp_path.iterdir())


def test_dry_run_leaves_out_what_is_there(tmp_path):
    clock = iter([False] * 5 + [True])
    planned, _ = run(tmp_path, FakeMeasurement(), out_of_time=lambda: next(clock))
    text = session.dry_run(FEWER, tmp_path, GPU)
    assert text.splitlines()[-1].startswith(f"{len(planned) - 5} to measure, ")
    assert text.endswith("; 5 are there already")


def test_env_says_which_table_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFT_KERNELS_CACHE", str(tmp_path))
    everything = ", ".join(PACKAGES)
    assert session.tables_used(GPU) == f"{everything}: none: nothing was measured on NVIDIA Test 1"
    write(tmp_path, {KEY: other()[0]})
    path = tuning.path_in(tmp_path, "masked_linear", GPU)
    assert f"masked_linear: {path} (1 entries)" in session.tables_used(GPU)
    path.write_text("{")
    assert f"masked_linear: none: {path} is ignored: damaged JSON" in session.tables_used(GPU)
    assert "  tuning tables " in env()
    if not torch.cuda.is_available():
        assert f"none: torch {torch.__version__} sees no GPU" in " ".join(env().split())
