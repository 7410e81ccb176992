import math
from pathlib import Path
from types import SimpleNamespace

import pytest

import musota
from musota.files import read_sealed
from musota.lab import sweep
from musota.lab.grid_runs import read_table
from musota.lab.profiles import PROFILES, scaled
from musota.registry import find_experiment

STUDY = Path(__file__).resolve().parent.parent / "results" / "study"


@pytest.mark.parametrize("profile", ["full", "study"])
@pytest.mark.parametrize("name", ["optimized", "baseline"])
def test_a_sweep_trains_at_the_rates_it_names(profile, name):
    profile = PROFILES[profile]
    runs = sweep.sweep_runs(name, profile, sweep.FIRST_RATES)
    assert (len(runs), min(sweep.FIRST_RATES), max(sweep.FIRST_RATES)) == (6, 1e-4, 3e-2)
    whole = find_experiment(name).training
    for rate, (label, run) in zip(sweep.FIRST_RATES, runs.items(), strict=True):
        experiment = run.at(profile)
        assert label == f"{name}_rate_{rate:g}"
        assert experiment.training.learning_rate == pytest.approx(rate, rel=1e-12)
        assert experiment.model == scaled(name, profile).model
    # Five of the plan's thirty epochs, with the plan's share of warm-up.
    short = run.experiment.training
    assert short.epochs == 5
    assert short.warmup_steps / 5 == pytest.approx(whole.warmup_steps / whole.epochs, rel=0.01)


def pretend(best, tried):
    """In place of `run_many`: the loss of each run is its distance from the best rate."""

    def run_many(runs, seeds, profile, *_, **__):
        rows = {}
        for label, run in runs.items():
            name, rate = label.split("_rate_")
            tried.setdefault(name, []).append(float(rate))
            loss = abs(math.log(float(rate) / best[name]))
            rows[label] = {0: SimpleNamespace(experiment=run.at(profile), best_valid_loss=loss)}
        return rows

    return run_many


def test_a_best_rate_at_the_edge_widens_the_sweep_of_both_models(monkeypatch):
    tried, best = {}, {"optimized": 1e-1, "baseline": 3e-5}
    monkeypatch.setattr(sweep, "run_many", pretend(best, tried))
    losses = sweep.run_sweeps(PROFILES["full"], None, "table.csv", "folder")
    assert sorted(tried["optimized"]) == sorted(tried["baseline"])
    assert sorted(tried["baseline"]) == [1e-5, 3e-5, *sweep.FIRST_RATES, 1e-1, 3e-1]
    found = [sweep.lowest(of_one) for of_one in losses.values()]
    assert found == pytest.approx([1e-1, 3e-5])


@pytest.mark.parametrize(
    ("low", "middle", "high", "decision", "next_step"),  # losses by rate; the usual rate is the low
    [([7.0], [6.0], [5.5], "at the edge", "widen"), ([5.0], [6.0], [6.5], "at the edge", "widen"),
     ([7.0], [5.0, 5.2], [5.5], "bracketed", "raise"), ([6.0], [5.98], [6.4], "bracketed", ""),
     ([7.0], [5.0], [math.inf], "bracketed", "raise")],
)  # fmt: skip
def test_the_verdict_on_a_sweep(low, middle, high, decision, next_step):
    verdict = sweep.best_rate("MU-SOTA", {1e-4: low, 1e-3: middle, 1e-2: high}, 1e-4)
    assert verdict.decision == decision and verdict.next_step.split(" ")[0] == next_step
    assert verdict.value == pytest.approx(math.exp(min(low + high + [sum(middle) / len(middle)])))


def test_the_recorded_sweep_is_read_and_its_best_rates_are_those_of_the_tuned_runs():
    profile, rows = PROFILES["study"], read_table(STUDY / "sweep.csv")
    losses = sweep.swept(rows, profile)
    rates = [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03]
    assert [[*of_one] for of_one in losses.values()] == [rates, rates]
    recorded = read_sealed(STUDY / "tuned-seed0" / "config.json")["experiment"]
    best = sweep.tuned("optimized", profile, rows)
    assert best == musota.Experiment.from_dict(recorded) and best.training.learning_rate == 0.01
    assert sweep.tuned("baseline", profile, rows) == scaled("baseline", profile)  # its usual 0.003
    assert not any(sweep.next_rates(of_one) for of_one in losses.values())


def test_tuned_needs_a_recorded_sweep():
    rows = read_table(STUDY / "sweep.csv")
    for profile, given in (("tiny", rows), ("study", []), ("study", rows[:1])):
        with pytest.raises(musota.MusotaError, match="--only sweep"):
            sweep.tuned("optimized", PROFILES[profile], given)
