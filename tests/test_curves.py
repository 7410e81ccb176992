"""Plateau, warm-up, oscillation and health, on drawn curves."""

import numpy as np
import pandas as pd
import pytest
from test_verdicts import make_run

from musota.lab import curves
from musota.registry import experiments


def warming(steps):
    return experiments["optimized"].with_(warmup_steps=steps)


FLAT = [7.0, 6.6, 6.3, 6.15, 6.05, 6.0, *[6.0 - 0.0005 * k for k in range(1, 5)]]
SLOW = [7.0, 6.5, 6.2, 6.1, 6.0975, 6.095, 6.0925]


@pytest.mark.parametrize(
    ("losses", "noise", "decision", "start", "reason"),
    [
        (FLAT, 0.02, "yes", 6, "since epoch 6"),
        (6.5 - 0.08 * np.arange(12), 0.05, "no", None, "still improving"),
        ([7.0, 6.9, 6.9], 0, "too early", None, "3 epochs"),
        (SLOW, 0.0001, "no", None, "beyond the noise of the text"),
        ([7.0, 6.0, 5.5, 5.4, 5.5, 5.6, 5.7], 0.01, "yes", 4, "overfits"),
    ],
)
def test_plateau(losses, noise, decision, start, reason):
    run = make_run(losses=losses, noise=noise)
    found = curves.plateau(run)
    assert found.decision == decision and reason in found.reason
    assert curves.plateau_start(run) == start and bool(found.next_step) == bool(start)


def test_the_plateau_rule_doubts_noise_and_can_be_moved():
    noisy = [make_run(losses=SLOW, noise=0.02, seed=seed) for seed in range(5)]
    assert "yes" in [curves.plateau(run).decision for run in noisy]
    run = make_run(losses=[7.0, 6.5, 6.2, 6.19, 6.19], noise=0.01)
    assert curves.plateau(run).decision == "no"
    assert curves.plateau_start(run, window=1, least_gain=0.02) == 3


def test_a_long_warm_up_is_named_before_a_plateau_is_blamed_on_the_rate():
    for steps, long in ((900, False), (901, True)):  # of 3,000
        run = make_run(losses=FLAT, noise=0.02, experiment=warming(steps))
        assert ("warmup_steps=300" in curves.plateau(run).next_step) == long


def drawn(curve, seed=0):
    losses = curve(np.linspace(0, 1, 250)) + np.random.default_rng(seed).normal(0, 0.1, 250)
    return pd.DataFrame({"step": np.arange(1, 251) * 40, "loss": losses})


@pytest.mark.parametrize(
    ("curve", "decision"),
    [
        (lambda x: 5 + 2 * np.exp(-4 * x), "yes"),
        (lambda x: 6 - x + 0.3 * np.sin(2 * np.pi * 4 * x), "oscillates"),
        (lambda x: 5.5 + 0.4 * np.exp(-(((x - 0.5) / 0.05) ** 2)), "yes"),  # one bump
        (lambda x: 6 - x + np.where(x > 0.7, 12 * (x - 0.7), 0.3 * np.sin(25 * x)), "diverges"),
    ],
)
def test_oscillation(curve, decision):
    for seed in range(3):
        found = curves.oscillation(make_run(steps=drawn(curve, seed), experiment=warming(400)))
        assert found.decision == decision and bool(found.next_step) == (decision != "yes")
    # Warm-up is left out, and a short run says too little.
    wild = drawn(lambda x: 6 + np.where(x < 0.5, np.sin(2 * np.pi * 10 * x), 0))
    assert curves.oscillation(make_run(steps=wild, experiment=warming(5000))).decision == "yes"
    assert curves.oscillation(make_run(steps=wild.head(40))).decision == "too early"
    assert curves.oscillation(make_run(diverged_at=9)).decision == "diverges"


HEALTHY = {
    "valid_loss": 5.0, "clean_train_loss": 4.95, "effective_rank": 50.0, "largest_score": 10.0,
    "update_ratio": {"embedding": 5e-4, "output": 2e-3, "gate": 1e-3}, "attention_entropy": [2, 1],
    "gate_mean": [0.2, 0.4], "gate_spread": [0.1, 0.1], "gate_saturated": [0.0, 0.1],
}  # fmt: skip


def health(norms=(9, 0.5, 2.0, 0.5), warmup_steps=10, **last):
    epochs = [{**HEALTHY, "update_ratio": last.get("update_ratio", HEALTHY["update_ratio"])}]
    epochs.append({**HEALTHY, **last})
    steps = pd.DataFrame({"step": [5, 20, 30, 40], "grad_norm": norms})
    run = make_run(health=epochs, steps=steps, experiment=warming(warmup_steps))
    return {verdict.question.split()[0]: verdict for verdict in curves.health(run)}


def test_a_healthy_run_is_called_healthy():
    found = health()
    assert {verdict.decision for verdict in found.values()} == {"ok"} and len(found) == 7
    assert found["Clipped"].value == pytest.approx(100 / 3)
    assert "5.0e-04 (embedding)" in found["Update"].reason
    module = {key: HEALTHY[key] for key in ("valid_loss", "clean_train_loss", "update_ratio")}
    assert len(curves.health(make_run(health=[module]))) == 3 and curves.health(make_run()) == []


@pytest.mark.parametrize(
    ("changes", "statistic", "decision"),
    [
        ({"update_ratio": {"a": 2e-5}}, "Update", "too low"),
        ({"warmup_steps": 4000, "norms": [0.0] * 4}, "Update", "warming up"),
        ({"norms": (9, 2.0, 3.0, 0.5)}, "Clipped", "too many"),
        ({"clean_train_loss": 4.0}, "Valid", "gap"),
        ({"valid_loss": 5.2}, "Valid", "overfits"),
        ({"largest_score": 90.0}, "Largest", "too large"),
        ({"attention_entropy": [2.0, 0.01]}, "Attention", "too low"),
        ({"attention_entropy": [4.28, 4.27]}, "Attention", "uniform"),  # ln 192! / 192 = 4.28
        ({"gate_saturated": [0.9, 0.8]}, "Saturated", "too many"),
        ({"effective_rank": 20.0}, "Effective", "too low"),
        ({"effective_rank": None}, "Effective", "not measured"),
    ],
)
def test_each_statistic_out_of_its_band_is_named(changes, statistic, decision):
    found = {name: verdict.decision for name, verdict in health(**changes).items()}
    assert found.pop(statistic) == decision and set(found.values()) == {"ok"}
