"""The explorer of a notebook: curves of recorded runs, with controls.

Only the controls are widgets. Picture and table are ordinary outputs, updated in place, which a
saved notebook shows without a kernel. Where nobody can use controls, they stand alone.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import ipywidgets as w
from IPython.display import Image, Markdown, display

from musota.files import write_bytes
from musota.lab.curves import PLATEAU_EPOCHS, PLATEAU_GAIN
from musota.training.run import Run
from musota.workbook.panel import Output, has_front_end
from musota.workbook.plots import METRICS, explored
from musota.workbook.results import by_title
from musota.workbook.style import figure_png
from musota.workbook.tables import markdown, plateaus_table

WIDE = {"style": {"description_width": "110px"}, "layout": {"width": "420px", "max_width": "100%"}}


class Explorer:
    """Curves of models, all seeds of each, with their plateaus and the comparison with the first.
    Controls stand above the picture, which is saved at `path`; `about` is the line under it."""

    def __init__(self, runs: Sequence[Run], ngrams: Mapping[str, float], path: Path, about=""):
        self.models = by_title(run for run in runs if run.summary)
        self.ngrams = {name: ppl for name, ppl in ngrams.items() if name != "uniform"}
        self.path, self.about = path, about
        self.status, self.picture, self.table = Output(), Output(), Output()  # from the top
        longest = max([PLATEAU_EPOCHS, *(len(run.history) - 1 for run in runs)])
        slider, names = {"continuous_update": False, **WIDE}, [*self.models]
        self.chosen = w.SelectMultiple(options=names, value=names[:6], description="models", **WIDE)
        self.metric = w.Dropdown(options=[*METRICS], description="metric", **WIDE)
        self.smoothing = w.IntSlider(0, 0, 30, description="smoothing", **slider)
        window, gain = {"description": "plateau: epochs"}, {"description": "… gain under %"}
        self.window = w.IntSlider(PLATEAU_EPOCHS, 1, longest, **window, **slider)
        self.least_gain = w.FloatSlider(100 * PLATEAU_GAIN, min=0.1, max=10, **gain, **slider)
        self.log_x = w.Checkbox(False, description="x logarithmic", indent=False)
        self.log_y = w.Checkbox(True, description="y logarithmic", indent=False)
        columns = [
            [self.chosen, self.metric],
            [self.smoothing, self.window, self.least_gain],
            [self.log_x, self.log_y],
        ]
        for control in itertools.chain(*columns):
            control.observe(lambda _: self.draw(), "value")
        if has_front_end():
            layout = {"flex_flow": "row wrap", "max_width": "100%"}
            display(w.HBox([w.VBox(column) for column in columns], layout=layout))
        self.draw()

    def draw(self) -> None:
        """Picture and table anew."""
        if not self.chosen.value:
            return self.status.show(Markdown("Choose a model."))
        self.status.show(Markdown("Drawing …"))
        chosen = [self.models[title] for title in self.chosen.value]
        rule = self.window.value, self.least_gain.value / 100
        log = "x" * self.log_x.value + "y" * self.log_y.value
        how = self.metric.value, self.smoothing.value, rule, log
        png = figure_png(explored(chosen, self.ngrams, *how), self.about)
        self.picture.show(Image(data=png))
        self.table.show(Markdown(markdown(plateaus_table(chosen, *rule))))
        write_bytes(self.path, png)
        return self.status.show(Markdown(f"Saved as {self.path.name}."))
