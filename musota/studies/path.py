"""The path from `optimized` to `redesigned`, trained: each row at its own best rate, and judged."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from musota.plan.path import EARNED, Step, steps
from musota.plan.profiles import Profile, scaled
from musota.rules.stats import Interval, pooled_contrast
from musota.studies.campaign import ByRate, at_rates, best_of, bracket, by_rate
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


def run_path(profile: Profile, seeds: range, **how) -> None:
    """Train every row of the path with the first seed at several rates, until the best lies
    between two others, then with the other seeds at the best."""
    names = {name: name.replace(",", "").replace(" ", "_") for name in steps()}
    experiments = {names[name]: step.experiment for name, step in steps().items()}
    cells = {}
    for name, losses in bracket(experiments, RATES, seeds[0], profile, **how).items():
        cells |= at_rates(name, experiments[name], profile, [best_of(losses)])
    run_cells(cells, seeds[1:], profile, **how)


# What an interval says of a row: beyond `EARNED`, undecided, within it. A change must bring so
# much; taking it back, or being a twin, must cost so much, and a gain is told.
OF_A_CHANGE = {1: "earns its place", 0: "undecided", -1: "does not earn it"}
OF_A_LONGER = {1: "better", 0: "undecided", -1: "no better"}
OF_COSTS = {
    "taken back": {1: "needed", 0: "undecided", -1: "not needed", "gain": "better without"},
    "twin": {1: "worse than the redesign", 0: "undecided", -1: "as good as the redesign"}
    | {"gain": "better than the redesign"},
}


def _verdict(kind: str, effect: Interval) -> str:
    if words := OF_COSTS.get(kind):
        return words["gain" if effect.side < 0 else effect.beyond(EARNED)]
    return (OF_A_LONGER if kind == "longer" else OF_A_CHANGE)[-effect.beyond(-EARNED)]


@dataclass(frozen=True)
class Judged:
    """A row of the path as trained: its seeds at its best of `tried` rates, the nats it has over
    the row it is set against, and what that says of the change."""

    step: Step
    rate: float
    tried: int
    runs: tuple[Run, ...]
    effect: Interval | None
    verdict: str  # of `_verdict`, or diverges; nothing without an interval

    @property
    def ppl(self) -> float:
        return math.exp(sum(run.valid_loss for run in self.runs) / len(self.runs))


def judge(trained: Mapping[str, ByRate]) -> dict[str, Judged]:
    """Every row that has been trained, in the order of the path. Effects are paired by the seeds
    that most rows with several have; their interval pools the spread of those rows (see
    `pooled_contrast`). A row that has not all of them yet gets no interval."""
    rows, runs, best = steps(), {}, {}
    for name, of_one in trained.items():
        first = min(seed for seeds in of_one.values() for seed in seeds)  # trained at all rates
        best[name] = best_of(_losses(of_one, first))
        runs[name] = of_one[best[name]]
    diverged = {name for name, seeds in runs.items() if any(r.diverged for r in seeds.values())}
    finite = {name: seeds for name, seeds in runs.items() if name not in diverged}
    counted = Counter(frozenset(seeds) for seeds in finite.values()).most_common()
    several = [seeds for seeds, _ in counted if len(seeds) > 1]
    common = next(iter(several or [seeds for seeds, _ in counted]), frozenset())
    whole = {
        name: {seed: seeds[seed].valid_loss for seed in common}
        for name, seeds in finite.items()
        if common and common <= seeds.keys()
    }
    judged = {}
    for name, seeds in runs.items():
        step, effect, verdict = rows[name], None, "diverges" if name in diverged else ""
        before = finite.get(step.before, {}) if name in finite else {}
        if {name, step.before} <= whole.keys():
            effect = pooled_contrast(whole, {step.before: -1, name: 1})
        elif paired := seeds.keys() & before.keys():
            gains = [seeds[seed].valid_loss - before[seed].valid_loss for seed in paired]
            effect = Interval(sum(gains) / len(gains))
        if effect and not math.isinf(effect.low):
            verdict = _verdict(step.kind, effect)
        shown = tuple(seeds[seed] for seed in sorted(common & seeds.keys() or seeds))
        judged[name] = Judged(step, best[name], len(trained[name]), shown, effect, verdict)
    return judged
