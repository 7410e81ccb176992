import pandas as pd
import pytest
from conftest import EXPERIMENT
from IPython.display import Image

import musota
from musota.errors import MusotaError
from musota.lab.verdicts import Verdict
from musota.workbook import panel, show, widgets
from musota.workbook.notebook import blocks_figure

NGRAMS = {"uniform": 512.0, "unigram": 230.0, "bigram": 150.0}


class Notebook:
    """What a person sees: controls once, and outputs that are replaced in place."""

    def __init__(self):
        self.controls, self.outputs = [], []

    def display(self, shown, display_id=None):
        if not display_id:
            return self.controls.append(shown)
        self.outputs.append([shown])
        own = self.outputs[-1]
        return type("Handle", (), {"update": lambda _, shown: own.append(shown)})()

    def pictures(self):
        return [shown.data for own in self.outputs for shown in own if isinstance(shown, Image)]

    @property
    def text(self):
        return self.outputs[0][-1].data

    @property
    def table(self):
        return self.outputs[2][-1].data


@pytest.fixture
def notebook(monkeypatch):
    seen = Notebook()
    monkeypatch.setattr(panel, "in_notebook", lambda: True)
    for module in (panel, widgets):
        monkeypatch.setattr(module, "display", seen.display)
        monkeypatch.setattr(module, "has_front_end", lambda: True)
    return seen


def test_picture_and_table_follow_the_controls_in_place(runs, tmp_path, notebook):
    explorer = widgets.Explorer(runs, NGRAMS, tmp_path / "out.png")
    heads, _, first, *others = notebook.table.splitlines()
    assert "against the optimized model" in heads and first.startswith("| the optimized model |")
    assert any("| the baseline model |" in row and "nats/token" in row for row in others)
    values = {"chosen": ("the baseline model",), "metric": "training loss", "log_x": True}
    for control, value in (values | {"log_y": False, "smoothing": 9}).items():
        getattr(explorer, control).value = value
    assert len({*notebook.pictures()}) == 6  # another one for each
    assert len(notebook.controls) == 1 and len(notebook.outputs) == 3  # with status and table
    explorer.window.value = 1
    assert "over 1 epoch" in notebook.table and notebook.text == "Saved as out.png."
    assert (tmp_path / "out.png").read_bytes() == notebook.pictures()[-1]
    explorer.chosen.value = ()
    assert notebook.text == "Choose a model."


def test_without_a_front_end_the_picture_stands_alone(runs, tmp_path, notebook, monkeypatch):
    monkeypatch.setattr(widgets, "has_front_end", lambda: False)
    widgets.Explorer(runs, NGRAMS, tmp_path / "two.png")
    assert not notebook.controls and len(notebook.pictures()) == 1 and "plateau" in notebook.table


def test_the_panel_follows_a_run_and_its_last_picture_stays(short, tmp_path, notebook, monkeypatch):
    monkeypatch.setattr(panel, "FIRST_PAUSE", 0)
    shown = panel.RunPanel("about", NGRAMS, True)
    assert not notebook.outputs  # nothing before there is something to see
    run = musota.train(EXPERIMENT, short, tmp_path, options=musota.RunOptions(watch=shown.update))
    assert len(notebook.outputs) == 2 and len({*notebook.pictures()}) >= 2  # replaced in place
    first = notebook.outputs[0][0].data
    assert " left" in first and "width:" in first
    shown.draw(run)
    assert "epochs in" in notebook.text and "best valid PPL" in notebook.text
    assert "width:" not in notebook.text  # no bar at the end
    assert (tmp_path / "training.png").read_bytes() == notebook.pictures()[-1]


def test_a_table_has_numbers_on_the_right_and_the_best_in_bold(monkeypatch):
    shown = []
    monkeypatch.setattr(show, "display", shown.append)
    table = pd.DataFrame({"model": ["a|b", "c"], "PPL": ["1.5", "2.0"]})
    table.attrs["best"] = [(0, "PPL")]
    show.show_table(table)
    show.show_table(pd.DataFrame({"mine": ["1"]}, index=["epochs"]))
    assert shown[0].data.splitlines()[1:3] == ["| :--- | ---: |", "| a\\|b | **1.5** |"]
    assert shown[1].data.splitlines()[::2] == ["|  | mine |", "| epochs | 1 |"]


def test_a_card_is_one_number_one_sentence_and_what_was_measured(monkeypatch):
    cards = []
    monkeypatch.setattr(show, "display", lambda card, raw: cards.append(card))
    verdict = Verdict("Help or <hurt>?", "hurts", 0.5, 0.4, 0.6, "nats/token", "seen", "x", False)
    show.show_card(verdict, [Verdict("Rank", "ok", 12.0)])
    (card,) = cards
    assert card["text/plain"] == "✗ +65% valid perplexity: Help or <hurt>? Hurts"
    assert "Help or &lt;hurt&gt;? Hurts</strong>" in card["text/html"]
    assert "<li>Rank: Ok (12).</li>" in card["text/html"] and "Next: x." in card["text/html"]
    for value, unit, shown in ((3e33, "PPL", "–"), (77.0, "nats/token", "+77.000 nats/token")):
        verdict = Verdict("Is it better?", "worse", value, unit=unit)
        assert show.large_number(verdict)[0] == shown and len(str(verdict)) < 60


def test_the_blocks_of_a_text_are_drawn(corpus, runs):
    model = runs[0].load_model()
    figure = blocks_figure(model, corpus.tokenizer, "$$ word_" * 100)
    titles = [axis.get_title() for axis in figure.axes]
    assert {"blocks", "layer 1"} <= {*titles} and len(titles) <= 20
    with pytest.raises(MusotaError, match="The text is empty"):
        blocks_figure(model, corpus.tokenizer, "")
    with pytest.raises(MusotaError, match="blocks"):
        blocks_figure(runs[2].load_model(), corpus.tokenizer, "A string")
