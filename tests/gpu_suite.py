"""The pytest plugin of `make gpu` (`pytest -p tests.gpu_suite --report FOLDER`): a suite whose minutes come back as
evidence, whatever a kernel does to the process that launches it.

- Order: the native library's unit tests; then one case of each test and backend; then the grid, of all tests by turns.
- Each test has a time limit (`--limit`; `@pytest.mark.time_limit(seconds)` for one that compiles long). The limit is
  kept by faulthandler's own thread, which needs no GIL: it writes where the test stands, and ends the process.
- After each GPU test the device is waited for, so that an error belongs to the test that made it. An error that stays
  ends the process once the test is reported. pytest-xdist starts a fresh worker for what is left.
- A test and backend that took `FATAL` processes with it is skipped from then on: a minute for each case of a kernel
  that never ends would leave no time for the others.
- `junit.xml` and `failures.txt`, the failures by cause, are up to date after every test; `scripts/gpu.sh` puts the
  second into the log.

The plugin is in the controller, which writes the files, and in each worker, which runs tests; without xdist it is both,
and the first process that is lost ends the suite.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import pytest

from peft_kernels.testing.device import device_fault

LIMIT = 60.0  # seconds of a test; its kernels are compiled in it
FATAL = 3
STAGES = ("native unit tests", "one case of each", "the grid")
LOST = "the GPU is lost to this process: "
WHOLE, SHORT = 20_000, 1_000  # characters of a failure in junit.xml: of the first ones of a cause, of the others
EXAMPLES = 3  # of a cause


def pytest_addoption(parser):
    group = parser.getgroup("gpu suite")
    group.addoption("--report", metavar="FOLDER", type=Path, help="where junit.xml and failures.txt are written")
    group.addoption("--limit", metavar="SECONDS", type=float, default=LIMIT, help="of each test")


def pytest_configure(config):
    worker = getattr(config, "workerinput", None)
    if worker is None:
        folder, name = Path(tempfile.mkdtemp(prefix="gpu_suite-")), "main"
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        config.pluginmanager.register(Controller(config, folder), "gpu suite: controller")
    else:
        folder, name = Path(worker["gpu_suite_folder"]), worker["workerid"]
    if worker is not None or not getattr(config.option, "numprocesses", None):
        config.pluginmanager.register(Worker(config, folder, name), "gpu suite: worker")


@pytest.hookimpl(trylast=True)  # behind what deselects
def pytest_collection_modifyitems(items):
    """Sorts them, and notes each one's stage where its reports carry it to the controller."""
    seen: Counter[tuple] = Counter()
    order = {}
    for number, item in enumerate(items):
        position = seen[_function(item)]
        stage = 0 if item.path.name.startswith("test_native") else 2 if seen[_kind(item)] else 1
        seen[_function(item)] += 1
        seen[_kind(item)] += 1
        order[item] = (stage, position if stage == 2 else 0, number)
        item.user_properties.append(("stage", STAGES[stage]))
    items.sort(key=order.__getitem__)


def _function(item) -> tuple:
    return item.nodeid.partition("[")[0], None


def _kind(item) -> tuple:
    """The test's function, and the backend that it is of."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return item.nodeid.partition("[")[0], str(parameters.get("backend", ""))


# --- In the process that runs tests --------------------------------------------------------------------------


class Worker:
    """Keeps the limits. Its file in `folder` says which test runs; what ends the process is written behind that."""

    def __init__(self, config, folder: Path, name: str) -> None:
        self.config, self.folder = config, folder
        self.file = open(folder / name, "w")  # noqa: SIM115 (for the process's whole life)
        # Without a controller that reads the file, traces go where the log is.
        self.traces = self.file if hasattr(config, "workerinput") else open(os.dup(2), "w")  # noqa: SIM115
        faulthandler.enable(self.traces)  # of a segmentation fault, too

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        self.file.seek(0)
        self.file.truncate()
        self.file.write(json.dumps({"kind": _kind(item), "stage": dict(item.user_properties)["stage"]}) + "\n")
        self.file.flush()
        marker = item.get_closest_marker("time_limit")
        limit = max([self.config.option.limit, *(marker.args if marker else ())])
        faulthandler.dump_traceback_later(limit, exit=True, file=self.traces)
        result = yield  # its reports are with the controller then
        fault = device_fault()
        faulthandler.cancel_dump_traceback_later()
        if fault:
            self.file.write(f"{LOST}{fault}\n")
            self.file.flush()
            if hasattr(self.config, "workerinput"):
                os._exit(1)
            item.session.shouldstop = f"{LOST}{fault}"
        return result

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item):
        lost = (self.folder / "lost").read_text().splitlines() if (self.folder / "lost").exists() else []
        if lost.count(json.dumps(_kind(item))) >= FATAL:
            pytest.skip(f"not run: {FATAL} cases of this test and backend took their process with them")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self):
        result = yield
        if fault := device_fault():
            pytest.fail(f"{LOST}{fault}", pytrace=False)
        return result


# --- In the process that reports -----------------------------------------------------------------------------


class Controller:
    """Writes the files."""

    def __init__(self, config, folder: Path) -> None:
        self.folder, self.began = folder, time.monotonic()
        report = config.option.report
        if report is None:
            raise pytest.UsageError("expected --report FOLDER for tests.gpu_suite, got none")
        report.mkdir(parents=True, exist_ok=True)
        self.junit, self.failures = JUnit(report / "junit.xml"), report / "failures.txt"
        self.seconds: Counter[str] = Counter()  # of tests that run
        self.faults: dict[str, list[str]] = {}  # of tests that run: what they raised, a phase each
        self.causes: dict[str, list[tuple[str, str]]] = {}  # cause → the tests, each with its text
        self.outcomes: dict[str, Counter[str]] = {}  # stage → how many
        self.spans: dict[str, list[float]] = {}  # stage → seconds at which its first and its last test ended
        self.stage_of: dict[str, str] = {}
        self.ended: dict[str, str] = {}  # test → its outcome
        self._summarise()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        node.workerinput["gpu_suite_folder"] = str(self.folder)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(self, config, log):
        from xdist.scheduler import LoadScheduling

        class InOrder(LoadScheduling):
            """What a worker had in store when it ended comes next, not behind all others."""

            def remove_node(self, node):
                crashed = super().remove_node(node)
                self.pending.sort()
                return crashed

        return InOrder(config, log)

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem, report):
        """A worker has ended within a test: of its file's words the report is made."""
        path = self.folder / report.node.gateway.id
        first, _, text = path.read_text(errors="replace").partition("\n")
        facts = json.loads(first)
        with open(self.folder / "lost", "a") as lost:
            lost.write(json.dumps(facts["kind"]) + "\n")
        self.stage_of[crashitem] = facts["stage"]
        if text.startswith(LOST):
            report.longrepr = text.strip()
            if self.ended.get(crashitem) == "failed":  # it has said so itself
                report.outcome, report.when, report.longrepr = "passed", "teardown", None
        elif text.startswith("Timeout"):
            report.longrepr = f"it did not end within {text.partition('(')[2].partition(')')[0]}\n{text}"
        else:
            what = re.search(r"Fatal Python error: .*", text)
            report.longrepr = f"its process ended: {what[0] if what else 'killed, or by an exit of its own'}\n{text}"

    def pytest_collectreport(self, report):
        if report.failed:
            self.faults[report.nodeid] = [_text(report)]
            self._end(report.nodeid, "failed")

    def pytest_runtest_logreport(self, report):
        test = report.nodeid
        self.stage_of.setdefault(test, dict(report.user_properties).get("stage", ""))
        self.seconds[test] += report.duration if hasattr(report, "duration") else 0.0
        if report.failed:
            self.faults.setdefault(test, []).append(_text(report))
        skipped = report.skipped and report.when != "teardown"
        if skipped:
            self.faults.setdefault(test, [])
            self._end(test, "skipped", str(report.longrepr[2] if isinstance(report.longrepr, tuple) else ""))
        elif report.when == "???" or (report.when == "teardown" and test not in self.ended):
            self._end(test, "failed" if self.faults.get(test) else "passed")

    def _end(self, test: str, outcome: str, why: str = "") -> None:
        self.ended[test] = outcome
        stage, text = self.stage_of.pop(test, "") or "collection", "\n".join(self.faults.pop(test, []))
        self.outcomes.setdefault(stage, Counter())[outcome] += 1
        span = self.spans.setdefault(stage, [time.monotonic() - self.began] * 2)
        span[1] = time.monotonic() - self.began
        if outcome == "failed":
            found = self.causes.setdefault(_cause(text), [])
            room = WHOLE if len(found) < EXAMPLES else SHORT
            found.append((test, text.strip().splitlines()[0] if text.strip() else ""))
            why = text[-room:]
        self.junit.add(test, self.seconds.pop(test, 0.0), outcome, why)
        self._summarise()

    def _summarise(self) -> None:
        lines = [f"{stage}: {self._counts(stage)}" for stage in self.outcomes] or ["no test has ended yet"]
        for cause, found in sorted(self.causes.items(), key=lambda one: -len(one[1])):
            lines += ["", f"{len(found)} × {cause}"]
            lines += [f"    {test}\n        {text[:300]}" for test, text in found[:EXAMPLES]]
            lines += [f"    … and {len(found) - EXAMPLES} more" if len(found) > EXAMPLES else ""]
        self.failures.write_text("\n".join(lines) + "\n")

    def _counts(self, stage: str) -> str:
        counts = ", ".join(f"{count} {outcome}" for outcome, count in sorted(self.outcomes[stage].items()))
        first, last = (seconds / 60 for seconds in self.spans[stage])
        return f"{counts}, from minute {first:.1f} to {last:.1f} of the suite"


def _text(report) -> str:
    """What was raised in the first line, then where."""
    crash = getattr(report.longrepr, "reprcrash", None)
    return f"{crash.message}\n{report.longreprtext}" if crash else str(report.longrepr)


def _cause(text: str) -> str:
    """The first line without its numbers, so that the cases of one fault are together."""
    first = text.strip().partition("\n")[0]
    return re.sub(r"0x[0-9a-f]+|[-+]?\d[\d.]*(e[-+]?\d+)?", "#", first)[:200] or "no words"


class JUnit:
    """A file of JUnit's format that is whole after every test."""

    _END = b"</testsuite>\n</testsuites>\n"

    def __init__(self, path: Path) -> None:
        self.file = open(path, "wb", buffering=0)  # noqa: SIM115 (open until the end)
        self.file.write(b'<?xml version="1.0" encoding="utf-8"?>\n<testsuites>\n<testsuite name="gpu">\n' + self._END)

    def add(self, test: str, seconds: float, outcome: str, why: str) -> None:
        path, _, name = test.partition("::")
        head = f'<testcase classname={quoteattr(path)} name={quoteattr(name or path)} time="{seconds:.3f}"'
        why = re.sub(r"[^\t\n\x20-\ud7ff\ue000-\ufffd]", "?", why)  # XML has no other characters
        first = quoteattr(why.strip().partition("\n")[0][:500])
        body = {
            "passed": "/>", "skipped": f"><skipped message={first}/></testcase>",
            "failed": f"><failure message={first}>{escape(why)}</failure></testcase>",
        }[outcome]  # fmt: skip
        self.file.seek(-len(self._END), os.SEEK_END)
        self.file.write(f"{head}{body}\n".encode() + self._END)
