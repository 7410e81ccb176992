"""Learning-rate sweeps of MU-SOTA and its parameter-matched transformer, and their best rates."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from musota.config import Experiment
from musota.data.corpus import Corpus
from musota.errors import MusotaError
from musota.lab.grid_runs import GridRun, Row, run_many
from musota.lab.profiles import Profile, rate_factor, scaled
from musota.lab.verdicts import PPL, Verdict
from musota.registry import find_experiment, find_row

RELEVANT = 0.05  # nats/token, 5 % of the perplexity: a smaller effect is not worth a search
SWEEP_EPOCHS = 5  # of the plan's 30, with the same share of warm-up
# Rates are about a factor of 3 apart. A sweep starts with six of them and is widened as needed.
RATES = tuple(float(f"{mantissa}e{power}") for power in range(-6, 1) for mantissa in (1, 3))
FIRST_RATES = RATES[4:10]  # 1e-4 to 3e-2
SWEPT = {"optimized": False, "baseline": True}  # by name: whether it is matched to `optimized`
TUNED = {  # titles of both at their best rate
    "optimized": "MU-SOTA, its best learning rate",
    "baseline": "Transformer, its best learning rate",
}
Losses = Mapping[float, Sequence[float]]  # best valid loss of every seed, by learning rate


def sweep_runs(name: str, profile: Profile, rates: Iterable[float]) -> dict[str, GridRun]:
    """Short runs of `optimized` or `baseline`; `rates` are those at the size of the profile."""
    whole = find_experiment("optimized")
    share = SWEEP_EPOCHS / whole.training.epochs
    warmup = round(share * whole.training.warmup_steps)
    short = whole.with_(epochs=SWEEP_EPOCHS, warmup_steps=warmup)
    factor = rate_factor(whole.model, profile)
    return {
        f"{name}_rate_{rate:g}": GridRun(
            short.with_(learning_rate=rate / factor), matched=SWEPT[name]
        )
        for rate in rates
    }


def run_sweeps(
    profile: Profile,
    corpus: Corpus,
    table: str | os.PathLike,
    folder: str | os.PathLike,
    seed: int = 0,
    **options,
) -> dict[str, Losses]:
    """Train both models at the same rates, and at further rates until the best rate of each lies
    between two others. Returns losses by title and rate; arguments are those of `run_many`."""
    rates, rows = FIRST_RATES, []
    while rates:
        runs = {}
        for name in SWEPT:
            runs |= sweep_runs(name, profile, rates)
        trained = run_many(runs, [seed], profile, corpus, table, folder, **options)
        rows += [row for by_seed in trained.values() for row in by_seed.values()]
        losses = swept(rows, profile)
        rates = sorted({rate for of_one in losses.values() for rate in next_rates(of_one)})
    return losses


def by_rate(rows: Iterable[Row], experiment: Experiment) -> dict[float, list[float]]:
    """Best valid losses, by learning rate, of the rows that differ from an experiment in that
    alone."""
    found: dict[float, list[float]] = {}
    for row in rows:
        rate = row.experiment.training.learning_rate
        if experiment.with_(learning_rate=rate) == row.experiment:
            found.setdefault(rate, []).append(row.best_valid_loss)
    return dict(sorted(found.items()))


def swept(rows: Sequence[Row], profile: Profile) -> dict[str, dict[float, list[float]]]:
    """Losses by title and learning rate, of the models whose sweep is among the rows."""
    found = {}
    for name in SWEPT:
        (run,) = sweep_runs(name, profile, FIRST_RATES[:1]).values()
        found[find_row(name).title] = by_rate(rows, run.at(profile))
    return {title: losses for title, losses in found.items() if losses}


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
    reason, next_step = f"best of {len(losses)} rates from {low:g} to {high:g}", ""
    if usual in means:
        reason += f", {means[best] - means[usual]:+.2f} nats/token against {usual:g}"
        if means[usual] - means[best] >= RELEVANT:
            direction = "raise" if best > usual else "lower"
            next_step = f"{direction} the learning rate to {best:g}"
    decision = "bracketed"
    if best in (low, high):
        decision, next_step = "at the edge", "widen the sweep on that side"
    reason = f"learning rate {best:g} is the {reason}"
    question = f"Is the best learning rate of “{title}” bracketed?"
    return Verdict(question, decision, math.exp(means[best]), None, None, PPL, reason, next_step)


def tuned(name: str, profile: Profile, rows: Sequence[Row]) -> Experiment:
    """`optimized` or `baseline` at the size of a profile, at the best rate of its recorded sweep.

    Raises MusotaError where the rows have no sweep of it.
    """
    losses = swept(rows, profile).get(find_row(name).title)
    if not losses:
        raise MusotaError(
            f"No learning-rate sweep of {name} is recorded at profile {profile.name}: run "
            f"`musota evidence --profile {profile.name} --only sweep` first."
        )
    return scaled(name, profile, learning_rate=lowest(losses))
