"""All of `make gpu` on a machine without a GPU, against a stub of one: a test fails, one hangs, one loses the GPU, a
provider of the benchmark raises, one loses the GPU, and the suite's time runs out in the middle."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.specs import SPECS

ROOT = Path(__file__).parents[1]
PYTHON = """#!/bin/sh
case "$*" in
    *is_available*) exit 0 ;;
    "-m peft_kernels env") echo "a stub"; exit 0 ;;
    setup.py*) echo "BUILDS"; exit 0 ;;
    "-m benchmarks run"*) shift 2; exec {python} -m tests.stub_gpu "$@" ;;
    *) exec {python} "$@" ;;
esac
"""
#: Time is over when a test says so, not by the clock: this machine may be slow.
TIMEOUT = """#!{python}
import os, pathlib, signal, subprocess, sys, time
over = pathlib.Path({over!r})
command = subprocess.Popen(sys.argv[4:], start_new_session=True)
while command.poll() is None:
    if over.exists():
        over.unlink()
        os.killpg(command.pid, signal.SIGINT)
        command.wait()
        sys.exit(124)
    time.sleep(0.1)
sys.exit(command.returncode)
"""
#: Of the three stages, in an order of collection that is not that of the run.
SUITE = {
    "test_alpha_gpu.py": """
import os, time, pytest
from tests import stub_gpu
pytestmark = pytest.mark.gpu

@pytest.mark.parametrize("size", range(3))
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_sums(backend, size):
    if backend == "cuda" and size == 1:
        pytest.fail(f"rms error {1e-3 + size} > 1e-4")
    if backend == "cuda" and size == 2:
        raise AssertionError(f"rms error {size}.5 > 1e-4")

@pytest.mark.parametrize("size", range(6))
@pytest.mark.parametrize("backend", ["cuda"])
def test_hangs(backend, size):
    time.sleep(600)

@pytest.mark.parametrize("size", range(4))
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_loses(backend, size):
    if backend == "cuda" and size == 1:
        stub_gpu.lose()

def test_segfault():
    import faulthandler
    faulthandler._sigsegv()

@pytest.mark.time_limit(6000)
@pytest.mark.parametrize("size", range(100))
def test_the_grid_that_does_not_end(size):
    if size > 40:
        open(os.environ["OVER"], "w").close()
        time.sleep(6000)
""",
    "test_native_beta.py": """
import pytest
@pytest.mark.gpu
@pytest.mark.parametrize("size", range(2))
def test_unit(size):
    pass

def test_not_of_a_gpu():
    pass
""",
    "test_not_importable.py": "import no_such_module\nmark.gpu\n",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What `make gpu MINUTES=90` leaves, and what it prints."""
    folder = tmp_path_factory.mktemp("gpu")
    out = folder / "out"
    (ROOT / "build").mkdir(exist_ok=True)
    suite = Path(tempfile.mkdtemp(prefix="suite-", dir=ROOT / "build"))  # below pytest's root, so that files have names
    over = str(folder / "over")
    programs = {
        "python3": PYTHON.format(python=sys.executable), "timeout": TIMEOUT.format(python=sys.executable, over=over),
        "nvidia-smi": "#!/bin/sh\n",
    }  # fmt: skip
    for name, text in programs.items():
        name = f"bin/{name}"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    for name, text in SUITE.items():
        (suite / name).write_text(text)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PY", "MAKE"))}
    environment |= {
        "PATH": f"{folder / 'bin'}:{environment['PATH']}", "SUITE": str(suite.relative_to(ROOT)), "OUT": str(out),
        "OVER": over,
        "PYTEST_ADDOPTS": "-p tests.stub_gpu --limit 6",
    }  # fmt: skip
    done = subprocess.run(
        ["make", "--no-print-directory", "gpu", "MINUTES=90"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    shutil.rmtree(suite)
    return done, out


pytestmark = pytest.mark.slow


def test_what_comes_back(finished):
    """At most eight files with all ops of the benchmark, no pictures; the log is what was printed, with the minutes."""
    done, out = finished
    assert {path.name for path in out.rglob("*")} == {
        "log.txt", "junit.xml", "lora_linear_Stub_GPU.jsonl",
    }  # fmt: skip
    assert 2 + len(SPECS) <= 8
    log = (out / "log.txt").read_text()
    assert log == done.stdout
    assert done.returncode != 0
    assert "no pytest-xdist" not in log
    table = log[log.index("== minutes by stage") :]
    for words in ("min  what is here: passed", "min  the GPU suite: STOPPED", "min  the GPU benchmarks: FAILED (3)",
                  "min  the GPU benchmarks: passed", "3 files in"):  # fmt: skip
        assert words in table, table
    assert ("BUILDS" in log) == (not (ROOT / "peft_kernels" / "_lib" / "libpeft_kernels.so").exists())


def cases(out):
    found = {}
    for case in ElementTree.parse(out / "junit.xml").iter("testcase"):
        name = case.get("name")
        assert name not in found, name
        (found[name],) = [child.tag for child in case] or ["passed"]
    return found


def message(out, name):
    (case,) = [case for case in ElementTree.parse(out / "junit.xml").iter("testcase") if case.get("name") == name]
    return case[0].get("message"), case[0].text or ""


def test_every_mishap_costs_its_own_test(finished):
    _, out = finished
    found = cases(out)
    sums = {name: outcome for name, outcome in found.items() if name.startswith("test_sums")}
    assert sums == {
        f"test_sums[{b}-{n}]": "failure" if b == "cuda" and n else "passed"
        for b in ("triton", "cuda")
        for n in range(3)
    }
    assert message(out, "test_sums[cuda-1]")[0] == "Failed: rms error 1.001 > 1e-4"
    # Three of a kind are enough, but for one that another worker had begun.
    hangs = [found[f"test_hangs[cuda-{n}]"] for n in range(6)]
    assert hangs.count("failure") in (3, 4) and hangs.count("skipped") == 6 - hangs.count("failure")
    first, text = message(out, "test_hangs[cuda-0]")
    assert first == "it did not end within 0:00:06"
    assert "in test_hangs" in text
    assert [found[f"test_loses[cuda-{n}]"] for n in range(4)] == ["passed", "failure", "passed", "passed"]
    assert "CUDA error: an illegal memory access" in message(out, "test_loses[cuda-1]")[0]
    assert message(out, "test_segfault")[0] == "its process ended: Fatal Python error: Segmentation fault"
    assert found["test_unit[0]"] == found["test_unit[1]"] == "passed"
    assert "test_not_of_a_gpu" not in found
    grid = [name for name in found if name.startswith("test_the_grid")]
    assert 0 < len(grid) <= 42  # of two workers one may have begun the last


def test_a_file_that_cannot_be_imported_is_named(finished):
    _, out = finished
    (case,) = [
        case for case in ElementTree.parse(out / "junit.xml").iter("testcase") if "importable" in case.get("name")
    ]  # fmt: skip
    assert "no_such_module" in case[0].text


def test_the_order(finished):
    """Native unit tests, one case of each test and backend, then the grid, in the order of their ends."""
    _, out = finished
    names = [case.get("name") for case in ElementTree.parse(out / "junit.xml").iter("testcase")]
    names = [name for name in names if name.startswith("test_")]
    assert max(map(names.index, ("test_unit[0]", "test_unit[1]"))) < 4
    # Two workers, each with a test in hand and one in store.
    grid = names.index("test_the_grid_that_does_not_end[40]")
    assert all(
        names.index(f"test_{test}-0]") < grid for test in ("sums[cuda", "sums[triton", "loses[cuda", "loses[triton")
    )
    assert names.index("test_sums[triton-1]") < grid


def test_failures_by_cause(finished):
    _, out = finished
    log = (out / "log.txt").read_text()
    text = log[log.index("== failures by cause") :]
    assert "native unit tests: 2 passed, from minute" in text
    assert "the grid: " in text and "one case of each: " in text
    assert "× it did not end within #:#:#" in text
    assert "1 × Failed: rms error # > #" in text
    assert "1 × AssertionError: rms error # > #" in text
    assert "1 × its process ended: Fatal Python error: Segmentation fault" in text


def test_the_benchmarks(finished):
    """What the bars ask comes first. The provider that raised and the one that took the process with it have a row
    each; the fresh process went on without the second, to the end."""
    _, out = finished
    _, *lines = map(json.loads, (out / "lora_linear_Stub_GPU.jsonl").read_text().splitlines())
    reference = "M=12 24→16 R=4 f32 p=0"
    assert [(line["case"], line["part"]) for line in lines[:6]] == [
        (reference, None), (reference, "bars"), (f"{reference}.1", "bars"), ("M=5 24→16 R=4 f32 p=0", "grid"),
        (reference, "others"), (f"{reference}.1", "others"),
    ]  # fmt: skip
    assert {line["part"] for line in lines[6:]} <= {"compiled"}
    lost, first = lines[0]["rows"], lines[1]["rows"]
    assert [(row["provider"], row["failed"]) for row in lost] == [
        ("ours, loses the GPU", "it took the process with it: CUDA error: an illegal memory access was encountered")
    ]
    assert {row["provider"]: row["failed"] for row in first if row.get("failed")} == {
        "ours, raises": "OutOfMemoryError: CUDA out of memory"
    }
    assert [row["provider"] for row in first if row.get("skipped")] == ["ours, loses the GPU"]
    assert {row["provider"] for row in first if row.get("mode") == "both"} == {
        "bare linear", "eager", "PEFT", "ours, reference",
    }  # fmt: skip


@pytest.mark.parametrize("mishap", ["hangs", "loses"])
def test_without_xdist_the_first_lost_process_ends_the_suite(tmp_path, mishap):
    """Its report is whole, and the log has where it stood."""
    (tmp_path / "test_small.py").write_text(
        "import time, pytest\nfrom tests import stub_gpu\npytestmark = pytest.mark.gpu\n"
        "def test_passes(): pass\ndef test_hangs(): time.sleep(600)\ndef test_loses(): stub_gpu.lose()\n"
        "def test_after(): pass\n"
    )
    chosen = f"passes or {mishap} or after"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.gpu_suite", "-p", "tests.stub_gpu", "-p", "no:faulthandler",
         "-p", "no:xdist", "-c", "pyproject.toml", "--report", str(tmp_path / "out"), "--limit", "6", "-k", chosen,
         str(tmp_path / "test_small.py")],
        cwd=ROOT, capture_output=True, text=True, env={k: v for k, v in os.environ.items() if "PYTEST" not in k},
    )  # fmt: skip
    assert done.returncode != 0
    found = cases(tmp_path / "out")
    assert found == {"test_passes": "passed"} | ({"test_loses": "failure"} if mishap == "loses" else {})
    if mishap == "hangs":
        assert "Timeout (0:00:06)!" in done.stderr and "in test_hangs" in done.stderr
    else:
        assert "the GPU is lost to this process: CUDA error" in (tmp_path / "out" / "failures.txt").read_text()
