"""The explorer of a notebook: curves of recorded runs, with controls.

Only the controls are widgets. Pictures and sentences are ordinary outputs, updated in place, which
a saved notebook shows without a kernel. Where nobody can use controls, they stand alone.
"""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import ipywidgets as w
from IPython.display import HTML, Image, display

from musota.files import write_bytes
from musota.lab.curves import PLATEAU_EPOCHS, PLATEAU_GAIN, plateau
from musota.lab.verdicts import compare
from musota.training.run import Run
from musota.workbook.panel import Output, has_front_end
from musota.workbook.plots import METRICS, explored
from musota.workbook.results import by_title
from musota.workbook.style import figure_png

WIDE = {"style": {"description_width": "110px"}, "layout": {"width": "420px", "max_width": "100%"}}


class Explorer:
    """Curves of models, all seeds of each, with their plateaus and the comparison with the first.
    Controls stand above the picture, which is saved at `path`; `about` is the line under it."""

    def __init__(self, runs: Sequence[Run], ngrams: Mapping[str, float], path: Path, about=""):
        self.models = by_title(run for run in runs if run.summary)
        self.ngrams = {name: ppl for name, ppl in ngrams.items() if name != "uniform"}
        self.path, self.about, self.picture, self.text = path, about, Output(), Output()
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
        """Picture and sentences anew."""
        if not self.chosen.value:
            return self._tell("Choose a model.")
        self._tell("Drawing …")
        first, *others = chosen = [self.models[title] for title in self.chosen.value]
        rule = self.window.value, self.least_gain.value / 100
        log = "x" * self.log_x.value + "y" * self.log_y.value
        how = self.metric.value, self.smoothing.value, rule, log
        self.png = figure_png(explored(chosen, self.ngrams, *how), self.about)
        self.picture.show(Image(data=self.png))
        alike = [other for other in others if other[0].valid_text == first[0].valid_text]
        self.sentences = [f"{seeds[0].title}: {plateau(seeds[0], *rule)}" for seeds in chosen]
        self.sentences += [str(compare(first, other)) for other in alike]
        return self._tell(*self.sentences)

    def save(self) -> None:
        """Write the picture to `path`."""
        try:
            write_bytes(self.path, self.png)
            self._tell(*self.sentences, f"saved: {self.path}")
        except OSError as error:
            self._tell(*self.sentences, f"not saved: {self.path}: {error.strerror}")

    def _tell(self, *sentences: str) -> None:
        self.text.show(HTML("<br>".join(map(html.escape, sentences))))
