"""Training seen in a notebook: one panel for a run, one for a grid of runs.

A panel is a line of progress and a picture, updated in place while somebody watches; the last
picture stays. Headless, only that one is drawn.
"""

import html
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil  # comes with accelerate
from IPython import get_ipython
from IPython.display import HTML, Image, display
from matplotlib.figure import Figure
from tqdm import tqdm

from musota.files import write_bytes
from musota.lab.grid_runs import Row, print_run
from musota.training.run import Run
from musota.workbook import plots
from musota.workbook.style import BLUE, figure_png

HEADLESS = "MUSOTA_HEADLESS"  # set where nobody watches a notebook while it runs
FIRST_PAUSE, LONGEST_PAUSE = 1, 10  # seconds between two pictures
BAR = (
    '<div style="max-width:46em; border:1px solid #8888; border-radius:4px">'
    '<div style="width:{percent:.1f}%; height:0.6em; background:{colour}"></div></div>'
)


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    return hasattr(get_ipython(), "kernel")


def has_front_end() -> bool:
    """Whether somebody sees this notebook while it runs, as far as a kernel can know."""
    if os.environ.get(HEADLESS) or not in_notebook():
        return False
    with suppress(psutil.Error):
        parent = psutil.Process().parent()  # None in the first process of a container
        started_by = " ".join(parent.cmdline() if parent else ())
        return not any(name in started_by for name in ("papermill", "nbconvert", "nbclient"))
    return True


class Output:
    """One output of a cell, replaced in place when it is shown again."""

    handle = None

    def show(self, shown) -> None:
        if self.handle:
            self.handle.update(shown)
        else:
            self.handle = display(shown, display_id=True)


class Panel:
    """A line of progress above a picture, with `about` under it. Nothing is shown outside of a
    notebook."""

    def __init__(self, about: str):
        self.about, self.watched = about, has_front_end()
        self.line, self.picture = Output(), Output()
        self.due, self.pause = 0.0, FIRST_PAUSE

    def is_due(self) -> bool:
        """Whether to draw again: soon at first, then at longer intervals."""
        now = time.monotonic()
        if now < self.due:
            return False
        self.due, self.pause = now + self.pause, min(1.5 * self.pause, LONGEST_PAUSE)
        return True

    def show(self, done: float, text: str, figure: Figure, path: Path | None = None) -> None:
        """Show a bar of which the share `done` is filled, a text, and a figure, saved at `path`."""
        png = figure_png(figure, self.about)
        if path:
            with suppress(OSError):  # a full or read-only disk stops no training
                write_bytes(path, png)
        bar = BAR.format(percent=100 * done, colour=BLUE) if done < 1 else ""
        self.line.show(HTML(f"{bar}<p>{text}</p>"))
        self.picture.show(Image(data=png))


class RunPanel(Panel):
    """The panel of one run; `ngrams` and `reported` as in `plots.training_curve`."""

    def __init__(self, about: str, ngrams: Mapping[str, float], reported: bool):
        super().__init__(about)
        self.how = ngrams, reported

    def update(self, run: Run) -> None:
        """To be called after each record of the run."""
        if len(run.steps) > 1 and self.is_due():
            self.draw(run, running=True)

    def draw(self, run: Run, running: bool = False) -> None:
        """Show the run as it stands, and save the picture in its folder."""
        if in_notebook() and len(run.steps):
            done = 1.0 if run.ended else run.steps.step.iloc[-1] / run.total_steps
            figure = plots.training_curve(run, *self.how)
            self.show(done, run_text(run, done, running), figure, run.path / "training.png")


def run_text(run: Run, done: float, running: bool) -> str:
    """How far a run is, what it reached, and the last text that it wrote, as HTML."""
    seconds, epochs = run.steps.seconds.iloc[-1], run.experiment.training.epochs
    parts = [f"<strong>{html.escape(run.title)}</strong>"]
    if run.diverged:
        parts.append(f"diverged at step {run.diverged_at}")
    elif run.finished:
        parts.append(f"{epochs} epochs in {tqdm.format_interval(seconds)}")
    else:
        epoch = min(epochs, len(run.history) + 1)
        left = f"{tqdm.format_interval(seconds / done - seconds)} left" if running else "stopped"
        parts += [f"epoch {epoch} of {epochs}", left]
    if run.summary:
        best = f"best valid PPL {run.summary['ppl']:,.0f}, accuracy {run.summary['accuracy']:.1%}"
        parts.append(f"{best}, after epoch {run.summary['best_epoch']}")
    if len(run.samples):
        sample = run.samples.iloc[-1]
        prompt, text = html.escape(sample.prompt), html.escape(sample.text)
        parts.append(f"it writes: <em>{prompt}</em> {text}")
    return " · ".join(parts)


class GridPanel(Panel):
    """The panel of a grid of runs; its methods take what `grid_runs.print_run` takes."""

    def update(self, row: Row | None, rows: Mapping, left: int) -> None:
        """To be called after each run."""
        if self.watched:
            self.draw(rows, left)
        else:
            print_run(row, rows, left)

    def draw(self, rows: Mapping, left: int) -> None:
        """Draw the grid as it stands."""
        if in_notebook():
            total = sum(map(len, rows.values()))
            text = f"{total - left} of {total} runs are done."
            self.show(1 - left / total, text, plots.grid(rows))
