"""What reacts in a notebook: the explorer, the live view of a training run, the block view.

Pictures are PNGs in an Image widget whose value is replaced, so none stack up in any front end.
Only core widgets of ipywidgets 7.7 and 8. Where nobody watches, a static picture stands instead.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path

import ipywidgets
import pandas as pd
import torch
from IPython.display import Image, display
from ipywidgets import HTML, Button, Checkbox, Dropdown, FloatSlider, HBox, IntSlider, VBox
from matplotlib.figure import Figure

from musota.data.tokenizer import TextTokenizer
from musota.errors import MusotaError
from musota.models.base import CausalLM
from musota.rules import curves
from musota.studies import probes
from musota.training.machine import has_front_end
from musota.training.runs import Run
from musota.workbook import figures, pictures
from musota.workbook.answers import plateau_of
from musota.workbook.evidence import Evidence
from musota.workbook.style import figure_png

# What can be shown: (records, column, label, where a rung's perplexity stands, if anywhere).
METRICS = {
    "valid perplexity": ("history", "ppl", "valid perplexity per token", float),
    "valid loss": ("history", "valid_loss", "valid loss (nats/token)", math.log),
    "valid accuracy": ("history", "accuracy", "valid top-1 accuracy", None),
    "training loss": ("steps", "loss", "training loss (nats/token)", None),
    "learning rate": ("steps", "learning_rate", "learning rate", None),
    "gradient norm": ("steps", "grad_norm", "gradient norm before clipping", None),
}
UNITS = {"epochs": "epoch", "tokens": "training tokens", "seconds": "seconds of training"}
LIVE_SECONDS = 3  # at least so long between two pictures of a training run
# Boxes of ipywidgets 7 neither shrink nor scroll: without these they are cut off on the right.
_FITTING = {"max_width": "100%"}
_WRAPPED = {"flex_flow": "row wrap", **_FITTING}


class Panel:
    """Columns of controls, one picture, the text that follows from both, and a button that saves.

    `draw()` gives the figure and the sentences for the controls as they stand, or raises
    MusotaError where they make no sense. `about` is the line under the figure; `copy` is called
    after each saving, as `Workbook.push`.
    """

    def __init__(self, columns, draw, path, about="", copy=None):
        self.draw, self.path, self.about, self.copy = draw, Path(path), about, copy
        self.one_at_a_time = threading.Lock()  # newer kernels may handle two controls at once
        self.button = Button(description="Save as PNG", icon="download")
        self.button.on_click(lambda _: self.save())
        for control in chain(*columns):
            control.observe(lambda _: self.redraw(), "value")
        self.image = ipywidgets.Image(format="png", layout=_FITTING)
        self.text, self.saved = HTML(), HTML()
        columns = [*columns[:-1], [*columns[-1], self.button]]
        controls = HBox([VBox(c) for c in columns], layout=_WRAPPED)
        self.box = VBox([controls, self.image, self.text, self.saved], layout=_FITTING)
        self._paint()

    def _paint(self) -> None:
        figure, sentences = self.draw()
        self.image.value = figure_png(figure, self.about)
        self.text.value = "<br>".join(sentences)

    def redraw(self) -> bool:
        """Picture and text anew; False, and the reason as text, where nothing can be drawn."""
        self.saved.value = ""
        with self.one_at_a_time:
            try:
                self._paint()
            except MusotaError as error:
                self.text.value = str(error)
                return False
        return True

    def save(self) -> None:
        """What the controls say, should its picture still be on its way, to the file given."""
        if self.redraw():
            self._write()

    def _write(self) -> None:
        try:
            self.path.write_bytes(self.image.value)
        except OSError as error:
            self.saved.value = f"not saved: {self.path}: {error.strerror}"
            return
        where = f"{self.path.name}, in the folder of the results" if self.copy else str(self.path)
        if self.copy and not self.copy():
            where = f"{self.path}, but it could not be copied beside the results"
        self.saved.value = f"saved: {where}"

    def show(self, alone: str) -> None:
        """Save the picture and show the panel; where nobody watches say `alone` and show that."""
        self._write()
        if has_front_end():
            display(self.box)
        else:
            print(alone)
            display(Image(data=self.image.value))
            print("\n".join([*self.text.value.split("<br>"), self.saved.value]))


def explore(
    runs: Sequence[Run],
    rungs: Mapping[str, float],
    path: str | os.PathLike,
    about: str = "",
    metric: str = "valid perplexity",
    copy: Callable[[], bool] | None = None,
) -> None:
    """Curves of runs with their plateaus, to turn and look at; also saved at `path`.

    Opens on `metric`, one of METRICS; `about` and `copy` as in Panel. Without a front end the
    static figure is shown.
    """
    if not runs:
        print("No run has finished an epoch yet: there is nothing to explore.")
        return
    explorer = Explorer(runs, rungs, path, about, metric, copy)
    explorer.show("Nobody can turn controls here: this is the explorer's figure as it opens.")


class Explorer(Panel):
    """Curves of the runs chosen, and what the plateau rule as set says of them."""

    def __init__(self, runs, rungs, path, about="", metric="valid perplexity", copy=None):
        self.runs = {figures.label_of(run): run for run in runs}
        self.rungs = {name: ppl for name, ppl in rungs.items() if name != "uniform"}
        first_seeds = [figures.label_of(group[0]) for group in figures.by_name(runs).values()]
        widest = max([curves.PLATEAU_EPOCHS, *(len(run.history) - 1 for run in runs)])
        wide = {"style": {"description_width": "110px"}}
        slider = {"continuous_update": False, **wide}
        tick = {"indent": False, "layout": {"width": "auto"}}
        self.chosen = ipywidgets.SelectMultiple(
            options=list(self.runs), value=first_seeds[:6], rows=max(2, min(6, len(self.runs))),
            description="runs", layout={"width": "420px"}, **wide,
        )  # fmt: skip
        self.metric = Dropdown(options=list(METRICS), value=metric, description="metric", **wide)
        self.unit = Dropdown(options=list(UNITS), description="x axis", **wide)
        self.smoothing = IntSlider(0, 0, 30, description="smoothing", **slider)
        self.window = IntSlider(
            curves.PLATEAU_EPOCHS, 1, widest, description="plateau: epochs", **slider
        )
        self.least_gain = FloatSlider(
            100 * curves.PLATEAU_GAIN, min=0.1, max=10, step=0.1, description="… gain under %",
            **slider,
        )  # fmt: skip
        self.log_x = Checkbox(False, description="x logarithmic", **tick)
        self.log_y = Checkbox(True, description="y logarithmic", **tick)
        self.show_rungs = Checkbox(bool(rungs), description="rungs", **tick)
        columns = [
            [self.chosen, self.metric, self.unit],
            [self.smoothing, self.window, self.least_gain],
            [self.log_x, self.log_y, self.show_rungs],
        ]
        super().__init__(columns, self._explored, path, about, copy)

    def _explored(self) -> tuple[Figure, list[str]]:
        chosen = [self.runs[label] for label in self.chosen.value]
        rule = {"window": self.window.value, "least_gain": self.least_gain.value / 100}
        found = {run: plateau_of(run, **rule) for run in chosen}
        records, column, label, place = METRICS[self.metric.value]
        how = records, column, self.unit.value, self.smoothing.value
        rungs = self.rungs if place and self.show_rungs.value else {}
        figure = figures.explored(
            [curve_of(run, *how, found[run].since) for run in chosen],
            {name: place(ppl) for name, ppl in rungs.items()},
            (UNITS[self.unit.value], label),
            self.log_x.value,
            self.log_y.value,
        )
        sentences = [f"{figures.label_of(run)}: {found[run].sentence}" for run in chosen]
        compared = Evidence(self.path.parent, tuple(chosen)).compared
        sentences += [finding.sentence for finding, _ in compared.values()]
        return figure, sentences or ["Choose a run."]


def curve_of(
    run: Run, records: str, column: str, unit: str, smoothing: int = 0, since: int | None = None
) -> figures.Curve:
    """A column of a run's records over epochs, tokens or seconds; `since`: its plateau's epoch."""
    per_epoch = run.history.step.iloc[0] / run.history.epoch.iloc[0]
    history = run.history.assign(epochs=run.history.step / per_epoch)
    steps = run.steps.assign(epochs=run.steps.step / per_epoch)
    table = history if records == "history" else steps
    values = table.set_index(unit)[column]
    smoothing = 0 if column == "learning_rate" else smoothing  # that has no noise
    end = float(history[unit].iloc[-1])
    plateau = (float(history[unit][history.epoch == since].iloc[0]), end) if since else None
    passed = pd.concat([steps, history]).sort_values("step")
    later = [(passed[passed.step >= step][unit], text) for step, text in run.events]
    marks = [(float(places.iloc[0]), text) for places, text in later if len(places)]
    swings = curves.oscillation(run.steps, run.experiment.training.warmup_steps)
    if swings.verdict in ("oscillating", "diverging"):
        marks.append((end, swings.verdict))
    lines = (_smoothed(values, smoothing), values) if smoothing else (values,)
    return figures.Curve(run.name, figures.label_of(run), *lines, plateau=plateau, marks=marks)


def _smoothed(y: pd.Series, halflife: float) -> pd.Series:
    """Averaged from both sides, so that the curve does not lag behind where it falls."""
    backward = y[::-1].ewm(halflife=halflife).mean()[::-1]
    return (y.ewm(halflife=halflife).mean() + backward) / 2


def live_view() -> Callable[[Run], None] | None:
    """For `train(watch=…)`: curves and the last epochs, refreshed in place; None if nobody looks.

    Drawing takes a twentieth of the time at most.
    """
    if not has_front_end():
        return None
    image, table = ipywidgets.Image(format="png", layout=_FITTING), HTML()
    image.layout.display = "none"  # until there is something to see
    box, due = VBox([image, table], layout=_FITTING), None

    def refresh(run: Run) -> None:
        nonlocal due
        if due is None:  # a run that is only loaded shows none
            display(box)
            due = 0.0
        if not len(run.steps):
            return
        started = time.monotonic()
        is_last = len(run.history) == run.experiment.training.epochs
        if started < due and not is_last:
            return
        image.value, image.layout.display = figure_png(figures.training_curve(run), ""), None
        if len(run.history):
            columns = ["epoch", "train_loss", "valid_loss", "ppl", "accuracy", "seconds"]
            table.value = run.history[columns].tail(6).to_html(index=False, float_format="%.4g")
        spent = time.monotonic() - started
        due = time.monotonic() + max(LIVE_SECONDS, 20 * spent)

    return refresh


def block_view(
    model: CausalLM,
    tokenizer: TextTokenizer,
    sentence: str,
    path: str | os.PathLike,
    about: str,
    copy: Callable[[], bool] | None = None,
) -> None:
    """The matrices and gates of a sentence's tokens, for any sentence; also saved at `path`.

    Shows at most 12 tokens, and says so; `about` and `copy` as in Panel. Without a front end the
    picture of `sentence` is shown. Raises MusotaError for a model without blocks or a sentence
    without a token.
    """
    probes.require_blocks(model)
    L, most = model.config.n_layer, min(12, model.config.max_seq_len)
    typed = ipywidgets.Text(sentence, description="sentence", continuous_update=False,
                            layout={"width": "480px", **_FITTING})  # fmt: skip
    layer = IntSlider(L, 0, L, description="after layer", continuous_update=False)

    def draw() -> tuple[Figure, list[str]]:
        ids = tokenizer.encode(typed.value)
        if not len(ids):
            raise MusotaError("The sentence is empty: type a few words.")
        note = [f"the first {most} of {len(ids)} tokens"] if len(ids) > most else []
        inside = probes.look_inside(model, torch.from_numpy(ids[:most]))
        tokens = [tokenizer.decode([int(token)]).strip() or "␣" for token in ids[:most]]
        cells, gate = inside["cells"].numpy(), inside["gate"].numpy()
        return pictures.block_view(cells, gate, tokens, model.config.layout, layer.value), note

    panel = Panel([[typed], [layer], []], draw, path, about, copy)
    panel.show("Nobody can type here: this is the block view of the sentence given.")
