"""Tables of one case's rows: for the terminal, 100 columns at most, and for Markdown."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from .registry import MODES
from .resultfile import Row

Columns = dict[str, str]  # heading → key of a row


def short(key: str, value: object) -> str:
    """Format a value as the end of its key says: three digits, and the unit where it has one."""
    if value is None:
        return "–"
    if not isinstance(value, (int, float)):
        return str(value)
    if key.endswith("_us"):
        for unit, size in (("s", 1e6), ("ms", 1e3)):
            if abs(value) >= size:
                return f"{digits(value / size)} {unit}"
        return f"{digits(value)} µs"
    if key.endswith("_bytes"):
        return f"{digits(value / 2**20)}"
    if key.endswith("_share"):
        return f"{value:.0%}"
    return digits(value)


def digits(value: float) -> str:
    """Format three digits, two of them decimals at most."""
    return f"{value:.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def lines(rows: list[Row], columns: Columns) -> tuple[list[str], list[list[str]]]:
    """Make headings, and a line for each provider of one case: the median of each mode, then of the longest mode its
    spread (between 20 and 80 % of the rounds) and the columns that are not empty."""
    timed: dict[str, dict[str, Row]] = {}
    for row in rows:
        if "mode" in row:
            timed.setdefault(row["provider"], {})[row["mode"]] = row
    columns = {heading: key for heading, key in columns.items() if any(row.get(key) is not None for row in rows)}
    modes = [mode for mode in MODES if any(mode in found for found in timed.values())]
    body = []
    for provider, found in timed.items():
        last = found[modes[-1]]
        times = [short("_us", found[mode]["p50_us"]) for mode in modes]
        spread = f"{(last['p80_us'] - last['p20_us']) / last['p50_us']:.0%}"
        body.append([provider, *times, spread, *(short(key, last.get(key)) for key in columns.values())])
    return ["", *modes, "spread", *columns], body


def fault(row: Row, wrong: str) -> str:
    """Say why a provider has no time although it is here; empty where it has."""
    if row.get("failed"):
        return f"failed: {row['failed']}"
    return f"{wrong}: {row['error']}" if row.get("error") else ""


def terminal(rows: list[Row], columns: Columns) -> Table | Text:
    """Make a table of one case. Who was wrong or failed stands at the foot with the reason; who cannot run does not."""
    title = f"{rows[0]['op']}: {rows[0]['case']}"
    wrong = [f"{row['provider']}: {what}" for row in rows if (what := fault(row, "wrong, not timed"))]
    faults = Text("\n".join(wrong), "bold red")
    head, body = lines(rows, columns)
    if not body:  # a table would be as narrow as its headings
        return Text.assemble(title, "\n", faults)
    result = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0), caption_justify="left")
    for number, heading in enumerate(head):
        result.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for cells in body:
        result.add_row(*cells)
    result.caption = faults if wrong else None
    return result


def markdown(rows: list[Row], columns: Columns) -> str:
    """Write the table of one case in Markdown."""
    head, body = lines(rows, columns)
    body += [[row["provider"], what] + [""] * (len(head) - 2) for row in rows if (what := fault(row, "wrong"))]
    return grid([heading.replace("\n", " ") for heading in head], body, "--:")


def grid(head: list[str], body: list[list[str]], rule: str = "---") -> str:
    """Write a table of Markdown; `rule` is that of all columns but the first."""
    ruled = ["---", *[rule] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ruled, *body))
