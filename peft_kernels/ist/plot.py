"""Draws importance over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


def draw(steps: Sequence[int], importance: Sequence[Sequence[float]], updates: Sequence[int], path: Path) -> Path:
    """Draw a heat map of σ(−I), layers from bottom to top, beside bars of how often each layer trained (PNG).

    Args:
        steps: the step of each estimate.
        importance: σ(−I) of each layer after each estimate, [estimates][L].
        updates: in how many steps each layer trained, [L].
    """
    count = len(updates)
    figure = Figure(figsize=(9, max(2.5, 0.18 * count + 1.5)), layout="constrained")
    heat, bars = figure.subplots(1, 2, sharey=True, width_ratios=[3, 1])
    columns = [[column[layer] for column in importance] for layer in range(count)]
    image = heat.imshow(
        columns, aspect="auto", origin="lower", interpolation="nearest", cmap=matplotlib.colormaps["cividis"],
        extent=(-0.5, len(steps) - 0.5, -0.5, count - 0.5),
    )  # fmt: skip
    shown = range(0, len(steps), max(1, len(steps) // 8))
    heat.set_xticks(list(shown), [steps[index] for index in shown])
    heat.set(xlabel="step of the estimate", ylabel="layer", title="importance σ(−I)")
    figure.colorbar(image, ax=heat)
    bars.barh(range(count), updates, color="#0072B2")
    bars.set(xlabel="steps in which it trained")
    figure.savefig(path, dpi=130)
    return path
