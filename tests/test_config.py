import dataclasses

import pytest

import musota
from musota.errors import MusotaError
from musota.plan.profiles import _warmup_share, find_profile
from musota.plan.registry import find_experiment


def test_the_experiments_are_the_plans_and_the_redesign():
    e = musota.experiments
    assert set(e) == {"original", "optimized", "baseline", "simplified", "redesigned"}
    assert e["original"].model == musota.MuConfig(50_000, 128, 12, 8, 0.1, 8, 16)
    assert e["optimized"].model == musota.MuConfig(50_000, 192, 12, 8, 0.1, 8, 16)
    assert e["baseline"].model == musota.DenseConfig(50_000, 192, 12, 13, 0.1, 208)
    assert e["simplified"].model == musota.MuConfig(50_000, 192, 8, 6, 0.1, 6, 8)
    assert e["original"].training == musota.TrainConfig(10, 3e-4, 500, 6, 4, 0.01, 1.0)
    for name in ("optimized", "baseline", "simplified"):
        assert e[name].training == musota.TrainConfig(30, 1e-4, 2000, 4, 8, 0.01, 1.0)


def test_parameter_counts_by_hand():
    counts = {name: e.model.n_parameters for name, e in musota.experiments.items()}
    assert counts["optimized"] == 16_691_024
    assert counts["simplified"] == 6_994_104
    assert abs(counts["baseline"] / counts["optimized"] - 1) < 0.001


def test_match_width_finds_the_plans_baseline_and_a_twin_for_the_simplified_model():
    matched = musota.match_width(16_691_024, musota.DenseConfig())
    assert (matched.d_model, matched.n_head) == (208, 13)
    simplified = musota.experiments["simplified"]
    twin = musota.twin(simplified)
    assert twin.model.n_layer == simplified.model.n_layer
    assert twin.training == simplified.training
    assert abs(twin.model.n_parameters / simplified.model.n_parameters - 1) < 0.01
    for target in (10_000, 300_000, 5_000_000):  # the neighbours are never nearer
        config = musota.match_width(target, musota.DenseConfig(vocab_size=300, n_layer=2))
        assert config.d_model % 2 == 0 and config.d_model % config.n_head == 0
        for step in (-2, 2):
            if config.d_model + step > 0:
                other = dataclasses.replace(config, d_model=config.d_model + step, n_head=1)
                assert abs(other.n_parameters - target) >= abs(config.n_parameters - target)


def test_with_changes_model_and_training_by_name_and_refuses_unknown_names():
    changed = musota.experiments["optimized"].with_(learning_rate=1e-3, n_layer=2)
    assert changed.training.learning_rate == 1e-3 and changed.model.n_layer == 2
    with pytest.raises(MusotaError, match="did you mean 'learning_rate'"):
        musota.experiments["optimized"].with_(learning_rat=1)


def test_an_experiment_survives_being_written_down():
    for experiment in musota.experiments.values():
        assert musota.Experiment.from_dict(experiment.to_dict()) == experiment
    with pytest.raises(MusotaError, match="Not the description"):
        musota.Experiment.from_dict({"model": {"kind": "rnn"}, "training": {}})


@pytest.mark.parametrize("profile", ["study", "quick", "tiny"])
def test_profiles_keep_the_plans_proportions(profile):
    original, optimized, baseline, simplified = (
        musota.scaled(musota.experiments[name], profile)
        for name in ("original", "optimized", "baseline", "simplified")
    )
    assert original.training.learning_rate / optimized.training.learning_rate == pytest.approx(3)
    for name, small in (("original", original), ("optimized", optimized)):
        full = musota.experiments[name]
        tokens = musota.profiles[profile].train_tokens
        per_step = small.training.sequences_per_step * small.model.max_seq_len
        share = small.training.warmup_steps / (small.training.epochs * tokens / per_step)
        assert share == pytest.approx(
            _warmup_share(full.training, full.model.max_seq_len), abs=0.01
        )
    assert small.training.epochs >= 3
    assert baseline.model.n_layer == optimized.model.n_layer
    assert abs(baseline.model.n_parameters / optimized.model.n_parameters - 1) < 0.02
    assert simplified.model.n_layer < optimized.model.n_layer
    # A twin scaled is a scaled model's twin.
    twin = musota.scaled(musota.twin(musota.experiments["simplified"]), profile)
    assert twin.model.d_model == musota.twin(simplified).model.d_model


def test_the_full_profile_changes_nothing():
    for experiment in musota.experiments.values():
        assert musota.scaled(experiment, "full") is experiment


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: find_experiment("optimised"), "did you mean 'optimized'"),
        (lambda: find_profile("quik"), "did you mean 'quick'"),
        (lambda: musota.MuConfig(n_block=7), "7 equal blocks do not tile a 8×8 matrix"),
        (lambda: musota.MuConfig(matrix_size=6, n_block=4, n_head=6), "Block B1 has 9 cells"),
        (lambda: musota.MuConfig(n_head=7), "n_head=7 does not divide d_model=64"),
        (lambda: musota.DenseConfig(n_head=12), "n_head=12 does not divide d_model=208"),
        (lambda: musota.MuConfig(vocab_size=0), "vocab_size must be a whole number"),
        (lambda: musota.MuConfig(n_layer=1.5), "n_layer must be a whole number"),
        (
            lambda: musota.DenseConfig(dropout=1.0),
            "dropout must be a finite number of at least 0, at most 0.99",
        ),
        (
            lambda: musota.TrainConfig(learning_rate=0),
            "learning_rate must be a finite number above 0",
        ),
        (lambda: musota.TrainConfig(learning_rate=float("nan")), "learning_rate must be a finite"),
        (lambda: musota.TrainConfig(epochs=0), "epochs must be a whole number"),
    ],
)
def test_bad_values_get_one_sentence(make, message):
    with pytest.raises(MusotaError, match=message):
        make()
