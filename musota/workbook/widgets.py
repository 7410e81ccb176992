"""What reacts in a notebook: the explorer, the live view of a training run, the block view.

Pictures are PNGs in an Image widget whose value is replaced, so none stack up in any front end.
Only core widgets of ipywidgets 7.7 and 8. Where nobody watches, a static picture stands instead.
"""

import math
import os
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
from musota.workbook.naming import by_name, label_of
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
LIVE_SECONDS = 10  # between two pictures of a training run: drawing takes little of its time
# Boxes of ipywidgets 7 neither shrink nor scroll: without these they are cut off on the right.
_FITTING = {"max_width": "100%"}
_WRAPPED = {"flex_flow": "row wrap", **_FITTING}
_WIDE = {"width": "420px", **_FITTING}


class Panel:
    """Columns of controls, one picture, the text that follows from both, and a button that saves.

    `draw()` gives the figure and the sentences for the controls as they stand, or raises
    MusotaError where they make no sense. `about` is the line under the figure; `copy` is called
    after each saving, as `Workbook.push`.
    """

    def __init__(self, columns, draw, path, about="", copy=None):
        self.draw, self.path, self.about, self.copy = draw, Path(path), about, copy
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
        self.saved.value = ""

    def redraw(self) -> None:
        """Picture and text anew, or the reason as text where nothing can be drawn."""
        try:
            self._paint()
        except MusotaError as error:
            self.text.value = str(error)

    def save(self) -> None:
        try:
            self.path.write_bytes(self.image.value)
        except OSError as error:
            self.saved.value = f"not saved: {self.path}: {error.strerror}"
            return
        copied = not self.copy or self.copy()
        missing = "" if copied else ", but it could not be copied beside the results"
        self.saved.value = f"saved: {self.path}{missing}"

    def show(self, alone: str) -> None:
        """Save the picture and show the panel; where nobody watches say `alone` and show that."""
        self.save()
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

    Opens on `metric`, one of METRICS; `about` and `copy` as in Panel.
    """
    if not runs:
        print("No run has finished an epoch yet: there is nothing to explore.")
        return
    explorer = Explorer(runs, rungs, path, about, metric, copy)
    explorer.show("Nobody can turn controls here: this is the explorer's figure as it opens.")


class Explorer(Panel):
    """Curves of the runs chosen, and what the plateau rule as set says of them."""

    def __init__(self, runs, rungs, path, about="", metric="valid perplexity", copy=None):
        self.runs = {label_of(run): run for run in runs}
        self.rungs = {name: ppl for name, ppl in rungs.items() if name != "uniform"}
        first_seeds = [label_of(group[0]) for group in by_name(runs).values()]
        widest = max([curves.PLATEAU_EPOCHS, *(len(run.history) - 1 for run in runs)])
        wide = {"style": {"description_width": "110px"}, "layout": _WIDE}
        slider = {"continuous_update": False, **wide}
        tick = {"indent": False, "layout": {"width": "auto"}}
        self.chosen = ipywidgets.SelectMultiple(
            options=list(self.runs), value=first_seeds[:6], description="runs", **wide
        )
        self.metric = Dropdown(options=list(METRICS), value=metric, description="metric", **wide)
        self.unit = Dropdown(options=list(UNITS), description="x axis", **wide)
        self.smoothing = IntSlider(0, 0, 30, description="smoothing", **slider)
        window, gain = curves.PLATEAU_EPOCHS, 100 * curves.PLATEAU_GAIN
        self.window = IntSlider(window, 1, widest, description="plateau: epochs", **slider)
        self.least_gain = FloatSlider(gain, min=0.1, max=10, description="… gain under %", **slider)
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
            "x" * self.log_x.value + "y" * self.log_y.value,
        )
        sentences = [f"{label_of(run)}: {found[run].sentence}" for run in chosen]
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
    values = (history if records == "history" else steps).set_index(unit)[column]
    end = float(history[unit].iloc[-1])
    plateau = (float(history[unit][history.epoch == since].iloc[0]), end) if since else None
    passed = pd.concat([steps, history]).sort_values("step")
    later = [(passed[passed.step >= step][unit], text) for step, text in run.events]
    marks = [(float(places.iloc[0]), text) for places, text in later if len(places)]
    swings = curves.oscillation(run.steps, run.experiment.training.warmup_steps)
    if swings.verdict in ("oscillating", "diverging"):
        marks.append((end, swings.verdict))
    lines = (values,)
    if smoothing:  # from both sides, so that the curve does not lag behind where it falls
        window = values.rolling(1 + 2 * smoothing, center=True, min_periods=1)
        lines = window.mean(), values
    return figures.Curve(run.name, label_of(run), *lines, plateau=plateau, marks=marks)


def live_view() -> Callable[[Run], None] | None:
    """For `train(watch=…)`: curves and the last epochs, refreshed in place; None if nobody looks.
    A run that is only loaded shows none."""
    if not has_front_end():
        return None
    image, table = ipywidgets.Image(format="png", layout=_FITTING), HTML()
    image.layout.display = "none"  # until there is something to see
    box, due = VBox([image, table], layout=_FITTING), None

    def refresh(run: Run) -> None:
        nonlocal due
        if due is None:
            display(box)
            due = 0.0
        is_last = len(run.history) == run.experiment.training.epochs
        if not len(run.steps) or (time.monotonic() < due and not is_last):
            return
        image.value, image.layout.display = figure_png(figures.training_curve(run), ""), None
        if len(run.history):
            columns = ["epoch", "train_loss", "valid_loss", "ppl", "accuracy", "seconds"]
            table.value = run.history[columns].tail(6).to_html(index=False, float_format="%.4g")
        due = time.monotonic() + LIVE_SECONDS

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

    Shows at most 12 tokens, and says so; `about` and `copy` as in Panel. Raises MusotaError for a
    model without blocks or a sentence without a token.
    """
    probes.require_blocks(model)
    L, most = model.config.n_layer, min(12, model.config.max_seq_len)
    typed = ipywidgets.Text(sentence, description="text", continuous_update=False, layout=_WIDE)
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
