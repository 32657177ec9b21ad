"""Every kernel of every room with every configuration that the rules of its `configs.py` can pick, and with the
candidates that a measurement may prefer, as compilations."""

from __future__ import annotations

from tests.aot import lora_linear, masked_linear, sparse_delta
from tests.aot.case import Case

#: Each has `cases(architecture)` and `candidates(architecture)`; what they repeat is compiled once.
ROOMS = (lora_linear, masked_linear, sparse_delta)


def cases(architecture: int | str, everything: bool, candidates: bool = False) -> list[Case]:
    """All distinct compilations for an architecture, or the first of each kernel."""
    found: dict[tuple, Case] = {}
    for room in ROOMS:
        for case in (*room.cases(architecture), *(room.candidates(architecture) if candidates else ())):
            found.setdefault((case.kernel.__name__, str(case.arguments), case[3:]), case)
    if everything:
        return list(found.values())
    first: dict[str, Case] = {}
    for case in found.values():
        first.setdefault(case.kernel.__name__, case)
    return list(first.values())
