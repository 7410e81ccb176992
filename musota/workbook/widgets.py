"""Interactive views in a notebook: the explorer, and a run while it trains.

Only the controls are widgets. Pictures and sentences are ordinary outputs that are updated in
place, so a saved notebook shows them without a kernel. Where nobody can use controls, they stand
alone.
"""

import html
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import ipywidgets as w
from IPython.display import HTML, Image, display
from matplotlib.figure import Figure

from musota.errors import MusotaError
from musota.files import write_bytes
from musota.lab.curves import plateau, plateau_start
from musota.lab.verdicts import compare
from musota.training.device import has_front_end
from musota.training.run import Run
from musota.workbook.plots import Curve, explored, training_curve
from musota.workbook.results import group_runs, label, titles_of
from musota.workbook.style import figure_png

# What the explorer can show: (records, column, label, place of an n-gram baseline, if any).
METRICS = {
    "valid perplexity": ("history", "ppl", "valid perplexity per token", float),
    "valid loss": ("history", "valid_loss", "valid loss (nats/token)", math.log),
    "valid accuracy": ("history", "accuracy", "valid top-1 accuracy", None),
    "training loss": ("steps", "loss", "training loss (nats/token)", None),
    "learning rate": ("steps", "learning_rate", "learning rate", None),
    "gradient norm": ("steps", "grad_norm", "gradient norm before clipping", None),
}
LIVE_SECONDS = 10  # between two pictures of a run while it trains
WIDE = {"style": {"description_width": "110px"}, "layout": {"width": "420px", "max_width": "100%"}}


class Output:
    """Something in the output of a cell, replaced in place when it is shown again."""

    handle = None

    def show(self, shown) -> None:
        if self.handle:
            self.handle.update(shown)
        else:
            self.handle = display(shown, display_id=True)


class Explorer:
    """Curves of models, all seeds of each, with their plateaus and the comparison with the first.
    Controls stand above the picture, which is saved at `path`; `about` is the line under it."""

    def __init__(self, runs: Sequence[Run], ngrams: Mapping[str, float], path: Path, about=""):
        groups = group_runs(run for run in runs if run.summary)
        titles = titles_of(groups)
        self.models = {titles[key]: group for key, group in groups.items()}
        self.ngrams = {name: ppl for name, ppl in ngrams.items() if name != "uniform"}
        self.path, self.about, self.picture, self.text = path, about, Output(), Output()
        longest = max([3, *(len(run.history) - 1 for run in runs)])
        slider, tick = {"continuous_update": False, **WIDE}, {"indent": False}
        names = [*self.models]
        self.chosen = w.SelectMultiple(options=names, value=names[:6], description="models", **WIDE)
        self.metric = w.Dropdown(options=[*METRICS], description="metric", **WIDE)
        self.smoothing = w.IntSlider(0, 0, 30, description="smoothing", **slider)
        self.window = w.IntSlider(3, 1, longest, description="plateau: epochs", **slider)
        self.least_gain = w.FloatSlider(1, min=0.1, max=10, description="… gain under %", **slider)
        self.log_x = w.Checkbox(False, description="x logarithmic", **tick)
        self.log_y = w.Checkbox(True, description="y logarithmic", **tick)
        button = w.Button(description="Save as PNG", icon="download")
        button.on_click(lambda _: self.save())
        columns = [
            [self.chosen, self.metric],
            [self.smoothing, self.window, self.least_gain],
            [self.log_x, self.log_y, button],
        ]
        for control in (*columns[0], *columns[1], self.log_x, self.log_y):
            control.observe(lambda _: self.draw(), "value")
        if has_front_end():
            layout = {"flex_flow": "row wrap", "max_width": "100%"}
            display(w.HBox([w.VBox(column) for column in columns], layout=layout))
        self.draw()
        write_bytes(self.path, self.png)

    def draw(self) -> None:
        """Picture and sentences anew; where nothing can be drawn the text says why."""
        try:
            figure, self.sentences = self._explored()
            self.png = figure_png(figure, self.about)
            self.picture.show(Image(data=self.png))
            self._tell(*self.sentences)
        except MusotaError as error:
            self._tell(str(error))

    def save(self) -> None:
        """Write the picture to `path`."""
        try:
            write_bytes(self.path, self.png)
            self._tell(*self.sentences, f"saved: {self.path}")
        except OSError as error:
            self._tell(*self.sentences, f"not saved: {self.path}: {error.strerror}")

    def _tell(self, *sentences: str) -> None:
        self.text.show(HTML("<br>".join(map(html.escape, sentences))))

    def _explored(self) -> tuple[Figure, list[str]]:
        if not self.chosen.value:
            raise MusotaError("Choose a model.")
        first, *others = chosen = [self.models[title] for title in self.chosen.value]
        rule = self.window.value, self.least_gain.value / 100
        records, column, name, place = METRICS[self.metric.value]
        how = records, column, self.smoothing.value
        figure = explored(
            [curve_of(run, *how, plateau_start(run, *rule)) for seeds in chosen for run in seeds],
            {name: place(ppl) for name, ppl in self.ngrams.items()} if place else {},
            ("epoch", name),
            "x" * self.log_x.value + "y" * self.log_y.value,
        )
        sentences = [f"{seeds[0].title}: {plateau(seeds[0], *rule)}" for seeds in chosen]
        alike = (other for other in others if other[0].valid_text == first[0].valid_text)
        return figure, sentences + [str(compare(first, other)) for other in alike]


def curve_of(
    run: Run, records: str, column: str, smoothing: int, plateau_epoch: int | None
) -> Curve:
    """A column of a run's records by epoch, with the plateau that starts at an epoch and with the
    run's events."""
    per_epoch = run.history.step.iloc[0] / run.history.epoch.iloc[0]
    table = run.history if records == "history" else run.steps
    values = table[column].set_axis(table.step / per_epoch)
    span = None if plateau_epoch is None else (plateau_epoch, run.history.epoch.iloc[-1])
    marks = [(step / per_epoch, event) for step, event in run.events]
    lines = (values,)
    if smoothing:  # centred, so that a falling curve does not lag
        lines = values.rolling(1 + 2 * smoothing, center=True, min_periods=1).mean(), values
    return Curve(run.name, label(run), *lines, plateau=span, marks=marks)


def live_view() -> Callable[[Run], None] | None:
    """For RunOptions(watch=…): the training curve and the last epochs, updated in place. None where
    nobody looks. A run that is only loaded shows nothing."""
    if not has_front_end():
        return None
    picture, table, due = Output(), Output(), 0.0

    def refresh(run: Run) -> None:
        nonlocal due
        is_last = len(run.history) == run.experiment.training.epochs
        if len(run.steps) and (time.monotonic() >= due or is_last):
            picture.show(Image(data=figure_png(training_curve(run), "")))
            if len(run.history):
                columns = ["epoch", "train_loss", "valid_loss", "ppl", "accuracy", "seconds"]
                shown = run.history[columns].tail(6)
                table.show(HTML(shown.to_html(index=False, float_format="%.4g")))
            due = time.monotonic() + LIVE_SECONDS

    return refresh
