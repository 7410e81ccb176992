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
from pathlib import Path

import ipywidgets
import pandas as pd
import torch
from IPython.display import Image, display
from matplotlib.figure import Figure

from musota.data.tokenizer import TextTokenizer
from musota.errors import MusotaError
from musota.models.base import CausalLM
from musota.rules import curves
from musota.studies import probes
from musota.training.machine import has_front_end
from musota.training.runs import Run
from musota.workbook import figures, pictures
from musota.workbook.evidence import PAIRS, Evidence, plateau_of
from musota.workbook.pages import figure_png, save_figure

# What can be shown: (records, column, label, whether the rungs apply and in which unit).
METRICS = {
    "valid perplexity": ("history", "ppl", "valid perplexity per token", "ppl"),
    "valid loss": ("history", "valid_loss", "valid loss (nats/token)", "nats"),
    "valid accuracy": ("history", "accuracy", "valid top-1 accuracy", None),
    "training loss": ("steps", "loss", "training loss (nats/token)", None),
    "learning rate": ("steps", "learning_rate", "learning rate", None),
    "gradient norm": ("steps", "grad_norm", "gradient norm before clipping", None),
}
UNITS = {"epochs": "epoch", "tokens": "training tokens", "seconds": "seconds of training"}
LIVE_SECONDS = 3  # at least so long between two pictures of a training run


def explore(
    runs: Sequence[Run],
    rungs: Mapping[str, float],
    path: str | os.PathLike,
    about: str = "",
    metric: str = "valid perplexity",
    copy: Callable[[], bool] | None = None,
) -> None:
    """Curves of runs with their plateaus, to turn and look at; also saved at `path`.

    Opens on `metric`, one of METRICS. `about` is the line under the figure; `copy` is called after
    each saving, as `Workbook.push`. Without a front end the static figure is shown.
    """
    if not runs:
        print("No run has finished an epoch yet: there is nothing to explore.")
        return
    explorer = Explorer(runs, rungs, path, about, metric, copy)
    explorer.save()
    if has_front_end():
        display(explorer.box)
    else:
        print("Nobody can turn controls here: this is the explorer's figure as it opens.")
        display(Image(data=explorer.image.value))
        print(explorer.sentence)


class Explorer:
    """Controls, one picture, and the sentence that follows from both."""

    def __init__(self, runs, rungs, path, about="", metric="valid perplexity", copy=None):
        self.runs = {figures.label_of(run): run for run in runs}
        self.rungs, self.path, self.about, self.copy = rungs, Path(path), about, copy
        self.sentence = ""
        wide = {"style": {"description_width": "110px"}}
        longest = max(len(run.history) for run in runs)
        first = {run.name: label for label, run in reversed(self.runs.items())}  # seed of a name
        self.chosen = ipywidgets.SelectMultiple(
            options=list(self.runs),
            value=list(first.values())[::-1][:6],
            rows=max(2, min(6, len(self.runs))),
            description="runs",
            layout={"width": "420px"},
            **wide,
        )
        self.metric = ipywidgets.Dropdown(
            options=list(METRICS), value=metric, description="metric", **wide
        )
        self.unit = ipywidgets.Dropdown(options=list(UNITS), description="x axis", **wide)
        slider = {"continuous_update": False, **wide}
        self.smoothing = ipywidgets.IntSlider(0, 0, 30, description="smoothing", **slider)
        self.window = ipywidgets.IntSlider(
            curves.PLATEAU_EPOCHS,
            1,
            max(curves.PLATEAU_EPOCHS, longest - 1),
            description="plateau: epochs",
            **slider,
        )
        self.least_gain = ipywidgets.FloatSlider(
            100 * curves.PLATEAU_GAIN, min=0.1, max=10, step=0.1, description="… gain under %",
            **slider,
        )  # fmt: skip
        tick = {"indent": False, "layout": {"width": "auto"}}
        self.log_x = ipywidgets.Checkbox(False, description="x logarithmic", **tick)
        self.log_y = ipywidgets.Checkbox(True, description="y logarithmic", **tick)
        self.show_rungs = ipywidgets.Checkbox(bool(rungs), description="rungs", **tick)
        self.button = ipywidgets.Button(description="Save as PNG", icon="download")
        self.image, self.text = _picture(), ipywidgets.HTML()
        self.saved = ipywidgets.HTML()
        self.controls = [
            self.chosen, self.metric, self.unit, self.smoothing, self.window, self.least_gain,
            self.log_x, self.log_y, self.show_rungs,
        ]  # fmt: skip
        for control in self.controls:
            control.observe(lambda _: self.draw(), "value")
        self.button.on_click(lambda _: self.save())
        rows, ticks = ipywidgets.VBox, [self.log_x, self.log_y, self.show_rungs, self.button]
        self.box = rows(
            [
                ipywidgets.HBox(
                    [
                        rows([self.chosen, self.metric, self.unit]),
                        rows([self.smoothing, self.window, self.least_gain]),
                        rows(ticks),
                    ],
                    layout=_WRAPPED,
                ),
                self.image,
                self.text,
                self.saved,
            ],
            layout=_FITTING,
        )
        self.draw()

    def draw(self) -> None:
        """Picture and sentence for the controls as they stand."""
        chosen = [self.runs[label] for label in self.chosen.value]
        rule = {"window": self.window.value, "least_gain": self.least_gain.value / 100}
        found = {run: plateau_of(run, **rule) for run in chosen}
        records, column, label, unit_of_rungs = METRICS[self.metric.value]
        rungs = {name: ppl for name, ppl in self.rungs.items() if name != "uniform"}
        if not self.show_rungs.value or unit_of_rungs is None:
            rungs = {}
        elif unit_of_rungs == "nats":
            rungs = {name: math.log(ppl) for name, ppl in rungs.items()}
        figure = figures.explored(
            [self._curve(run, found[run], records, column) for run in chosen],
            rungs,
            (UNITS[self.unit.value], label),
            self.log_x.value,
            self.log_y.value,
        )
        self.image.value = figure_png(figure, self.about)
        sentences = [f"{figures.label_of(run)}: {found[run].sentence}" for run in chosen]
        evidence = Evidence(self.path.parent, tuple(chosen))
        sentences += [pair[0].sentence for name in PAIRS if (pair := evidence.compare(name))]
        self.sentence = "\n".join(sentences or ["Choose a run."])
        self.text.value = "<br>".join(sentences or ["Choose a run."])
        self.saved.value = ""

    def _curve(self, run: Run, plateau, records: str, column: str) -> figures.Curve:
        table, history = getattr(run, records), run.history
        per_epoch = history.step.iloc[0] / history.epoch.iloc[0]
        unit = self.unit.value

        def on_axis(frame: pd.DataFrame) -> pd.Series:
            return frame.step / per_epoch if unit == "epochs" else frame[unit]

        x, y = on_axis(table), table[column]
        smooth = 0 if column == "learning_rate" else self.smoothing.value  # that has no noise
        ends = on_axis(history)
        span = None
        if plateau.since:
            span = float(ends[history.epoch == plateau.since].iloc[0]), float(ends.iloc[-1])
        steps = pd.concat([run.steps, history])[["step", "tokens", "seconds"]].sort_values("step")
        events = [(on_axis(steps[steps.step >= step].head(1)), text) for step, text in run.events]
        marks = [(float(place.iloc[0]), text) for place, text in events if len(place)]
        swings = curves.oscillation(run.steps, run.experiment.training.warmup_steps)
        if swings.verdict in ("oscillating", "diverging"):
            marks.append((float(ends.iloc[-1]), swings.verdict))
        return figures.Curve(
            run.name,
            figures.label_of(run),
            x.to_numpy(float),
            (_smoothed(y, smooth) if smooth else y).to_numpy(float),
            y.to_numpy(float) if smooth else None,
            span,
            tuple(marks),
        )

    def save(self) -> None:
        """The picture as it stands, to the file given."""
        self.saved.value = _save(self.image.value, self.path, self.copy)


# Boxes of ipywidgets 7 neither shrink nor scroll: without these they are cut off on the right.
_FITTING = {"max_width": "100%"}
_WRAPPED = {"flex_flow": "row wrap", **_FITTING}


def _picture(value: bytes = b"") -> ipywidgets.Image:
    return ipywidgets.Image(value=value, format="png", layout=_FITTING)


def _save(picture: bytes, path: Path, copy: Callable[[], bool] | None) -> str:
    """Write a picture and copy it where results belong; returns what to tell the reader."""
    try:
        path.write_bytes(picture)
    except OSError as error:
        return f"not saved: {path}: {error.strerror}"
    if copy and not copy():
        return f"saved: {path}, but it could not be copied beside the results"
    return f"saved: {path.name}, in the folder of the results" if copy else f"saved: {path}"


def _smoothed(y: pd.Series, halflife: float) -> pd.Series:
    """Averaged from both sides, so that the curve does not lag behind where it falls."""
    forward, backward = (series.ewm(halflife=halflife).mean() for series in (y, y[::-1]))
    return (forward + backward) / 2  # pandas aligns them by their index


def live_view() -> Callable[[Run], None] | None:
    """For `train(watch=…)`: curves and the last epochs, refreshed in place; None if nobody looks.

    Drawing takes a twentieth of the time at most.
    """
    if not has_front_end():
        return None
    image, table = _picture(), ipywidgets.HTML()
    image.layout.display = "none"  # until there is something to see
    box, due = ipywidgets.VBox([image, table], layout=_FITTING), None

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

    Shows at most 12 tokens, and says so. `copy` is called after each saving. Without a front end
    the picture of `sentence` is shown. Raises MusotaError for a model without blocks or a sentence
    without a token.
    """
    probes.require_blocks(model)
    path, layout, L = Path(path), model.config.layout, model.config.n_layer
    most = min(12, model.config.max_seq_len)

    def draw(sentence: str, layer: int) -> tuple[Figure, str]:
        ids = tokenizer.encode(sentence)
        if not len(ids):
            raise MusotaError("The sentence is empty: type a few words.")
        note = f"the first {most} of {len(ids)} tokens" if len(ids) > most else ""
        ids = ids[:most]
        inside = probes.look_inside(model, torch.from_numpy(ids))
        tokens = [tokenizer.decode([int(token)]).strip() or "␣" for token in ids]
        cells, gate = inside["cells"].numpy(), inside["gate"].numpy()
        return pictures.block_view(cells, gate, tokens, layout, layer), note

    figure, note = draw(sentence, L)
    save_figure(figure, path, about)
    if not has_front_end():
        print("Nobody can type here: this is the block view of the sentence given.")
        display(Image(data=path.read_bytes()))
        return
    typed = ipywidgets.Text(sentence, description="sentence", continuous_update=False,
                            layout={"width": "480px", **_FITTING})  # fmt: skip
    layer = ipywidgets.IntSlider(L, 0, L, description="after layer", continuous_update=False)
    button = ipywidgets.Button(description="Save as PNG", icon="download")
    image, said, saved = _picture(path.read_bytes()), ipywidgets.HTML(note), ipywidgets.HTML()
    one_at_a_time = threading.Lock()  # newer kernels may handle two controls at once

    def redraw(_) -> bool:
        saved.value = ""
        with one_at_a_time:
            try:
                figure, note = draw(typed.value, layer.value)
                image.value, said.value = figure_png(figure, about), note
            except MusotaError as error:
                said.value = str(error)
                return False
        return True

    def save(_) -> None:
        if redraw(_):  # what the controls say, should the picture still be on its way
            saved.value = _save(image.value, path, copy)

    typed.observe(redraw, "value")
    layer.observe(redraw, "value")
    button.on_click(save)
    controls = ipywidgets.HBox([typed, layer, button], layout=_WRAPPED)
    display(ipywidgets.VBox([controls, image, said, saved], layout=_FITTING))
