"""The public API: names, signatures and results that users' code relies on."""

import inspect
import json

import pytest
from conftest import EXPERIMENT

import musota

NAMES = """Audit BlockLayout CausalLM Corpus DenseConfig Experiment MuConfig MusotaError
RedesignedConfig Run RunOptions TrainConfig audit build_model compare evaluate experiments
load_corpus load_model load_runs match_width train twin"""
SUMMARY = "ppl accuracy valid_loss word_ppl bits_per_byte test_ppl weights_sha256"


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_names_and_signatures():
    assert sorted(musota.__all__) == sorted(NAMES.split())
    assert parameters(musota.load_corpus) == ["name", "vocab_size", "data_dir"]
    assert parameters(musota.train)[:3] == ["experiment", "corpus", "run_dir"]
    assert {"training", "max_seq_len", "seed", "resume", "name"} <= set(parameters(musota.train))
    assert len(parameters(musota.train)) <= 10
    assert parameters(musota.evaluate)[:5] == ["model", "tokens", "words", "bytes", "stride"]
    assert parameters(musota.twin) == ["experiment", "vocab_size", "max_seq_len"]
    assert parameters(musota.audit)[:4] == ["module", "vocab_size", "max_seq_len", "loss"]
    assert musota.__getattr__("lab").scaled  # without an import of its own
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        musota.nothing  # noqa: B018
    with pytest.raises(musota.MusotaError, match="such as experiment.model, not 'optimized'"):
        musota.build_model("optimized")


def test_a_run_is_what_its_records_say(finished, short):
    run = musota.Run(finished.path)
    assert (run.name, run.seed, run.finished, run.experiment) == ("finished", 0, True, EXPERIMENT)
    assert list(run.history["epoch"]) == [1, 2] and len(run.steps)
    for name in SUMMARY.split():
        assert name in run.summary and name in json.loads((run.path / "summary.json").read_text())
    kinds = {json.loads(line)["kind"] for line in (run.path / "metrics.jsonl").open()}
    assert {"step", "epoch"} <= kinds <= {"step", "epoch", "event"}
    assert json.loads((run.path / "config.json").read_text())["seed"] == 0
    model = run.load_model()
    window = short.valid[:25].long()[None]
    logits, none = model(window[:, :-1])
    also_none, loss = model(window[:, :-1], window[:, 1:])
    assert none is also_none is None and logits.shape == (1, 24, 512) and loss.dim() == 0
