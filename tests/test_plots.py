"""Figures show what they claim, in colour and without, whatever the labels contain."""

import io
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pandas as pd
from conftest import ROOT

import musota
from musota.lab import plateau_start
from musota.lab.root_causes import Cause
from musota.lab.stats import Interval
from musota.lab.verdicts import Verdict
from musota.models.layout import BlockLayout
from musota.registry import REGISTRY
from musota.workbook import drawings, plots
from musota.workbook.style import draw_ngrams, figure_png, literal, new_figure, styles_of

NGRAMS = {"uniform": 512.0, "unigram": 230.0, "bigram": 150.0, "trigram": 120.0}
EFFECTS = {"cause": Interval(-0.4, -0.5, -0.3), "undecided": Interval(0.02, -0.1, 0.14)}
EFFECTS["not a cause"] = None
CAUSES = [
    Cause(f"suspect {n}", "50 %", "a", "b", "remove it", effect, 400.0, 270.0, decision, "x 1 → 2")
    for n, (decision, effect) in enumerate(EFFECTS.items())
]
SWEEP = {1e-3: [6.5, 6.4], 3e-3: [6.0, 6.1], 1e-2: [5.5, 5.4], 3e-2: [29.0, 30.0]}
LAYOUT = BlockLayout.standard(8, 16)
ABLATED = {name: Interval(0.1, 0.05, 0.15) for name in ("gate", *LAYOUT.names)}
VERDICTS = {
    "the first": Verdict("Better?", "tie", 0.012, -0.014, 0.038, "nats/token"),
    "the second": Verdict("Better?", "better", -0.2, -0.25, -0.15, "nats/token"),
    "diverged": Verdict("Better?", "worse"),
}


def _texts(figure):
    figure.draw_without_rendering()
    axes = [text.get_text() for axis in figure.axes for text in axis.texts]
    legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes)]
    return " ".join([*axes, *(t.get_text() for key in legends if key for t in key.texts)])


def test_figures_are_not_empty_and_say_what_they_are_about(runs):
    noise = np.random.default_rng(0)
    drawn = {
        "training": plots.training_curve(runs[0], NGRAMS, reported=True),
        "sizes": plots.sizes(runs),
        "ledgers": drawings.ledgers({run.name: run.summary["parameter_ledger"] for run in runs}),
        "layouts": drawings.layouts({"8×8": LAYOUT, "6×6": BlockLayout.standard(6, 8)}),
        "causality": drawings.causality(np.triu(noise.random((8, 8)))),
        "n-grams": drawings.ngrams(NGRAMS, at_plan_size=False),
        "no difference": plots.difference({"a": Verdict("Better?", "unfinished")}, "None yet"),
        "ablations": plots.ablations(runs[0], ABLATED),
        "blocks": drawings.block_view(
            noise.normal(size=(7, 3, 64)), noise.random((6, 3, 16)), ["$$", "_a", "was"], LAYOUT, 5
        ),
        "path": plots.path(pd.read_csv(ROOT / "results" / "redesign" / "path.csv")),
    }
    for name, figure in drawn.items():
        pixels = matplotlib.image.imread(io.BytesIO(figure_png(figure, "about")))[..., :3]
        height, width = pixels.shape[:2]
        middle = pixels[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4]
        assert (middle < 0.98).any(-1).mean() > 0.005, name  # more than background
        assert figure.get_supxlabel() == "about"


def test_curves_draw_every_model_baseline_and_the_reported_result(runs):
    figure = plots.curves(runs, NGRAMS, reported=True)
    left, right = figure.axes
    lines = [np.round(line.get_ydata(), 6).tolist() for line in left.lines]
    for run in runs:  # each seed
        assert np.round(run.history.ppl, 6).tolist() in lines
    mean = np.exp((runs[0].history.valid_loss + runs[1].history.valid_loss) / 2)
    assert np.round(mean, 6).tolist() in lines
    assert [100 * 0.1725] in [list(line.get_ydata()) for line in right.lines]
    texts = _texts(figure)
    for text in ["unigram", "bigram", "trigram", "reported: 402", "model, seed 0", "2 seeds"]:
        assert text in texts
    assert "reported" not in _texts(plots.curves(runs, NGRAMS))


def test_differences_print_their_numbers_and_leave_out_what_has_none():
    figure = plots.difference(VERDICTS, "Against the first")
    texts = _texts(figure)
    assert "+0.012 nats/token [-0.014, +0.038]\ntie" in texts and "-0.200" in texts
    assert len(figure.axes[0].get_yticks()) == 2


def test_the_explorers_figure_shades_the_plateau_marks_events_and_smooths(runs):
    run = musota.Run(runs[0].path)
    run.records.append({"kind": "event", "step": int(run.history.step[1]), "event": "halved"})
    figure = plots.explored([[run]], NGRAMS, rule=(1, 0.99))
    (axis,) = figure.axes
    (band,) = axis.patches
    start = plateau_start(run, 1, 0.99)
    assert (band.get_x(), band.get_x() + band.get_width()) == (start, 2)
    assert band.get_hatch()  # visible in black and white, too
    assert "halved" in _texts(figure) and "bigram" in _texts(figure)
    assert [2, 2] in [list(line.get_xdata()) for line in axis.lines]  # in the epoch it happened
    losses = np.linspace(9.0, 1.0, 200) + np.tile([0.3, -0.3], 100)
    run.steps = pd.DataFrame({"step": range(1, 201), "loss": losses})
    figure = plots.explored([[run]], {}, "training loss", smoothing=10, log="x")
    smooth = figure.axes[0].lines[0].get_ydata()
    np.testing.assert_allclose(smooth[50:150], np.linspace(9, 1, 200)[50:150], atol=0.1)  # no lag


def test_the_seeds_of_a_model_are_one_line_with_a_band(runs):
    (axis,) = plots.explored([runs[:2]], {}).axes
    (line,), (band,) = axis.lines, axis.collections
    mean = (runs[0].history.ppl * runs[1].history.ppl) ** 0.5  # of the losses
    np.testing.assert_allclose(line.get_ydata(), mean)
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == max(run.history.ppl.max() for run in runs[:2])
    assert line.get_label().endswith(", 2 seeds")


def test_sizes_are_drawn_against_parameters_and_operations(runs):
    models = [run.experiment.model for run in runs]
    for axis, name in zip(plots.sizes(runs).axes, ("n_parameters", "flops_per_token"), strict=True):
        drawn = {float(line.get_xdata()[0]) for line in axis.lines}
        assert drawn == {getattr(model, name) / 1e6 for model in models}


def test_decisions_on_root_causes_differ_without_colour():
    figure = plots.root_causes(CAUSES)
    marks = {(line.get_marker(), line.get_fillstyle()) for line in figure.axes[0].lines}
    assert {("o", "full"), ("D", "left")} <= marks
    assert "400 → 270" in _texts(figure) and "400 → diverges" in _texts(figure)


def test_losses_of_a_sweep_that_are_off_the_scale_are_marked():
    figure = plots.rate_sweep({"MU-SOTA": SWEEP, "transformer": {1e-3: [6.1], 1e-2: [5.8]}})
    assert max(line.get_ydata().max() for line in figure.axes[0].lines) < 8.5
    assert "off the scale" in _texts(figure) and "best PPL 233 at 0.01" in _texts(figure)


def test_every_model_has_a_style_of_its_own():
    styles = styles_of(["mine", "optimized", "yours", "optimized"])
    assert styles[1] == REGISTRY["optimized"].style
    assert len({style[0] for style in styles}) == len({style[2] for style in styles}) == 4
    for known, others in (([], 20), (["original"], 20), ([*REGISTRY], 12)):
        names = [*known, *(f"model {n}" for n in range(others))]
        assert len({*styles_of(names)}) == len(names)


def test_a_changed_run_has_the_style_of_its_model_unless_that_is_drawn_too():
    named = (("faster", "original"), ("original", "original"), ("mine", None))
    groups = ([SimpleNamespace(name=name, model_name=model)] for name, model in named)
    changed, unchanged, other = groups
    style = REGISTRY["original"].style
    assert plots._styles([changed, other])[0] == style
    assert plots._styles([changed, unchanged])[0] != style == plots._styles([changed, unchanged])[1]


def test_labels_are_plain_text():
    figure, axis = new_figure(3, 3)
    axis.plot([1, 2], label=literal("_net.py: pr$ice$"))
    axis.legend()
    assert figure_png(figure, "a folder pr$ice^$")
    (text,) = axis.get_legend().texts
    assert not text.get_text().startswith("_")
    assert text._preprocess_math(text.get_text()) == (" _net.py: pr$ice$", False)


def test_baselines_above_the_range_are_not_drawn():
    figure, axis = new_figure(3, 3)
    axis.plot([100, 36_000])
    axis.set_ylim(90, 1_000)
    draw_ngrams(axis, NGRAMS | {"uniform": 50_000})
    assert "uniform" not in _texts(figure) and "bigram" in _texts(figure)
