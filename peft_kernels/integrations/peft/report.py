"""What `accelerate` did, for people and for programs."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from dataclasses import dataclass

WIDTH = 100


@dataclass(frozen=True)
class Report:
    """The layers of PEFT's tuners in a model by what runs their forward.

    Attributes:
        fused: names of the layers that run fused.
        shared: the groups among them that share their input and run as one op.
        kept: name → why the layer keeps PEFT's own forward.
        kinds: the names of their tuners: "LoRA", or "LoRA and SHiRA".
    """

    fused: tuple[str, ...]
    shared: tuple[tuple[str, ...], ...]
    kept: dict[str, str]
    kinds: str = "LoRA"

    def __str__(self) -> str:
        total = len(self.fused) + len(self.kept)
        lines = [f"{len(self.fused)} of {total} {self.kinds} layers run fused"]
        together = {name for group in self.shared for name in group}
        for members, count in Counter(map(_pattern_of_group, self.shared)).items():
            lines += _row(count, members, "one op: they share their input")
        for pattern, count in Counter(_pattern(name) for name in self.fused if name not in together).items():
            lines += _row(count, pattern, "")
        if self.kept:
            lines.append(f"{len(self.kept)} keep PEFT's own forward")
        for (pattern, reason), count in Counter((_pattern(n), reason) for n, reason in self.kept.items()).items():
            lines += _row(count, pattern, reason)
        return "\n".join(lines)


def _pattern(name: str) -> str:
    """`model.layers.17.mlp` → `model.layers.*.mlp`: the layers of a stack take one line."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def _pattern_of_group(names: tuple[str, ...]) -> str:
    parent = names[0].rpartition(".")[0]
    return f"{_pattern(parent)}.{{{', '.join(name.rpartition('.')[2] for name in names)}}}".lstrip(".")


def _row(count: int, what: str, why: str) -> list[str]:
    line = f"{count:6d} × {what.removeprefix('base_model.model.')}"
    if len(line) + len(why) + 2 <= WIDTH:
        return [f"{line}  {why}".rstrip()]
    return [line, *textwrap.wrap(why, WIDTH, initial_indent=" " * 11, subsequent_indent=" " * 11)]
