import io

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

import musota
from musota.files import write_json
from musota.plan import registry
from musota.plan.config import TrainConfig
from musota.plan.layout import BlockLayout
from musota.plan.suspects import Suspect
from musota.rules.stats import Interval
from musota.rules.verdicts import Cause
from musota.workbook import figures, pictures
from musota.workbook.answers import rule_lines
from musota.workbook.evidence import read_evidence
from musota.workbook.style import figure_png, styles_of
from musota.workbook.tables import comparison_table, ledger_table

MODELS = {"optimized": musota.MuConfig(vocab_size=512, max_seq_len=24, n_layer=1)}
MODELS["baseline"] = musota.twin(musota.Experiment(MODELS["optimized"], TrainConfig())).model

EFFECTS = {
    "cause": Interval(-0.4, -0.5, -0.3),
    "undecided": Interval(0.02, -0.1, 0.14),
    "not a cause": None,
}
CAUSES = [
    Cause(Suspect(f"suspect {n}", "50 %", "a", "b", "mend"), effect, 400.0, 270.0, verdict, "x")
    for n, (verdict, effect) in enumerate(EFFECTS.items())
]
SWEEP = {1e-3: [6.5, 6.4], 3e-3: [6.0, 6.1], 1e-2: [5.5, 5.4], 3e-2: [29.0, 30.0]}
ABLATED = {
    name: Interval(0.1 * n, 0.1 * n - 0.05, 0.1 * n + 0.05)
    for n, name in enumerate(("gate", *BlockLayout.standard(8, 16).names))
}
CELLS = np.random.default_rng(0).normal(size=(7, 3, 64))
GATE = np.random.default_rng(1).random((6, 3, 16))
CURVE = figures.Curve(
    "optimized", "MU-SOTA optimized, seed 0", pd.Series(np.linspace(300, 200, 6), range(1, 7)),
    pd.Series(np.linspace(310, 190, 6), range(1, 7)), (4.0, 6.0), [(3.0, "learning rate halved")],
)  # fmt: skip


@pytest.fixture(scope="module")
def evidence(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    training = TrainConfig(epochs=3, learning_rate=3e-3, warmup_steps=5, batch_size=32)
    for name, model in MODELS.items():
        run_dir = folder / f"{name}-seed0"
        musota.train(musota.Experiment(model, training), corpus, run_dir, name=name)
    rungs = {"uniform": 512.0, "unigram": 230.0, "bigram": 150.0, "trigram": 120.0}
    write_json(folder / "ladder.json", {"fingerprint": corpus.fingerprint, "ppl": rungs})
    return read_evidence(folder)


def _written(axis):
    return " ".join(text.get_text() for text in axis.texts)


def test_figures_are_not_empty_and_say_what_they_show(evidence):
    runs = evidence.runs
    ledgers = {run.name: run.summary["parameter_ledger"] for run in runs}
    layouts = {"8×8": BlockLayout.standard(8, 16), "6×6": BlockLayout.standard(6, 8)}
    finding, intervals = evidence.compare()
    drawn = {
        "curves": figures.curves(runs, evidence.rungs, reported=True),
        "training": figures.training_curve(runs[0]),
        "ledgers": pictures.ledgers(ledgers),
        "layouts": pictures.layouts(layouts),
        "causality": pictures.causality(np.triu(np.random.default_rng(0).random((8, 8)))),
        "zipf": pictures.zipf(np.array([90, 40, 30, 5, 1, 0])),
        "ladder": pictures.ladder(evidence.rungs, comparable=False),
        "difference": figures.difference(intervals, finding.conclusion),
        "answer": figures.answer(runs, evidence.rungs, {"MU-SOTA": SWEEP}),
        "root causes": figures.root_causes(CAUSES, 0.05),
        "sweep": figures.rate_sweep({"MU-SOTA": SWEEP, "dense": {1e-3: [6.1], 1e-2: [5.8]}}),
        "halving": figures.data_halving({1000: {0: 6.2, 1: 6.3}, 2000: {0: 6.0, 1: 6.1}}),
        "gap": figures.clean_gap(runs),
        "ablations": figures.ablations(evidence.best("optimized"), ABLATED),
        "blocks": pictures.block_view(CELLS, GATE, ["The", "king", "was"], layouts["8×8"], 5),
        "explored": figures.explored([CURVE], evidence.rungs, ("epoch", "perplexity")),
    }
    for name, figure in drawn.items():
        pixels = matplotlib.image.imread(io.BytesIO(figure_png(figure, "about")))[..., :3]
        height, width = pixels.shape[:2]
        middle = pixels[height // 4 : 3 * height // 4, width // 4 : 3 * width // 4]
        assert (middle < 0.98).any(-1).mean() > 0.005, name  # more than background
        assert figure.get_supxlabel() == "about"


def test_the_explorers_figure_shades_the_plateau_and_marks_events(evidence):
    figure = figures.explored([CURVE], evidence.rungs, ("epoch", "perplexity"), log="y")
    (axis,) = figure.axes
    (band,) = axis.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == (4.0, 6.0)
    assert band.get_hatch()  # seen in black and white, too
    assert "learning rate halved" in _written(axis) and "bigram" in _written(axis)
    assert axis.get_yscale() == "log" and len(axis.lines) == 2 + 1 + len(evidence.rungs)


def test_the_root_cause_figure_tells_verdicts_apart_without_colour():
    axis = figures.root_causes(CAUSES, 0.05).axes[0]
    marks = {(line.get_marker(), line.get_fillstyle()) for line in axis.lines}
    assert {("o", "full"), ("D", "left")} <= marks
    assert "400 → 270" in _written(axis) and "400 → diverges" in _written(axis)


def test_a_sweep_keeps_what_fails_off_the_scale():
    axis = figures.rate_sweep({"MU-SOTA": SWEEP}).axes[0]
    assert max(line.get_ydata().max() for line in axis.lines) < 8.5
    assert "off the scale" in _written(axis) and "at 0.01" in _written(axis)


def test_names_nobody_registered_are_told_apart():
    styles = styles_of(["mine", "optimized", "yours"])
    assert styles["optimized"] == registry.style_of("optimized")
    assert styles["mine"][0] != styles["yours"][0] and styles["mine"][2] != styles["yours"][2]


def test_curves_draw_every_run_rung_and_the_reported_result(evidence):
    figure = figures.curves(evidence.runs, evidence.rungs, reported=True)
    left = figure.axes[0]
    drawn = {tuple(np.round(line.get_ydata(), 6)) for line in left.lines}  # exp rounds by machine
    for run in evidence.runs:
        assert tuple(np.round(run.history.ppl, 6)) in drawn
    labels = " ".join(text.get_text() for text in [*left.texts, *figure.legends[0].texts])
    for word in ("unigram", "bigram", "trigram", "reported: 402", "dense baseline, seed 0"):
        assert word in labels
    without = figures.curves(evidence.runs, evidence.rungs, reported=False)
    assert "reported" not in str([t.get_text() for t in without.legends[0].texts])


def test_tables_and_verdicts_hold_the_recorded_numbers(evidence):
    assert "measured" in evidence.footer and "not WikiText" in evidence.footer
    table = comparison_table(evidence.runs).set_index("model")
    for run in evidence.runs:
        row = table.loc[registry.title_of(run.name)]
        assert row["valid PPL"] == f"{run.summary['ppl']:.1f}"
        assert row["parameters"] == f"{run.experiment.model.n_parameters:,}"
    total = ledger_table(evidence.runs).loc["total", "MU-SOTA optimized"]
    assert total == f"{MODELS['optimized'].n_parameters:,}"
    compared = [finding.sentence for finding, _ in evidence.compared.values()]
    text = "\n".join(compared + rule_lines(evidence))
    for said in ("optimized against its dense twin", "Ladder", "Option 3", "not applicable here"):
        assert said in text
