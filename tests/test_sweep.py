import math
import shutil
from types import SimpleNamespace

import pytest
from conftest import ROOT

import musota
from musota.files import read_sealed
from musota.lab import sweep
from musota.lab.grid_runs import read_table
from musota.lab.profiles import PROFILES, scaled
from musota.workbook.results import Results

STUDY = ROOT / "results" / "study"


def test_a_best_rate_at_the_edge_widens_the_sweep_of_both_models():
    rows, best, profile = [], {"optimized": 1e-1, "baseline": 3e-5}, PROFILES["full"]
    while len(runs := sweep.sweep(profile, rows)) > len(rows):
        rows, tried = [], {}
        for label, run in runs.items():  # the loss is the distance from the best rate
            name, rate = label.split("_rate_")
            tried.setdefault(name, []).append(float(rate))
            loss = abs(math.log(float(rate) / best[name]))
            rows.append(SimpleNamespace(experiment=run.at(profile), best_valid_loss=loss))
    assert tried["optimized"] == tried["baseline"]
    assert tried["baseline"] == [1e-5, 3e-5, *sweep.FIRST_RATES, 1e-1, 3e-1]
    found = [sweep.lowest(of_one) for of_one in sweep.swept(rows, profile).values()]
    assert found == pytest.approx([1e-1, 3e-5])


@pytest.mark.parametrize(
    ("low", "middle", "high", "usual", "decision", "next_step"),  # losses by rate; the usual rate
    [([7.0], [6.0], [5.5], 1e-4, "at the edge", "widen"),
     ([6.0], [5.98], [6.4], 1e-4, "yes", ""),
     ([7.0], [5.0, 5.2], [math.inf], 1e-4, "yes", "raise"),
     ([6.0], [5.0], [math.inf], 1e-2, "yes", "lower")],
)  # fmt: skip
def test_the_verdict_on_a_sweep(low, middle, high, usual, decision, next_step):
    verdict = sweep.best_rate("MU-SOTA", {1e-4: low, 1e-3: middle, 1e-2: high}, usual)
    assert verdict.decision == decision and verdict.next_step.split(" ")[0] == next_step
    assert verdict.value == pytest.approx(math.exp(min(low + high + [sum(middle) / len(middle)])))
    assert ("against 0.01: which diverges" in verdict.reason) == (usual == 1e-2)


def test_the_recorded_sweep_is_read_and_its_best_rates_are_those_of_the_tuned_runs(tmp_path):
    profile, rows = PROFILES["study"], read_table(STUDY / "sweep.csv")
    losses = sweep.swept(rows, profile)
    shutil.copy(STUDY / "sweep.csv", tmp_path)  # without a run
    assert Results(tmp_path).sweeps == losses
    assert [[*of_one] for of_one in losses.values()] == 2 * [[1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2]]
    short = sweep.sweep_run("baseline", profile, 1e-3).experiment.training
    assert (short.epochs, short.warmup_steps) == (5, 333)  # of thirty, the same share of warm-up
    recorded = read_sealed(STUDY / "tuned-seed0" / "config.json")["experiment"]
    best = sweep.tuned("optimized", profile, rows)
    assert best == musota.Experiment.from_dict(recorded) and best.training.learning_rate == 0.01
    assert sweep.tuned("baseline", profile, rows) == scaled("baseline", profile)  # its usual 0.003
    assert not any(sweep.next_rates(of_one) for of_one in losses.values())
    for profile, given in (("tiny", rows), ("study", rows[:1])):
        with pytest.raises(musota.MusotaError, match="--only sweep"):
            sweep.tuned("optimized", PROFILES[profile], given)
