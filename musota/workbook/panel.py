"""Training seen in a notebook.

A panel is a line of progress and a picture, updated in place while somebody watches; the last
picture stays. Headless, only that one is drawn.
"""

import html
import os
import time
from collections.abc import Mapping
from contextlib import suppress

import psutil  # comes with accelerate
from IPython import get_ipython
from IPython.display import HTML, Image, display
from tqdm import tqdm

from musota.files import write_bytes
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


class RunPanel:
    """A line of progress above a picture of one run, with `about` under it; `ngrams` and `reported`
    as in `plots.training_curve`. Nothing is shown outside of a notebook."""

    def __init__(self, about: str, ngrams: Mapping[str, float], reported: bool):
        self.about, self.watched, self.how = about, has_front_end(), (ngrams, reported)
        self.line, self.picture = Output(), Output()
        self.due, self.pause = 0.0, FIRST_PAUSE

    def update(self, run: Run) -> None:
        """To be called after each record of the run. Draws soon at first, then less often."""
        now = time.monotonic()
        if len(run.steps) > 1 and now >= self.due:
            self.due, self.pause = now + self.pause, min(1.5 * self.pause, LONGEST_PAUSE)
            self.draw(run, running=True)

    def draw(self, run: Run, running: bool = False) -> None:
        """Show the run as it stands, and save the picture in its folder."""
        if in_notebook() and len(run.steps):
            done = 1.0 if run.ended else run.steps.step.iloc[-1] / run.total_steps
            png = figure_png(plots.training_curve(run, *self.how), self.about)
            with suppress(OSError):  # a full or read-only disk stops no training
                write_bytes(run.path / "training.png", png)
            bar = BAR.format(percent=100 * done, colour=BLUE) if done < 1 else ""
            self.line.show(HTML(f"{bar}<p>{run_text(run, done, running)}</p>"))
            self.picture.show(Image(data=png))


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
