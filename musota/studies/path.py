"""The path from `optimized` to `redesigned`, trained: each row at its own best rate, and judged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from musota.plan.path import EARNED, Step, steps
from musota.plan.profiles import Profile, rate_factor, scaled
from musota.plan.suspects import Cell
from musota.rules.stats import Interval, pooled_contrast
from musota.studies.campaign import best_of, wider
from musota.studies.cells import run_cells
from musota.training.runs import Run

RATES = (1e-3, 3e-3, 1e-2)
Trained = Mapping[str, Mapping[float, Mapping[int, Run]]]  # by row, learning rate and seed


def sort_out(runs: Iterable[Run], profile: Profile) -> Trained:
    """Which of `runs` belong to which row of the path, by what they are."""
    rows, found = {name: scaled(step.experiment, profile) for name, step in steps().items()}, {}
    for run in runs:
        if run.finished or run.diverged:
            rate = run.experiment.training.learning_rate
            for name, experiment in rows.items():
                if experiment.with_(learning_rate=rate) == run.experiment:
                    found.setdefault(name, {}).setdefault(rate, {})[run.seed] = run
    return {name: dict(sorted(found[name].items())) for name in rows if name in found}


def best_rate(by_rate: Mapping[float, Mapping[int, Run]]) -> float:
    """The rate with the lowest loss of the first seed, which was trained at all of them."""
    first = min(seed for by_seed in by_rate.values() for seed in by_seed)
    tried = {rate: [_loss(runs[first])] for rate, runs in by_rate.items() if first in runs}
    return best_of(tried)


def run_path(profile: Profile, corpus, folder: Path, seeds: range, known=(), **how) -> None:
    """Train every row of the path with the first seed at several rates, until the best lies
    between two others, then with the other seeds at the best."""
    known = list(known)

    def train(rates: Mapping[str, Iterable[float]], seeds) -> None:
        cells = {}
        for name, step in steps().items():
            factor = rate_factor(step.experiment.model, profile)
            for rate in rates.get(name, ()):
                experiment = step.experiment.with_(learning_rate=rate / factor)
                cells[f"{name.replace(', ', ' ').replace(' ', '_')}_rate_{rate:g}"] = Cell(
                    experiment
                )
        done = run_cells(cells, list(seeds), profile, corpus, folder, known=known, **how)
        known.extend(run for by_seed in done.values() for run in by_seed.values())

    rates = dict.fromkeys(steps(), RATES)
    while any(rates.values()):
        train(rates, seeds[:1])
        trained = sort_out(known, profile)
        losses = {
            name: {rate: [_loss(runs[seeds[0]])] for rate, runs in by_rate.items()}
            for name, by_rate in trained.items()
        }
        rates = {name: wider(of_one) for name, of_one in losses.items()}
    train({name: [best_rate(by_rate)] for name, by_rate in trained.items()}, seeds[1:])


@dataclass(frozen=True)
class Judged:
    """A row of the path as trained: its seeds at its best of `tried` rates, the nats it has over
    the row it is one change away from, and whether the change earns its place."""

    step: Step
    rate: float
    tried: int
    runs: tuple[Run, ...]
    effect: Interval | None
    verdict: str  # earns its place | does not | undecided, or nothing without an interval

    @property
    def ppl(self) -> float:
        return math.exp(sum(map(_loss, self.runs)) / len(self.runs))


def judge(trained: Trained) -> dict[str, Judged]:
    """Every row that has been trained, in the order of the path. Effects are paired by the seeds
    that all rows with several have; their interval pools the spread of those rows (see
    `pooled_contrast`). A row that has not all of them yet gets no interval."""
    rows, best = steps(), {name: best_rate(by_rate) for name, by_rate in trained.items()}
    runs = {name: trained[name][rate] for name, rate in best.items()}
    several = [set(by_seed) for by_seed in runs.values() if len(by_seed) > 1]
    common = set.intersection(*several or map(set, runs.values())) if runs else set()
    whole = {
        name: {seed: _loss(by_seed[seed]) for seed in common}
        for name, by_seed in runs.items()
        if common <= by_seed.keys()
    }
    judged = {}
    for name in runs:
        step, effect, verdict = rows[name], None, ""
        if {name, step.before} <= whole.keys():
            effect = pooled_contrast(whole, {step.before: -1, name: 1})
        elif paired := runs[name].keys() & runs.get(step.before, {}).keys():
            gains = [_loss(runs[name][seed]) - _loss(runs[step.before][seed]) for seed in paired]
            effect = Interval(sum(gains) / len(gains))
        if effect:
            gain = -1 if step.made else 1  # of a change made, or one taken back
            side = effect.beyond(gain * EARNED) * gain
            if not math.isinf(effect.low):
                verdict = {1: "earns its place", 0: "undecided", -1: "does not"}[side]
        seeds = tuple(runs[name][seed] for seed in sorted(common & runs[name].keys()))
        judged[name] = Judged(step, best[name], len(trained[name]), seeds, effect, verdict)
    return judged


def _loss(run: Run) -> float:
    return math.inf if run.diverged else run.summary["valid_loss"]
