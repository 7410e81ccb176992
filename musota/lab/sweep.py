"""Learning-rate sweeps of MU-SOTA and its parameter-matched transformer, and their best rates."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from musota.config import Experiment
from musota.errors import MusotaError
from musota.lab.grid_runs import GridRun, Row
from musota.lab.profiles import Profile, scaled
from musota.lab.stats import RELEVANT
from musota.lab.verdicts import PPL, Verdict
from musota.registry import REGISTRY, find_experiment

SWEEP_EPOCHS = 5  # of the plan's 30
# Rates are about a factor of 3 apart. A sweep starts with six of them and is widened as needed.
RATES = tuple(float(f"{mantissa}e{power}") for power in range(-6, 1) for mantissa in (1, 3))
FIRST_RATES = RATES[4:10]  # 1e-4 to 3e-2
SWEPT = {"optimized": False, "baseline": True}  # by name: whether it is matched to `optimized`
TUNED = {  # titles of both at their best rate
    "optimized": "MU-SOTA, its best learning rate",
    "baseline": "Transformer, its best learning rate",
}
Losses = Mapping[float, Sequence[float]]  # best valid loss of every seed, by learning rate


def sweep_run(name: str, profile: Profile, rate: float) -> GridRun:
    """A short run of `optimized` or `baseline`, with the same share of warm-up; `rate` is that at
    the size of the profile."""
    whole = find_experiment("optimized")
    warmup = round(SWEEP_EPOCHS / whole.training.epochs * whole.training.warmup_steps)
    changes = {"warmup_steps": warmup, "learning_rate": rate / profile.learning_rate}
    return GridRun(whole.with_(epochs=SWEEP_EPOCHS, **changes), matched=SWEPT[name])


def sweep(profile: Profile, rows: Sequence[Row]) -> dict[str, GridRun]:
    """The runs of both models by name, at the same rates: the first six, those of the recorded
    rows and, if the best rate of a model is the lowest or the highest, the next one."""
    rates = {*FIRST_RATES}
    for losses in swept(rows, profile).values():
        rates |= losses.keys()
        if {*FIRST_RATES} <= {*losses}:
            rates |= {*next_rates(losses)}
    each = [(name, rate) for name in SWEPT for rate in sorted(rates)]
    return {f"{name}_rate_{rate:g}": sweep_run(name, profile, rate) for name, rate in each}


def swept(rows: Sequence[Row], profile: Profile) -> dict[str, dict[float, list[float]]]:
    """Losses by title and learning rate, of the models whose sweep is among the rows."""
    found = {}
    for name in SWEPT:
        experiment, losses = sweep_run(name, profile, FIRST_RATES[0]).at(profile), {}
        for row in rows:
            rate = row.experiment.training.learning_rate
            if experiment.with_(learning_rate=rate) == row.experiment:
                losses.setdefault(rate, []).append(row.best_valid_loss)
        if losses:
            found[REGISTRY[name].title] = dict(sorted(losses.items()))
    return found


def lowest(losses: Losses) -> float:
    """The learning rate with the lowest mean loss."""
    return min(losses, key=lambda rate: np.mean(losses[rate]))


def next_rates(losses: Losses) -> list[float]:
    """The rate to try beyond the edge of a sweep, where the best rate lies at the edge."""
    best = lowest(losses)
    beyond = {min(losses): -1, max(losses): 1}.get(best, 0)
    place = min(range(len(RATES)), key=lambda i: abs(math.log(RATES[i] / best))) + beyond
    return [RATES[place]] if beyond and 0 <= place < len(RATES) else []


def best_rate(title: str, losses: Losses, usual: float | None = None) -> Verdict:
    """Whether the best learning rate of a sweep is bracketed by worse ones or at its edge. The next
    step changes the `usual` rate where another is better by the relevant difference."""
    best, (low, high) = lowest(losses), (min(losses), max(losses))
    means = {rate: float(np.mean(of_rate)) for rate, of_rate in losses.items()}
    reason = f"learning rate {best:g} is the best of {len(losses)} rates from {low:g} to {high:g}"
    decision, next_step = "yes", ""
    if usual in means and usual != best:
        gain = means[usual] - means[best]
        seen = "which diverges" if math.isinf(means[usual]) else f"{-gain:+.2f} nats/token"
        reason += f", against {usual:g}: {seen}"
        if gain >= RELEVANT:
            direction = "raise" if best > usual else "lower"
            next_step = f"{direction} the learning rate to {best:g}"
    if best in (low, high):
        decision, next_step = "at the edge", "widen the sweep on that side"
    question = f"Does the sweep of “{title}” hold the best learning rate?"
    return Verdict(question, decision, math.exp(means[best]), None, None, PPL, reason, next_step)


def tuned(name: str, profile: Profile, rows: Sequence[Row]) -> Experiment:
    """`optimized` or `baseline` at the size of a profile, at the best rate of its recorded sweep.

    Raises MusotaError where the rows have no sweep of it.
    """
    losses = swept(rows, profile).get(REGISTRY[name].title, {})
    if not {*FIRST_RATES} <= {*losses}:
        lacks = f"No whole learning-rate sweep of {name} is recorded at profile {profile.name}"
        raise MusotaError(
            f"{lacks}: run `musota evidence --profile {profile.name} --only sweep` on this corpus."
        )
    return scaled(name, profile, learning_rate=lowest(losses))
