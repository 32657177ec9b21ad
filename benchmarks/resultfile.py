"""The file of one op's results: a line of facts, then a line a case, written as soon as the case is measured.

    {"op": …, "machine": {…}, "ceilings": {…}}
    {"case": …, "rows": [{"provider": …, "mode": …, "p50_us": …, …}, …]}

The providers of a case are measured by turns, so its rows are there together or not at all. A run that was killed
leaves whole lines and at most a part of one, which is dropped; the next run goes on behind them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

Row = dict[str, object]


class ResultFile:
    """Rows on the disk.

    Args:
        path: of a JSON lines file, there or not.

    Attributes:
        machine: device, versions, commit.
        ceilings: FLOP/s a dtype, and bytes/s ("bytes").
        cases: rows by case, in the order measured. Each row has its "op" and "case".

    Raises:
        ValueError: the file is another one; names the line.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.op = path, ""
        self.machine: dict[str, str] = {}
        self.ceilings: dict[str, float] = {}
        self.cases: dict[str, list[Row]] = {}
        text = path.read_text() if path.exists() else ""
        *lines, self._torn = text.split("\n")
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if number == 1:
                    self.op, self.machine, self.ceilings = entry["op"], entry["machine"], entry["ceilings"]
                else:
                    self.cases[entry["case"]] = [self._whole(entry["case"], row) for row in entry["rows"]]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"expected a result file in {path}, got in line {number}: {line[:60]}") from error

    @property
    def rows(self) -> list[Row]:
        return [row for rows in self.cases.values() for row in rows]

    def _whole(self, case: str, row: Row) -> Row:
        return {"op": self.op, "case": case} | row

    def begin(self, op: str, machine: dict[str, str], ceilings: dict[str, float]) -> Path | None:
        """Starts the file, or goes on with it if it is of the same op, machine, versions and commit. Another one is
        moved aside; returns where to."""
        aside = None
        if (self.op, self.machine) == (op, machine):
            if self._torn:
                self._write([self._head(), *map(self._line, self.cases)], "w")
                self._torn = ""
            return None
        if self.path.exists():
            aside = self.path.with_suffix(f".{self.machine.get('commit', 'before')}.jsonl")
            self.path.replace(aside)
        self.op, self.machine, self.ceilings, self.cases, self._torn = op, machine, ceilings, {}, ""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write([self._head()], "w")
        return aside

    def add(self, case: str, rows: list[Row]) -> None:
        self.cases[case] = [self._whole(case, row) for row in rows]
        self._write([self._line(case)], "a")

    def _head(self) -> dict:
        return {"op": self.op, "machine": self.machine, "ceilings": self.ceilings}

    def _line(self, case: str) -> dict:
        rows = [{key: value for key, value in row.items() if key not in ("op", "case")} for row in self.cases[case]]
        return {"case": case, "rows": rows}

    def _write(self, entries: list[dict], mode: str) -> None:
        with open(self.path, mode) as file:
            file.write("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
            file.flush()
            os.fsync(file.fileno())
