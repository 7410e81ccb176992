"""How figures look and how they are saved."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

from musota.files import write_whole


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
