import copy
import io

import ipywidgets
import matplotlib.image
import numpy as np
import pandas as pd
import pytest

import musota
from musota.errors import MusotaError
from musota.plan.config import TrainConfig
from musota.workbook import widgets

MODEL = musota.MuConfig(vocab_size=512, max_seq_len=24, n_layer=2)
DENSE = musota.DenseConfig(vocab_size=512, max_seq_len=24, n_layer=1, d_model=32, n_head=2)
RUNGS = {"uniform": 512.0, "unigram": 230.0, "bigram": 150.0}


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    training = TrainConfig(epochs=8, learning_rate=3e-3, warmup_steps=5, batch_size=64)
    optimized = musota.Experiment(MODEL, training)
    for name, experiment in {"optimized": optimized, "baseline": musota.twin(optimized)}.items():
        musota.train(experiment, corpus, folder / name, name=name)
    return musota.load_runs(folder)


@pytest.fixture
def watched(monkeypatch):
    """As if a person sat before the notebook; what is displayed is collected."""
    shown = []
    monkeypatch.setattr(widgets, "has_front_end", lambda: True)
    monkeypatch.setattr(widgets, "display", shown.append)
    return shown


def _size(picture):
    return matplotlib.image.imread(io.BytesIO(picture)).shape


@pytest.mark.parametrize(
    ("control", "value"),
    [
        ("chosen", ("dense baseline, seed 0",)),
        ("metric", "training loss"),
        ("metric", "valid accuracy"),
        ("unit", "seconds"),
        ("smoothing", 3),
        ("log_x", True),
        ("log_y", False),
        ("show_rungs", False),
    ],
)
def test_each_control_changes_the_one_picture(runs, tmp_path, control, value):
    explorer = widgets.Explorer(runs, RUNGS, tmp_path / "out.png")
    before = explorer.image.value
    getattr(explorer, control).value = value
    assert explorer.image.value != before
    assert [w for w in explorer.box.children if isinstance(w, ipywidgets.Image)] == [explorer.image]


def test_smoothing_draws_the_unsmoothed_curve_faintly_behind_and_does_not_lag(runs):
    curve = widgets.curve_of(runs[0], "steps", "loss", "epochs", smoothing=10)
    assert curve.y.std() < curve.faint.std()
    falling, middle = copy.copy(runs[0]), slice(50, 150)
    steps = pd.DataFrame({"step": range(1, 201), "loss": np.linspace(9.0, 1.0, 200)})
    falling.steps = steps.assign(tokens=0, seconds=0.0, learning_rate=0.1, grad_norm=1.0)
    smooth = widgets.curve_of(falling, "steps", "loss", "epochs", smoothing=10)
    np.testing.assert_allclose(smooth.y.iloc[middle], smooth.faint.iloc[middle], atol=0.1)


def test_the_sentences_follow_the_plateau_rule_and_the_runs_chosen(runs, tmp_path):
    explorer = widgets.Explorer(runs, RUNGS, tmp_path / "out.png")
    assert "MU-SOTA optimized against its dense twin" in explorer.text.value
    explorer.window.value = 7
    assert "over 7 epochs;" in explorer.text.value and "no plateau" in explorer.text.value
    explorer.window.value = 1
    explorer.least_gain.value = 10
    assert "a plateau since epoch" in explorer.text.value
    found = {run: widgets.plateau_of(run, window=1, least_gain=0.1) for run in runs}
    for run, finding in found.items():
        span = widgets.curve_of(run, "history", "ppl", "epochs", since=finding.since).plateau
        assert span == ((finding.since, 8) if finding.verdict == "plateau" else None)
    assert "plateau" in {finding.verdict for finding in found.values()}
    explorer.chosen.value = ()
    assert explorer.text.value == "Choose a run."


def test_events_are_marked_where_they_happened(runs):
    run = musota.Run(runs[0].path)
    run.records.append({"kind": "event", "step": int(run.history.step[1]), "event": "halved"})
    assert widgets.curve_of(run, "history", "ppl", "epochs").marks == [(2.0, "halved")]


def test_saving_tells_what_became_of_it(runs, tmp_path):
    copied = []
    explorer = widgets.Explorer(runs, RUNGS, tmp_path / "out.png", copy=lambda: copied.append(1))
    explorer.unit.value = "tokens"
    explorer.button.click()
    assert (tmp_path / "out.png").read_bytes() == explorer.image.value
    assert copied and "could not be copied" in explorer.saved.value
    explorer.path = tmp_path / "vanished" / "out.png"
    explorer.button.click()
    assert "not saved" in explorer.saved.value and len(copied) == 1


def test_with_a_front_end_the_explorer_is_shown_and_without_one_its_picture(
    runs, tmp_path, watched, monkeypatch, capsys
):
    widgets.explore(runs, RUNGS, tmp_path / "one.png")
    assert isinstance(watched[-1], ipywidgets.VBox) and (tmp_path / "one.png").exists()
    saved = watched[-1].children[-1].value
    assert "saved" in saved and "one.png" in saved
    monkeypatch.setattr(widgets, "has_front_end", lambda: False)
    widgets.explore(runs, RUNGS, tmp_path / "two.png")
    assert watched[-1].data == (tmp_path / "two.png").read_bytes()
    assert "Nobody can turn controls here" in capsys.readouterr().out
    widgets.explore([], RUNGS, tmp_path / "three.png")
    assert "nothing to explore" in capsys.readouterr().out and widgets.live_view() is None


def test_the_live_view_follows_a_training_run(corpus, tmp_path, watched, monkeypatch):
    monkeypatch.setattr(widgets, "LIVE_SECONDS", 0)
    view = widgets.live_view()
    assert not watched  # a run that is only loaded shows none
    pictures = []

    def watch(run):
        view(run)
        image = watched[0].children[0]
        assert (image.layout.display == "none") == (not image.value)  # no broken picture at first
        if image.value and image.value not in pictures[-1:]:
            pictures.append(image.value)

    training = TrainConfig(epochs=2, learning_rate=3e-3, warmup_steps=5, batch_size=64)
    musota.train(musota.Experiment(DENSE, training), corpus, tmp_path, watch=watch)
    assert len(pictures) >= 2 and all(_size(picture) for picture in pictures)
    table = watched[0].children[1]
    assert "valid_loss" in table.value and table.value.count("<tr") == 3
    assert len(watched) == 1


def test_the_block_view_follows_the_sentence_and_the_layer(corpus, runs, tmp_path, watched):
    model = next(run for run in runs if run.name == "optimized").load_model()
    path = tmp_path / "blocks.png"
    widgets.block_view(model, corpus.tokenizer, "Return a list of names", path, "about")
    controls, image, said, saved = watched[0].children
    typed, layer, button = (column.children[0] for column in controls.children)
    first = image.value
    assert first == path.read_bytes()
    layer.value = 0
    second = image.value
    typed.value = "A string"
    assert len({first, second, image.value}) == 3
    button.click()
    assert path.read_bytes() == image.value and "saved" in saved.value
    typed.value = ""
    assert "type a few words" in said.value
    typed.value = "word " * 100
    assert _size(image.value) and "the first 12 of" in said.value and not saved.value
    dense = next(run for run in runs if run.name == "baseline").load_model()
    with pytest.raises(MusotaError, match="Only MU-SOTA"):
        widgets.block_view(dense, corpus.tokenizer, "A string", path, "")
