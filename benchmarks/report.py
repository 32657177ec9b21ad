"""`python -m benchmarks report`: writes docs/benchmarks/ and blocks of other pages from the committed result files.

A page has the machine, the picture, the summary, and a table a case. In the README and in the pages of docs/, what
stands between

    <!-- lora_linear_cpu.jsonl: layers -->
    <!-- end -->

is written by the function of that name in `HEADLINES`, from that file; `<!-- *_cpu.jsonl: gains -->` by that in
`OVERVIEWS`, from all these files; `<!-- demo_cpu.md -->` is that file itself, a table that an example wrote. No
measured number is typed by hand.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from itertools import starmap
from pathlib import Path

from . import ist_providers, model, tables
from .measure import where
from .providers import BARE, PEFT
from .registry import BOTH, FORWARD, STEP
from .resultfile import ResultFile, Row
from .sparse_providers import ACCELERATED, DENSE, SCATTER, SHIRA, of_ours
from .specs import SPECS
from .tables import digits, grid, short

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BLOCK = re.compile(r"( *<!-- (?P<file>\S+\.(jsonl|md))(: (?P<name>\w+))? -->\n).*?( *<!-- end -->)", re.DOTALL)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs" / "benchmarks", help="folder of the pages")
    parser.add_argument("--fill", type=Path, nargs="*", help="pages with blocks: this project's, of its own results")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if something would change")


def main(options: argparse.Namespace) -> None:
    files = {path.name: ResultFile(path) for path in sorted(options.results.glob("*.jsonl"))}
    if not files:
        sys.exit(f"expected result files (*.jsonl) in {options.results}, got none")
    wanted = {options.docs / f"{file.path.stem}.md": page(file, options.docs) for file in files.values() if file.rows}
    own = with_blocks() if options.results == RESULTS else []
    for path in own if options.fill is None else options.fill:
        wanted[path] = filled(path.read_text(), files, options.results)
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text() != text]
    if options.check:
        if stale:
            sys.exit(f"expected what the results say, got another text in {', '.join(map(str, stale))}")
        return
    for path in stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path])
    print("\n".join(f"written: {path}" for path in stale) or "nothing has changed")


# --- Pages ---------------------------------------------------------------------------------------------------


def page(file: ResultFile, docs: Path) -> str:
    """Write the Markdown page of one result file. Pictures lie beside the file."""
    spec = SPECS[file.op]
    picture = file.path.with_suffix(".png")
    parts = [
        "<!-- Written by `python -m benchmarks report`. -->",
        f"# {file.op}, {where(file.machine)}",
        f"{spec.what[0].upper()}{spec.what[1:]}. [How to read this](README.md).",
        ", ".join(f"{name} {value}" for name, value in file.machine.items()) + ".",
    ]
    if file.ceilings:
        parts.append("Ceilings, measured: " + ", ".join(map(ceiling, file.ceilings.items())) + ".")
    parts += [f"![{file.op}]({os.path.relpath(picture, docs)})"] if picture.exists() else []
    parts += ["## Summary", f"```\n{spec.summary(file.rows)}\n```", "## Case by case"]
    absent = {row["provider"]: row["skipped"] for row in file.rows if row.get("skipped")}
    if absent:
        parts.append("Not measured here: " + "; ".join(f"{name} ({why})" for name, why in absent.items()) + ".")
    for case, rows in file.cases.items():
        shown = [row | {"predicted_us": predicted(row, model.ceilings_of_file(file))} for row in rows]
        columns = dict(spec.columns)
        if any(row["predicted_us"] for row in shown):
            columns["predicted"] = "predicted_us"
        parts += [f"### {case}", tables.markdown(shown, columns)]
    return "\n\n".join(parts) + "\n"


def ceiling(item: tuple[str, float]) -> str:
    name, peak = item
    if name == "bytes":
        return f"{digits(peak / 1e9)} GB/s copy"
    return f"{peak / 1e12:.2f} TFLOP/s {name.removeprefix('torch.')}"


def predicted(row: Row, ceilings: dict[str, float]) -> float | None:
    return model.predicted(row["op"], row, row["provider"], row["mode"], ceilings) if "mode" in row else None


# --- Blocks of the README and of docs/ -----------------------------------------------------------------------


def with_blocks() -> list[Path]:
    """Return the pages of this project that have blocks to be filled."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path for path in pages if BLOCK.search(path.read_text())]


def filled(text: str, files: dict[str, ResultFile], folder: Path) -> str:
    """Return the text with its blocks filled from the results.

    Raises:
        ValueError: a block names a file or a table that is not there.
    """

    def block(match: re.Match) -> str:
        file, name = match["file"], match["name"]
        if file.endswith(".md") and (folder / file).exists():
            content = (folder / file).read_text().strip()
        elif file in files and name in HEADLINES:
            content = HEADLINES[name](Rows(files[file]))
        elif name in OVERVIEWS:
            content = OVERVIEWS[name]({one.op: Rows(one) for known, one in files.items() if fnmatch(known, file)})
        else:
            names = ", ".join(HEADLINES | OVERVIEWS)
            raise ValueError(f"expected a file in {folder} and one of {names}, got {file}: {name}")
        indent = " " * (len(match[1]) - len(match[1].lstrip()))
        return match[1] + "".join(f"{indent}{line}".rstrip() + "\n" for line in content.split("\n")) + match[6]

    return BLOCK.sub(block, text)


class Rows:
    """Finds rows by case, provider and mode."""

    def __init__(self, file: ResultFile) -> None:
        self.file, self.cases = file, file.cases
        self._rows = {(row["case"], row["provider"], row["mode"]): row for row in file.rows if "mode" in row}

    @property
    def providers(self) -> list[str]:
        """The names of the providers, each once, in the order of the file."""
        return list(dict.fromkeys(provider for _, provider, _ in self._rows))

    def __call__(self, case: str, provider: str, mode: str) -> Row | None:
        return self._rows.get((case, provider, mode))

    def time(self, case: str, provider: str, mode: str) -> str:
        row = self(case, provider, mode)
        return short("p50_us", row["p50_us"]) if row else "–"

    def pairs(self, provider: str, other: str, mode: str) -> list[tuple[Row, Row]]:
        """Return the rows of both for each case that both have."""
        found = [(self(case, provider, mode), self(case, other, mode)) for case in self.cases]
        return [(row, beside) for row, beside in found if row and beside]

    def span(self, key: str, provider: str, mode: str, part: str = "") -> str:
        """Write the least and the most of a ratio over the cases with `part` in their name."""
        return span(
            row[key] for (case, name, of), row in self._rows.items()
            if (name, of) == (provider, mode) and part in case and row.get(key)
        )  # fmt: skip


def span(values: Iterable[float], to: str = " to ") -> str:
    """Write the least and the most of the values."""
    values = list(values)
    return to.join(dict.fromkeys((digits(min(values)), digits(max(values)))))


def layers(rows: Rows) -> str:
    """Compare, at shapes of the demo's model and one larger, ours beside PEFT's layer, forward + backward."""
    ours = next(name for name in rows.providers if name.startswith("ours"))
    body = []
    for case in rows.cases:
        mine, peft = rows(case, ours, BOTH), rows(case, PEFT, BOTH)
        if mine and peft and mine["M"] in (512, 8192):
            row = [mine["K"], mine["N"], mine["dtype"], digits(mine["p"]) if mine["p"] else "0"]
            row += [rows.time(case, name, BOTH) for name in (BARE, "torch.compile", PEFT, ours)]
            body.append([*map(str, row), short("", mine.get("of_peft"))])
    table = grid(
        ["K", "N", "dtype", "dropout", "bare linear", "torch.compile", "PEFT's layer", "ours", "ours / PEFT"], body
    )
    count = sum(1 for case in rows.cases if rows(case, ours, BOTH))
    return f"{table}\n\nOver all {count} shapes: {rows.span('of_peft', ours, BOTH)} × PEFT's time."


HEADLINE_PATTERNS = ("entries 1 %", "entries 10 %", "columns 1 %", "rows 1 %", "blocks 1 %")


def steps(rows: Rows) -> str:
    """Write the times of a step that trains a part of one weight."""
    ours = of_ours(rows.providers)
    body = []
    for case in rows.cases:
        mine = rows(case, ours, STEP)
        if mine is None or mine["pattern"] not in HEADLINE_PATTERNS or mine["K"] > mine["N"]:
            continue  # a layer that narrows is like the one that widens as much
        times = [rows.time(case, name, STEP) for name in (BARE, DENSE, SCATTER, ours)]
        body.append([case, *times, *(short("", mine.get(key)) for key in ("of_dense", "memory_of_dense"))])
    return grid(["", "bare forward + dx", DENSE, SCATTER, "ours", "ours / dense: time", "memory"], sorted(body))


def shira(rows: Rows) -> str:
    spans = [
        f"{rows.span('of_shira', ACCELERATED, STEP, part)} × its time at {part.partition('M=512 ')[2] or part}"
        for part in dict.fromkeys(row["shape"] for row in rows.file.rows if row["provider"] == ACCELERATED)
    ]
    return f"{SHIRA} as `accelerate` leaves it takes, step by step: " + ", ".join(spans) + "."


def trainings(rows: Rows) -> str:
    """Write the speeds of whole training steps: tokens/s, and × the authors' algorithm."""
    body = [
        [name, *(f"{row['tokens_per_s']:.0f} ({short('', row['of_authors'])})" for case in rows.cases
                 if (row := rows(case, name, STEP)))]
        for name in rows.providers
    ]  # fmt: skip
    counts = {row["rounds"] for row in rows.file.rows if "mode" in row}
    model_name = next(row["model"] for row in rows.file.rows)
    return grid(["", *rows.cases], body) + f"\n\n{model_name}; {min(counts)} rounds and more."


def hosts(rows: Rows) -> str:
    body = [
        [case, row["provider"], *(rows.time(case, row["provider"], mode) for mode in (FORWARD, BOTH))]
        for case, found in rows.cases.items() for row in found if row["mode"] == FORWARD
    ]  # fmt: skip
    return grid(["", "", "forward", "forward + backward"], body)


def gains(of: dict[str, Rows]) -> str:
    """Write the README's table: time and memory over what people use otherwise, the least and the most of all cases."""
    lora, training, sparse = of["lora_linear"], of["ist_step"], of["sparse_delta"]
    pairs = lora.pairs(f"{PEFT}, accelerated", PEFT, BOTH)
    dropout, plain = ([pair for pair in pairs if bool(pair[0]["p"]) == dropped] for dropped in (True, False))
    accelerated = training.pairs(ist_providers.ACCELERATED, ist_providers.LORA, STEP)
    budget = training.pairs(ist_providers.BUDGET, ist_providers.AUTHORS, STEP)
    entries = sparse.pairs(of_ours(sparse.providers), DENSE, STEP)
    lines = [
        ("LoRA layer, accelerated, dropout", "PEFT's layer", dropout, of_peft, saved),
        ("LoRA layer, accelerated, no dropout", "PEFT's layer", plain, of_peft, saved),
        ("LoRA training, accelerated", "PEFT", accelerated, by_tokens, saved),
        ("IST, backward budget", "the authors' IST on PEFT", budget, by_tokens, saved),
        (
            "1 % of a weight trained", "dense training, masked",
            [pair for pair in entries if pair[0]["pattern"].endswith(" 1 %")],
            lambda row, _: row["of_dense"], lambda row, _: row["memory_of_dense"],
        ),
    ]  # fmt: skip
    body = [
        [what, beside, *(span(starmap(ratio, found), "–") for ratio in ratios)]
        for what, beside, found, *ratios in lines
    ]
    return grid(["", "beside", "× time", "× memory"], body)


def of_peft(row: Row, _: Row) -> float:
    return row["of_peft"]


def by_tokens(row: Row, other: Row) -> float:
    return other["tokens_per_s"] / row["tokens_per_s"]


def saved(row: Row, other: Row) -> float:
    return row["saved_bytes"] / other["saved_bytes"]


HEADLINES: dict[str, Callable[[Rows], str]] = {
    function.__name__: function for function in (layers, steps, shira, trainings, hosts)
}
OVERVIEWS: dict[str, Callable[[dict[str, Rows]], str]] = {gains.__name__: gains}
