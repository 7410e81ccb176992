"""How figures look and how they are saved.

Colours are Okabe and Ito's, told apart by people who see no red or no green; line styles, markers
and hatches repeat the distinction for black-and-white prints.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from musota.files import write_whole
from musota.rules.stats import Interval

THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")
SHADES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++", "oo")


def new_figure(width: float = 9.0, height: float = 4.0, columns: int = 1, **gridspec):
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    axes = figure.subplots(1, columns, gridspec_kw=gridspec or None)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_rungs(axis, rungs: Mapping[str, float], between: str = " ") -> None:
    """Lines across at the rungs, their names on the right, pushed apart where they are close."""
    for level in rungs.values():
        axis.axhline(level, color="0.45", linewidth=0.9, linestyle=(0, (1, 2)))
    axis.figure.draw_without_rendering()  # for where the levels come to stand
    points, last = 72 / axis.figure.dpi, -np.inf
    for name, level in sorted(rungs.items(), key=lambda rung: rung[1]):
        text = f"{name}{between}{level:,.4g}"
        height = axis.transData.transform((0, level))[1] * points
        last = max(height, last + 10 * (1 + text.count("\n")))
        axis.annotate(text, (1.01, level), (0, last - height), xycoords=("axes fraction", "data"),
                      textcoords="offset points", va="center", fontsize=8, color="0.3")  # fmt: skip


def draw_intervals(axis, intervals: Sequence[Interval | None], labels, styles=()) -> None:
    """A row for each interval, from the top, around a line at 0; None leaves its row empty."""
    for row, interval in enumerate(intervals):
        colour, marker, fill = styles[row] if styles else ("#0072B2", "o", "full")
        if interval is None:
            axis.text(0, row, "diverges ", ha="right", va="center", fontsize=8)
            continue
        if np.isfinite(interval.high - interval.low):
            axis.plot([interval.low, interval.high], [row, row], color=colour, linewidth=2.5)
        style = {"fillstyle": fill, "markersize": 8, "markeredgewidth": 1.5}
        axis.plot(interval.mean, row, marker, color=colour, markerfacecoloralt="white", **style)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(intervals)), labels)
    axis.set_ylim(len(intervals) - 0.5, -0.5)
    axis.grid(axis="x", color="0.9")


def figure_png(figure: Figure, about: str) -> bytes:
    """The figure as PNG, with `about` in small print under it."""
    if about:
        figure.supxlabel(about, fontsize=7.5, color="0.35", x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save_figure(figure: Figure, path: Path, about: str) -> None:
    """Write `figure_png`, whole or not at all."""
    data = figure_png(figure, about)
    write_whole(path, lambda target: target.write_bytes(data))
