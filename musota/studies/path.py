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
from musota.studies.campaign import ByRate, best_of, by_rate, wider
from musota.studies.cells import run_cells
from musota.training.runs import Run

RATES = (1e-3, 3e-3, 1e-2)


def sort_out(runs: Iterable[Run], profile: Profile) -> dict[str, ByRate]:
    """Which of `runs` belong to which row of the path, by what they are."""
    runs = list(runs)
    found = {n: by_rate(runs, scaled(step.experiment, profile)) for n, step in steps().items()}
    return {name: of_one for name, of_one in found.items() if of_one}


def _losses(runs: ByRate, seed: int) -> dict[float, list[float]]:
    return {rate: [seeds[seed].valid_loss] for rate, seeds in runs.items() if seed in seeds}


def run_path(profile: Profile, corpus, folder: Path, seeds: range, known=(), **how) -> None:
    """Train every row of the path with the first seed at several rates, until the best lies
    between two others, then with the other seeds at the best."""
    known = list(known)

    def train(rates: Mapping[str, Iterable[float]], seeds) -> None:
        cells = {}
        for name, step in steps().items():
            for rate in rates.get(name, ()):
                factor = rate_factor(step.experiment.model, profile)
                label = f"{name.replace(', ', ' ').replace(' ', '_')}_rate_{rate:g}"
                cells[label] = Cell(step.experiment.with_(learning_rate=rate / factor))
        done = run_cells(cells, list(seeds), profile, corpus, folder, known=known, **how)
        known.extend(run for by_seed in done.values() for run in by_seed.values())

    rates = dict.fromkeys(steps(), RATES)
    while any(rates.values()):
        train(rates, seeds[:1])
        losses = {n: _losses(runs, seeds[0]) for n, runs in sort_out(known, profile).items()}
        rates = {name: wider(of_one) for name, of_one in losses.items()}
    train({name: [best_of(of_one)] for name, of_one in losses.items()}, seeds[1:])


OF_A_CHANGE = {1: "earns its place", 0: "undecided", -1: "does not"}
OF_A_TWIN = {1: "worse than the redesign", 0: "undecided", -1: "as good as the redesign"}


@dataclass(frozen=True)
class Judged:
    """A row of the path as trained: its seeds at its best of `tried` rates, the nats it has over
    the row it is one change away from, and whether the change earns its place."""

    step: Step
    rate: float
    tried: int
    runs: tuple[Run, ...]
    effect: Interval | None
    verdict: str  # of OF_A_CHANGE, of a twin of OF_A_TWIN, or nothing without an interval

    @property
    def ppl(self) -> float:
        return math.exp(sum(run.valid_loss for run in self.runs) / len(self.runs))


def judge(trained: Mapping[str, ByRate]) -> dict[str, Judged]:
    """Every row that has been trained, in the order of the path. Effects are paired by the seeds
    that all rows with several have; their interval pools the spread of those rows (see
    `pooled_contrast`). A row that has not all of them yet gets no interval."""
    rows, runs, best = steps(), {}, {}
    for name, of_one in trained.items():
        first = min(seed for seeds in of_one.values() for seed in seeds)  # trained at all rates
        best[name] = best_of(_losses(of_one, first))
        runs[name] = of_one[best[name]]
    several = [set(seeds) for seeds in runs.values() if len(seeds) > 1]
    common = set.intersection(*several or map(set, runs.values())) if runs else set()
    whole = {
        name: {seed: seeds[seed].valid_loss for seed in common}
        for name, seeds in runs.items()
        if common <= seeds.keys()
    }
    judged = {}
    for name, seeds in runs.items():
        step, effect, verdict = rows[name], None, ""
        before = runs.get(step.before, {})
        if {name, step.before} <= whole.keys():
            effect = pooled_contrast(whole, {step.before: -1, name: 1})
        elif paired := seeds.keys() & before.keys():
            gains = [seeds[seed].valid_loss - before[seed].valid_loss for seed in paired]
            effect = Interval(sum(gains) / len(gains))
        if effect and not math.isinf(effect.low):
            gain = -1 if step.made else 1  # of a change made, or one taken back
            side = effect.beyond(gain * EARNED) * gain
            verdict = (OF_A_TWIN if "twin" in name else OF_A_CHANGE)[side]
        shown = tuple(seeds[seed] for seed in sorted(common & seeds.keys()))
        judged[name] = Judged(step, best[name], len(trained[name]), shown, effect, verdict)
    return judged
