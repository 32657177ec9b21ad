"""Run the benchmarks that this machine can run.

    python -m benchmarks.run                     # `make bench`: the CPU grid, or the GPU's where there is a GPU
    python -m benchmarks.run --gpu --minutes 5
    python -m benchmarks.run --op sparse_delta   # training a few entries of a weight alone, see sparse_delta.py
    python -m benchmarks.run --op ist_step       # whole training steps alone, see ist_step.py

Every provider is checked against float64 before it is timed; one that is wrong is named and not timed. Providers are
interleaved. Ends with CSV, JSON and plots in --out.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import peft_kernels as pk

from . import plots
from .measure import Timer, ceilings, check, graphed, host_microseconds, interleaved, machine, quantile, write
from .registry import OPS, Shape, base_flops, bytes_moved, flops, launches_and_bytes, make_inputs, providers

SMALL_M = 256  # up to here launches and the host rule: CUDA graph and host time are measured as well
COMMANDS = {"sparse_delta": 3, "ist_step": 4}  # modules with a `main` of their own, and their shares of the time
LAYERS_SHARE = 4


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    shares = {name: share for name, share in COMMANDS.items() if name in options.ops}
    options.ops = [op for op in options.ops if op not in shares]
    minutes = options.minutes / (sum(shares.values()) + LAYERS_SHARE * bool(options.ops))
    if options.ops:
        options.minutes = LAYERS_SHARE * minutes
        measure_layers(options)
    for name, share in shares.items():
        command = importlib.import_module(f".{name}", __package__)  # takes a while
        given = ["--minutes", str(share * minutes), "--out", str(options.out)]
        given += ["--cpu"] * (options.device == "cpu") + ["--rounds", "3"] * options.quick
        command.main(given)


def measure_layers(options: argparse.Namespace) -> None:
    began = time.perf_counter()
    deadline = began + 60 * options.minutes
    console = Console(width=100)
    facts = machine(options.device)
    console.print(", ".join(f"{key} {value}" for key, value in facts.items()))

    planned = [
        (name, shape)
        for name in options.ops
        for shape in OPS[name].shapes(options.device)[: 2 if options.quick else None]
        if options.dtype in (None, str(shape.dtype).removeprefix("torch."))
    ]
    peaks = ceilings(options.device, {shape.dtype for _, shape in planned})
    console.print(
        "ceilings, measured: "
        + ", ".join(
            f"{peak / 1e9:.0f} GB/s copy"
            if key == "bytes"
            else f"{peak / 1e12:.2f} TFLOP/s {key.removeprefix('torch.')}"
            for key, peak in peaks.items()
        )
    )
    rows, left_out = [], []
    for index, (name, shape) in enumerate(tqdm(planned, unit="shape")):
        remaining = deadline - time.perf_counter()
        if remaining <= 0:
            left_out = planned[index:]
            break
        share = min(remaining / (len(planned) - index), 20.0)
        found = measure_shape(name, shape, options.device, peaks, share)
        rows += found
        tqdm.write(_rendered(console, table(name, shape, found)))
        save(rows, facts, peaks, options.out)
    if left_out:
        console.print(f"out of time: {len(left_out)} shapes left out, from {left_out[0][0]} {left_out[0][1]} on")

    for shape in [s for s in OPS["lora_linear_shared_input"].shapes(options.device) if s.p == 0][:2]:
        console.print(f"kernels of {shape}, counted: {launches_and_bytes(shape)}")
    console.print(summary(rows))
    hosts = host_costs(options.device)
    console.print(host_table(hosts))
    save(rows, facts, peaks, options.out, hosts)
    for path in plots.draw(rows, facts, options.out):
        console.print(f"plot: {path}")
    console.print(f"{len(rows)} rows in {options.out}, {time.perf_counter() - began:.0f} s")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="require a CUDA GPU")
    parser.add_argument("--cpu", action="store_true", help="use the CPU even where there is a GPU")
    parser.add_argument("--op", dest="ops", action="append", choices=[*OPS, *COMMANDS], help="only this (repeatable)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of the layers")
    parser.add_argument("--quick", action="store_true", help="two shapes an op, three rounds of steps")
    parser.add_argument("--minutes", type=float, default=11.0, help="time budget")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "output")
    options = parser.parse_args(arguments)
    if options.gpu and not torch.cuda.is_available():
        sys.exit("expected a CUDA GPU that torch can use, got none")
    options.device = "cuda" if torch.cuda.is_available() and not options.cpu else "cpu"
    options.ops = options.ops or [*OPS, *COMMANDS]
    return options


def measure_shape(op: str, shape: Shape, device: str, peaks: dict[str, float], seconds: float) -> list[dict]:
    """A row for each provider and direction."""
    case = make_inputs(shape, device)
    ready, wrong = {}, {}
    for provider in providers(shape, device):
        error = check(provider, shape, case)
        if error is None:
            ready[provider.name] = provider.build(case)
        else:
            wrong[provider.name] = error
    timer, rows = Timer(device), []
    for backward in (False, True):
        calls = {name: r.forward_backward if backward else r.forward for name, r in ready.items()}
        times = interleaved(calls, timer, seconds / 2)
        floor = max(flops(shape, backward) / peaks[str(shape.dtype)], bytes_moved(shape, backward) / peaks["bytes"])
        for name, values in times.items():
            median = quantile(values, 0.5)
            ratios = [value / linear for value, linear in zip(values, times["nn.Linear"])]
            row = {
                "op": op, "shape": str(shape), "M": shape.M, "K": shape.K, "N": "+".join(map(str, shape.Ns)),
                "R": shape.R, "dtype": str(shape.dtype).removeprefix("torch."), "p": shape.p, "provider": name,
                "direction": "forward+backward" if backward else "forward",
                "p20_us": quantile(values, 0.2), "p50_us": median, "p80_us": quantile(values, 0.8),
                "of_linear": statistics.median(ratios),
                "of_peft": statistics.median(v / p for v, p in zip(values, times["PEFT"])) if "PEFT" in times else None,
                "tflops": (base_flops if name == "nn.Linear" else flops)(shape, backward) / median / 1e6,
                "gbps": bytes_moved(shape, backward) / median / 1e3, "of_floor": median / (floor * 1e6),
                "rounds": len(values), "error": None,
            }  # fmt: skip
            if device == "cuda" and shape.M <= SMALL_M:
                row["host_us"] = host_microseconds(calls[name], repeats=20)
                replay = graphed(calls[name])
                row["graph_us"] = statistics.median(timer(replay) for _ in range(21))
            rows.append(row)
        rows += [
            {"op": op, "shape": str(shape), "provider": name, "direction": "forward", "error": error}
            for name, error in wrong.items()
            if not backward
        ]
    return rows


def table(op: str, shape: Shape, rows: list[dict]) -> Table:
    result = Table(title=f"{op}: {shape}", title_justify="left")
    for heading in ("provider", "", "µs p20/p50/p80", "× linear", "TFLOP/s", "GB/s", "× floor"):
        result.add_column(heading, justify="left" if heading in ("provider", "") else "right", no_wrap=True)
    for row in rows:
        if row["error"]:
            result.add_row(row["provider"], "[bold red]wrong[/]", row["error"][:60])
            continue
        result.add_row(
            row["provider"], {"forward": "fwd", "forward+backward": "fwd+bwd"}[row["direction"]],
            f"{row['p20_us']:.0f}/{row['p50_us']:.0f}/{row['p80_us']:.0f}", f"{row['of_linear']:.3f}",
            f"{row['tflops']:.2f}", f"{row['gbps']:.0f}", f"{row['of_floor']:.2f}",
        )  # fmt: skip
    return result


def _rendered(console: Console, renderable) -> str:
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def summary(rows: list[dict]) -> str:
    """The bar: forward + backward no slower than PEFT's layer at any shape."""
    compared = [
        row for row in rows
        if row["provider"].startswith("ours") and not row["error"] and row["direction"] != "forward" and row["of_peft"]
    ]  # fmt: skip
    if not compared:
        return "nothing of ours to compare with PEFT"
    lines = [f"  {row['of_peft']:.3f} × PEFT  {row['op']} {row['shape']} ({row['provider']})" for row in compared]
    worst = max(compared, key=lambda row: row["of_peft"])
    return (
        "forward + backward, ours over PEFT's layer, median of interleaved rounds:\n" + "\n".join(lines)
        + f"\nworst: {worst['of_peft']:.3f} at {worst['op']} {worst['shape']} ({worst['provider']})"
    )  # fmt: skip


def host_costs(device: str) -> list[dict]:
    """Host time of a module at a tiny shape, one thread: nothing but overhead."""
    from peft import LoraConfig, get_peft_model

    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def peft_layer() -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(8, 8, device=device))
        return get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))

    accelerated = peft_layer()
    pk.integrations.peft.accelerate(accelerated)
    modules = {
        "nn.Linear": torch.nn.Linear(8, 8, device=device),
        "PEFT's layer": peft_layer().base_model.model[0],
        "pk.nn.LoRALinear": pk.nn.LoRALinear(8, 8, 2, device=device),
        "PEFT's layer, accelerated": accelerated.base_model.model[0],
    }
    x = torch.randn(2, 8, device=device, requires_grad=True)
    found = []
    for name, module in modules.items():
        for _ in range(50):
            module(x).sum().backward()
        found.append(
            {
                "module": name,
                "forward_us": host_microseconds(lambda module=module: module(x)),
                "forward_backward_us": host_microseconds(lambda module=module: module(x).sum().backward()),
            }
        )
    torch.set_num_threads(threads)
    return found


def host_table(hosts: list[dict]) -> Table:
    result = Table(title="host time of a module, 2 × 8 → 8, r 2, one thread", title_justify="left")
    for heading in ("module", "forward µs", "forward + backward µs"):
        result.add_column(heading, justify="left" if heading == "module" else "right")
    for row in hosts:
        result.add_row(row["module"], f"{row['forward_us']:.1f}", f"{row['forward_backward_us']:.1f}")
    return result


def save(rows: list[dict], facts: dict, peaks: dict, out: Path, hosts: list[dict] | None = None) -> None:
    name = f"lora_linear_{facts.get('gpu', 'cpu').replace(' ', '_')}"
    write({"machine": facts, "ceilings": peaks, "rows": rows, "host": hosts or []}, out, name)


if __name__ == "__main__":
    main()
