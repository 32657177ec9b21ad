"""`python -m peft_kernels env`: what is here, which backend each op would take, and why; `… tune`: measure this GPU."""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from importlib import metadata

import torch

import peft_kernels
from peft_kernels import _native, backends, tune
from peft_kernels.tune import session

_WIDTH = 80
_LABEL = 28  # columns of a row's label, the indent included
_BESIDE = ("triton", "peft", "transformers", "accelerate", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m peft_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("env", help="versions, GPU, native library, and the backend each op would take")
    tuner = commands.add_parser(
        "tune", help="measure this GPU, and keep the fastest tiles", description=tune.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    session.add_arguments(tuner)
    options = parser.parse_args()
    if options.command == "tune":
        sys.exit(session.main(options))
    print(env())


def env() -> str:
    """The whole table as text, at most 80 columns wide."""
    sections = {
        "Versions": _versions(),
        "GPU": _gpus(),
        "Native library": _library(),
        "Backends": _choices(),
    }
    lines = []
    for title, rows in sections.items():
        lines.append(title)
        for label, text in rows:
            lines += _row(label, text)
        lines.append("")
    return "\n".join(lines).rstrip()


def _row(label: str, text: str) -> list[str]:
    first = f"  {label}".ljust(_LABEL)
    if len(first) > _LABEL:  # a long name stands on a line of its own
        return [first, *_row("", text)]
    return textwrap.wrap(text, _WIDTH, initial_indent=first, subsequent_indent=" " * _LABEL)


def _versions() -> Iterator[tuple[str, str]]:
    yield "peft_kernels", peft_kernels.__version__
    yield "Python", platform.python_version()
    yield "torch", f"{torch.__version__} ({_torch_build()})"
    for package in _BESIDE:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, "not installed"


def _torch_build() -> str:
    if torch.version.hip:
        return f"built for ROCm {torch.version.hip}"
    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"


def _gpus() -> Iterator[tuple[str, str]]:
    if torch.cuda.is_available():
        yield "driver", _driver_version()
    else:
        yield "none", "torch sees no GPU"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"device {index}", f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.total_memory / 2**30:.0f} GiB"
    measured, missing = session.current_gpu()
    yield "tuning tables", session.tables_used(measured) if measured else f"none: {missing}"


def _driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "unknown (nvidia-smi did not answer)"


def _library() -> Iterator[tuple[str, str]]:
    if not _native.load():
        yield "none", _native.why_not()
        return
    yield "path", str(_native.LIBRARY)
    facts = _native.build_facts()
    for fact in ("cuda", "torch", "architectures", "compiler"):
        yield f"built: {fact}", facts.get(fact, "not known to this Python")


def _choices() -> Iterator[tuple[str, str]]:
    devices = [("cpu", torch.float32)]
    if torch.cuda.is_available():
        devices.insert(0, ("cuda", torch.bfloat16))
    for op in backends.OPS:
        for device_type, dtype in devices:
            where = f"{device_type} {str(dtype).removeprefix('torch.')}"
            try:
                choice = backends.explain(op, device_type, dtype)
            except RuntimeError as error:  # a backend was asked for that cannot run here: that is the answer
                yield op, f"{where}: refused: {str(error).removeprefix(op + ': ')}"
            else:
                yield op, f"{where}: {choice.backend} ({choice.reason})"


if __name__ == "__main__":
    main()
