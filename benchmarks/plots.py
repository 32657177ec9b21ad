"""Draws results: one function a kind of op, each from rows to a PNG that can be read at a width of 800 pixels."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

from .providers import BARE, PEFT
from .registry import BOTH, FORWARD, STEP
from .resultfile import Row

#: Okabe and Ito's palette, told apart by colour-blind readers too.
COLOURS = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"]
OURS, OTHERS = COLOURS[5], "#999999"
MARKERS = "osD^vP"
WIDTH, DPI, SMALL, MEDIUM = 8.0, 130, 8, 9  # inches, pixels an inch, sizes of letters


def draw_ratios(rows: list[Row], title: str, path: Path) -> Path:
    """Draw forward + backward over the bare linear: a line a provider, a panel for each dtype with and without dropout,
    or of a kind."""
    rows = [row for row in rows if row.get("mode") == BOTH and row.get("of_bare") and row["provider"] != BARE]
    settings, providers = list(dict.fromkeys(map(_setting, rows))), _each(rows, "provider")
    figure, panels = _panels(len(settings), 2, len(providers))
    for setting, axes in zip(settings, panels):
        for place, provider in enumerate(providers):
            values = [row["of_bare"] for row in rows if (_setting(row), row["provider"]) == (setting, provider)]
            ours = _is_ours(provider) or provider.endswith("accelerated")
            colour = OURS if ours else COLOURS[0] if provider == PEFT else OTHERS
            axes.scatter(values, [place] * len(values), s=18, color=colour, alpha=0.5, linewidth=0)
            if values:
                axes.plot(statistics.median(values), place, "|", color=colour, markersize=11, markeredgewidth=2)
        axes.set_title(setting, fontsize=MEDIUM)
    _lines(panels, providers)
    figure.supxlabel("× the bare linear's time, lower is better; a dot a shape, a bar at their median", fontsize=MEDIUM)
    return _written(figure, title, path)


def draw_layers(rows: list[Row], where: str, path: Path) -> Path:
    """Draw the README's picture: PEFT's layer, torch.compile and ours at rank 16, a line a shape of 512 tokens, 8,192
    on a GPU."""
    rows = [row for row in rows if row.get("mode") == BOTH and row["M"] in (512, 8192) and row["R"] == 16]
    shapes = list(dict.fromkeys(f"{row['K']}→{row['N']}" for row in rows))
    settings = list(dict.fromkeys(map(_setting, rows)))
    figure, panels = _panels(len(settings), 4, len(shapes))
    for setting, axes in zip(settings, panels):
        here = [row for row in rows if _setting(row) == setting]
        for number, name in enumerate((PEFT, "torch.compile", "ours")):
            found = [row for row in here if row["provider"] == name or (name == "ours" and _is_ours(row["provider"]))]
            places = [shapes.index(f"{row['K']}→{row['N']}") for row in found]
            _dots(axes, [row["of_bare"] for row in found], places, number, name)
        axes.set_title(setting, fontsize=MEDIUM)
    _lines(panels, shapes)
    _legend(figure, panels)
    return _written(
        figure, f"time of a LoRA layer over the bare linear's, forward + backward: lower is better\n{where}", path
    )


def draw_sparse(rows: list[Row], where: str, path: Path) -> Path:
    """Draw steps that train a part of a weight, over the bare linear's: a line a pattern, a panel a shape."""
    rows = [row for row in rows if row.get("mode") == STEP and row.get("of_bare") and row["provider"] != BARE]
    shapes, kinds, providers = (_each(rows, key) for key in ("shape", "kind", "provider"))
    densities = {row["pattern"]: (kinds.index(row["kind"]), row["r"], row["density"]) for row in rows}
    patterns = sorted(densities, key=densities.get)
    figure, panels = _panels(len(shapes), 2, len(patterns))
    for shape, axes in zip(shapes, panels):
        for number, provider in enumerate(providers):
            found = [row for row in rows if (row["shape"], row["provider"]) == (shape, provider)]
            places = [patterns.index(row["pattern"]) for row in found]
            _dots(axes, [row["of_bare"] for row in found], places, number, provider)
        axes.set_title(shape, fontsize=MEDIUM)
    _lines(panels, patterns)
    _legend(figure, panels)
    return _written(figure, f"a training step over the bare linear's forward and dx: lower is better\n{where}", path)


def draw_hosts(rows: list[Row], where: str, path: Path) -> Path:
    """Draw a call's CPU overhead in µs, forward and forward + backward: a line a provider, a panel a kind of call."""
    cases = _each(rows, "case")
    names = {case: _each([row for row in rows if row["case"] == case], "provider") for case in cases}
    heights = [len(found) for found in names.values()]
    size = (WIDTH, 0.9 + sum(0.5 + 0.27 * count for count in heights))
    figure, panels = plt.subplots(
        len(cases), figsize=size, sharex=True, squeeze=False, layout="constrained", height_ratios=heights
    )
    for case, axes in zip(cases, panels[:, 0]):
        for offset, mode, colour in ((0.0, FORWARD, COLOURS[2]), (0.4, BOTH, COLOURS[1])):
            found = {row["provider"]: row["p50_us"] for row in rows if (row["case"], row["mode"]) == (case, mode)}
            places = [at + offset for at, name in enumerate(names[case]) if name in found]
            axes.barh(places, [found[name] for name in names[case] if name in found], 0.4, color=colour, label=mode)
        axes.set_yticks([at + 0.2 for at in range(len(names[case]))], names[case])
        axes.invert_yaxis()
        axes.set_title(case, fontsize=MEDIUM)
        axes.tick_params(labelsize=SMALL)
        axes.grid(axis="x", alpha=0.3)
    figure.supxlabel("µs of the CPU a call, lower is better", fontsize=MEDIUM)
    panels[0, 0].legend(fontsize=SMALL, loc="lower right")
    return _written(figure, where, path)


def draw_steps(rows: list[Row], title: str, path: Path) -> Path:
    """Draw whole training steps: time of a step and its share of the importance loop, a panel a setting."""
    settings = _each(rows, "case")
    size = (WIDTH, 1.0 + 2.3 * len(settings))
    figure, panels = plt.subplots(len(settings), figsize=size, sharex=True, squeeze=False, layout="constrained")
    for setting, axes in zip(settings, panels[:, 0]):
        shown = [row for row in rows if row["case"] == setting]
        steps = [row["p50_us"] / 1e3 for row in shown]
        loops = [(row["loop_us"] or 0.0) / 1e3 / row["interval"] for row in shown]
        axes.barh(range(len(shown)), steps, color=COLOURS[2], label="step")
        axes.barh(range(len(shown)), loops, left=steps, color=COLOURS[1], label="importance loop / its interval")
        for place, (row, step, loop) in enumerate(zip(shown, steps, loops)):
            ratio = f", {row['of_authors']:.2f} ×" if row["of_authors"] else ""
            text = f" {row['tokens_per_s']:.0f} tokens/s{ratio}"
            axes.text(step + loop, place, text, va="center", fontsize=SMALL)
        axes.set_yticks(range(len(shown)), [row["provider"] for row in shown])
        axes.invert_yaxis()
        axes.margins(x=0.25)
        axes.set_title(setting, fontsize=MEDIUM)
        axes.tick_params(labelsize=SMALL)
        axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("ms a step, lower is better; ×: speed over the authors' IST on PEFT", fontsize=MEDIUM)
    _legend(figure, panels[0])
    return _written(figure, title, path)


# --- What they share -----------------------------------------------------------------------------------------


def _is_ours(provider: str) -> bool:
    return provider.partition(",")[0] == "ours"


def _each(rows: list[Row], key: str) -> list:
    """Return the values of a key, each once, in the order of the rows."""
    return list(dict.fromkeys(row[key] for row in rows))


def _setting(row: Row) -> str:
    """Name the setting that a panel shows."""
    dropout = f"dropout {row['p']:g}" if "p" in row else ""
    return ", ".join(filter(None, (row["dtype"], dropout, row.get("kind"))))


def _panels(count: int, columns: int, lines: int):
    """Make a figure with so many panels, in rows of at most `columns`, for as many lines each."""
    columns = min(columns, max(count, 1))
    height = math.ceil(max(count, 1) / columns)
    size = (WIDTH, 1.0 + height * (0.4 + 0.22 * max(lines, 3)))
    figure, panels = plt.subplots(
        height, columns, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for axes in panels.flat[count:]:
        axes.set_axis_off()
    return figure, panels.flat[: max(count, 1)]


def _dots(axes, values: Sequence[float], places: Sequence[int], number: int, label: str) -> None:
    colours = (COLOURS[1], COLOURS[2], OURS, COLOURS[3], COLOURS[0], COLOURS[7])
    style = dict(marker=MARKERS[number % len(MARKERS)], color=colours[number % len(colours)])
    axes.scatter(values, places, s=24, label=label, linewidth=0, alpha=0.9, **style)


def _lines(panels, names: Sequence[str]) -> None:
    """Name the lines of panels that share their axes, and put the ratios on a logarithmic one."""
    for axes in panels:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator([0.5, 1, 1.5, 2, 3, 5, 10, 20, 50]))
        axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.axvline(1.0, color=COLOURS[0], linewidth=1)
        axes.tick_params(labelsize=SMALL)
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.4, -0.6)


def _legend(figure, panels) -> None:
    """Draw one legend for all panels, below them: that of the panel with the most in it."""
    handles, labels = max((axes.get_legend_handles_labels() for axes in panels), key=lambda pair: len(pair[1]))
    figure.legend(handles, labels, fontsize=SMALL, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)


def _written(figure, title: str, path: Path) -> Path:
    figure.suptitle(title, fontsize=MEDIUM)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path
