"""The public API: names and signatures that users' code relies on."""

import inspect

import pytest

import musota

NAMES = """Audit BlockLayout CausalLM Corpus DenseConfig Experiment MuConfig MusotaError
RedesignedConfig Run RunOptions TrainConfig audit build_model compare evaluate experiments
load_corpus load_model load_runs match_width train twin"""


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
