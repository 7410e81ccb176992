"""A model of the reader's own, from its file: an experiment like any other."""

import pytest
from click.testing import CliRunner

import musota
from musota import Experiment, MusotaError, OwnConfig, TrainConfig, twin
from musota.plan import own
from musota.plan.registry import find_experiment, run_name, title_of
from musota.workbook.cli import cli

SOURCE = """
import torch
from torch import nn


class Recurrent(nn.Module):
    def __init__(self, vocab_size, width=16, tied=True):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.recurrence = nn.LSTM(width, width, 2, batch_first=True, dropout=0.1)
        self.output = nn.Linear(width, vocab_size)
        if tied:
            self.output.weight = self.embedding.weight
        self.register_buffer("mask", torch.ones(3, 4).T)

    def forward(self, ids):
        return (self.output(self.recurrence(self.embedding(ids))[0]),)


class Cached(Recurrent):
    def forward(self, ids):  # makes a buffer in its first call
        if not hasattr(self, "seen"):
            self.register_buffer("seen", torch.zeros(3))
        return super().forward(ids)


def half(vocab_size, **more):
    return Recurrent(vocab_size, **more).bfloat16()


def broken(vocab_size):
    raise ValueError(f"no, not {vocab_size}")


def nothing():
    return 3


def loss(module, ids):
    logits = module(ids)[0].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, ids.flatten())  # not shifted


READY = Recurrent(9)
"""
TRAINING = TrainConfig(2, 3e-3, 10, 8, 1)


@pytest.fixture
def source(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path / "mine.py"


def config(source, name="Recurrent", arguments=(), **more):
    return OwnConfig(f"{source}:{name}", dict(arguments), 512, 24, **more)


@pytest.mark.parametrize("averaging", [0.0, 0.2])
@pytest.mark.parametrize("name", ["Recurrent", "Cached", "half"])
def test_it_trains_resumes_and_is_loaded_again(source, corpus, tmp_path, name, averaging):
    experiment = Experiment(config(source, name), TRAINING).with_(averaging=averaging)
    whole = musota.train(experiment, corpus, tmp_path / "whole")
    musota.train(experiment, corpus, tmp_path / "cut", stop_at=0.7)
    resumed = musota.train(experiment, corpus, tmp_path / "cut")
    assert resumed.summary["weights_sha256"] == whole.summary["weights_sha256"]
    assert whole.summary["ppl"] < 400 and len(whole.samples)
    assert whole.summary["parameter_ledger"].keys() == {"embedding", "recurrence", "output"}
    model = whole.load_model()
    again = musota.evaluate(model, corpus.valid)["ppl"]
    assert again == pytest.approx(whole.summary["ppl"], rel=1e-5)
    assert musota.Run(tmp_path / "whole").experiment == experiment


def test_the_report_says_how_to_train_it_again(source, corpus, tmp_path):
    musota.train(Experiment(config(source), TRAINING), corpus, tmp_path / "a" / "b", name="mine")
    text = musota.write_report(tmp_path / "a").read_text()
    assert "NAME is `FOLDER/mine.py:Recurrent --set vocab_size=512 --set max_seq_len=24 " in text
    assert "--set epochs=2 --set learning_rate=0.003" in text


def test_it_has_a_dense_twin_also_where_its_file_is_not_at_hand(
    source, corpus, tmp_path, monkeypatch
):
    experiment = Experiment(config(source), TRAINING)
    dense = twin(experiment)
    assert dense.model.n_layer == 2 and dense.model.dropout == 0.1 and dense.twin_of
    assert abs(dense.model.n_parameters / experiment.model.n_parameters - 1) < 0.15
    assert Experiment.from_dict(dense.to_dict()).twin_of == experiment.model
    monkeypatch.setattr(own, "_named", {})
    assert twin(Experiment.from_dict(experiment.to_dict())) == dense  # its size is remembered


def test_a_record_runs_no_code_until_its_file_is_named_again(source, tmp_path, monkeypatch):
    first = config(source)
    described = Experiment(first, TRAINING).to_dict()
    musota.build_model(first).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(own, "_named", {})
    with pytest.raises(MusotaError, match="name the file yourself first"):
        musota.load_model(tmp_path / "model")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    config(source.rename(elsewhere / "mine.py"))
    assert musota.load_model(tmp_path / "model").config == first
    described["model"]["sha256"] = ""
    with pytest.raises(MusotaError, match="Not the description"):  # it may not name one itself
        Experiment.from_dict(described)


def test_what_it_is_is_its_file_its_name_and_its_arguments(source):
    first = config(source)
    assert first == config(source) and first.source == "mine.py:Recurrent"
    assert first != config(source, arguments={"width": 8}) != config(source, "half")
    source.write_text(SOURCE + "\n")
    assert first != config(source)
    at_full = find_experiment(f"{source}:Recurrent")
    small = musota.plan.profiles.scaled(at_full, "tiny").model
    assert (small.vocab_size, small.max_seq_len) == (512, 48)
    name = run_name(f"{source}:Recurrent", at_full)
    assert name == f"mine.Recurrent@{at_full.model.sha256[:6]}"
    assert title_of(f"{name}_twin") == f"dense twin of {name}"


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("missing", {}, "mine.py defines no 'missing'"),
        ("broken", {}, "mine.py:broken raised ValueError: no, not 512 (line 32 of "),
        ("nothing", {}, "mine.py:nothing made int, not a torch.nn.Module"),
        ("READY", {}, "mine.py:READY is Recurrent: name the function or class"),
        ("Recurrent", {"widht": 3}, "raised TypeError"),
    ],
)
def test_a_file_that_does_not_do_is_told_in_a_sentence(source, name, arguments, message):
    with pytest.raises(MusotaError) as told:
        config(source, name, arguments).build()
    assert message in str(told.value) and "\n" not in str(told.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "slip.py").write_text("def build(:\n")
    for given, message in {
        "mine.py": "is named FILE.py:NAME",
        f"{tmp_path}/none.py:build": "none.py cannot be read: No such file",
        f"{tmp_path}/slip.py:build": r"slip.py raised SyntaxError: .*\(line 1 of ",
    }.items():
        with pytest.raises(MusotaError, match=message):
            OwnConfig(given).build()


def test_the_command_line_audits_a_file(source, tmp_path):
    honest = [f"{source}:Recurrent", "--picture", str(tmp_path / "audit.png")]
    told = CliRunner().invoke(cli, ["audit", *honest, "--arguments", '{"width": 8}'])
    assert told.exit_code == 0 and told.output.startswith("This model is honest.")
    assert (tmp_path / "audit.png").stat().st_size > 10_000
    told = CliRunner().invoke(cli, ["audit", f"{source}:Recurrent", "--loss", "loss"])
    assert told.exit_code == 1 and "targets not shifted" in told.output
