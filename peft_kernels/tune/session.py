"""A run: jobs that are left, measurements appended line by line, the tables at the end; and the command."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from ..ops.core import tuning
from ..ops.core.tuning import Gpu
from .jobs import PACKAGES, Job, best, jobs

Results = list[float | str]


class DeviceLost(RuntimeError):
    """The GPU answers nothing more to this process.

    Args:
        why: its last answer.
        results: of the job in which it was lost, so that no later run tries it again.
    """

    def __init__(self, why: str, results: Results) -> None:
        super().__init__(why)
        self.results = results


#: `measure(job, table)`, as `measure.Measure` has it.
Measurement = Callable[[Job, dict[tuple, Any]], Results]


def run(
    planned: list[Job],
    folder: Path,
    gpu: Gpu,
    measure: Measurement,
    out_of_time: Callable[[], bool] = lambda: False,
    progress: Callable[[list[Job]], Iterable[Job]] = iter,
) -> dict[Job, Results]:
    """Measure what is not measured yet, and write each op package's table, also where it ends early (out of time, or by
    an exception, which is passed on).

    Args:
        folder: of tables and measurements; the user's cache.
        out_of_time: asked before each job.
        progress: wraps the jobs that are left.

    Returns:
        All results there are now, of this run and of earlier ones.
    """
    rows: dict[Job, Results] = {}
    with contextlib.ExitStack() as stack:
        files = {}
        for op in dict.fromkeys(job.op for job in planned):
            known = measured(folder, gpu, op, planned)
            rows |= known
            path = rows_path(folder, gpu, op)
            lines = [json.dumps(tuning.header(op, gpu)), *(_line(job, results) for job, results in known.items())]
            tuning.replace(path, "".join(f"{line}\n" for line in lines))  # without a line that was cut off
            files[op] = stack.enter_context(open(path, "a"))
            stack.callback(_write_table, folder, gpu, op, planned, rows)
        compared: set[str] = set()
        for job in progress([job for job in planned if job not in rows]):
            if out_of_time():
                break
            if job.at and job.op not in compared:  # whole layers are, by the tiles of the tables in force
                compared.add(job.op)
                _write_table(folder, gpu, job.op, planned, rows)
                PACKAGES[job.op].tuned.cache_clear()
            # Tiles are measured by themselves; two paths are compared with the tiles that were found.
            table = best((other for other in planned if other.op == job.op), rows) if job.at else {}
            try:
                rows[job] = measure(job, table)
            except DeviceLost as lost:
                rows[job] = lost.results
                raise
            finally:
                if job in rows:
                    files[job.op].write(f"{_line(job, rows[job])}\n")
                    files[job.op].flush()
    return rows


def measured(folder: Path, gpu: Gpu, op: str, planned: list[Job]) -> dict[Job, Results]:
    """The results of earlier runs on this GPU, with this Triton and the candidates of today; a last line that a killed
    run left half written is passed over."""
    path = rows_path(folder, gpu, op)
    wanted = {_identity(job): job for job in planned if job.op == op}
    found: dict[Job, Results] = {}
    if not path.exists():
        return found
    first, *lines = path.read_text(errors="replace").splitlines() or [""]
    if first != json.dumps(tuning.header(op, gpu)):
        return found
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
            row = json.loads(line)
            job = wanted.get(json.dumps(row["job"]))
            if job is not None and len(row["results"]) == len(job.candidates):
                found[job] = row["results"]
    return found


def rows_path(folder: Path, gpu: Gpu, op: str) -> Path:
    return tuning.path_in(folder, op, gpu).with_suffix(".rows.jsonl")


def _identity(job: Job) -> str:
    return json.dumps(job._asdict())


def _line(job: Job, results: Results) -> str:
    return json.dumps({"job": job._asdict(), "results": results})


def _write_table(folder: Path, gpu: Gpu, op: str, planned: list[Job], rows: dict[Job, Results]) -> None:
    table = best((job for job in planned if job.op == op), rows)
    if table:
        tuning.write(tuning.path_in(folder, op, gpu), op, gpu, PACKAGES[op].CHOICES, table)


# --- The command ---------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", choices=PACKAGES, help="one op package; may be given several times")
    parser.add_argument("--minutes", type=float, help="start no further measurement after this many minutes")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be measured; needs no GPU")


def main(options: argparse.Namespace) -> str | None:
    """The command; the line that it fails with, or None."""
    ops = options.op or list(PACKAGES)
    folder, (gpu, missing) = tuning.cache_folder(), current_gpu()
    if options.dry_run:
        print(dry_run(ops, folder, gpu))
        return None
    if gpu is None:
        return f"tune: expected a CUDA GPU and Triton, got none: {missing}"
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return "tune: expected tqdm for the progress bar, which is not installed (pip install tqdm)"
    from .measure import Measure

    end = time.monotonic() + 60 * options.minutes if options.minutes is not None else float("inf")
    planned = jobs(ops, gpu.architecture)
    try:
        rows = run(
            planned, folder, gpu, Measure(), lambda: time.monotonic() >= end,
            lambda left: tqdm(left, desc=gpu.name, unit="shape", initial=len(planned) - len(left), total=len(planned)),
        )  # fmt: skip
    except KeyboardInterrupt:
        return "tune: stopped; what was measured is kept, and the next run goes on from there"
    except DeviceLost as lost:
        return (
            f"tune: the GPU is lost to this process: {lost}; what was measured is kept, and the next run goes on behind"
        )
    print(summary(planned, rows, folder, gpu))
    return None


def current_gpu() -> tuple[Gpu | None, str]:
    """The GPU that would be measured, or None and why."""
    if not torch.cuda.is_available():
        return None, f"torch {torch.__version__} sees no GPU"
    if importlib.util.find_spec("triton") is None:
        return None, "Triton is not installed"
    return tuning.gpu_of(torch.device("cuda", torch.cuda.current_device())), ""


def tables_used(gpu: Gpu) -> str:
    """Which table each op package uses on this GPU, or why none."""
    packages: dict[str, list[str]] = {}
    for op, configs in PACKAGES.items():
        packages.setdefault(tuning.explain(op, gpu, configs.CHOICES), []).append(op)
    return "; ".join(f"{', '.join(ops)}: {text}" for text, ops in packages.items())


def dry_run(ops: list[str], folder: Path, gpu: Gpu | None) -> str:
    """Say what would be measured: shapes and timings of each choice."""
    planned = jobs(ops, gpu.architecture if gpu else 90)
    rows = {job: r for op in ops for job, r in measured(folder, gpu, op, planned).items()} if gpu else {}
    left = [job for job in planned if job not in rows]
    lines = [f"{gpu.name}, into {folder}" if gpu else "torch sees no GPU; this is the plan for an sm_90"]
    names = list(dict.fromkeys((job.op, job.choice) for job in planned))
    for op, choice in names:
        chosen = [job for job in left if (job.op, job.choice) == (op, choice)]
        what = "sizes" if PACKAGES[op].CHOICES[choice].crossover else "shapes"
        timings = sum(len(job.candidates) for job in chosen)
        lines.append(f"  {f'{op}.{choice}':<32}{len(chosen):>5} {what:<8}{timings:>6} timings")
    total = sum(len(job.candidates) for job in left)
    lines.append(f"{len(left)} to measure, {total} timings; {len(rows)} are there already")
    return "\n".join(lines)


def summary(planned: list[Job], rows: dict[Job, Results], folder: Path, gpu: Gpu) -> str:
    """How much was measured, which candidates were wrong, how many were skipped, and where the tables are."""
    skipped, wrong = 0, Counter()
    for job, results in rows.items():
        for candidate, result in zip(job.candidates, results):
            if str(result).startswith("wrong"):
                wrong[f"{job.op}.{job.choice} {candidate}"] += 1
            elif isinstance(result, str):
                skipped += 1
    lines = [f"{len(rows)} of {len(planned)} are measured; {skipped} timings were skipped"]
    lines += [f"dropped as wrong {count} times: {what}" for what, count in wrong.items()]
    lines += [str(tuning.path_in(folder, op, gpu)) for op in dict.fromkeys(job.op for job in rows)]
    return "\n".join(lines)
