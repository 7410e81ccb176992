"""How figures look and how they are saved. Colours are Okabe and Ito's, told apart by people who
see no red or no green; line styles, markers and hatches say the same in black and white."""

import io
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from PIL import Image  # comes with matplotlib

from musota.files import write_bytes
from musota.plan.registry import style_of
from musota.rules.stats import Interval

BLUE, ORANGE, RED, GREEN, GREY = "#0072B2", "#E69F00", "#D55E00", "#009E73", "#999999"
SHADES = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", RED, "#F0E442", GREY)
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++", "oo")
PLAIN = FuncFormatter(lambda value, _: f"{value:,.10g}")
DOTTED = {"color": "0.45", "linewidth": 0.9, "linestyle": (0, (1, 2))}  # a rung


def new_figure(width: float, height: float, columns: int = 1, grid: str = ""):
    """A figure and its axis or axes, side by side; `grid` is x, y or both."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    axes = figure.subplots(1, columns)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
        if grid:
            axis.grid(axis=grid, color="0.9")
    return figure, axes


def styles_of(names: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """Colour, line style and marker of each: its row's; what has no row, or not alone, takes its
    turn."""
    names, styles = list(dict.fromkeys(names)), {}
    for name in sorted(names, key=lambda name: "," in name):  # a row before what is changed in it
        own = style_of(name.split(",")[0])
        if own not in (style_of(""), *styles.values()):
            styles[name] = own
    used = {part for style in styles.values() for part in style}
    colours, markers = ([p for p in of if p not in used] or of for of in (SHADES, "X*dph<>P"))
    others = [name for name in names if name not in styles]
    for i, name in enumerate(others):
        styles[name] = colours[i % len(colours)], ":", markers[i % len(markers)]
    return {name: styles[name] for name in names}


def wrapped(title: str, width: int = 36) -> str:
    """A title on lines that leave room for the picture: the names of changed runs are long."""
    return "\n".join(textwrap.wrap(title, width, break_long_words=False, break_on_hyphens=False))


def note(axis, text: str, at: tuple, offset: tuple = (0, 0), **look) -> None:
    """Small print at a place, moved by so many points."""
    axis.annotate(text, at, offset, textcoords="offset points", **{"fontsize": 8, **look})


def logarithmic(axis, lowest: float, highest: float) -> None:
    """A logarithmic y axis with round numbers, of four decades at most (a rate may end at 0)."""
    axis.set_yscale("log")
    if lowest < highest / 1e4:
        axis.set_ylim(bottom=highest / 1e4)
    elif highest < 100 * lowest:  # few decades: round numbers, not powers of ten
        few, more = MaxNLocator(8, steps=[1, 2, 5, 10]), LogLocator(subs=(1, 1.5, 2, 3, 5, 7))
        axis.yaxis.set_major_locator(few if highest < 3 * lowest else more)
        axis.minorticks_off()
    axis.yaxis.set_major_formatter(PLAIN)


def draw_rungs(axis, rungs: Mapping[str, float], between: str = " ") -> None:
    """Lines across at the rungs, their names on the right, pushed apart where they are close."""
    for level in rungs.values():
        axis.axhline(level, **DOTTED)
    axis.figure.draw_without_rendering()  # for where the levels come to stand
    points, last = 72 / axis.figure.dpi, -np.inf
    for name, level in sorted(rungs.items(), key=lambda rung: rung[1]):
        text = f"{name}{between}{level:,.4g}"
        height = axis.transData.transform((0, level))[1] * points
        last = max(height, last + 10 * (1 + text.count("\n")))
        place = {"xycoords": ("axes fraction", "data"), "va": "center", "color": "0.3"}
        note(axis, text, (1.01, level), (0, last - height), **place)


def draw_intervals(
    axis, rows: Mapping[str, Interval | None], notes: Iterable[str] = (), styles: Sequence = ()
) -> None:
    """A row for each interval, from the top, around 0, its note on the right; None diverges."""
    for row, interval in enumerate(rows.values()):
        colour, marker, fill = styles[row] if styles else (BLUE, "o", "full")
        if interval is None:
            axis.text(0, row, "diverges ", ha="right", va="center", fontsize=8)
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
    """The figure as PNG, with `about` in small print under it."""
    if about:
        figure.supxlabel(about, fontsize=7.5, color="0.35", x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save_figure(figure: Figure, path: Path, about: str) -> None:
    """Write `figure_png` with a palette, a third of the bytes; whole or not at all."""
    image = Image.open(io.BytesIO(figure_png(figure, about))).convert("RGB")
    image = image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(small := io.BytesIO(), "PNG", optimize=True)
    write_bytes(path, small.getvalue())
