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
from peft_kernels.ops.core import tuning
from peft_kernels.ops.lora_linear import configs
from peft_kernels.ops.lora_linear.explain import Sizes, explain, explain_native
from peft_kernels.tune import session

_WIDTH = 80
_LABEL = 28  # columns of a row's label, the indent included
_PROCESSORS = {80: 108, 86: 84, 89: 142, 90: 132}  # of an A100, an A6000, an L40S, an H200
_EXPLAINED = (torch.float32, torch.bfloat16, torch.float16)
_BESIDE = ("triton", "peft", "transformers", "accelerate", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m peft_kernels", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shown = commands.add_parser("env", help="versions, GPU, native library, and the backend each op would take")
    shown.add_argument(
        "--explain",
        nargs=5,
        metavar=("M", "K", "N", "R", "DTYPE"),
        help="what lora_linear would take for M tokens, K in_features, N out_features, rank R: way and tiles",
    )
    shown.add_argument("--arch", type=int, help="explain for this compute capability, as 90, instead of the GPU here")
    tuner = commands.add_parser(
        "tune", help="measure this GPU, and keep the fastest tiles", description=tune.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    session.add_arguments(tuner)
    options = parser.parse_args()
    if options.command == "tune":
        sys.exit(session.main(options))
    if options.explain is None:
        if options.arch is not None:
            parser.error("--arch: expected --explain beside it")
        print(env())
        return
    try:
        print(explained(*options.explain, arch=options.arch))
    except ValueError as error:
        parser.error(str(error))


def explained(*sizes_and_dtype: str, arch: int | None = None) -> str:
    """Say what `lora_linear` would take for M, K, N, R and a dtype's name: on a CPU, and on the GPU here or of `arch`.

    Raises:
        ValueError: for sizes that are no whole numbers of at least 1, or another dtype.
    """
    *numbers, name = sizes_and_dtype
    if not all(number.isdecimal() and int(number) for number in numbers):
        raise ValueError(f"--explain: expected M, K, N and R of at least 1, got {' '.join(numbers)}")
    dtype = getattr(torch, name, None)
    if dtype not in _EXPLAINED:
        raise ValueError(f"--explain: expected float32, bfloat16 or float16, got {name!r}")
    sizes = Sizes(*map(int, numbers))
    heading = ", ".join(f"{key} {value}" for key, value in sizes._asdict().items())
    lines = [f"lora_linear with {heading}, {name}", *_row("on a CPU", _choice("lora_linear", "cpu", dtype)[1])]
    if arch is not None:
        choices = [("on a GPU", f"sm_{arch}, by the rules"), *explain(sizes, dtype, arch)]
        choices += explain_native(sizes, dtype, arch, _PROCESSORS.get(arch, 132))
    else:
        gpu, missing = session.current_gpu()
        if gpu is None:
            choices = [("on a GPU", f"none: {missing}; --arch 90 explains for one")]
        else:
            backend, text = _choice("lora_linear", "cuda", dtype)
            choices = [("on a GPU", f"{gpu.name}: {text}")]
            table = tuning.load("lora_linear", gpu, configs.CHOICES)
            if backend == "auto" or backend.startswith("triton"):
                choices += explain(sizes, dtype, gpu.architecture, backend, table)
            processors = torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
            choices += explain_native(sizes, dtype, gpu.architecture, processors, table)
    return "\n".join([*lines, *(line for label, text in choices for line in _row(label, text))])


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
    yield "CUDA kernels", _kernels()


def _kernels() -> str:
    """Whether the library has some, and whether the driver here, if any, is new enough for the runtime they bring."""
    version, least = _native.cuda_version(), _native.least_driver()
    if not version:
        return f"none: {_native.why_not(cuda=True)}"
    takes = f"CUDA {version // 1000}.{version % 1000 // 10}'s runtime takes a driver of {least or '?'} or later"
    driver = _driver_version()
    major = driver.partition(".")[0]
    if not major.isdecimal() or least is None:
        return f"{takes}; the driver here: {driver}"
    return f"{takes}; the driver here, {driver}, is {'new enough' if int(major) >= least else 'too old for it'}"


def _choices() -> Iterator[tuple[str, str]]:
    devices = [("cpu", torch.float32)]
    if torch.cuda.is_available():
        devices.insert(0, ("cuda", torch.bfloat16))
    for op in backends.OPS:
        for device_type, dtype in devices:
            yield op, f"{device_type} {str(dtype).removeprefix('torch.')}: {_choice(op, device_type, dtype)[1]}"


def _choice(op: str, device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """The backend, empty where the one asked for is refused, and the line about it."""
    try:
        choice = backends.explain(op, device_type, dtype)
    except RuntimeError as error:  # a backend was asked for that cannot run here: that is the answer
        return "", f"refused: {str(error).removeprefix(op + ': ')}"
    return choice.backend, f"{choice.backend} ({choice.reason})"


if __name__ == "__main__":
    main()
