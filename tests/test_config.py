"""Configurations, the registry, matching and profiles."""

import dataclasses
import json

import numpy as np
import pytest

import musota
from musota import DenseConfig, MuConfig, RedesignedConfig, TrainConfig
from musota.errors import MusotaError
from musota.lab.profiles import PLAN_TRAIN_TOKENS, PROFILES, check_changes, scaled
from musota.registry import REGISTRY, find_experiment
from musota.workbook.experiments import experiment_at


def test_the_experiments_are_the_plans_and_the_redesign():
    e = musota.experiments
    assert set(e) == {"original", "optimized", "baseline", "simplified", "redesigned"}
    assert e["original"].model == MuConfig(50_000, 128, 12, 8, 0.1, 8, 16)
    assert e["optimized"].model == MuConfig(50_000, 192, 12, 8, 0.1, 8, 16)
    assert e["baseline"].model == DenseConfig(50_000, 192, 12, 13, 0.1, 208)
    assert e["simplified"].model == MuConfig(50_000, 192, 8, 6, 0.1, 6, 8)
    assert e["original"].training == TrainConfig(10, 3e-4, 500, 6, 4, 0.01, 1.0)
    for name in ("optimized", "baseline", "simplified"):
        assert e[name].training == TrainConfig(30, 1e-4, 2000, 4, 8, 0.01, 1.0)
    for name in REGISTRY:
        experiment = find_experiment(name)
        described = experiment.to_dict()
        described["training"]["started_from"] = ""  # in older records
        assert musota.Experiment.from_dict(described) == experiment
        assert scaled(name, "full") == scaled(experiment, "full") == experiment
        for value in experiment.fields().values():  # of the types that trackers take
            assert isinstance(value, bool | int | float | str | None)


@pytest.mark.parametrize("target", [10_000, 300_000, 5_000_000])
def test_match_width_has_no_nearer_neighbour(target):
    config = musota.match_width(target, DenseConfig(vocab_size=300, n_layer=2))
    assert config.d_model % 2 == 0 and config.d_model % config.n_head == 0
    for width in {config.d_model - 2, config.d_model + 2} - {0}:
        other = dataclasses.replace(config, d_model=width, n_head=1)
        assert abs(other.n_parameters - target) >= abs(config.n_parameters - target)


@pytest.mark.parametrize("profile", ["study", "tiny"])
def test_profiles_keep_the_plans_proportions(profile):
    names = ("original", "optimized", "baseline", "simplified")
    original, optimized, baseline, simplified = (scaled(name, profile) for name in names)
    assert original.training.learning_rate / optimized.training.learning_rate == pytest.approx(3)

    def warmup_share(experiment, tokens):
        training = experiment.training
        per_step = training.sequences_per_step * experiment.model.max_seq_len
        return training.warmup_steps / (training.epochs * tokens / per_step)

    for name, small in (("original", original), ("optimized", optimized)):
        share = warmup_share(small, PROFILES[profile].train_tokens)
        plans = warmup_share(musota.experiments[name], PLAN_TRAIN_TOKENS)
        assert share == pytest.approx(plans, abs=0.01) and small.training.epochs >= 3
    assert baseline.model.n_layer == optimized.model.n_layer > simplified.model.n_layer
    assert abs(baseline.model.n_parameters / optimized.model.n_parameters - 1) < 0.02
    # A matched row is matched once, to the other row as scaled and changed.
    changed = optimized.with_(n_layer=1, epochs=2)
    assert (changed.model.n_layer, changed.training.epochs) == (1, 2)
    assert scaled("baseline", profile, n_layer=1, epochs=2) == musota.twin(changed)
    assert scaled("baseline", profile, d_model=64, n_head=32).model.n_head == 32
    other_name = experiment_at("redesigned_twin", PROFILES[profile], {})  # of one folder
    assert other_name == scaled("modern_twin", profile)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: check_changes({"learning_rat": 1}), "did you mean 'learning_rate'"),
        (lambda: musota.experiments["baseline"].with_(epoch=1), "did you mean 'epochs'"),
        (lambda: musota.twin(3), "twin needs an Experiment, or a torch module"),
        (lambda: MuConfig(n_block=7), "7 equal blocks do not tile a 8×8 matrix"),
        (lambda: MuConfig(matrix_size=6, n_block=4, n_head=6), "n_block=4 must make blocks of"),
        (lambda: DenseConfig(n_head=12), "n_head=12 must divide d_model=208"),
        (lambda: MuConfig(vocab_size=2**40), "parameters is over the limit"),
        (lambda: MuConfig(n_layer=1.5), "n_layer must be a whole number"),
        (lambda: DenseConfig(dropout=1.0), "dropout must be a number from 0 to 0.99"),
        (lambda: RedesignedConfig(gate="no"), "gate must be True or False, not 'no'"),
        (lambda: RedesignedConfig(block_size=5), "block_size must be even, not 5"),
        (lambda: TrainConfig(epochs=10**16), "epochs must be a whole number from 1 to 1,000,000"),
        (lambda: TrainConfig(learning_rate=0), "learning_rate must be a number of at least 1e-15"),
    ],
)
def test_bad_values_get_one_sentence(make, message):
    with pytest.raises(MusotaError, match=message):
        make()


def test_numbers_of_numpy_become_pythons():
    changes = check_changes({"epochs": np.int64(2), "learning_rate": np.float32(0.5)})
    experiment = musota.experiments["baseline"].with_(n_layer=np.uint8(3), **changes)
    training = experiment.training
    assert (experiment.model.n_layer, training.epochs, training.learning_rate) == (3, 2, 0.5)
    assert json.loads(json.dumps(experiment.to_dict())) == experiment.to_dict()
