"""Plots of a benchmark's rows: time over the bare linear, and distance to the floor."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

#: Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]


def draw(rows: list[dict], facts: dict[str, str], out: Path) -> list[Path]:
    """A PNG an op and quantity; returns their paths."""
    where = facts.get("gpu", facts["cpu"])
    rows = [row for row in rows if not row["error"] and row["direction"] == "forward+backward"]
    paths = []
    for op in dict.fromkeys(row["op"] for row in rows):
        of_op = [row for row in rows if row["op"] == op]
        for key, label in (("of_linear", "time over the bare linear"), ("of_floor", "time over the floor")):
            paths.append(_bars(of_op, key, f"{op}, forward + backward: {label}\n{where}", out / f"{op}_{key}.png"))
    return paths


def _bars(rows: list[dict], key: str, title: str, path: Path) -> Path:
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    providers = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != "nn.Linear"]
    values = {(row["shape"], row["provider"]): row[key] for row in rows}
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.075 * len(shapes) * (len(providers) + 1)), layout="constrained")
    height = 1.0 / (len(providers) + 1)
    for number, provider in enumerate(providers):
        places = [index + number * height for index, shape in enumerate(shapes) if (shape, provider) in values]
        lengths = [values[shape, provider] for shape in shapes if (shape, provider) in values]
        axes.barh(places, lengths, height, label=provider, color=COLOURS[(number + 1) % len(COLOURS)])
    middle = height * (len(providers) - 1) / 2
    axes.set_yticks([index + middle for index in range(len(shapes))], shapes, fontsize=7)
    axes.set_ylim(len(shapes) - 0.1, -height)
    axes.axvline(1.0, color=COLOURS[0], linewidth=1)
    if values:
        longest = sorted(values.values())[-1]
        axes.set_xlim(0, min(longest * 1.05, max(4.0, 2 * sorted(values.values())[len(values) // 2])))
    axes.set(xlabel="×, lower is better", title=title)
    axes.title.set_fontsize(10)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=4)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def draw_steps(rows: list[dict], title: str, path: Path) -> Path:
    """Whole training steps: time of a step and its share of the importance loop, a panel a setting."""
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    figure, panels = plt.subplots(len(settings), figsize=(9, 0.8 + 2.4 * len(settings)), sharex=True, squeeze=False)
    figure.set_layout_engine("constrained")
    for setting, axes in zip(settings, panels[:, 0]):
        shown = [row for row in rows if row["setting"] == setting]
        steps, loops = ([row["step_ms"] for row in shown], [row["loop_ms"] / row["interval"] for row in shown])
        axes.barh(range(len(shown)), steps, color=COLOURS[2], label="step")
        axes.barh(range(len(shown)), loops, left=steps, color=COLOURS[1], label="importance loop / its interval")
        for place, (row, step, loop) in enumerate(zip(shown, steps, loops)):
            text = f" {row['tokens_per_s']:.0f} tokens/s, {row['of_authors']:.2f} ×"
            axes.text(step + loop, place, text, va="center", fontsize=7)
        axes.set_yticks(range(len(shown)), [row["provider"].strip() for row in shown], fontsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.set_title(setting, fontsize=9)
        axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("ms a step, lower is better; ×: speed over the authors' IST on PEFT", fontsize=9)
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=2)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def draw_sparse(rows: list[dict], where: str, path: Path) -> Path:
    """Steps that train a part of a weight, over the bare linear's: by density, a panel a shape and kind of layout."""
    rows = [row for row in rows if not row["error"] and row["bytes_per_value"]]  # the bare linear is the line at 1
    shapes, kinds, providers = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "kind", "provider"))
    size = (1.2 + 2 * len(kinds), 1.2 + 2 * len(shapes))
    figure, panels = plt.subplots(
        len(shapes), len(kinds), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for (shape, kind), axes in zip(((shape, kind) for shape in shapes for kind in kinds), panels.flat):
        for number, provider in enumerate(providers, 1):
            points = sorted(
                (100 * row["density"], row["step_of_bare"])
                for row in rows
                if (row["shape"], row["kind"], row["provider"]) == (shape, kind, provider)
            )
            style = dict(marker="o", markersize=3, linewidth=1, color=COLOURS[number % len(COLOURS)])
            if points:
                axes.plot(*zip(*points), label=provider, **style)
        axes.axhline(1.0, color=COLOURS[0], linewidth=1)
        axes.set_xscale("log")
        axes.set_xlim(0.07, 70)
        axes.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=6)
    highest = sorted(row["step_of_bare"] for row in rows)
    panels[0, 0].set_ylim(0, max(2.0, 1.5 * highest[int(0.9 * len(highest))]))  # what was disturbed may lie outside
    for kind, axes in zip(kinds, panels[0]):
        axes.set_title(kind, fontsize=8)
    for shape, axes in zip(shapes, panels[:, 0]):
        axes.set_ylabel(shape, fontsize=7)
    title = "a training step over the bare linear's forward and dx, by trained entries in %: lower is better"
    figure.suptitle(f"{title}\n{where}", fontsize=9)
    handles, labels = max((axes.get_legend_handles_labels() for axes in panels.flat), key=lambda pair: len(pair[1]))
    figure.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
