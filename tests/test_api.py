"""The public API: names, signatures and results that users' code relies on."""

import inspect
import json

import pytest
import torch
from conftest import EXPERIMENT
from torch import nn

import musota
from musota.lab.verdicts import Verdict

NAMES = """Audit BlockLayout CausalLM Corpus DenseConfig Experiment MuConfig MusotaError
RedesignedConfig Run RunOptions TrainConfig audit build_model compare evaluate experiments
load_corpus load_model load_runs match_width train twin"""

EXPERIMENTS = "original optimized baseline simplified redesigned"
SUMMARY = "ppl accuracy valid_loss word_ppl bits_per_byte test_ppl weights_sha256"


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_names_and_signatures():
    assert sorted(musota.__all__) == NAMES.split() == sorted(NAMES.split())
    assert all(hasattr(musota, name) for name in musota.__all__)
    assert parameters(musota.load_corpus) == ["name", "vocab_size", "data_dir"]
    assert parameters(musota.train)[:3] == ["experiment", "corpus", "run_dir"]
    assert {"training", "max_seq_len", "seed", "resume", "name"} <= set(parameters(musota.train))
    assert len(parameters(musota.train)) <= 10
    assert parameters(musota.evaluate)[:5] == ["model", "tokens", "words", "bytes", "stride"]
    assert parameters(musota.twin) == ["experiment", "vocab_size", "max_seq_len"]
    assert parameters(musota.audit)[:4] == ["module", "vocab_size", "max_seq_len", "loss"]
    assert list(musota.experiments) == EXPERIMENTS.split()
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        musota.nothing  # noqa: B018


def test_a_run_is_what_its_records_say(finished, short):
    run = musota.Run(finished.path)
    assert (run.name, run.seed, run.finished, run.experiment) == ("finished", 0, True, EXPERIMENT)
    assert list(run.history["epoch"]) == [1, 2] and len(run.steps)
    for name in SUMMARY.split():
        assert name in run.summary and name in json.loads((run.path / "summary.json").read_text())
    kinds = {json.loads(line)["kind"] for line in (run.path / "metrics.jsonl").open()}
    assert {"step", "epoch"} <= kinds <= {"step", "epoch", "event"}
    assert json.loads((run.path / "config.json").read_text())["seed"] == 0
    assert [one.path for one in musota.load_runs(run.path.parent)] == [run.path]
    model = run.load_model()
    window = short.valid[:25].long()[None]
    logits, none = model(window[:, :-1])
    also_none, loss = model(window[:, :-1], window[:, 1:])
    assert none is also_none is None and logits.shape == (1, 24, 512) and loss.dim() == 0
    assert sum(model.parameter_ledger().values()) == run.experiment.model.n_parameters
    measured = musota.evaluate(model, short.valid, short.words["valid"], short.bytes["valid"])
    assert measured["ppl"] == pytest.approx(run.summary["ppl"], rel=1e-4)
    assert measured["word_ppl"] == pytest.approx(run.summary["word_ppl"], rel=1e-4)


class Bigram(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(512, 16)
        self.output = nn.Linear(16, 512)

    def forward(self, ids):
        return self.output(self.embedding(ids))


def test_any_module_is_trained_compared_and_loaded(finished, short, tmp_path):
    torch.manual_seed(0)
    training = musota.TrainConfig(2, learning_rate=0.03, warmup_steps=2, accumulation_steps=1)
    run = musota.train(Bigram(), short, tmp_path / "mine", training=training, max_seq_len=24)
    assert run.finished and run.summary["ppl"] < 512
    verdict = musota.compare(run, finished)
    assert isinstance(verdict, Verdict) and verdict.decision in ("better", "worse", "tie")
    assert verdict.value == pytest.approx(run.valid_loss - finished.valid_loss)
    module = Bigram()
    run.load_weights(module)
    tokens = short.valid.long()
    loss = nn.functional.cross_entropy(module(tokens[:-1]), tokens[1:]).item()
    assert loss == pytest.approx(run.valid_loss, rel=1e-4)
    other = short.limited(None, 800)
    other = musota.train(EXPERIMENT.with_(epochs=1), other, tmp_path / "other")
    with pytest.raises(musota.MusotaError, match="validated on different texts"):
        musota.compare(run, other)
