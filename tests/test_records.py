"""Records: what a run is, and packed files that hold what the folders held."""

import random
import re
import shutil
from dataclasses import dataclass

import pytest
from conftest import EXPERIMENT

import musota
from musota.errors import MusotaError
from musota.plan.architectures import KINDS, MuConfig
from musota.workbook import records
from musota.workbook.answers import health_of
from musota.workbook.evidence import read_evidence
from musota.workbook.pages import write_report
from musota.workbook.tables import comparison_table


@pytest.fixture(scope="module")
def trained(short, tmp_path_factory):
    """Three runs from Python, none of them named, all of seed 0: three different things."""
    folder = tmp_path_factory.mktemp("results")
    musota.train(EXPERIMENT, short, folder / "a")
    musota.train(EXPERIMENT.with_(learning_rate=1e-3), short, folder / "b")
    musota.train(musota.twin(EXPERIMENT), short, folder / "c")
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "kept", ignore=shutil.ignore_patterns("check*"))


def test_runs_that_differ_elsewhere_than_in_the_seed_are_never_pooled(folder):
    names = [run.name for run in read_evidence(folder).runs]
    assert len(set(names)) == 3 and "run" in names
    assert any("learning_rate=0.001" in name for name in names)


def test_two_runs_equal_in_all_are_an_error_that_names_both(folder):
    shutil.copytree(folder / "a", folder / "z")
    with pytest.raises(MusotaError, match="a and z hold the same run"):
        musota.load_runs(folder)


def test_a_new_field_with_a_default_leaves_old_runs_readable(folder, short, monkeypatch):
    @dataclass(frozen=True)
    class Later(MuConfig):
        new: float = 0.5

    monkeypatch.setitem(KINDS, "mu", Later)
    experiment = musota.Experiment(Later(**vars(EXPERIMENT.model)), EXPERIMENT.training)
    assert musota.Run(folder / "a").experiment == experiment
    assert musota.train(experiment, short, folder / "a", name="called otherwise").finished


def test_a_name_decides_nothing_when_a_run_goes_on(folder, short):
    assert musota.train(EXPERIMENT, short, folder / "a", name="another", profile="study").finished
    with pytest.raises(MusotaError, match="its learning_rate is 0.003, not 0.002"):
        musota.train(EXPERIMENT.with_(learning_rate=2e-3), short, folder / "a", name="run")


def test_packed_records_hold_what_the_folders_held(folder):
    (folder / "probe.json").write_text('{"seen": 1}')
    kept = {r.path.name: (r.records, r.summary, r.config) for r in musota.load_runs(folder)}
    assert {path.name for path in records.pack(folder)} == set(records.PACKED)
    assert {path.name for path in folder.iterdir()} == {*records.PACKED, records.SUMS}
    for run in musota.load_runs(folder):
        held, summary, config = kept[run.path.name]
        assert (run.summary, run.config, run.has_model) == (summary, config, False)  # unrounded
        others = [[r for r in of if r["kind"] != "step"] for of in (run.records, held)]
        assert others[0] == others[1]
        steps = [r["loss"] for r in held if r["kind"] == "step"]
        assert run.steps.loss.tolist() == pytest.approx(steps, rel=1e-7)
    assert records.read_probes(folder) == {"probe": {"seen": 1}}
    first = (folder / records.SUMS).read_bytes()
    records.pack(folder)  # again, from what is packed
    assert (folder / records.SUMS).read_bytes() == first


@pytest.mark.parametrize("name", records.PACKED)
def test_a_changed_byte_or_line_end_in_a_packed_file_is_seen(folder, name):
    records.pack(folder)
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data.replace(b"\n", b"\r\n", 1) if b"\n" in data else data[:-1])
    with pytest.raises(MusotaError, match=f"{name} is missing, damaged or was changed"):
        musota.load_runs(folder)


def test_what_is_no_run_is_skipped_and_named(folder, capsys):
    musota.build_model(EXPERIMENT.model).save_pretrained(folder / "model")
    data = bytearray((folder / "b" / "config.json").read_bytes())
    data[20] ^= 1
    (folder / "b" / "config.json").write_bytes(data)
    assert len(musota.load_runs(folder)) == 2
    assert "b is left out: damaged" in capsys.readouterr().out


def test_a_text_without_spaces_runs_to_the_end_and_shows_dashes(tmp_path):
    """Its "words" are paragraphs: a perplexity over them is a number of 200 digits, or none."""
    signs, choose = [chr(0x4E00 + n) for n in range(99)], random.Random(0).choices
    for split, lines in (("train", 40), ("valid", 9), ("test", 9)):
        text = "".join("".join(choose(signs, k=400)) + "\n" for _ in range(lines))
        (tmp_path / f"{split}.txt").write_text(text, "utf-8")
    corpus, experiment = musota.load_corpus(str(tmp_path), 300), EXPERIMENT.with_(vocab_size=300)
    run = musota.train(experiment.with_(epochs=1), corpus, tmp_path / "results" / "a")
    shown = comparison_table([run]).loc[0]
    assert shown["valid word PPL"] == "–" and float(shown["valid bits/byte"]) > 0
    page = write_report(tmp_path / "results").read_text("utf-8")
    assert "nan" not in page and not re.search(r"\d{12}", re.sub(r"[0-9a-f]{12,}", "", page))


def test_a_run_whose_gradient_norms_all_overflowed_has_health_all_the_same(folder):
    run = musota.load_runs(folder)[0]
    run.records = [r | {"grad_norm": None} if r["kind"] == "step" else r for r in run.records]
    found = {finding.rule for finding in health_of(run)}
    assert found and "Clipped steps" not in found
