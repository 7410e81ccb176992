"""The look of figures, and how they are saved. The colours are Okabe and Ito's colour-blind safe
palette; line styles, markers and hatches carry the same information in black and white."""

import io
import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from PIL import Image  # installed with matplotlib

from musota.files import write_bytes
from musota.lab.stats import Interval
from musota.registry import REGISTRY

BLUE, ORANGE, RED, GREEN, GREY = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#999999"
SHADES = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", RED, "#F0E442", GREY)
LINES = (*SHADES[:6], "#882255", "#444444")  # for lines, which yellow makes hard to see
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++", "oo")
PLAIN = FuncFormatter(lambda value, _: f"{value:,.10g}")


def new_figure(width: float, height: float, columns: int = 1, grid: str = ""):
    """A figure and its axis, or its axes side by side; `grid` is x, y or both."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    axes = figure.subplots(1, columns)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
        if grid:
            axis.grid(axis=grid, color="0.9")
    return figure, axes


def styles_of(names: Sequence[str]) -> list[tuple[str, str, str]]:
    """Colour, line style and marker for each name. A name of the registry has the style of its row,
    the first time; all others have styles that are not in use."""
    fixed = {name: REGISTRY[name].style for name in names if name in REGISTRY}
    used = {part for look in fixed.values() for part in look}
    colours, markers = ([p for p in of if p not in used] or of for of in (LINES, "X*dph<>P"))
    n, m = len(colours), len(markers)
    free = ((colours[i % n], ":", markers[(i % n + i // n) % m]) for i in itertools.count())
    return [fixed.pop(name, None) or next(free) for name in names]


def literal(text: str) -> str:
    """`text` that matplotlib shows as it is: no "$" is mathematics, no leading "_" hides it."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def wrapped(title: str, width: int = 36) -> str:
    """A literal title, wrapped into lines."""
    lines = textwrap.wrap(title, width, break_on_hyphens=False)
    return literal("\n".join(lines))


def note(axis, text: str, at: tuple, offset: tuple = (0, 0), **look) -> None:
    """Writes small print at a place, moved by `offset` points."""
    axis.annotate(text, at, offset, textcoords="offset points", **{"fontsize": 8, **look})


def logarithmic(axis, lowest: float, highest: float, cut: str = "top") -> None:
    """Makes the y axis logarithmic, with round numbers and four decades at most; what is beyond
    them at the top (or bottom) is cut off."""
    axis.set_yscale("log")
    if lowest < highest / 1e4:
        axis.set_ylim(**{cut: 1e4 * lowest if cut == "top" else highest / 1e4})
    elif highest < 100 * lowest:  # few decades: round numbers, not powers of ten
        few, more = MaxNLocator(8, steps=[1, 2, 5, 10]), LogLocator(subs=(1, 1.5, 2, 3, 5, 7))
        axis.yaxis.set_major_locator(few if highest < 3 * lowest else more)
        axis.minorticks_off()
    axis.yaxis.set_major_formatter(PLAIN)


def draw_ngrams(axis, ngrams: Mapping[str, float], between: str = " ") -> None:
    """Draws a line across for each n-gram baseline that does not flatten the curves, its name on
    the right; names that would overlap are moved apart."""
    highest = 2 * axis.dataLim.y1 if axis.get_autoscaley_on() else axis.get_ylim()[1]
    ngrams = {name: level for name, level in ngrams.items() if level <= highest}
    for level in ngrams.values():
        axis.axhline(level, color="0.45", linewidth=0.9, linestyle=(0, (1, 2)))
    axis.figure.draw_without_rendering()  # for the positions of the lines
    points, last = 72 / axis.figure.dpi, -np.inf
    for name, level in sorted(ngrams.items(), key=lambda baseline: baseline[1]):
        text = f"{name}{between}{format(level, ',.0f' if level > 999 else '.4g')}"
        height = axis.transData.transform((0, level))[1] * points
        last = max(height, last + 10 * (1 + text.count("\n")))
        place = {"xycoords": ("axes fraction", "data"), "va": "center", "color": "0.3"}
        note(axis, text, (1.01, level), (0, last - height), **place)


def draw_intervals(
    axis, rows: Mapping[str, Interval | None], notes: Iterable[str] = (), styles: Sequence = ()
) -> None:
    """Draws a row for each interval, from the top, with its note on the right; None diverged."""
    for row, interval in enumerate(rows.values()):
        colour, marker, fill = styles[row] if styles else (BLUE, "o", "full")
        if interval is None:
            axis.text(0, row, "a seed diverges ", ha="right", va="center", fontsize=8)
            continue
        if np.isfinite(interval.high - interval.low):
            axis.plot([interval.low, interval.high], [row, row], color=colour, linewidth=2.5)
        look = {"fillstyle": fill, "markersize": 8, "markeredgewidth": 1.5}
        axis.plot(interval.mean, row, marker, color=colour, markerfacecoloralt="white", **look)
    for row, text in enumerate(notes):
        axis.text(1.01, row, text, transform=axis.get_yaxis_transform(), va="center", fontsize=8)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)


def figure_png(figure: Figure, about: str) -> bytes:
    """The figure as PNG, with `about` in small print under it. Its palette of 256 colours takes a
    third of the bytes."""
    if about:
        figure.supxlabel(literal(about), fontsize=7.5, color="0.35", x=0.01, ha="left")
    figure.savefig(drawn := io.BytesIO(), format="png")
    image = Image.open(drawn).convert("RGB")
    image = image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(small := io.BytesIO(), "PNG", optimize=True)
    return small.getvalue()


def save_figure(figure: Figure, path: Path, about: str) -> None:
    """Write `figure_png` to a file."""
    write_bytes(path, figure_png(figure, about))
