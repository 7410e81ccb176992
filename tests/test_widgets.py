import ipywidgets
import numpy as np
import pandas as pd
import pytest
from IPython.display import Image

import musota
from musota.errors import MusotaError
from musota.lab import plateau_start
from musota.workbook import widgets
from musota.workbook.notebook import blocks_figure

MODEL = musota.MuConfig(vocab_size=512, max_seq_len=24, n_layer=2)
DENSE = musota.DenseConfig(vocab_size=512, max_seq_len=24, n_layer=1, d_model=32, n_head=2)
NGRAMS = {"uniform": 512.0, "unigram": 230.0, "bigram": 150.0}


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    training = musota.TrainConfig(epochs=6, learning_rate=3e-3, warmup_steps=5, batch_size=64)
    optimized = musota.Experiment(MODEL, training)
    for name, experiment in {"optimized": optimized, "baseline": musota.twin(optimized)}.items():
        options = musota.RunOptions(about={"title": name})
        musota.train(experiment, corpus, folder / name, name=name, options=options)
    return sorted(musota.load_runs(folder), key=lambda run: -len(run.name))


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
        return self.outputs[-1][-1].data


@pytest.fixture
def notebook(monkeypatch):
    seen = Notebook()
    monkeypatch.setattr(widgets, "has_front_end", lambda: True)
    monkeypatch.setattr(widgets, "display", seen.display)
    return seen


@pytest.mark.parametrize(
    ("control", "value"),
    [
        ("chosen", ("baseline",)),
        ("metric", "training loss"),
        ("metric", "valid accuracy"),
        ("log_x", True),
        ("log_y", False),
    ],
)
def test_each_control_replaces_the_one_picture(runs, tmp_path, notebook, control, value):
    explorer = widgets.Explorer(runs, NGRAMS, tmp_path / "out.png")
    (box,) = notebook.controls
    assert isinstance(box, ipywidgets.Box)
    getattr(explorer, control).value = value
    first, second = notebook.pictures()
    assert first != second and len(notebook.outputs) == 2  # a picture and its text, in place


def test_smoothing_keeps_the_curve_faintly_behind_and_does_not_lag(runs):
    curve = widgets.curve_of(runs[0], "steps", "loss", 10, None)
    assert curve.y.std() < curve.faint.std()
    run = musota.Run(runs[0].path)
    steps = pd.DataFrame({"step": range(1, 201), "loss": np.linspace(9.0, 1.0, 200)})
    run.steps = steps.assign(tokens=0, seconds=0.0)
    smooth = widgets.curve_of(run, "steps", "loss", 10, None)
    np.testing.assert_allclose(smooth.y.iloc[50:150], smooth.faint.iloc[50:150], atol=0.1)


def test_the_sentences_follow_the_plateau_rule_and_the_models(runs, tmp_path, notebook):
    explorer = widgets.Explorer(runs, NGRAMS, tmp_path / "out.png")
    assert "baseline: Has the valid PPL" in notebook.text
    assert "Is “optimized” better than “baseline”?" in notebook.text
    explorer.window.value = 1
    assert "over 1 epoch," in notebook.text
    explorer.least_gain.value = 10
    for run in runs:
        since = plateau_start(run, 1, 0.1)
        span = widgets.curve_of(run, "history", "ppl", 0, since).plateau
        assert span == (since and (since, 6))
    explorer.chosen.value = ()
    assert notebook.text == "Choose a model."


def test_events_are_marked_where_they_happened(runs):
    run = musota.Run(runs[0].path)
    run.records.append({"kind": "event", "step": int(run.history.step[1]), "event": "halved"})
    assert widgets.curve_of(run, "history", "ppl", 0, None).marks == [(2, "halved")]


def test_the_picture_is_saved_when_asked_and_says_so(runs, tmp_path, notebook):
    explorer = widgets.Explorer(runs, NGRAMS, tmp_path / "out.png")
    explorer.log_x.value = True
    button = notebook.controls[0].children[-1].children[-1]
    button.click()
    assert (tmp_path / "out.png").read_bytes() == notebook.pictures()[-1]
    assert "saved: " in notebook.text
    explorer.path = tmp_path / "vanished" / "out.png"
    button.click()
    assert "not saved" in notebook.text


def test_without_a_front_end_picture_and_sentences_stand_alone(
    runs, tmp_path, notebook, monkeypatch
):
    monkeypatch.setattr(widgets, "has_front_end", lambda: False)
    widgets.Explorer(runs, NGRAMS, tmp_path / "two.png")
    assert not notebook.controls and len(notebook.pictures()) == 1
    assert "plateau" in notebook.text and widgets.live_view() is None


def test_the_live_view_follows_a_run_while_it_trains(corpus, tmp_path, notebook, monkeypatch):
    monkeypatch.setattr(widgets, "LIVE_SECONDS", 0)
    view = widgets.live_view()
    assert not notebook.outputs  # a run that is only loaded shows nothing
    training = musota.TrainConfig(epochs=2, learning_rate=3e-3, warmup_steps=5, batch_size=64)
    experiment = musota.Experiment(DENSE, training)
    musota.train(experiment, corpus, tmp_path, options=musota.RunOptions(watch=view))
    assert len(notebook.outputs) == 2  # a picture and a table, in place
    assert len({*notebook.pictures()}) >= 2
    assert "valid_loss" in notebook.text and notebook.text.count("<tr") == 3


def test_the_blocks_of_a_text_are_drawn(corpus, runs):
    model = runs[0].load_model()
    figure = blocks_figure(model, corpus.tokenizer, "$$ word_" * 100)
    titles = [axis.get_title() for axis in figure.axes]
    assert {"blocks", "layer 1", "layer 2"} <= {*titles} and len(titles) <= 20
    with pytest.raises(MusotaError, match="The text is empty"):
        blocks_figure(model, corpus.tokenizer, "")
    with pytest.raises(MusotaError, match="blocks"):
        blocks_figure(runs[1].load_model(), corpus.tokenizer, "A string")
