"""The ops `lora_linear` and `lora_linear_shared_input`: shapes, inputs, rooflines, the check, the measuring.

Counting rules. FLOPs: two a multiply-add of every product that the mathematics needs. Bytes: each input read once,
each output written once, what is saved written once and read once. The roofline of a shape is the larger of FLOPs
over the machine's measured matmul rate and bytes over its measured copy bandwidth.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

import peft_kernels as pk
from peft_kernels.testing import assert_within_eager, float64_reference
from peft_kernels.testing import eager as eager_results
from peft_kernels.testing.lora_linear import LoRACase
from peft_kernels.testing.timing import Timer, interleaved

from . import plots
from .guard import failures
from .measure import graphed, host_microseconds, peak_bytes, rows_of, saved_bytes
from .providers import BARE, EAGER, PEFT, Provider, Ready, all_providers
from .registry import BACKWARD, BOTH, FORWARD, GPU_SECONDS, OpSpec, Part, Request
from .resultfile import Row

GRAPHED_BELOW_US = 100  # on a GPU: launches and CPU overhead rule here, so that both are measured apart
REFERENCES = {"bare": BARE, "eager": EAGER, "peft": PEFT}


@dataclass(frozen=True)
class Shape:
    """M tokens, K in_features, out_features of each projection, rank R, dtype of base and adapters, dropout."""

    M: int
    K: int
    Ns: tuple[int, ...]
    R: int
    dtype: torch.dtype
    p: float = 0.0

    def __str__(self) -> str:
        features = "+".join(map(str, self.Ns))
        dtype = str(self.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")
        return f"M={self.M} {self.K}→{features} R={self.R} {dtype} p={self.p:g}"


#: The shape that the bars of a GPU are about.
REFERENCE_SHAPE = Shape(8192, 4096, (4096,), 16, torch.bfloat16)


# --- Rooflines -----------------------------------------------------------------------------------------------


def flops(shape: Shape, mode: str) -> int:
    """Count the FLOPs of one mode, with lora_A, lora_B and x taking gradients."""
    M, K, R = shape.M, shape.K, shape.R
    low_rank = sum(2 * M * R * (K + N) for N in shape.Ns)
    forward = base_flops(shape, FORWARD) + low_rank
    backward = base_flops(shape, BACKWARD) + 2 * low_rank  # dx: dy·W and dH·A; dH; dA; dB
    return {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}[mode]


def base_flops(shape: Shape, mode: str) -> int:
    """Count the FLOPs of the bare linear: forward and dx."""
    return sum(2 * shape.M * N * shape.K for N in shape.Ns) * (2 if mode == BOTH else 1)


def bytes_moved(shape: Shape, mode: str) -> int:
    """Count the fewest bytes: x once for all projections in forward, and once in backward; one dx."""
    M, K, R, size = shape.M, shape.K, shape.R, shape.dtype.itemsize
    adapters = sum(R * (K + N) for N in shape.Ns) * size
    weights = sum(N * K for N in shape.Ns) * size + adapters
    outputs = sum(M * N for N in shape.Ns) * size
    saved = len(shape.Ns) * (M * R * size + (M * ((K + 7) // 8) if shape.p else 0))
    forward = M * K * size + weights + outputs
    backward = saved + outputs + M * K * size + weights + M * K * size + adapters
    return {FORWARD: forward, BACKWARD: backward + saved, BOTH: forward + backward + saved}[mode]


def floor_us(shape: Shape, mode: str, ceilings: dict[str, float]) -> float:
    return 1e6 * max(flops(shape, mode) / ceilings[str(shape.dtype)], bytes_moved(shape, mode) / ceilings["bytes"])


# --- Inputs and their check ----------------------------------------------------------------------------------


def make_inputs(shape: Shape, device: str) -> LoRACase:
    """Draw operands of order one, B ≠ 0; never zeros, which hide errors and run faster."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*size: int, scale: float = 1.0) -> torch.Tensor:
        values = torch.randn(*size, generator=generator, device=device, dtype=torch.float32)
        return values.mul_(scale).to(shape.dtype)

    projections = [
        pk.Projection(
            random(N, shape.K, scale=shape.K**-0.5), random(shape.R, shape.K, scale=shape.K**-0.5),
            random(N, shape.R, scale=0.5 * shape.R**-0.5), 2.0, None,
        )
        for N in shape.Ns
    ]  # fmt: skip
    return LoRACase(
        random(shape.M, shape.K), projections, [random(shape.M, N) for N in shape.Ns], shape.p,
        frozen=("weight", "bias"), seed=0,
    )  # fmt: skip


@functools.lru_cache(maxsize=2)
def right_results(shape: Shape, device: str) -> tuple[LoRACase, dict, dict]:
    """Return a shape's inputs, their float64 reference, and eager's results."""
    case = make_inputs(shape, device)
    return case, float64_reference(case), eager_results(case)


@functools.cache
def check(provider: Provider, shape: Shape, device: str) -> str | None:
    """Say what is wrong, or None where outputs and gradients are within twice eager's error (against float64).

    With dropout only ours can be checked, since its masks can be drawn again; the others are checked without, and once.
    """
    if not provider.adapters:
        return None
    if shape.p and not provider.our_masks:
        return check(provider, replace(shape, p=0.0), device)
    case, exact, yardstick = right_results(shape, device)
    if provider.base:
        held = replace(case, projections=[p._replace(weight=provider.base(p.weight)) for p in case.projections])
        exact, yardstick = float64_reference(held), eager_results(held)
    torch.manual_seed(case.seed)
    built = provider.build(case)
    ys = built.forward()
    names = ["grad of x"] + [f"grad of {name}{j}" for j in range(len(ys)) for name in ("lora_A", "lora_B")]
    found = {f"y{j}": y.detach() for j, y in enumerate(ys)} | dict(zip(names, built.backward(ys)))
    try:
        for name, value in found.items():
            assert_within_eager(name, value.to(yardstick[name].dtype), yardstick[name], exact[name])
    except AssertionError as error:
        return str(error)
    return None


# --- Measuring -----------------------------------------------------------------------------------------------


def measure(shape: Shape, request: Request) -> list[Row]:
    """Measure rows of every provider and mode, the references even if they are not asked for."""
    began, case = time.perf_counter(), make_inputs(shape, request.device)
    facts = {
        "M": shape.M, "K": shape.K, "N": "+".join(map(str, shape.Ns)), "R": shape.R,
        "dtype": str(shape.dtype).removeprefix("torch."), "p": shape.p,
    }  # fmt: skip
    ready: dict[str, Ready] = {}
    rows: list[Row] = []
    guard = request.guard
    for provider in all_providers(request.device):
        if not request.wants(provider.name) and provider.name not in REFERENCES.values():
            continue
        why = guard.without.get(provider.name) or why_not(provider, shape)
        if why:
            rows.append({"provider": provider.name, "skipped": why})
            continue
        with guard(provider.name):
            error = check(provider, shape, request.device)
            if error:
                rows.append({"provider": provider.name, "error": error})
            else:
                ready[provider.name] = provider.build(case)
    right_results.cache_clear()  # on a GPU these are gigabytes
    parts = (FORWARD,) if request.modes == (FORWARD,) else (FORWARD, BOTH)
    seconds = request.seconds - (time.perf_counter() - began)
    calls = {name: partial(in_parts, built, parts) for name, built in ready.items()}
    times = interleaved(calls, Timer(request.device), seconds, guard=guard)
    for row in rows_of(times, parts, REFERENCES):
        name, mode = row["provider"], row["mode"]
        if request.modes and mode not in request.modes:
            continue
        built = ready[name]
        row |= {
            "tflops": (base_flops if name == BARE else flops)(shape, mode) / row["p50_us"] / 1e6,
            "gbps": bytes_moved(shape, mode) / row["p50_us"] / 1e3,
            "of_floor": row["p50_us"] / floor_us(shape, mode, request.ceilings),
        }
        with guard(name):
            if mode == BOTH:
                row["saved_bytes"] = saved_bytes(built.forward, built.kept)
                row["peak_bytes"] = peak_bytes(built.both, request.device)
            if request.device == "cuda" and row["p50_us"] < GRAPHED_BELOW_US and mode != BACKWARD:
                call = built.forward if mode == FORWARD else built.both
                row["host_us"] = host_microseconds(call, repeats=20)
                row["graph_us"] = _graph_us(call)
        rows.append(row)
    return [facts | row for row in [*rows, *failures(guard)]]


def why_not(provider: Provider, shape: Shape) -> str | None:
    if provider.why_not:
        return provider.why_not
    if provider.sixteen_bits and shape.dtype.itemsize != 2:
        return "for a 16-bit base"
    return "it has no dropout" if shape.p and not provider.dropout else None


def in_parts(built: Ready, parts: tuple[str, ...], mark: Callable[[], None]) -> None:
    ys = built.forward()
    mark()
    if BOTH in parts:
        built.backward(ys)
        mark()


def _graph_us(call: Callable[[], object]) -> float | None:
    """Time the call as a CUDA graph; None if it cannot be captured."""
    try:
        replay = graphed(call)
    except RuntimeError:
        return None
    timer = Timer("cuda")
    times = interleaved({"graph": lambda mark: (replay(), mark())}, timer, 0.2, least=21, most=21)["graph"]
    return sorted(marks[0] for marks in times)[len(times) // 2]


# --- What people see -----------------------------------------------------------------------------------------

COLUMNS = {
    "×\nbare": "of_bare", "×\nPEFT": "of_peft",
    "×\nfloor": "of_floor", "saved\nMiB": "saved_bytes", "peak\nMiB": "peak_bytes",
}  # fmt: skip


def summary(rows: list[Row]) -> str:
    """Compare with the bar: forward + backward no slower than any other provider at any shape."""
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        timed = {row["provider"]: row for row in rows if row["case"] == case and row.get("mode") == BOTH}
        timed = {name: row for name, row in timed.items() if row.get("of_bare")}
        ours = {name: row for name, row in timed.items() if name.startswith("ours")}
        others = {name: row for name, row in timed.items() if not is_ours(name) and name != BARE}
        if not ours or not others:
            continue
        mine = min(ours.values(), key=lambda row: row["of_bare"])
        peer = min(others.values(), key=lambda row: row["of_bare"])
        ratio = mine["of_bare"] / peer["of_bare"]
        verdict = "        " if ratio <= 1 else "BEHIND  "
        lines.append(f"  {ratio:.3f}  {verdict}{case}, beside {peer['provider']}")
    title = "forward + backward, ours over the fastest of the others, each over the bare linear of its own rounds:"
    return "\n".join([title, *lines]) if lines else "nothing of ours to compare"


def is_ours(provider: str) -> bool:
    return provider.startswith("ours") or provider.endswith("accelerated")


def providers(device: str) -> dict[str, str | None]:
    return {provider.name: provider.why_not for provider in all_providers(device)}


# --- Shapes --------------------------------------------------------------------------------------------------


def _cpu_shapes(Ns_of: Callable[[int, int], tuple[int, ...]], features: list[tuple[int, int]]) -> list[Shape]:
    shapes = []
    for dtype in (torch.float32, torch.bfloat16):
        for p in (0.0, 0.1):
            shapes += [Shape(512, K, Ns_of(K, N), 16, dtype, p) for K, N in features]
        K, N = features[0]
        shapes += [Shape(M, K, Ns_of(K, N), 16, dtype) for M in (1, 8, 64, 1024)]
    return shapes


def _gpu_shapes(widths: list[tuple[int, tuple[int, ...]]]) -> list[Shape]:
    """Return the reference shape first, then the bars' grid: what matters most is measured if time runs out."""
    bf16 = torch.bfloat16
    shapes = [Shape(8192, K, Ns, 16, bf16, p) for K, Ns in widths for p in (0.0, 0.1)]
    K, Ns = widths[0]
    shapes += [Shape(M, K, Ns, 16, bf16) for M in (1, 16, 64, 256, 1024, 2048, 4096, 16384)]
    shapes += [Shape(8192, K, Ns, R, bf16) for R in (8, 32, 64, 128, 512)]
    shapes += [Shape(8192, K, Ns, 16, torch.float16, p) for p in (0.0, 0.1)]
    return shapes


def single_shapes(device: str) -> list[Shape]:
    if device == "cpu":
        smollm2 = [(576, 576), (576, 192), (576, 1536), (1536, 576), (2048, 2048)]
        return _cpu_shapes(lambda K, N: (N,), smollm2)
    llama = [(4096, (4096,)), (4096, (1024,)), (4096, (14336,)), (14336, (4096,))]
    lorafusion = [
        Shape(256 * m, width, (width,), 16, torch.bfloat16, 0.1)
        for width in (4096, 5120, 8192)
        for m in (8, 16, 24, 32)
    ]
    return _gpu_shapes(llama) + [shape for shape in lorafusion if shape.M != 8192 or shape.K != 4096]


def shared_shapes(device: str) -> list[Shape]:
    if device == "cpu":
        return [
            Shape(512, 576, Ns, 16, dtype, p)
            for Ns in ((576, 192, 192), (1536, 1536))
            for dtype in (torch.float32, torch.bfloat16)
            for p in (0.0, 0.1)
        ]
    return _gpu_shapes([(4096, (4096, 1024, 1024)), (4096, (14336, 14336))])


#: Providers that compile, on a GPU: they take longer than all others together.
_COMPILED = ("torch.compile",)


def parts(shape: Shape, device: str) -> list[Part]:
    """Return the parts of a shape, on a GPU the reference shape's bars first and what is compiled last."""
    if device == "cpu":
        return [Part()]

    def compiled(provider: str) -> bool:
        return provider.startswith(_COMPILED)

    def of_bars(provider: str) -> bool:
        return provider in (BARE, EAGER, PEFT) or provider.startswith("ours")

    last = Part("compiled", 3, compiled, least=20.0, seconds=GPU_SECONDS)
    if replace(shape, p=0.0) == REFERENCE_SHAPE and shape.p in (0.0, 0.1):
        bars = Part("bars", 0, of_bars, seconds=GPU_SECONDS)
        others = Part("others", 1, lambda name: not compiled(name) and not of_bars(name), seconds=GPU_SECONDS)
        return [bars, others, last]
    return [Part("grid", 1, lambda name: not compiled(name), seconds=GPU_SECONDS), last]


def _spec(name: str, what: str, cases: Callable[[str], list[Shape]], share: float) -> OpSpec:
    def plot(rows: list[Row], device: str, path: Path) -> Path:
        if name == "lora_linear":
            plots.draw_layers(rows, device, path.with_name(f"{path.stem}_layers.png"))
        return plots.draw_ratios(rows, f"{name}, forward + backward\n{device}", path)

    return OpSpec(
        name, what, (FORWARD, BACKWARD, BOTH), cases, providers, measure, COLUMNS, summary, plot, share, parts
    )


SPECS = (
    _spec("lora_linear", "a LoRA layer: y = x·Wᵀ + scaling·D(x)·Aᵀ·Bᵀ", single_shapes, 3.0),
    _spec("lora_linear_shared_input", "LoRA layers that share x: q/k/v, gate/up", shared_shapes, 1.0),
)
