"""The file of one op's results: a line of facts, then a line a case, written as soon as the case is measured.

    {"op": …, "machine": {…}, "ceilings": {…}}
    {"case": …, "part": …, "rows": [{"provider": …, "mode": …, "p50_us": …, …}, …]}

The providers of a part of a case are measured by turns, so its rows are there together or not at all. For a provider
that is measured with several parts (a reference of ratios) the first rows count. A run that was killed leaves whole
lines and at most a part of one, which is dropped; the next run goes on behind them. A provider that took its process
with it has a line without a part: the case is not done.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

Row = dict[str, object]
#: The part that is a whole case.
WHOLE = "all"


class ResultFile:
    """Rows on the disk.

    Args:
        path: the path of a JSON lines file, there or not.

    Attributes:
        machine: device, versions, commit.
        ceilings: FLOP/s a dtype, and bytes/s ("bytes").
        cases: rows by case, in the order measured. Each row has its "op" and "case".
        done: (case, part) for each part that is measured.
        lost: provider → what it did to the process that measured it, and where.

    Raises:
        ValueError: the file is another one; names the line.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.op = path, ""
        self.machine: dict[str, str] = {}
        self.ceilings: dict[str, float] = {}
        self._start()
        text = path.read_text() if path.exists() else ""
        *lines, self._torn = text.split("\n")
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if number == 1:
                    self.op, self.machine, self.ceilings = entry["op"], entry["machine"], entry["ceilings"]
                else:
                    self._take(entry["case"], entry["rows"], entry.get("part", WHOLE))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"expected a result file in {path}, got in line {number}: {line[:60]}") from error

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.cases.values() for row in rows]

    def _start(self) -> None:
        self._entries: list[dict] = []
        self.cases: dict[str, list[Row]] = {}
        self.done: set[tuple[str, str]] = set()
        self.lost: dict[str, str] = {}

    def _take(self, case: str, rows: list[Row], part: str | None) -> None:
        self._entries.append({"case": case, "part": part, "rows": rows})
        found = self.cases.setdefault(case, [])
        known = {row["provider"] for row in found}
        found += [{"op": self.op, "case": case} | row for row in rows if row["provider"] not in known]
        if part is None:
            self.lost |= {row["provider"]: f"{row['failed']} (at {case})" for row in rows}
        else:
            self.done.add((case, part))

    def begin(self, op: str, machine: dict[str, str], ceilings: dict[str, float]) -> Path | None:
        """Start the file, or go on with it if it is of the same op, machine, versions and commit. Another one is moved
        aside; returns where to."""
        aside = None
        if (self.op, self.machine) == (op, machine):
            if self._torn:
                self._write([self._head(), *self._entries], "w")
                self._torn = ""
            return None
        if self.path.exists():
            aside = self.path.with_suffix(f".{self.machine.get('commit', 'before')}.jsonl")
            self.path.replace(aside)
        self.op, self.machine, self.ceilings, self._torn = op, machine, ceilings, ""
        self._start()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write([self._head()], "w")
        return aside

    def add(self, case: str, rows: list[Row], part: str | None = WHOLE) -> None:
        """Add the rows of a measured part or, without a part, those of a provider that took its process with it."""
        self._take(case, rows, part)
        self._write(self._entries[-1:], "a")

    def _head(self) -> dict:
        return {"op": self.op, "machine": self.machine, "ceilings": self.ceilings}

    def _write(self, entries: list[dict], mode: str) -> None:
        with open(self.path, mode) as file:
            file.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
            file.flush()
            os.fsync(file.fileno())
