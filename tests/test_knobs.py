"""The researcher's own experiments: changed, named, continued, compared, scored."""

import os
import re
import signal

import pytest
from click.testing import CliRunner

import musota
from musota.errors import MusotaError
from musota.plan.architectures import DenseConfig
from musota.plan.config import check_changes
from musota.plan.profiles import changed, scaled
from musota.plan.suspects import grid
from musota.rules import curves, verdicts
from musota.studies.grid import LINES, advised_changes, next_line
from musota.training import trainer
from musota.workbook import figures
from musota.workbook.answers import health_of, run_findings
from musota.workbook.cli import cli
from musota.workbook.compare import against_first, chosen_runs, find_runs
from musota.workbook.evidence import read_evidence
from musota.workbook.session import Workbook
from musota.workbook.tables import comparison_table, differences_table

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


# --- changes ---


def test_what_is_written_is_what_trains_and_how_it_is_called(results):
    run = find(LONGER, results)
    assert run.experiment == TINY["optimized"].with_(**FAST, epochs=4)
    assert run.path.name == f"{LONGER}-seed0" and run.history.epoch.max() == 4
    title = LONGER.replace("optimized", "MU-SOTA optimized").replace(",", ", ")
    assert comparison_table([run]).model.tolist() == [title]
    assert figures.label_of(run) == f"{title}, seed 0"


def test_a_changed_model_has_the_twin_matched_to_it_and_no_other(results, made):
    evidence = read_evidence(results[0] / results[1], made().corpus.fingerprint)
    twin = evidence.twin_of(LONGER)
    assert twin == LONGER.replace("optimized", "optimized_twin")  # told by the model's changes
    assert list(evidence.compared) == [LONGER]  # not the model of 3 epochs
    assert find(LONGER, results).experiment == made(epochs=4).experiment("optimized")


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


def test_a_profile_never_multiplies_a_change(made):
    for name in ("original", "optimized", "simplified"):
        assert made(learning_rate=0.5).experiment(name).training.learning_rate == 0.5


def test_the_grid_takes_what_it_does_not_turn_itself(text_folder, tmp_path, capsys):
    changes = {"learning_rate": 0.1, "dropout": 0.3}
    book = Workbook("tiny", str(text_folder), 0, False, str(tmp_path), changes, grid=True)
    assert book.changes == {"dropout": 0.3}
    assert "turns learning_rate itself: left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, "Unknown field 'learning_rat': did you mean 'learning_rate'"),
        ({"epochs": "fifty"}, "epochs must be a whole number of at least 1, not 'fifty'"),
        ({"learning_rate": 0}, "learning_rate must be a finite number above 0, not 0"),
        ({"optimizer": 3}, "optimizer must be a name, not 3"),
        ("epochs", "changes must be like"),
    ],
)
def test_wrong_changes_get_one_sentence(changes, message):
    with pytest.raises(MusotaError, match=message):
        check_changes(changes)
    assert check_changes('{"learning_rate": 0.003}') == {"learning_rate": 0.003}  # papermill's -p


# --- going on from another run's weights ---


def test_a_run_goes_on_from_anothers_best_weights(results, made, capsys):
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


def test_weights_that_do_not_fit_are_refused(results, made):
    with pytest.raises(MusotaError, match="has n_block=16, not 8"):
        made(n_block=8).train("optimized", continue_from=find(LABEL, results))


# --- comparing any runs ---


def test_any_runs_are_compared_where_they_differ_first(results):
    evidence = chosen_runs([LABEL, LONGER, f"{LONGER.replace('d,', 'd_twin,')}-seed0"], *results)
    assert evidence.note.startswith("They differ in architecture, ")
    table = differences_table(evidence.runs)
    assert table.loc["epochs"].tolist() == ["3", "4", "4"] and "batch_size" not in table.index
    longer, interval = next(against_first(evidence.runs))
    assert longer.verdict in ("better", "worse", "undecided") and "provisional" in longer.conclusion
    losses = [find(label, results).summary["valid_loss"] for label in (LONGER, LABEL)]
    assert interval.mean == pytest.approx(losses[0] - losses[1], abs=1e-4)


def test_other_tokens_are_compared_in_bits_per_byte(results):
    other = LABEL.replace("optimized,", "optimized,vocab_size=400,")
    evidence = chosen_runs([LABEL, other], *results)
    assert "bits per byte" in evidence.note and not [*against_first(evidence.runs)]
    axis = figures.curves(evidence.runs, {"bigram": 100.0}, reported=True).axes[0]
    assert "bits per byte" in axis.get_ylabel() and axis.dataLim.ymax < 10


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([f"{LABEL}6"], f"Unknown run '{LABEL}6': did you mean '{LABEL}'"),
        ([LABEL, LABEL], "two models or more"),
        (["nowhere/at/all"], "There is no run nowhere/at/all: give its folder"),
    ],
)
def test_what_cannot_be_compared_gets_one_sentence(results, names, message):
    with pytest.raises(MusotaError, match=message):
        chosen_runs(names, *results)


# --- scoring a text ---


def test_a_text_is_scored_token_by_token(results):
    run, text = find(LABEL, results), "Return the name of the file.\n\nÄ 名"
    model = run.load_model()
    scored = model.score_text(text)
    ids = [model.tokenizer.line_end, *model.tokenizer.encode(text)]
    assert len(scored.table) == len(ids) - 1
    cut = model.score_text(text[:10])  # what follows changes nothing
    assert scored.nats[: len(cut.nats) - 1] == pytest.approx(cut.nats[:-1], abs=1e-5)
    bits = scored.table.bits.sum()
    assert scored.bits_per_byte == pytest.approx(bits / len(text.encode()))
    assert scored.ppl == pytest.approx(2 ** (bits / len(scored.nats)))
    for wrong in ("", 3):
        with pytest.raises(MusotaError, match="score_text needs a text"):
            model.score_text(wrong)


def test_compare_and_score_on_the_command_line(results, tmp_path):
    (tmp_path / "note.txt").write_text("Return the name of the file.\n")
    where = ["--save-to", str(results[0]), "--profile", results[1]]
    done = CliRunner().invoke(cli, ["compare", LABEL, LONGER, *where], catch_exceptions=False)
    assert done.output.startswith("They differ in epochs.") and "against MU-SOTA" in done.output
    for picture in ("curves", "verdicts"):
        assert (results[0] / "compared" / f"{picture}.png").stat().st_size > 5000
    command = ["score", LABEL, str(tmp_path / "note.txt"), *where]
    done = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert "bits per byte" in done.output
    assert (results[0] / results[1] / f"{LABEL}-seed0" / "score-note.csv").exists()


# --- warm-up that outlasts its run ---


def test_warm_up_longer_than_the_run_is_a_finding_and_said_before_the_first_step(
    results, made, capsys
):
    run = find(LABEL.replace("steps=5", "steps=2000"), results)
    found = {finding.rule: finding for finding in run_findings(run, {})}
    assert found["Warm-up"].verdict == "never ends" and "plateau" in found["Warm-up"].conclusion
    updates = {finding.rule: finding for finding in health_of(run)}["Update of a step ÷ weights"]
    assert updates.verdict == "warming up" and "usual" not in updates.conclusion
    assert "Warm-up" not in {f.rule for f in run_findings(find(LABEL, results), {})}
    assert curves.warmup(2000, 220).saw == "2,000 warm-up steps in a run of 220"
    assert curves.warmup(100, 220).verdict == "long" and curves.warmup(2000, 10_500) is None
    capsys.readouterr()
    made(warmup_steps=1999).train("optimized", stop_at=0.5)
    said = capsys.readouterr().out
    assert said.index("1,999 warm-up steps in a run of") < said.index("tokens/s")


# --- what notebook 06 advises ---


@pytest.mark.parametrize("profile", ["tiny", "study"])
def test_the_advised_line_makes_the_change(profile):
    base = scaled(musota.experiments["optimized"], profile)
    for suspect in grid(profile)[1]:
        line = next_line([verdicts.Cause(suspect, None, 2.0, 1.0, "cause")], profile, "my folder")
        assert "--corpus 'my folder'" in line or suspect.advice in LINES
        changes = {} if suspect.advice in LINES else advised_changes(suspect, profile)
        assert base.with_(**changes).differences(base) == re.findall(r"--set (\S+=[^\s`]+)", line)
    assert next_line([], profile, "auto").startswith("No change")


def test_sigterm_ends_a_run_as_ctrl_c_does(made, monkeypatch):
    step, at = trainer.Trainer.one_step, 20  # in the second epoch

    def one_step(self):
        if self.step + 1 == at:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "one_step", one_step)
        partial = made(dropout=0.2).train("optimized")
    assert not partial.finished and partial.summary["epochs_done"] == 1
    whole = made(dropout=0.2).train("optimized")
    assert whole.finished and len(whole.steps) >= at
