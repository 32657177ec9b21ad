"""A griffe extension for the API reference. `a, b: what they are`, under Args and Attributes, documents a and b each;
docstrings of modules are left out, since the pages have an introduction of their own."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTION = re.compile(r"^( *)(?:Args|Attributes):\n((?:\1 +.*\n?|\n)+)", re.MULTILINE)
ENTRY = re.compile(r"^( +)(\w+(?:, \w+)+): (.*\n?(?:\1 +.*\n?)*)", re.MULTILINE)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.is_module:
            obj.docstring = None
        elif obj.docstring:
            obj.docstring.value = one_name_a_line(obj.docstring.value)


def one_name_a_line(docstring: str) -> str:
    def entry(match: re.Match) -> str:
        text = match[3] if match[3].endswith("\n") else f"{match[3]}\n"
        return "".join(f"{match[1]}{name}: {text}" for name in match[2].split(", "))

    return SECTION.sub(lambda section: ENTRY.sub(entry, section[0]), docstring)
