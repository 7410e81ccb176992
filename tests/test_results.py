"""Recorded results: which runs are one model, what is compared with what, what is left out."""

import json
import math
import random
import shutil

import pytest
from conftest import EXPERIMENT, ROOT

import musota
from musota.errors import MusotaError
from musota.workbook.results import Results, find_results, find_runs, progress
from musota.workbook.tables import model_table, runs_table

FROZEN = json.loads((ROOT / "tests" / "data" / "frozen_results.json").read_text("utf-8"))
TITLE = {"title": "MU-SOTA, as tested"}
MODEL = EXPERIMENT.with_(n_layer=2)


@pytest.fixture(scope="module")
def trained(short, tmp_path_factory):
    """Two seeds of a model, the model at another rate, and its parameter-matched transformer."""
    root = tmp_path_factory.mktemp("results")
    about = musota.RunOptions(about=TITLE)
    for seed in (0, 1):
        folder = root / "tiny" / f"mu-seed{seed}"
        musota.train(MODEL, short, folder, seed=seed, name="mu", options=about)
    musota.train(MODEL.with_(learning_rate=1e-3), short, root / "tiny" / "b", name="b")
    musota.train(musota.twin(MODEL), short, root / "tiny" / "c")
    return root


@pytest.fixture
def folder(trained, tmp_path):
    ignore = shutil.ignore_patterns("checkpoints")
    return shutil.copytree(trained / "tiny", tmp_path / "tiny", ignore=ignore)


def test_seeds_are_one_model_and_nothing_else_is_pooled(folder):
    results = Results(folder)
    assert sorted(len(group) for group in results.groups.values()) == [1, 1, 2]
    assert sorted(results.titles.values()) == [TITLE["title"], "b", "run"]
    (row,) = (row for row in model_table(results).to_dict("records") if row["seeds"] == "2")
    losses = [run.valid_loss for run in results.group("mu")]
    assert row["valid PPL"].startswith(f"{math.exp(sum(losses) / 2):,.1f} [")


def test_a_model_is_compared_with_its_transformer_at_the_same_rate_first(folder, short):
    results = Results(folder)
    other = musota.twin(MODEL)
    assert results.matched_to(results.group("mu"))[0].experiment == other
    slower = next(g for g in results.groups.values() if g[0].path.name == "b")
    assert results.matched_to(slower)[0].experiment == other  # at another rate, as nothing else is
    musota.train(other.with_(learning_rate=1e-3), short, folder / "d")
    results = Results(folder)
    slower = next(g for g in results.groups.values() if g[0].path.name == "b")
    assert results.matched_to(slower)[0].path.name == "d"
    assert results.matched_to(results.matched_to(slower)) is None
    assert len(results.verdicts()["architecture"]) == 2


def test_an_unfinished_run_is_shown_as_unfinished_and_not_judged(folder, short):
    shutil.rmtree(folder / "c")
    half = musota.RunOptions(stop_at=0.5)
    run = musota.train(musota.twin(MODEL), short, folder / "c", options=half)
    assert not run.finished and progress(run) == "1 of 2"
    results = Results(folder)
    assert "1 of 2" in {*model_table(results)["epochs"]} & {*runs_table(results.runs)["epochs"]}
    assert not results.verdicts()["architecture"]


def test_damage_and_models_without_a_run_are_left_out(folder, capsys):
    musota.build_model(MODEL.model).save_pretrained(folder / "model")
    data = bytearray((folder / "b" / "config.json").read_bytes())
    data[20] ^= 1
    (folder / "b" / "config.json").write_bytes(data)
    assert len(Results(folder).runs) == 3
    assert "b is left out" in capsys.readouterr().out
    (folder / "ngrams.json").write_text("{")
    with pytest.raises(MusotaError, match="ngrams.json is damaged"):
        _ = Results(folder).ngrams


@pytest.mark.parametrize("name", ["mu", "tiny/mu", "mu-seed1", TITLE["title"], "b"])
def test_runs_are_found_by_name_title_and_folder(trained, name):
    found = find_runs(name, trained, "tiny")
    assert [run.seed for run in found] == {"mu-seed1": [1], "b": [0]}.get(name, [0, 1])
    path = str(trained / "tiny" / "b")
    assert [run.path.name for run in find_runs(path, trained, "another")] == ["b"]


def test_an_unknown_run_is_an_error_with_the_nearest_name(trained):
    with pytest.raises(MusotaError, match="mu-seed0"):
        find_runs("mu-sed0", trained, "tiny")
    with pytest.raises(MusotaError, match="another"):
        find_runs("mu", trained, "another")


def test_results_fall_back_on_another_folder_and_say_so(trained, tmp_path):
    here, there = tmp_path / "here", trained / "tiny"
    found = find_results(["mu"], [here, there])
    assert found.group("mu") and str(there) in found.note and str(here) in found.note
    assert not find_results(["mu"], [there, here]).note
    assert "run the notebook" in find_results(["nothing"], [here, there]).note


def test_a_text_without_spaces_shows_bits_per_byte(tmp_path):
    """Its "words" are paragraphs: a perplexity over them has 200 digits, or overflows."""
    signs, choose = [chr(0x4E00 + n) for n in range(99)], random.Random(0).choices
    for split, lines in (("train", 40), ("valid", 9), ("test", 9)):
        text = "".join("".join(choose(signs, k=400)) + "\n" for _ in range(lines))
        (tmp_path / f"{split}.txt").write_text(text, "utf-8")
    corpus, experiment = musota.load_corpus(str(tmp_path), 300), MODEL.with_(vocab_size=300)
    musota.train(experiment.with_(epochs=1), corpus, tmp_path / "results" / "a")
    (row,) = model_table(Results(tmp_path / "results")).to_dict("records")
    assert "test word PPL" not in row and float(row["bits/byte"]) > 0


@pytest.mark.parametrize("profile", ["study", "full"])
def test_the_committed_records_hold_the_frozen_numbers(profile):
    """The numbers as they were before records became run folders."""
    runs = {run.path.name: run for run in Results(ROOT / "results" / profile).runs}
    for name, frozen in FROZEN[profile]["runs"].items():
        run = runs[name]
        for metric in ("valid_loss", "ppl", "accuracy", "test_ppl", "weights_sha256"):
            assert run.summary[metric] == frozen[metric], (name, metric)


def test_the_committed_redesign_is_a_tie_with_its_transformer():
    study, full = (Results(ROOT / "results" / name) for name in ("study", "full"))
    assert study.architecture()["Redesign"].decision == "tie"
    assert full.architecture()["Redesign, 3 epochs"].decision == "tie"  # 82.1 against 81.1
    assert study.architecture()["MU-SOTA, simplified"].decision == "hurts"
    causes = {cause.name: cause.decision for cause in study.grid}
    assert causes["too few epochs (10 → 30)"] == "cause" and len(causes) > 15
