"""The researcher's own experiments: changed, named, continued, compared, scored."""

import copy
import os
import re
import signal

import pytest
from click.testing import CliRunner
from conftest import each_step

import musota
from musota.errors import MusotaError
from musota.plan.architectures import DenseConfig
from musota.plan.config import check_changes
from musota.plan.profiles import changed, scaled
from musota.plan.suspects import grid
from musota.rules import curves, verdicts
from musota.studies.grid import LINES, advised_changes, next_line
from musota.workbook import figures
from musota.workbook.answers import against_first, health_of, run_findings
from musota.workbook.cli import cli
from musota.workbook.evidence import chosen_runs, find_runs, read_evidence
from musota.workbook.naming import label_of
from musota.workbook.session import Workbook
from musota.workbook.tables import differences_table

FAST = {"max_seq_len": 24, "n_layer": 1, "warmup_steps": 5, "batch_size": 32}  # seconds a run
LABEL = "optimized,max_seq_len=24,n_layer=1,warmup_steps=5,batch_size=32"
LONGER = LABEL.replace("warmup", "epochs=4,warmup")
TINY = {name: scaled(experiment, "tiny") for name, experiment in musota.experiments.items()}


@pytest.fixture(scope="module")
def made(text_folder, tmp_path_factory):
    """Makes workbooks on one results folder."""
    base = str(tmp_path_factory.mktemp("results"))
    return lambda **changes: Workbook("tiny", str(text_folder), 0, False, base, FAST | changes)


@pytest.fixture(scope="module")
def results(made):
    """A results folder with a model, changes of it, and the dense twin of one: parent and name."""
    for changes in ({}, {"epochs": 4}, {"vocab_size": 400}, {"warmup_steps": 2000}):
        made(**changes).train("optimized")
    made(epochs=4).train("optimized_twin")
    root = made().root
    return root.parent, root.name


def find(label, results):
    (run,) = find_runs(label, *results)
    return run


def test_what_is_written_is_what_trains_and_how_it_is_called(results):
    run = find(LONGER, results)
    assert run.experiment == TINY["optimized"].with_(**FAST, epochs=4)
    assert run.path.name == f"{LONGER}-seed0" and run.history.epoch.max() == 4
    title = LONGER.replace("optimized", "MU-SOTA optimized").replace(",", ", ")
    assert label_of(run) == f"{title}, seed 0"


def test_a_changed_model_has_the_twin_matched_to_it_and_no_other(results, made):
    evidence = read_evidence(results[0] / results[1], made().corpus.fingerprint)
    twin = evidence.twin_of(LONGER)
    assert twin == LONGER.replace("optimized", "optimized_twin")  # told by the model's changes
    assert list(evidence.compared) == [LONGER]  # not the model of 3 epochs


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"learning_rate": 1e-3}, True),  # carries over, and the size stays
        ({"n_block": 8}, False),  # matched anew
        ({"n_head": 4}, True),  # moves no parameter, and a twin's heads follow from its width
    ],
)
def test_changes_keep_a_comparison_fair(changes, same):
    model, baseline = changed(TINY["optimized"], changes), changed(TINY["baseline"], changes)
    assert baseline == musota.twin(model)
    assert (baseline.model == TINY["baseline"].model) is same
    own = changed(TINY["baseline"], {"d_model": 64, "n_head": 4})
    assert own.model == DenseConfig(512, 48, 2, 4, 0.1, 64) and own.twin_of is None


def test_the_grid_takes_what_it_does_not_turn_itself(text_folder, tmp_path, capsys):
    changes = {"learning_rate": 0.1, "dropout": 0.3}
    book = Workbook("tiny", str(text_folder), 0, False, str(tmp_path), changes, grid=True)
    assert book.changes == {"dropout": 0.3}
    assert "turns learning_rate itself: left out" in capsys.readouterr().out


def test_changes_are_checked_and_a_profile_never_multiplies_them(made):
    for wrong, message in {
        '{"learning_rat": 1}': "Unknown field 'learning_rat': did you mean 'learning_rate'",
        '{"epochs": "fifty"}': "epochs must be a whole number of at least 1, not 'fifty'",
        "epochs": "changes must be like",
    }.items():
        with pytest.raises(MusotaError, match=message):
            check_changes(wrong)
    changes = check_changes('{"learning_rate": 0.5}')  # as text: papermill's -p
    assert made(**changes).experiment("original").training.learning_rate == 0.5


def test_a_run_goes_on_from_anothers_best_weights(results, made):
    book, first = made(learning_rate=1e-3), find(LABEL, results)
    run = book.train("optimized", continue_from=first)
    start = run.experiment.training.started_from
    assert start and run.path.name.count(f"started_from={start}") == 1
    assert run.experiment.with_(started_from="") == book.experiment("optimized")
    assert run.history.valid_loss[0] < first.history.valid_loss.min() + 0.05  # not anew
    assert run.steps.learning_rate.iloc[0] < 1e-3 / 4  # a schedule of its own
    with pytest.raises(MusotaError, match="starts from the weights .* continue_from="):
        musota.train(run.experiment, book.corpus, results[0] / "anew")
    with pytest.raises(MusotaError, match="its started_from is"):
        musota.train(book.experiment("optimized"), book.corpus, run.path)
    assert musota.train(run.experiment, book.corpus, run.path).finished  # as it is
    with pytest.raises(MusotaError, match="has n_block=16, not 8"):
        made(n_block=8).train("optimized", continue_from=first)


def test_any_runs_are_compared_where_they_differ_first(results):
    evidence = chosen_runs([LABEL, LONGER, f"{LONGER.replace('d,', 'd_twin,')}-seed0"], *results)
    table = differences_table(evidence.runs)
    assert table.loc["epochs"].tolist() == ["3", "4", "4"] and "batch_size" not in table.index
    longer, interval = next(against_first(evidence.runs))
    assert longer.verdict in ("better", "worse", "undecided") and "provisional" in longer.conclusion
    losses = [find(label, results).summary["valid_loss"] for label in (LONGER, LABEL)]
    assert interval.mean == pytest.approx(losses[0] - losses[1], abs=1e-4)


def test_a_probe_is_measured_once_for_a_models_weights(made, results):
    book, run, calls = made(), find(LABEL, results), []
    other, unfinished = copy.copy(run), copy.copy(run)
    other.summary = run.summary | {"weights_sha256": "others"}
    unfinished.summary = {"epochs_done": 1}
    for one in (run, run, other, other, unfinished, unfinished):
        kept = book.kept("seen", lambda r: calls.append(r) or {"of": len(calls)}, one)
        assert kept["of"] == len(calls)
    assert calls == [run, other, unfinished]


def test_two_runs_are_compared_in_python(results):
    runs = [find(label, results) for label in (LONGER, LABEL)]
    for run in runs:
        run.name = "run"  # as Python calls what nobody named
    finding, interval = musota.compare(*runs)
    assert finding.rule == "run against run, epochs=3"
    runs = [find(label, results) for label in (LONGER, LABEL)]
    finding, interval = musota.compare(*runs)
    (same,) = against_first([runs[1], runs[0]])
    assert (finding.sentence, interval) == (same[0].sentence, same[1])
    assert interval.mean == -musota.compare([runs[1]], [runs[0]])[1].mean
    other = find(LABEL.replace("optimized,", "optimized,vocab_size=400,"), results)
    with pytest.raises(MusotaError, match="validated on other tokens: compare their bits"):
        musota.compare(runs[0], other)
    for wrong in (None, "optimized", []):
        with pytest.raises(MusotaError, match="compare needs"):
            musota.compare(runs[0], wrong)


def test_other_tokens_are_compared_in_bits_per_byte(results):
    other = LABEL.replace("optimized,", "optimized,vocab_size=400,")
    evidence = chosen_runs([LABEL, other], *results)
    assert "bits per byte" in evidence.note and not [*against_first(evidence.runs)]
    axis = figures.curves(evidence.runs, {"bigram": 100.0}, reported=True).axes[0]
    assert "bits per byte" in axis.get_ylabel() and axis.dataLim.ymax < 10


def test_what_cannot_be_compared_gets_one_sentence(results):
    for names, message in (
        ([f"{LABEL}6"], f"Unknown run '{LABEL}6': did you mean '{LABEL}'"),
        ([LABEL, LABEL], "two models or more"),
        (["nowhere/at/all"], "There is no run nowhere/at/all: give its folder"),
    ):
        with pytest.raises(MusotaError, match=message):
            chosen_runs(names, *results)


def test_a_text_is_scored_token_by_token(results):
    run, text = find(LABEL, results), "Return the name of the file.\n\nÄ 名"
    model = run.load_model()
    scored = model.score_text(text)
    ids = [model.tokenizer.line_end, *model.tokenizer.encode(text)]
    assert len(scored) == len(ids) - 1
    cut = model.score_text(text[:10])  # what follows changes nothing
    assert list(scored.bits[: len(cut) - 1]) == pytest.approx(list(cut.bits[:-1]), abs=1e-5)
    bits = scored.bits.sum()
    assert scored.attrs["bits_per_byte"] == pytest.approx(bits / len(text.encode()))
    assert scored.attrs["ppl"] == pytest.approx(2 ** (bits / len(scored)))
    for wrong in ("", 3):
        with pytest.raises(MusotaError, match="score_text needs a text"):
            model.score_text(wrong)


def test_compare_and_score_on_the_command_line(results, tmp_path):
    (tmp_path / "note.txt").write_text("Return the name of the file.\n")
    where = ["--save-to", str(results[0]), "--profile", results[1]]
    done = CliRunner().invoke(cli, ["compare", LABEL, LONGER, *where], catch_exceptions=False)
    assert "epochs " in done.output and "against MU-SOTA" in done.output
    command = ["score", LABEL, str(tmp_path / "note.txt"), *where]
    done = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert "bits per byte" in done.output
    assert (results[0] / results[1] / f"{LABEL}-seed0" / "score-note.csv").exists()


def test_warm_up_longer_than_the_run_is_a_finding_and_said_before_the_first_step(
    results, made, capsys
):
    run = find(LABEL.replace("steps=5", "steps=2000"), results)
    found = {f.rule: f.verdict for f in [*run_findings(run, {}), *health_of(run)]}
    assert found["Warm-up"] == "never ends"
    assert found["Update of a step ÷ weights"] == "warming up"
    assert "Warm-up" not in {f.rule for f in run_findings(find(LABEL, results), {})}
    assert curves.warmup(100, 220).verdict == "long" and curves.warmup(2000, 10_500) is None
    capsys.readouterr()
    made(warmup_steps=1999).train("optimized", stop_at=0.5)
    said = capsys.readouterr().out
    assert said.index("1,999 warm-up steps in a run of") < said.index("tokens/s")


@pytest.mark.parametrize("profile", ["tiny", "study"])
def test_the_advised_line_makes_the_change(profile):
    base = scaled(musota.experiments["optimized"], profile)
    for suspect in grid(profile)[1]:
        line = next_line([verdicts.Cause(suspect, None, 2.0, 1.0, "cause")], profile, "my folder")
        assert "--corpus 'my folder'" in line or suspect.advice in LINES
        changes = {} if suspect.advice in LINES else advised_changes(suspect, profile)
        assert base.with_(**changes).differences(base) == re.findall(r"--set (\S+=[^\s`]+)", line)
    assert next_line([], profile, "auto").startswith("No change")


def test_sigterm_ends_a_run_as_ctrl_c_does(made):
    def end(trainer):
        if trainer.step == 19:  # in the second epoch
            os.kill(os.getpid(), signal.SIGTERM)

    with each_step(before=end):
        partial = made(dropout=0.2).train("optimized")
    assert not partial.finished and partial.summary["epochs_done"] == 1
    assert made(dropout=0.2).train("optimized").finished
