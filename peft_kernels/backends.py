"""The one place where a backend is chosen.

Every public op asks :func:`choose` once, before its first launch. The answer travels to the kernels as an
argument of the op (and through autograd's context to the backward), so a forward and its backward never
disagree, whichever thread the backward runs on. Nothing here ever falls back after a failure.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from . import _native

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_HALVES = (torch.bfloat16, torch.float16)


class Capability(NamedTuple):
    """The calls that a backend of an op takes. None stands for everything.

    Attributes:
        dtypes: of the input that decides, under autocast after its cast.
        options: values of the op's option.
    """

    dtypes: tuple[torch.dtype, ...] | None = None
    options: tuple[str, ...] | None = None

    def includes(self, dtype: torch.dtype, option: str = "") -> bool:
        return (self.dtypes is None or dtype in self.dtypes) and (not self.options or option in ("", *self.options))


class Op(NamedTuple):
    """One row of the dispatch table.

    Attributes:
        option: the name of what decides beside device and dtype; "" where nothing does.
        backends: name -> what it takes. A suffix forces one of several paths, and is a backend of its own here.
    """

    option: str
    backends: dict[str, Capability]


_LORA = Op(
    "adapter_precision",
    {
        "reference": Capability(),
        **dict.fromkeys(("triton", "triton:fused", "triton:blas"), Capability(_FLOATS)),
        **dict.fromkeys(("cuda", "cuda:fused", "cuda:passes"), Capability(_HALVES, ("default",))),
    },
)
#: The dispatch table.
OPS = {
    "lora_linear": _LORA,
    "lora_linear_shared_input": _LORA,
    "masked_linear": Op("", {"reference": Capability(), "triton": Capability(_FLOATS)}),
    "scaled_linear": Op("", {"reference": Capability(), "triton": Capability(_FLOATS)}),
    "sparse_delta_linear": Op(
        "layout",
        {
            "reference": Capability(),
            "cpu": Capability(_FLOATS, ("entries",)),
            "triton": Capability(_FLOATS),
            "cuda": Capability(_HALVES, ("entries", "n_of_m")),
        },
    ),
}

#: What `use_backend` and the environment variable PEFT_KERNELS_BACKEND accept. `cpu` and `cuda` are the native
#: library's. `triton` and `cuda` choose between two paths by rule (`configs.py` of the op); a suffix forces one.
NAMES = ("auto", *dict.fromkeys(name for op in OPS.values() for name in op.backends))

#: On a GPU `auto` leaves the choice to these ops, which take the fastest backend by sizes.
_BY_SIZES = ("lora_linear", "lora_linear_shared_input")
_NATIVE = _native.load()  # now: where a graph is traced it could not be
_NATIVE_CUDA = _native.load(cuda=True)  # a library built without nvcc has no kernels for a GPU
_TRITON = importlib.util.find_spec("triton") is not None  # found, not imported
#: Triton's kernels then run in its interpreter, on the CPU; `auto` never takes it.
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


class Choice(NamedTuple):
    """A backend and, in a few words, why it was taken."""

    backend: str
    reason: str


class _Request:
    """The user's wish. One object for the process: the backward of CUDA tensors runs on threads of
    autograd's own, and neither a thread-local nor a ContextVar survives `torch.compile(fullgraph=True)`."""

    def __init__(self) -> None:
        self.backend = _checked(os.environ.get("PEFT_KERNELS_BACKEND", "auto"))


def _checked(name: str) -> str:
    if name not in NAMES:
        raise ValueError(f"expected a backend among {', '.join(NAMES)}, got {name!r}")
    return name


_request = _Request()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops called inside the block on one backend: `with pk.use_backend("reference"): …`.

    Args:
        name: one of `auto`, `reference`, `cpu`, `triton`, `cuda`; `triton:fused` and `triton:blas` force one path
            to expand the low-rank product, `cuda:fused` and `cuda:passes` one path to compute it (see
            `ops/lora_linear/README.md`).

    The setting holds for the whole process. A backward runs on the backend that its forward took.

    Raises:
        ValueError: for a name that is none of these. A backend that cannot run here is refused by the op.
    """
    previous, _request.backend = _request.backend, _checked(name)
    try:
        yield
    finally:
        _request.backend = previous


def choose(op: str, tensor: torch.Tensor, option: str = "") -> str:
    """The backend that `op` takes for `tensor`, the input that decides (its device and compute dtype). "auto": the op
    takes one by sizes.

    Args:
        option: the value of the op's option in the dispatch table, such as a layout's kind.

    Plain Python on constants, so that torch.compile traces it and guards what it reads.

    Raises:
        RuntimeError: if the backend that was asked for cannot run this call; the line says why.
    """
    device_type = "cpu" if tensor.is_cpu else tensor.device.type  # which makes a string at every call
    return _resolve(op, _request.backend, device_type, tensor.dtype, option)


def takes(op: str, backend: str, device_type: str, dtype: torch.dtype, option: str = "") -> bool:
    """Whether this backend could run such a call."""
    return not _why_not(op, backend, device_type, dtype, option)


def explain(op: str, device_type: str, dtype: torch.dtype, option: str = "") -> Choice:
    """Say what `choose` would answer for such tensors, and why. Without an option: for one that
    every backend takes."""
    requested = _request.backend
    backend = _resolve(op, requested, device_type, dtype, option)
    if requested != "auto":
        return Choice(backend, f"asked for: {requested}")
    if backend == "reference":
        native = device_type == "cpu" and "cpu" in OPS[op].backends
        return Choice(backend, _why_not(op, "cpu" if native else "triton", device_type, dtype, option))
    if backend == "cpu":
        return Choice(backend, "CPU tensors and the native library")
    reason = f"{device_type} tensors and Triton {importlib.metadata.version('triton')}"
    if backend == "auto":
        return Choice(backend, f"{reason}; torch's own products where launches rule, the native library as measured")
    return Choice(backend, reason)


def refuse_forced(op: str, what: str) -> None:
    """Refuse what torch's own operations would do in place of a backend's kernels.

    Raises:
        RuntimeError: the user asked for kernels.
    """
    if _request.backend not in ("auto", "reference"):
        raise RuntimeError(f"{op}: expected backend 'auto' or 'reference' for {what}, got {_request.backend!r}")


def _resolve(op: str, requested: str, device_type: str, dtype: torch.dtype, option: str) -> str:
    if requested == "auto":
        if device_type == "cuda":
            if _why_not(op, "triton", device_type, dtype, option):
                return "reference"
            return "auto" if op in _BY_SIZES else "triton"
        native = "cpu" in OPS[op].backends and not _why_not(op, "cpu", device_type, dtype, option)
        return "cpu" if native else "reference"
    if requested not in OPS[op].backends:
        raise RuntimeError(f"{op}: expected one of the backends {', '.join(OPS[op].backends)}, got {requested!r}")
    missing = _why_not(op, requested, device_type, dtype, option)
    if missing:
        raise RuntimeError(f"{op}: the backend {requested!r} cannot run here: {missing}")
    return requested


def _why_not(op: str, backend: str, device_type: str, dtype: torch.dtype, option: str) -> str:
    """Empty where it can run."""
    if backend == "reference":
        return ""
    missing = _why_not_here(backend.partition(":")[0], device_type)
    if missing:
        return missing
    dtypes, options = OPS[op].backends[backend]
    if dtypes is not None and dtype not in dtypes:
        expected = _listed(str(one).removeprefix("torch.") for one in dtypes)
        return f"expected {expected}, got {str(dtype).removeprefix('torch.')}"
    if option and options is not None and option not in options:
        return f"expected {OPS[op].option} {_listed(options)}, got {option}"
    return ""


def _why_not_here(family: str, device_type: str) -> str:
    """Empty where it is installed and runs on such tensors."""
    if family == "triton" and not _TRITON:
        return "Triton is not installed"
    if family == "cpu" and not _NATIVE:
        return f"no native library: {_native.why_not()}"
    if family == "cuda" and not _NATIVE_CUDA:
        return f"no native CUDA kernels: {_native.why_not(cuda=True)}"
    if family == "cuda" and torch.version.hip is not None:
        return "expected a GPU by NVIDIA, got a torch for ROCm"
    interpreted = family == "triton" and _INTERPRETING and device_type == "cpu"
    wanted = "cpu" if family == "cpu" or interpreted else "cuda"
    return "" if device_type == wanted else f"expected {wanted.upper()} tensors, got {device_type}"


def _listed(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last
