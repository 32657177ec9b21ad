"""Pictures of results: one function a kind of op, each from rows to a PNG."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .providers import BARE
from .registry import BOTH, FORWARD, STEP
from .resultfile import Row

#: Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]


def draw_bars(rows: list[Row], title: str, path: Path) -> Path:
    """Forward + backward of every case and provider, over the bare linear and over the floor, side by side."""
    rows = [row for row in rows if row.get("mode") == BOTH and row.get("of_bare")]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    providers = [name for name in dict.fromkeys(row["provider"] for row in rows) if name != BARE]
    height = 1.0 / (len(providers) + 1)
    size = (10, 1.6 + 0.075 * len(cases) * (len(providers) + 1))
    figure, panels = plt.subplots(1, 2, figsize=size, sharey=True, layout="constrained")
    for axes, key, label in zip(panels, ("of_bare", "of_floor"), ("over the bare linear", "over the floor")):
        values = {(row["case"], row["provider"]): row[key] for row in rows}
        for number, provider in enumerate(providers):
            bars = [(at + number * height, values[case, provider]) for at, case in enumerate(cases)
                    if (case, provider) in values]  # fmt: skip
            again, colour = divmod(number + 1, len(COLOURS))
            axes.barh(
                *zip(*bars), height, label=provider, color=COLOURS[colour], hatch="////" * again, edgecolor="white",
                linewidth=0,
            )  # fmt: skip
        axes.axvline(1.0, color=COLOURS[0], linewidth=1)
        _limit(axes, list(values.values()))
        axes.set_xlabel(f"× {label}, lower is better", fontsize=8)
        axes.grid(axis="x", alpha=0.3)
    middle = height * (len(providers) - 1) / 2
    panels[0].set_yticks([at + middle for at in range(len(cases))], cases, fontsize=7)
    panels[0].set_ylim(len(cases) - 0.1, -height)
    figure.suptitle(title, fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _limit(axes, values: list[float]) -> None:
    """What is far off may end outside of the picture, rather than press all else together."""
    ordered = sorted(values)
    if ordered:
        axes.set_xlim(0, min(1.05 * ordered[-1], max(4.0, 2 * ordered[len(ordered) // 2])))


def draw_hosts(rows: list[Row], where: str, path: Path) -> Path:
    """µs of the host a call, forward and forward + backward, a panel a kind of call."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, panels = plt.subplots(len(cases), figsize=(9, 0.8 + 1.5 * len(cases)), squeeze=False, layout="constrained")
    for case, axes in zip(cases, panels[:, 0]):
        names = list(dict.fromkeys(row["provider"] for row in rows if row["case"] == case))
        for offset, mode, colour in ((0.0, FORWARD, COLOURS[2]), (0.4, BOTH, COLOURS[1])):
            found = {row["provider"]: row["p50_us"] for row in rows if (row["case"], row["mode"]) == (case, mode)}
            places = [at + offset for at, name in enumerate(names) if name in found]
            axes.barh(places, [found[name] for name in names if name in found], 0.4, color=colour, label=mode)
        axes.set_yticks([at + 0.2 for at in range(len(names))], names, fontsize=7)
        axes.invert_yaxis()
        axes.set_title(case, fontsize=9)
        axes.grid(axis="x", alpha=0.3)
    panels[-1, 0].set_xlabel("µs of the host a call, lower is better", fontsize=9)
    panels[0, 0].legend(fontsize=7)
    figure.suptitle(where, fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def draw_steps(rows: list[Row], title: str, path: Path) -> Path:
    """Whole training steps: time of a step and its share of the importance loop, a panel a setting."""
    settings = list(dict.fromkeys(row["case"] for row in rows))
    figure, panels = plt.subplots(len(settings), figsize=(9, 0.8 + 2.4 * len(settings)), sharex=True, squeeze=False)
    figure.set_layout_engine("constrained")
    for setting, axes in zip(settings, panels[:, 0]):
        shown = [row for row in rows if row["case"] == setting]
        steps = [row["p50_us"] / 1e3 for row in shown]
        loops = [(row["loop_us"] or 0.0) / 1e3 / row["interval"] for row in shown]
        axes.barh(range(len(shown)), steps, color=COLOURS[2], label="step")
        axes.barh(range(len(shown)), loops, left=steps, color=COLOURS[1], label="importance loop / its interval")
        for place, (row, step, loop) in enumerate(zip(shown, steps, loops)):
            ratio = f", {row['of_authors']:.2f} ×" if row["of_authors"] else ""
            text = f" {row['tokens_per_s']:.0f} tokens/s{ratio}"
            axes.text(step + loop, place, text, va="center", fontsize=7)
        axes.set_yticks(range(len(shown)), [row["provider"] for row in shown], fontsize=7)
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


def draw_sparse(rows: list[Row], where: str, path: Path) -> Path:
    """Steps that train a part of a weight, over the bare linear's: by density, a panel a shape and kind of layout."""
    rows = [row for row in rows if row.get("mode") == STEP and row.get("of_bare")]
    rows = [row for row in rows if row["provider"] != BARE]  # which is the line at 1
    shapes, kinds, providers = (list(dict.fromkeys(row[key] for row in rows)) for key in ("shape", "kind", "provider"))
    size = (1.2 + 2 * len(kinds), 1.2 + 2 * len(shapes))
    figure, panels = plt.subplots(
        len(shapes), len(kinds), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for (shape, kind), axes in zip(((shape, kind) for shape in shapes for kind in kinds), panels.flat):
        for number, provider in enumerate(providers, 1):
            points = sorted(
                (100 * row["density"], row["of_bare"])
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
    highest = sorted(row["of_bare"] for row in rows)
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
