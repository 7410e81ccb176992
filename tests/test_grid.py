import math
import multiprocessing
import time
from dataclasses import replace

import pytest
from conftest import ROOT, interrupted_at

import musota
from musota.lab import root_causes
from musota.lab.grid_runs import add_row, read_table, run_many
from musota.lab.profiles import GRID_PROFILES, Profile, scaled
from musota.lab.root_causes import grid, judge
from musota.models.base import CausalLM
from musota.training.run import Run

STUDY = ROOT / "results" / "study"
RECORDED = read_table(STUDY / "grid.csv")
SMALL = Profile("small", 512, 4000, 1200, 1 / 12, 1 / 8, 1 / 10, 1 / 4, 30.0, 1)


def test_a_small_grid_is_part_of_the_whole():
    runs, _, seeds = grid("quick")
    assert list(seeds) == [0, 1]
    assert root_causes.varied_fields(runs) >= {"learning_rate", "n_block", "warmup_steps"}
    smaller = scaled("original", GRID_PROFILES["study"], n_layer=2)
    assert runs["dense"].at(GRID_PROFILES["study"], n_layer=2) == musota.twin(smaller)
    tiny, (only,), _ = grid("tiny")
    assert list(tiny) == [only.before, only.after]


def test_the_recorded_grid_counts_as_done(corpus, tmp_path, monkeypatch):
    """All runs of `study` with three seeds are in the committed table."""
    monkeypatch.setattr("musota.lab.grid_runs.train", None)  # whatever trains fails
    shares = {row.train_tokens: row.fingerprint for row in RECORDED}
    fingerprints = dict(zip((0.25, 0.5, 1.0), (shares[n] for n in sorted(shares)), strict=True))

    text = "musota.lab.grid_runs._text"
    monkeypatch.setattr(text, lambda _, share: replace(corpus, fingerprint=fingerprints[share]))
    runs, _, seeds = grid("study")
    where = STUDY / "grid.csv", tmp_path
    rows = run_many(runs, seeds, GRID_PROFILES["study"], corpus, *where)
    assert len(rows) == 22 and list(seeds) == [0, 1, 2]
    assert rows == {name: root_causes.by_name(RECORDED)[name] for name in runs}
    assert not [*tmp_path.iterdir()]


def test_the_recorded_grid_is_judged_as_before():
    causes = judge(root_causes.by_name(RECORDED))
    stray = replace(RECORDED[0], name="original", seed=7)
    assert judge(root_causes.by_name([*RECORDED, stray])) == causes
    decisions = ["cause"] * 6 + ["undecided"] * 2 + ["not a cause"] * 7
    assert [cause.decision for cause in causes] == decisions
    epochs = causes[0]
    assert epochs.effect.mean == pytest.approx(-0.508, abs=5e-4)
    assert (epochs.effect.low, epochs.effect.high) == pytest.approx((-0.567, -0.449), abs=5e-4)
    assert (epochs.name, epochs.changed) == ("too few epochs", "epochs 1 → 3")
    (fair,) = (cause for cause in causes if "each at its best rate" in cause.name)
    assert fair.effect.mean == pytest.approx(0.180, abs=5e-4)
    assert fair.changed == "d_model 64 → 126, n_head 8 → 7, learning_rate 0.03 → 0.001"
    verdict = root_causes.advice(causes)
    assert verdict.decision == epochs.name and verdict.value == epochs.effect.mean
    assert verdict.next_step.startswith("train longer, then raise the learning rate, then take s")
    assert root_causes.advice(causes[6:]).decision == "none found"


def test_a_table_gives_back_what_was_added(tmp_path):
    path, row = tmp_path / "new" / "grid.csv", RECORDED[0]
    assert read_table(path) == []
    diverged = replace(row, seed=7, valid_loss=(), best_valid_loss=math.inf, diverged=True)
    broken = replace(row, seed=8, train_loss=(math.nan, 2.0))
    for each in (row, diverged, broken, replace(row, best_valid_loss=1.0)):
        add_row(path, each)
    first, second, third = read_table(path)
    assert first == diverged and third == replace(row, best_valid_loss=1.0)
    assert math.isnan(second.train_loss[0]) and second.train_loss[1] == 2.0
    path.write_text(path.read_text()[:-9])
    with pytest.raises(musota.MusotaError, match="damaged"):
        read_table(path)


@pytest.fixture(scope="module")
def trained(short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grid")
    some = ("original", "original_half", "original_rate_x3", "dense", "dense_rate_x3")
    runs = {name: grid("quick")[0][name] for name in some}
    where = folder / "grid.csv", folder / "runs"
    spawn = multiprocessing.get_context("spawn")
    other = spawn.Process(target=time.sleep, args=(600,), daemon=True)
    other.start()
    rows = run_many(runs, (0, 1), SMALL, short, *where)
    assert other.is_alive()  # only its own processes are ended
    other.kill()
    return runs, where, rows


def test_a_grid_trains_every_run_once_and_keeps_a_row_of_each(trained, short, capsys):
    runs, (table, folder), rows = trained
    assert list(rows) == list(runs) and all(set(r) == {0, 1} for r in rows.values())
    assert not [*folder.iterdir()]
    whole, half = (rows[name][0] for name in ("original", "original_half"))
    assert half.train_tokens == pytest.approx(whole.train_tokens / 2, rel=0.1)
    assert len(half.valid_loss) == len(half.train_loss) == len(half.clean_train_loss) == 2
    lines = table.read_text().splitlines(keepends=True)
    left = [line for line in lines if not line.startswith("dense,1,")]
    assert len(lines) == 11 and len(left) == 10
    table.write_text("".join(left))
    again = run_many(runs, (0, 1), SMALL, short, table, folder)
    assert "1 of 10 runs are left to train." in capsys.readouterr().out
    # The first time it trained in a process with one thread: rounded differently.
    assert again["dense"][1].valid_loss == pytest.approx(rows["dense"][1].valid_loss, rel=1e-4)
    assert again["original"] == rows["original"]
    calls, changes, only = [], {"warmup_steps": 0}, {"original": runs["original"]}
    how = {"changes": changes, "each": lambda _, rows, left: calls.append((len(rows), left))}
    row = run_many(only, (0,), SMALL, short, table, folder, **how)["original"][0]
    assert row.name == "original,warmup_steps=0" and calls == [(1, 1), (1, 0)]
    assert row.experiment == scaled("original", SMALL, **changes)


def test_a_grid_is_judged_as_far_as_it_has_been_trained(trained):
    rows = dict(trained[2])
    causes = {cause.after: cause for cause in judge(rows)}
    (fair,) = (cause for cause in causes.values() if "edge" in cause.name)
    assert fair.decision == "undecided" and len(judge(rows)) == 4
    raised, losses = causes["original_rate_x3"], root_causes.valid_losses(rows)
    before, after = (sum(losses[name].values()) / 2 for name in (raised.before, raised.after))
    assert raised.effect.mean == pytest.approx(after - before)
    assert raised.changed == "learning_rate 0.009 → 0.027"
    for name in ("original", "dense"):
        assert [*root_causes.sweep_losses(rows, name)] == pytest.approx([0.009, 0.027])
    rows["original"] = {0: rows["original"][0]}  # not with every seed
    assert "original" not in root_causes.valid_losses(rows) and not judge(rows)


def test_an_interrupted_grid_stops_and_keeps_its_checkpoint(short, tmp_path):
    runs = {name: grid("quick")[0][name] for name in ("epochs", "original")}
    where = SMALL, short, tmp_path / "grid.csv", tmp_path / "runs"
    with interrupted_at(20), pytest.raises(KeyboardInterrupt):
        run_many(runs, (0,), *where)
    (only,) = (tmp_path / "runs").iterdir()
    assert not Run(only).ended and [*only.glob("checkpoints/step-*")]
    with interrupted_at(Run(only).total_steps), pytest.raises(KeyboardInterrupt):
        run_many(runs, (0,), *where)
    assert Run(only).ended and [*(tmp_path / "runs").iterdir()] == [only]
    rows = run_many(runs, (0,), *where)
    assert all(by_seed[0].best_valid_loss < 10 for by_seed in rows.values())


def test_a_diverged_run_is_recorded_and_no_cause(short, tmp_path, monkeypatch):
    runs = {name: grid("quick")[0][name] for name in ("original", "original_rate_x10")}
    where = SMALL, short, tmp_path / "grid.csv", tmp_path
    run_many({"original": runs["original"]}, (0,), *where)
    losses = CausalLM.loss_of
    monkeypatch.setattr(CausalLM, "loss_of", lambda *given: losses(*given) * math.inf)
    rows = run_many(runs, (0,), *where)
    assert rows["original_rate_x10"][0].diverged and not rows["original"][0].diverged
    (cause,) = judge(rows)
    assert (cause.effect, cause.decision, cause.ppl_after) == (None, "not a cause", math.inf)
