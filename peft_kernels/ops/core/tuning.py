"""Tables of what was measured on one GPU: how their keys are made, where they lie, how they are read and written.

A table belongs to one op package and one GPU. It says, for each of the op package's choices (`CHOICES` in its
`configs.py`), which tile was the fastest in a bucket of shapes, or from which size on one path is faster than another.
Two places are looked at: the user's cache (`cache_folder`), then the tables that come with the package (`tuned/` beside
this file). An entry of the first hides that of the second, and where neither has one the rules of `configs.py` decide.
`python -m peft_kernels tune` measures.

A choice is declared where its rule stands:

    CHOICES = tuning.Choices("my_op")

    @CHOICES.tile(M=TOKENS, N=FEATURES)  # what the table is asked by: these in buckets, all else but `arch` as it is
    def gemm_tile(M, N, element_size, arch): …  # the rule

    @gemm_tile.candidates
    def gemm_candidates(M, N, element_size, arch): …  # what may be measured, the rule's first

    fused_from = CHOICES.size("fused_from", Crossover(("blas", "fused"), …))  # the size from which on "fused" is taken

A file is `<GPU>/<op package>.json`:

    {"format": 1, "op": "masked_linear", "gpu": "NVIDIA H200", "architecture": 90, "triton": "3.9.0",
     "entries": [{"choice": "gemm_tile", "key": {"M": 8192, "N": 4096, …}, "best": {"block_m": 256, …}}, …]}

A table that does not fit, in whatever way, is ignored as a whole, with one warning that says why.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import json
import math
import os
import re
import types
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .machine import architecture

#: Raised where keys, tiles or kernels change their meaning: older tables are then ignored.
FORMAT = 1

#: (choice, *key) -> the tile, or the size from which on (up to which) another path is taken.
Table = Mapping[tuple, Any]
UNTUNED: Table = types.MappingProxyType({})


class Gpu(NamedTuple):
    """The GPU that a table holds for: its name, its architecture (90: compute capability 9.0; 0: AMD), and the version
    of the Triton that compiled."""

    name: str
    architecture: int
    triton: str


class Buckets(NamedTuple):
    """Powers of two from `least` to `most`, which sizes are rounded up to; what is larger counts as `most`. Within a
    bucket one tile serves all: the last wave of programs differs, not what limits the kernel."""

    least: int
    most: int

    def of(self, size: int) -> int:
        if size <= self.least:
            return self.least
        return self.most if size >= self.most else 1 << (size - 1).bit_length()

    def all(self) -> list[int]:
        """From the largest down."""
        return [1 << bits for bits in range(self.most.bit_length() - 1, self.least.bit_length() - 2, -1)]


class Choice(NamedTuple):
    """Something that can be measured.

    Attributes:
        fields: names of the values of a key.
        candidates: of a key's values and the architecture, all tiles that may be chosen, the rule's first; None where
            the answer is a size.
        crossover: what decides a size.
    """

    fields: tuple[str, ...]
    candidates: Callable[..., list] | None = None
    crossover: Crossover | None = None


class Crossover(NamedTuple):
    """Two paths, the sizes at which they are compared, and what follows from (product of sizes, second path faster).

    Attributes:
        paths: their names; the second is the one in question.
        only_on: an architecture.
        calls: how many are timed one right after another. With many the slower of GPU and CPU decides, as in training.
    """

    paths: tuple[str, str]
    sizes: list[tuple]
    of: Callable[[list[tuple[float, bool]]], float]
    only_on: int | None = None
    calls: int = 1


class Choices(dict[str, Choice]):
    """The choices of an op package that can be measured, by name.

    Attributes:
        op: the op package.
        tuned: of a device, the table of what was measured on it, read at the first launch; nothing on a CPU.
    """

    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op
        self.tuned = functools.cache(lambda device: load(op, gpu_of(device), self))

    def tile(self, **buckets: Buckets | tuple[str, Callable]) -> Callable[[Callable], Callable]:
        """Decorates the rule of a tile. The decorated function takes `table` too, which comes before the rule.

        Args:
            buckets: by parameter, the buckets of its value in a key, or the field's name in a key and what makes its
                value.
        """
        found = {name: (name, one.of) if isinstance(one, Buckets) else one for name, one in buckets.items()}

        def decorate(rule: Callable) -> Callable:
            choice = rule.__name__
            defaults = {one.name: one.default for one in inspect.signature(rule).parameters.values()}
            fields = {name: found.get(name, (name, lambda value: value)) for name in defaults if name != "arch"}

            @functools.wraps(rule)
            def tile(*args, table: Table = UNTUNED, **named):
                if table:
                    values = defaults | dict(zip(defaults, args)) | named
                    key = choice, *(bucket(values[name]) for name, (_, bucket) in fields.items())
                    if measured := table.get(key):
                        return measured
                return rule(*args, **named)

            def candidates(function: Callable[..., list]) -> Callable[..., list]:
                self[choice] = Choice(tuple(field for field, _ in fields.values()), function)
                return function

            tile.candidates = candidates
            return tile

        return decorate

    def size(
        self, choice: str, crossover: Crossover, rule: Mapping[int, float] = types.MappingProxyType({})
    ) -> Callable[..., float | None]:
        """Return a function of element size and table: the size from which on (up to which) another path is taken.

        Args:
            rule: by element size, where nothing was measured; without one the other path is not taken.
        """
        self[choice] = Choice(("element_size",), crossover=crossover)

        def size(element_size: int, table: Table = UNTUNED) -> float | None:
            return table.get((choice, element_size), rule.get(element_size))

        return size


def smallest_from(points: list[tuple[float, bool]]) -> float:
    """The smallest size from which on the path in question is always faster; infinity where it never is."""
    last_lost = max((size for size, faster in points if not faster), default=-1)
    return min((size for size, faster in points if faster and size > last_lost), default=math.inf)


def largest_up_to(points: list[tuple[float, bool]]) -> float:
    """The largest size up to which the path in question is always faster; 0 where it never is."""
    first_lost = min((size for size, faster in points if not faster), default=math.inf)
    return max((size for size, faster in points if faster and size < first_lost), default=0)


TOKENS = Buckets(64, 8192)
FEATURES = Buckets(512, 16384)
RANKS = Buckets(16, 64)


def with_rule_first(rule: Any, tiles: list) -> list:
    """Candidates, each once, the rule's among them: what is kept was measured against it."""
    return list(dict.fromkeys([rule, *tiles]))


def gpu_of(device: torch.device) -> Gpu | None:
    """The GPU and the Triton that a launch on `device` takes; None where one is missing, as tables are of both."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    import triton

    return Gpu(torch.cuda.get_device_name(device), architecture(device), triton.__version__)


def load(op: str, gpu: Gpu | None, choices: Mapping[str, Choice], *folders: Path) -> Table:
    """Read what is known of an op package's choices on this GPU. Warns of the tables that it ignores.

    Args:
        gpu: None has no tables.
        folders: other ones to look in, the first before the second.
    """
    table: dict[tuple, Any] = {}
    for folder in reversed(folders or _folders()) if gpu else ():
        path = path_in(folder, op, gpu)
        found, problem = _read(path, op, gpu, choices)
        if problem:
            warnings.warn(f"{path}: this tuning table is ignored: {problem}", RuntimeWarning, stacklevel=2)
        table |= found
    return table


def explain(op: str, gpu: Gpu, choices: Mapping[str, Choice]) -> str:
    """Which table of an op package is used on this GPU, or why none."""
    reasons = []
    for folder in _folders():
        path = path_in(folder, op, gpu)
        found, problem = _read(path, op, gpu, choices)
        if found:
            return f"{path} ({len(found)} entries)"
        if problem:
            reasons.append(f"{path} is ignored: {problem}")
    return "none: " + ("; ".join(reasons) or f"nothing was measured on {gpu.name}")


def cache_folder() -> Path:
    """PEFT_KERNELS_CACHE, else peft_kernels in XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("PEFT_KERNELS_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(own) if own else Path(caches) / "peft_kernels"


def _folders() -> tuple[Path, Path]:
    return cache_folder(), Path(__file__).parent / "tuned"


def path_in(folder: Path, op: str, gpu: Gpu) -> Path:
    """Where the table of an op package and a GPU lies below such a folder."""
    return folder / re.sub(r"[^A-Za-z0-9]+", "_", gpu.name) / f"{op}.json"


def header(op: str, gpu: Gpu) -> dict[str, Any]:
    """The facts that a table of this op package must state to be used on this GPU."""
    return {"format": FORMAT, "op": op, "gpu": gpu.name, "architecture": gpu.architecture, "triton": gpu.triton}


def write(path: Path, op: str, gpu: Gpu, choices: Mapping[str, Choice], table: Table) -> None:
    """Write a table, all of it or nothing."""
    entries = []
    for (name, *key), best in table.items():
        if choices[name].candidates is not None:
            best = best._asdict()
        elif math.isinf(best):  # never; JSON has no infinity
            best = None
        entries.append({"choice": name, "key": dict(zip(choices[name].fields, key)), "best": best})
    replace(path, json.dumps({**header(op, gpu), "entries": entries}, indent=1) + "\n")


def replace(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old text or the new one, and nothing in between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    fresh.write_text(text)
    os.replace(fresh, path)


def _read(path: Path, op: str, gpu: Gpu, choices: Mapping[str, Choice]) -> tuple[Table, str]:
    """A table's entries, or none and why the file cannot be used (an empty reason: there is no file)."""
    try:
        document = json.loads(path.read_text())
        found = document if isinstance(document, dict) else {}
        for name, expected in header(op, gpu).items():
            if found.get(name) != expected:
                raise ValueError(f"expected {name} {expected!r}, got {found.get(name)!r}")
        if not isinstance(found.get("entries"), list):
            raise ValueError("expected a list of entries, got none")
        return dict(_entry(entry, choices, gpu.architecture) for entry in found["entries"]), ""
    except (FileNotFoundError, NotADirectoryError):
        return UNTUNED, ""
    except OSError as error:
        return UNTUNED, f"it cannot be read: {error.strerror}"
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        return UNTUNED, f"damaged JSON: {error}"
    except ValueError as error:
        return UNTUNED, str(error)


def _entry(entry: Any, choices: Mapping[str, Choice], architecture: int) -> tuple[tuple, Any]:
    """The key in a table and what it holds.

    Raises:
        ValueError: the entry is none of this op package, or names a tile that is not among its candidates.
    """
    if not isinstance(entry, dict) or entry.keys() != {"choice", "key", "best"}:
        raise ValueError(f"expected an entry of choice, key and best, got {_short(entry)}")
    name, key, best = entry["choice"], entry["key"], entry["best"]
    choice = choices.get(name) if isinstance(name, str) else None
    if choice is None:
        raise ValueError(f"expected one of the choices {', '.join(choices)}, got {_short(name)}")
    whole = isinstance(key, dict) and all(type(value) in (int, bool) for value in key.values())
    if not whole or key.keys() != set(choice.fields):
        raise ValueError(f"{name}: expected a key of whole {', '.join(choice.fields)}, got {_short(key)}")
    values = tuple(key[field] for field in choice.fields)
    if choice.candidates is None:
        if best is not None and not (type(best) in (int, float) and 0 <= best < math.inf):
            raise ValueError(f"{name}: expected a size or null, got {_short(best)}")
        return (name, *values), math.inf if best is None else best
    tiles = choice.candidates(*values, architecture)
    for tile in tiles:
        if tile._asdict() == best:
            return (name, *values), tile
    if not isinstance(best, dict) or best.keys() != set(tiles[0]._fields):
        raise ValueError(f"{name}: expected a tile of {', '.join(tiles[0]._fields)}, got {_short(best)}")
    raise ValueError(f"{name}: expected one of the {len(tiles)} candidates, got {_short(best)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "…"
