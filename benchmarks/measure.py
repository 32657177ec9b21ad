"""Measures beside time (`peft_kernels/testing/timing.py`): memory, CPU overhead, the machine and its ceilings; makes
rows of times."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from peft_kernels.testing import saved_tensors
from peft_kernels.testing.timing import Timer, interleaved, whole

from .registry import BACKWARD, BOTH, FORWARD
from .resultfile import Row

GPU_STATE = {"sm_mhz": "clocks.sm", "celsius": "temperature.gpu", "watts": "power.draw"}


def rows_of(times: dict[str, list[tuple[float, ...]]], parts: tuple[str, ...], references: dict[str, str]) -> list[Row]:
    """Make a row for each provider and mode.

    Args:
        times: µs of each round, to the end of each of `parts`.
        parts: the modes that end where a mark does; backward is what lies between forward and both.
        references: key → provider. Each row gets `of_<key>`, the median over rounds of its time over that one's.
    """

    def column(provider: str, mode: str) -> list[float]:
        if mode == BACKWARD:
            forward, both = parts.index(FORWARD), parts.index(BOTH)
            return [marks[both] - marks[forward] for marks in times[provider]]
        return [marks[parts.index(mode)] for marks in times[provider]]

    modes = [*parts, BACKWARD] if {FORWARD, BOTH} <= set(parts) else list(parts)
    rows = []
    for provider in times:
        for mode in modes:
            values = column(provider, mode)
            row: Row = {"provider": provider, "mode": mode}
            row |= {f"p{q}_us": quantile(values, q / 100) for q in (20, 50, 80)} | {"rounds": len(values)}
            for key, reference in references.items():
                if reference in times:
                    ratios = [value / other for value, other in zip(values, column(reference, mode))]
                    row[f"of_{key}"] = statistics.median(ratios)
            rows.append(row)
    return rows


def host_microseconds(call: Callable[[], object], repeats: int = 200) -> float:
    """Measure the CPU time of a call, the least of seven means: on a GPU the call returns before the device is done."""
    best = float("inf")
    for _ in range(7):
        began = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - began) / repeats)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return best * 1e6


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    """Capture the call as a CUDA graph, which runs without its CPU overhead."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


# --- Memory --------------------------------------------------------------------------------------------------


def saved_bytes(forward: Callable[[], object], kept: Iterable[torch.Tensor]) -> int:
    """Return the bytes that a forward saves for backward, each storage once; `kept` stays between steps anyway."""
    with saved_tensors(ignore=tuple(kept)) as saved:
        y = forward()
    del y
    return sum(tensor.untyped_storage().nbytes() for tensor in saved)


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Return the bytes that a call takes at its peak beyond those taken before: by torch's allocator, whose events the
    profiler lists on a CPU. Memory that a library allocates by itself (MKL, cuBLAS) is not seen."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        found = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - found
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports every start and stop
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    taken = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        taken += event.nbytes()
        peak = max(peak, taken)
    return peak


# --- The machine ---------------------------------------------------------------------------------------------


def ceilings(device: str, dtypes: Iterable[torch.dtype]) -> dict[str, float]:
    """Measure FLOP/s of a large matmul for each dtype, and bytes/s of a large copy (read + written), on random data."""
    size, copied = (8192, 2 << 30) if device == "cuda" else (2048, 256 << 20)
    timer = Timer(device)
    found = {}
    for dtype in dtypes:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        calls = {"mm": whole(lambda left=left, right=right: left @ right)}
        found[str(dtype)] = 2 * size**3 / (_median(interleaved(calls, timer, 1.0, least=5)["mm"]) * 1e-6)
    source = torch.empty(copied, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    times = interleaved({"copy": whole(lambda: target.copy_(source))}, timer, 1.0, least=5)["copy"]
    found["bytes"] = 2 * copied / (_median(times) * 1e-6)
    return found


def _median(times: list[tuple[float, ...]]) -> float:
    return statistics.median(marks[-1] for marks in times)


def machine(device: str) -> dict[str, str]:
    """Return the facts about the machine that a reader needs to place the numbers."""
    facts = {
        "device": device,
        "cpu": _cpu_name(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }
    if device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        facts["cuda"] = str(torch.version.cuda)
    facts["python"] = platform.python_version()
    for package in ("torch", "triton", "transformers", "peft", "peft_kernels"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    facts["commit"] = _output("git", "rev-parse", "--short", "HEAD")
    return facts


def where(facts: dict[str, str]) -> str:
    """Name the device."""
    return facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"


def gpu_state() -> Row:
    """Return the GPU's present clock, temperature and power; nothing on a CPU, or where nvidia-smi is not there."""
    if not torch.cuda.is_available():
        return {}
    query = ",".join(GPU_STATE.values())
    answer = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--id={_gpu()}")
    try:
        return dict(zip(GPU_STATE, map(float, answer.split(","))))
    except ValueError:
        return {}


def _gpu() -> str:
    """Return the GPU's name for nvidia-smi: CUDA_VISIBLE_DEVICES may have renumbered it."""
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def _cpu_name() -> str:
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _output(*command: str) -> str:
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL, cwd=Path(__file__).parent).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
