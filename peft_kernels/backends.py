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
from collections.abc import Iterator
from typing import NamedTuple

import torch

from . import _native

#: What `use_backend` and the environment variable PEFT_KERNELS_BACKEND accept. `cpu` and `cuda` are the native
#: library's. `triton` and `cuda` choose between two ways by rule (`configs.py` of the room); a suffix forces one.
NAMES = ("auto", "reference", "cpu", "triton", "triton:fused", "triton:blas", "cuda", "cuda:fused", "cuda:passes")

#: op -> the backends that implement it.
OPS = {
    "lora_linear": ("reference", "triton", "cuda"),
    "lora_linear_shared_input": ("reference", "triton", "cuda"),
    "masked_linear": ("reference", "triton"),
    "sparse_delta_linear": ("reference", "cpu", "triton", "cuda"),
}

#: On a GPU `auto` leaves these to their room, which takes Triton or CUDA by sizes, as they were measured there.
_BY_SIZES = ("lora_linear", "lora_linear_shared_input")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of all but the reference
_NATIVE = _native.load()  # now: where a graph is traced it could not be
_TRITON = importlib.util.find_spec("triton") is not None  # found, not imported
#: Triton's kernels then run in its interpreter, on the CPU; `auto` never takes it.
_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


class Choice(NamedTuple):
    """A backend and, in a few words, why it was taken."""

    backend: str
    reason: str


class _Request:
    """What the user asked for. One object for the process: the backward of CUDA tensors runs on threads of
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
        name: one of `auto`, `reference`, `cpu`, `triton`, `cuda`; `triton:fused` and `triton:blas` force one way
            to expand the low-rank product, `cuda:fused` and `cuda:passes` one way to compute it (see
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


def choose(op: str, tensor: torch.Tensor) -> str:
    """The backend that `op` takes for `tensor`, the input that decides (its device and compute dtype). "auto": the room
    takes one by sizes.

    Plain Python on constants, so that torch.compile traces it and guards what it reads.

    Raises:
        RuntimeError: if the backend that was asked for cannot run here; the line says why.
    """
    device_type = "cpu" if tensor.is_cpu else tensor.device.type  # which makes a string at every call
    return _resolve(op, _request.backend, device_type, tensor.dtype)


def explain(op: str, device_type: str, dtype: torch.dtype) -> Choice:
    """What `choose` would answer for tensors of this device type and dtype, and why."""
    requested = _request.backend
    backend = _resolve(op, requested, device_type, dtype)
    if requested != "auto":
        return Choice(backend, f"asked for: {requested}")
    if backend == "reference":
        native = device_type == "cpu" and "cpu" in OPS[op]
        return Choice(backend, _why_not("cpu" if native else "triton", device_type, dtype))
    if backend == "cpu":
        return Choice(backend, "CPU tensors and the native library")
    reason = f"{device_type} tensors and Triton {importlib.metadata.version('triton')}"
    if backend == "auto":
        return Choice(backend, f"{reason}, or the native library by sizes, as measured")
    return Choice(backend, reason)


def refuse_forced(op: str, what: str) -> None:
    """Of what torch's own operations do, in place of a backend's kernels.

    Raises:
        RuntimeError: the user asked for kernels.
    """
    if _request.backend not in ("auto", "reference"):
        raise RuntimeError(f"{op}: expected backend 'auto' or 'reference' for {what}, got {_request.backend!r}")


def _resolve(op: str, requested: str, device_type: str, dtype: torch.dtype) -> str:
    if requested == "auto":
        if _TRITON and device_type == "cuda" and dtype in _DTYPES:
            return "auto" if op in _BY_SIZES and _NATIVE and torch.version.hip is None else "triton"
        native = _NATIVE and device_type == "cpu" and dtype in _DTYPES and "cpu" in OPS[op]
        return "cpu" if native else "reference"
    family = requested.partition(":")[0]
    if family not in OPS[op]:
        raise RuntimeError(f"{op}: expected one of the backends {', '.join(OPS[op])}, got {requested!r}")
    missing = _why_not(family, device_type, dtype)
    interpreted = family == "triton" and _INTERPRETING and device_type == "cpu" and dtype in _DTYPES
    if missing and not interpreted:
        raise RuntimeError(f"{op}: the backend {requested!r} cannot run here: {missing}")
    return requested


def _why_not(family: str, device_type: str, dtype: torch.dtype) -> str:
    """Empty where it can run."""
    if family == "reference":
        return ""
    if family == "triton" and not _TRITON:
        return "Triton is not installed"
    if family in ("cpu", "cuda") and not _NATIVE:
        return f"no native library: {_native.why_not()}"
    if family == "cuda" and torch.version.hip is not None:
        return "expected a GPU by NVIDIA, got a torch for ROCm"
    wanted = "cpu" if family == "cpu" else "cuda"
    if device_type != wanted:
        return f"expected {wanted.upper()} tensors, got {device_type}"
    if dtype not in _DTYPES:
        return f"expected float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    return ""
