"""Recorded results: which runs are one model, what is compared with what, what is left out."""

import json
import math
import shutil

import pytest
from conftest import EXPERIMENT, ROOT, flip_bit

import musota
from musota.errors import MusotaError
from musota.workbook import report, tables
from musota.workbook import results as records
from musota.workbook.naming import folder_of
from musota.workbook.results import Results, find_runs, ngrams_path

FROZEN = json.loads((ROOT / "tests" / "data" / "frozen_results.json").read_text("utf-8"))
TWIN = musota.twin(EXPERIMENT)


@pytest.fixture(scope="module")
def trained(runs, short, tmp_path_factory):
    """Results with `runs`, and with their model at another learning rate."""
    root = tmp_path_factory.mktemp("results")
    ignore = shutil.ignore_patterns("checkpoints")
    shutil.copytree(runs[0].path.parent, root / "tiny", ignore=ignore)
    musota.train(EXPERIMENT.with_(learning_rate=1e-3), short, root / "tiny" / "b", name="b")
    return root


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained / "tiny", tmp_path / "tiny")


def test_seeds_are_one_model_and_nothing_else_is_pooled(folder):
    results = Results(folder)
    assert sorted(len(group) for group in results.groups.values()) == [1, 1, 2]
    titles = {"b", "the baseline model", "the optimized model"}
    assert {run.title for run in results.runs} == titles
    row = tables.model_table(results).set_index("seeds").loc["2"]
    losses = [run.valid_loss for run in results.group("optimized")]
    assert row["valid PPL"].startswith(f"{math.exp(sum(losses) / 2):,.1f} [")


def test_models_of_equal_titles_and_folders_stay_apart(folder, tmp_path):
    here = musota.Run(folder / "b")
    there = musota.Run(shutil.copytree(here.path, tmp_path / "x" / "b"))
    far = musota.Run(shutil.copytree(here.path, tmp_path / "y" / "x" / "b"))
    there.key, far.key = "another model", "a third one"
    records.tell_apart(models := [here, there, far])
    assert len({run.title for run in models}) == len(records.by_title(models)) == 3
    twice = records.group_runs([here, musota.Run(here.path)])  # named twice
    assert [len(group) for group in twice.values()] == [1]


def test_a_model_is_compared_with_its_transformer_at_the_same_rate_first(folder, short):
    results = Results(folder)
    assert results.matched_to(results.group("optimized"))[0].experiment == TWIN
    slower = results.group("b")
    assert results.matched_to(slower)[0].experiment == TWIN  # at another rate, as nothing else is
    musota.train(TWIN.with_(learning_rate=1e-3), short, folder / "d")
    results = Results(folder)
    assert results.matched_to(slower)[0].path.name == "d"
    assert results.matched_to(results.matched_to(slower)) is None
    assert len(results.verdicts()["architecture"]) == 2


def test_damage_and_models_without_a_run_are_left_out(folder, capsys):
    musota.build_model(EXPERIMENT.model).save_pretrained(folder / "model")
    flip_bit(folder / "b" / "config.json", 20)
    assert len(Results(folder).runs) == 3
    assert "b is left out" in capsys.readouterr().out
    assert Results(folder).ngrams == {}
    path = ngrams_path(folder, Results(folder).fingerprint)
    path.write_text("{")
    with pytest.raises(MusotaError, match=f"{path.name} is damaged"):
        _ = Results(folder).ngrams


def test_runs_are_found_by_name_title_and_folder(trained):
    names = {name: [0, 1] for name in ("optimized", "tiny/optimized", "the optimized model")}
    for name, seeds in (names | {"optimized-seed1": [1], "b": [0]}).items():
        assert [run.seed for run in find_runs(name, trained, "tiny")] == seeds
    assert find_runs(str(trained / "tiny" / "b"), trained, "another")[0].path.name == "b"
    with pytest.raises(MusotaError, match="optimized-seed0"):
        find_runs("optimized-sed0", trained, "tiny")
    with pytest.raises(MusotaError, match="another"):
        find_runs("optimized", trained, "another")
    assert [folder_of(trained, name) for name in ("tiny", "quick")] == ["tiny", "quick"]
    (trained / "tiny").rename(other := trained / "quick-another-text")
    assert folder_of(trained, "quick") == other.name
    other.rename(trained / "tiny")


def test_a_name_of_several_models_is_refused(folder, short):
    musota.train(EXPERIMENT.with_(epochs=1), short, folder / "short", name="optimized")
    with pytest.raises(MusotaError, match=r"Several models are called 'optimized'.*short"):
        find_runs("optimized", folder.parent, folder.name)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_seed_that_diverged_leaves_its_model_without_numbers(folder, monkeypatch, seed):
    diverged = property(lambda run: 7 if run.name == "optimized" and run.seed == seed else None)
    monkeypatch.setattr(musota.Run, "diverged_at", diverged)
    (folder / Results(folder).group("optimized")[seed].path.name / "summary.json").unlink()
    results = Results(folder)
    found = results.architecture()["the optimized model"]
    assert results.group("optimized")[0].summary  # what is shown of the model
    answer = [bold for bold, _ in report._answer(results, results.verdicts())]
    assert "the optimized model: diverged at step 7." in answer
    assert found.decision == "hurts" and f"seed {seed}, diverged at step 7" in found.reason
    row = tables.model_table(Results(folder)).set_index("model").loc["the optimized model"]
    assert row["epochs"] == "diverged at step 7" and row["valid PPL"] == row["accuracy"] == "–"


def test_results_fall_back_on_another_folder_and_say_so(trained, tmp_path, monkeypatch):
    here, there = tmp_path / "here", trained / "tiny"
    found = records.find_results(["optimized"], [here, there])
    assert found.group("optimized") and str(there) in found.note and str(here) in found.note
    assert records.find_results(["optimized"], [there, here]).note == f"Runs of {there}."
    assert "run the notebook" in records.find_results(["nothing"], [here, there]).note
    monkeypatch.setattr(musota.Run, "finished", False)  # of an unfinished run there is no verdict
    assert "run the notebook" in records.find_results(["optimized"], [here, there]).note


def test_a_text_without_words_shows_bits_per_byte(folder, monkeypatch):
    """Without spaces "words" are paragraphs, and a perplexity over them has 200 digits."""
    monkeypatch.setattr(tables, "HUGE", 100)
    for row in tables.model_table(Results(folder)).to_dict("records"):
        assert "test word PPL" not in row and float(row["bits/byte"]) > 0 and row["test PPL"] == "–"


def test_the_committed_records_hold_the_frozen_numbers_and_the_redesign_is_a_tie():
    """The numbers as they were before records became run folders."""
    study, full = (Results(ROOT / "results" / name) for name in ("study", "full"))
    for results in (study, full):
        runs = {run.path.name: run for run in results.runs}
        for name, frozen in FROZEN[results.folder.name]["runs"].items():
            for metric in ("valid_loss", "ppl", "accuracy", "test_ppl", "weights_sha256"):
                assert runs[name].summary[metric] == frozen[metric], (name, metric)
    assert full.architecture()["Redesign, 3 epochs"].decision == "tie"  # 82.1 against 81.1
    assert study.architecture()["MU-SOTA, simplified"].decision == "hurts"
