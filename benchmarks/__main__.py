"""The benchmark: ours, eager PyTorch and the peers on the same work, against the roofline.

    python -m benchmarks list                 # ops, cases and providers, and who cannot run here
    python -m benchmarks run                  # `make bench`; goes on where it was ended
    python -m benchmarks run --op lora_linear --mode both --provider PEFT --provider ours
    python -m benchmarks compare one.jsonl other.jsonl
    python -m benchmarks compare main HEAD --op lora_linear
    python -m benchmarks plot
    python -m benchmarks report               # docs/benchmarks/, and the tables of README and docs/
    python -m benchmarks model --gpu h200     # predicted from bytes and FLOPs, on any machine
    python -m benchmarks kernels              # a LoRA layer kernel by kernel, measured beside predicted, on a GPU

Every provider is checked against float64 before it is timed; one that is wrong is named and not timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from . import compare, kernels, model, report, run
from .measure import where
from .resultfile import ResultFile
from .specs import SPECS


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    {
        "run": run.main, "list": show, "compare": compare.main, "plot": draw, "report": report.main,
        "model": model.main, "kernels": kernels.main,
    }[options.command](options)  # fmt: skip


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run.add_arguments(commands.add_parser("run", help="measure; goes on where it was ended"))
    listing = commands.add_parser("list", help="ops, cases and providers, and who cannot run here")
    listing.add_argument("--device", choices=["cuda", "cpu"], help="the GPU, unless there is none")
    listing.add_argument("--cases", action="store_true", help="every case")
    compare.add_arguments(commands.add_parser("compare", help="what got faster or slower between two runs"))
    drawing = commands.add_parser("plot", help="the pictures of results once more")
    drawing.add_argument("results", nargs="?", type=Path, default=run.OUTPUT, help="folder of result files")
    report.add_arguments(commands.add_parser("report", help="Markdown with tables and pictures"))
    model.add_arguments(commands.add_parser("model", help="times predicted from bytes and FLOPs"))
    kernels.add_arguments(commands.add_parser("kernels", help="a LoRA layer on a GPU, kernel by kernel"))
    return parser.parse_args(arguments)


def show(options: argparse.Namespace) -> None:
    import torch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=run.WIDTH)
    for spec in SPECS.values():
        cases = spec.cases(device)
        console.print(f"[bold]{spec.name}[/]: {spec.what}")
        table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
        table.add_column(f"{len(cases)} cases on {device}", no_wrap=True)
        table.add_column(", ".join(spec.modes))
        for name, why in spec.providers(device).items():
            table.add_row(name, f"[yellow]not here: {why}[/]" if why else "runs")
        console.print(table)
        if options.cases:
            console.print("\n".join(f"  {case}" for case in cases), highlight=False)


def draw(options: argparse.Namespace) -> None:
    for path in sorted(options.results.glob("*.jsonl")):
        file = ResultFile(path)
        print(SPECS[file.op].plot(file.rows, where(file.machine), path.with_suffix(".png")))


if __name__ == "__main__":
    main()
