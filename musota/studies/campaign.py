"""The plan carried out with several seeds: its models, learning-rate sweeps, both models tuned.

Every part is a set of cells for `run_cells`: what has finished is loaded, the rest trained.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

from musota.errors import MusotaError
from musota.plan.config import Experiment
from musota.plan.profiles import Profile, rate_factor, scaled
from musota.plan.registry import TUNED, find_experiment, registry
from musota.plan.suspects import Cell
from musota.studies.cells import run_cells
from musota.training.runs import Run

SWEEP_EPOCHS = 5  # of the plan's 30, with warm-up's share of the steps kept
# About a factor of 3 apart. A sweep starts with the middle six and is widened where it must be.
LADDER = tuple(float(f"{mantissa}e{power}") for power in range(-6, 1) for mantissa in (1, 3))
FIRST_RATES = LADDER[4:10]  # 1e-4 … 3e-2
ByRate = Mapping[float, Mapping[int, Run]]  # by learning rate and seed
Losses = Mapping[float, Sequence[float]]  # valid losses (inf: diverged) of every seed, by rate


def models() -> dict[str, Cell]:
    """Every row of the registry that needs no sweep."""
    return {name: Cell(find_experiment(name)) for name in registry if name not in TUNED}


def swept_experiment(name: str) -> Experiment:
    """What a sweep trains of a row of the registry: a short run."""
    experiment = find_experiment(name)
    share = SWEEP_EPOCHS / experiment.training.epochs
    warmup = round(share * experiment.training.warmup_steps)
    return experiment.with_(epochs=SWEEP_EPOCHS, warmup_steps=warmup)


def at_rates(
    name: str, experiment: Experiment, profile: Profile, rates: Iterable[float]
) -> dict[str, Cell]:
    """Cells of an experiment at `rates`, which are what the scaled model trains with."""
    factor = rate_factor(experiment.model, profile)
    return {
        f"{name}_rate_{rate:g}": Cell(experiment.with_(learning_rate=rate / factor))
        for rate in rates
    }


def bracket(
    experiments: Mapping[str, Experiment],
    rates: Iterable[float],
    seed: int,
    profile: Profile,
    alike: bool = False,
    **how,
) -> dict[str, Losses]:
    """Train experiments at `rates` and further, all `alike` or each for itself, until the best of
    each lies between two others. Returns losses by name and rate."""
    losses, left = {name: {} for name in experiments}, dict.fromkeys(experiments, rates)
    while any(left.values()):
        cells, labels = {}, {}
        for name, experiment in experiments.items():
            of_one = at_rates(name, experiment, profile, left[name])
            labels |= {label: (name, rate) for label, rate in zip(of_one, left[name], strict=True)}
            cells |= of_one
        for label, runs in run_cells(cells, [seed], profile, **how).items():
            name, rate = labels[label]
            losses[name][rate] = [runs[seed].valid_loss]
        left = {name: wider(of_one) for name, of_one in losses.items()}
        if alike:
            left = dict.fromkeys(
                experiments, sorted({r for of_one in left.values() for r in of_one})
            )
    return losses


def run_sweeps(profile: Profile, seed: int, **how) -> None:
    """Sweep both models over the same rates."""
    experiments = {name: swept_experiment(name) for name in TUNED.values()}
    bracket(experiments, FIRST_RATES, seed, profile, alike=True, **how)


def by_rate(runs: Iterable[Run], experiment: Experiment) -> ByRate:
    """The runs that have ended and differ from an experiment in the learning rate alone."""
    found: dict[float, dict[int, Run]] = {}
    for run in runs:
        rate = run.experiment.training.learning_rate
        if run.ended and experiment.with_(learning_rate=rate) == run.experiment:
            found.setdefault(rate, {})[run.seed] = run
    return dict(sorted(found.items()))


def swept(runs: Iterable[Run], name: str, profile: Profile) -> Losses:
    """Losses by rate, of the runs of a sweep."""
    found = by_rate(runs, scaled(swept_experiment(name), profile))
    return {rate: [run.valid_loss for run in seeds.values()] for rate, seeds in found.items()}


def best_of(losses: Losses) -> float:
    """The rate with the lowest mean loss."""
    return min(losses, key=lambda rate: sum(losses[rate]) / len(losses[rate]))


def wider(losses: Losses) -> list[float]:
    """The rate still to be tried beyond the edge the best lies at, if it does."""
    best = best_of(losses)
    beyond = {min(losses): -1, max(losses): 1}.get(best, 0)
    place = min(range(len(LADDER)), key=lambda i: abs(math.log(LADDER[i] / best))) + beyond
    return [LADDER[place]] if beyond and 0 <= place < len(LADDER) else []


def tuned(name: str, profile: Profile, losses: Losses) -> Experiment:
    """A tuned row at full size: its model at the best rate of the recorded sweep.

    Raises MusotaError where `losses` (see `swept`) is empty.
    """
    if not losses:
        raise MusotaError(
            f"{name} trains at the best learning rate of a sweep, and none is recorded: run "
            f"`python -m musota evidence --profile {profile.name} --only sweep` first."
        )
    rate = best_of(losses) / profile.learning_rate
    return find_experiment(TUNED[name]).with_(learning_rate=rate)
