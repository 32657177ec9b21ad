"""`python -m benchmarks compare`: what got faster or slower between two result files, or two revisions of the code.

Revisions are measured now, each in a work tree of its own, by today's benchmark: A, B, B, A, so that a slow phase of
the machine meets both. Each row is compared by its time over the reference of its own rounds (the bare linear), which
takes the machine's mood out. The spread is what 20 to 80 % of the rounds lie in, of both together; a change counts if
it is larger.
"""

from __future__ import annotations

import argparse
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from .resultfile import ResultFile, Row
from .specs import SPECS
from .tables import short

ROOT = Path(__file__).parent.parent
REFERENCES = ("of_bare", "of_linear", "of_authors")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", help="a result file, or a revision of git")
    parser.add_argument("after", help="of the same sort")
    parser.add_argument("--op", choices=[*SPECS], default="lora_linear", help="of revisions: what is measured")
    parser.add_argument("--case", action="append", default=[], help="of revisions: only those with this in their name")
    parser.add_argument("--minutes", type=float, default=4.0, help="of revisions: time budget, of both")
    parser.add_argument("--provider", default="ours", help="only those with this in their name")


def main(options: argparse.Namespace) -> None:
    both = options.before, options.after
    if all(Path(one).is_file() for one in both):
        before, after = (ResultFile(Path(one)).rows for one in both)
    elif any(Path(one).is_file() for one in both):
        sys.exit(f"expected two result files or two revisions, got {both[0]} and {both[1]}")
    else:
        before, after = measured(both, options)
    changes = list(compared(before, after, options.provider))
    if not changes:
        sys.exit(f"expected rows of {options.provider!r} for the same cases in both, got none")
    console = Console(width=100)
    console.print(table(changes, *both))
    verdicts = [change["verdict"] for change in changes]
    counts = {verdict: verdicts.count(verdict) for verdict in ("faster", "slower", "")}
    console.print(f"{counts['faster']} faster, {counts['slower']} slower, {counts['']} within the spread")


def compared(before: list[Row], after: list[Row], provider: str) -> Iterator[Row]:
    """Yield for each row that both have the ratio of its times, its spread, and the verdict."""
    keys = ("op", "case", "provider", "mode")
    earlier = {tuple(row[key] for key in keys): row for row in before if "mode" in row}
    for row in after:
        if "mode" not in row or provider.lower() not in row["provider"].lower():
            continue
        other = earlier.get(tuple(row[key] for key in keys))
        if other is None:
            continue
        reference = next((key for key in REFERENCES if row.get(key) and other.get(key)), None)
        if reference == "of_authors":  # a speed
            ratio = other[reference] / row[reference]
        else:
            ratio = row[reference] / other[reference] if reference else row["p50_us"] / other["p50_us"]
        spread = math.hypot(*((one["p80_us"] - one["p20_us"]) / one["p50_us"] for one in (row, other)))
        verdict = "" if abs(ratio - 1) <= spread else "faster" if ratio < 1 else "slower"
        yield {key: row[key] for key in keys} | {
            "before_us": other["p50_us"], "after_us": row["p50_us"], "ratio": ratio, "spread": spread,
            "verdict": verdict,
        }  # fmt: skip


def table(changes: list[Row], before: str, after: str) -> Table:
    result = Table(title=f"{before} → {after}", title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for heading in ("case", "provider", "", "before", "after", "ratio", "spread", ""):
        result.add_column(heading, justify="right" if heading in ("before", "after", "ratio", "spread") else "left")
    colours = {"faster": "green", "slower": "red"}
    for change in sorted(changes, key=lambda change: change["ratio"]):
        verdict = change["verdict"]
        result.add_row(
            change["case"], change["provider"], change["mode"], short("_us", change["before_us"]),
            short("_us", change["after_us"]), f"{change['ratio']:.3f}", f"{change['spread']:.0%}",
            f"[{colours[verdict]}]{verdict}[/]" if verdict else "",
        )  # fmt: skip
    return result


def measured(revisions: tuple[str, str], options: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Measure both revisions twice, each run a quarter of the time, and return each row's faster result."""
    found: list[dict[tuple, Row]] = [{}, {}]
    with tempfile.TemporaryDirectory() as folder:
        trees: list[Path] = []
        try:
            for number, revision in enumerate(revisions):
                trees.append(checked_out(revision, Path(folder) / f"{number}"))
            for turn, which in enumerate((0, 1, 1, 0)):
                out = Path(folder) / f"results{turn}"
                command = [sys.executable, "-m", "benchmarks", "run", "--op", options.op, "--out", str(out)]
                command += ["--minutes", str(options.minutes / 4), "--provider", options.provider]
                command += [word for case in options.case for word in ("--case", case)]
                print(f"run {turn + 1} of 4: {revisions[which]}", flush=True)
                subprocess.run(command, cwd=trees[which], check=True, stdout=subprocess.DEVNULL)
                for path in out.glob("*.jsonl"):
                    for row in ResultFile(path).rows:
                        key = row["case"], row["provider"], row.get("mode")
                        known = found[which].get(key)
                        if known is None or row.get("p50_us", 0) < known.get("p50_us", 0):
                            found[which][key] = row
        finally:
            for tree in trees:
                subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, check=True)
    return list(found[0].values()), list(found[1].values())


def checked_out(revision: str, tree: Path) -> Path:
    """Make a work tree of a revision, with today's benchmark in it and the native library that is built here."""
    done = subprocess.run(
        ["git", "worktree", "add", "--detach", str(tree), revision], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"expected a result file or a revision of git, got {revision!r}: {done.stderr.strip()}")
    shutil.rmtree(tree / "benchmarks", ignore_errors=True)
    shutil.copytree(ROOT / "benchmarks", tree / "benchmarks", ignore=shutil.ignore_patterns("output", "__pycache__"))
    library = Path("peft_kernels") / "_lib"
    if (ROOT / library).exists():
        shutil.copytree(ROOT / library, tree / library, dirs_exist_ok=True)
    return tree
