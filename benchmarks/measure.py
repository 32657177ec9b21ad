"""How it is measured: correctness first, then interleaved timing; the machine's ceilings and description; the files."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from peft_kernels.testing import assert_within_eager, truth
from peft_kernels.testing.lora_linear import LoRACase

from .registry import Provider, Ready, Shape, eager, make_inputs


def check(provider: Provider, shape: Shape, case: LoRACase) -> str | None:
    """None where outputs and gradients are within twice eager's error (against float64), else what is wrong.

    With dropout only ours can be checked, since its masks can be drawn again; the others are checked without.
    """
    if not provider.adapters:
        return None
    if shape.p and not provider.ours:
        case = make_inputs(Shape(shape.M, shape.K, shape.Ns, shape.R, shape.dtype), case.x.device.type)
    exact = truth(case)
    yardstick = _results(eager(case)) if not case.dropout_p else _masked_eager(case)
    torch.manual_seed(case.seed)
    found = _results(provider.build(case))
    try:
        for name, value in found.items():
            expected = yardstick[name]
            assert_within_eager(name, value.to(expected.dtype), expected, exact[name])
    except AssertionError as error:
        return str(error)
    return None


def _results(ready: Ready) -> dict[str, torch.Tensor]:
    ys = ready.forward()
    grads = torch.autograd.grad(ys, ready.leaves, ready.grad_ys)
    names = ["grad of x"] + [f"grad of {name}{j}" for j in range(len(ys)) for name in ("lora_A", "lora_B")]
    return {f"y{j}": y.detach() for j, y in enumerate(ys)} | dict(zip(names, grads))


def _masked_eager(case: LoRACase) -> dict[str, torch.Tensor]:
    from peft_kernels.testing import eager as masked

    return masked(case)


class Timer:
    """Time of a call in µs: CUDA events with a cold L2 on a GPU, the wall clock (the mean of `repeats`) on the CPU."""

    def __init__(self, device: str) -> None:
        self.gpu = device == "cuda"
        self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=device) if self.gpu else None

    def __call__(self, call: Callable[[], object], repeats: int = 1) -> float:
        if not self.gpu:
            began = time.perf_counter()
            for _ in range(repeats):
                call()
            return (time.perf_counter() - began) / repeats * 1e6
        self.flush.random_(0, 255)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def host_microseconds(call: Callable[[], object], repeats: int = 200) -> float:
    """Host time of a call, the least of seven means: on a GPU the call returns before the device is done."""
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
    """The call captured as a CUDA graph: what it costs without the host."""
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


def interleaved(
    calls: dict[str, Callable[[], object]], timer: Timer, seconds: float, least: int = 7, most: int = 101
) -> dict[str, list[float]]:
    """Every call once a round (ABC CBA ABC …), for about `seconds`; the first two rounds warm up and do not count.

    What ran before a call is not its concern, but is felt: 2 % at 300 µs. So each runs once untimed right before,
    short ones are repeated on the CPU until the shortest fills 2 ms, and the order turns round every time.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    began, rounds, repeats, shortest = time.perf_counter(), 0, 1, float("inf")
    while rounds < 2 + least or (rounds < 2 + most and time.perf_counter() - began < seconds):
        for name, call in list(calls.items())[:: -1 if rounds % 2 else 1]:
            call()
            elapsed = timer(call, repeats)
            if rounds >= 2:
                times[name].append(elapsed)
            shortest = min(shortest, elapsed)
        rounds += 1
        repeats = max(1, int(2000 / shortest))
    return times


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(q * len(ordered)), len(ordered) - 1)]


def ceilings(device: str, dtypes: set[torch.dtype]) -> dict[str, float]:
    """FLOP/s of a large matmul a dtype, and bytes/s of a large copy (read + written), on random data."""
    size, copied = (8192, 2 << 30) if device == "cuda" else (2048, 256 << 20)
    timer = Timer(device)
    found = {}
    for dtype in dtypes:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        times = interleaved({"mm": lambda left=left, right=right: left @ right}, timer, 1.0, least=5)["mm"]
        found[str(dtype)] = 2 * size**3 / (quantile(times, 0.5) * 1e-6)
    source = torch.empty(copied, dtype=torch.uint8, device=device).random_(0, 255)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, timer, 1.0, least=5)["copy"]
    found["bytes"] = 2 * copied / (quantile(times, 0.5) * 1e-6)
    return found


def machine(device: str) -> dict[str, str]:
    """What a reader needs to place the numbers."""
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


def write(document: dict, out: Path, stem: str) -> None:
    """The document as JSON, and its "rows" as CSV."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{stem}.json").write_text(json.dumps(document, indent=1))
    columns = list(dict.fromkeys(key for row in document["rows"] for key in row))
    with open(out / f"{stem}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(document["rows"])


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
