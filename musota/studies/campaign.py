"""The plan carried out with several seeds: its models, learning-rate sweeps, both models tuned.

Every part is a set of cells for `run_cells`: what has finished is loaded, the rest trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from musota.errors import MusotaError
from musota.plan.config import Experiment
from musota.plan.profiles import Profile, scaled
from musota.plan.registry import TUNED, find_experiment, registry
from musota.plan.suspects import Cell
from musota.studies.cells import run_cells
from musota.training.runs import Run

SWEEP_EPOCHS = 5  # of the plan's 30, with warm-up's share of the steps kept
# About a factor of 3 apart. A sweep starts with the middle six and is widened where it must be.
LADDER = tuple(float(f"{mantissa}e{power}") for power in range(-6, 1) for mantissa in (1, 3))
FIRST_RATES = LADDER[4:10]  # 1e-4 … 3e-2
ByRate = Mapping[float, Mapping[int, Run]]  # by learning rate and seed


def models() -> dict[str, Cell]:
    """Every row of the registry that needs no sweep."""
    return {name: Cell(find_experiment(name)) for name in registry if name not in TUNED}


def sweep(name: str, profile: Profile, rates=None) -> dict[str, Cell]:
    """Short runs of an experiment at `rates`, which are what the scaled model trains with."""
    experiment = find_experiment(name)
    share = SWEEP_EPOCHS / experiment.training.epochs
    warmup = round(share * experiment.training.warmup_steps)
    short = experiment.with_(epochs=SWEEP_EPOCHS, warmup_steps=warmup)
    return {
        f"{name}_rate_{rate:g}": Cell(short.with_(learning_rate=rate / profile.learning_rate))
        for rate in rates or FIRST_RATES
    }


def by_rate(runs: Iterable[Run], experiment: Experiment) -> ByRate:
    """The runs that have ended and differ from an experiment in the learning rate alone."""
    found: dict[float, dict[int, Run]] = {}
    for run in runs:
        rate = run.experiment.training.learning_rate
        if run.ended and experiment.with_(learning_rate=rate) == run.experiment:
            found.setdefault(rate, {})[run.seed] = run
    return dict(sorted(found.items()))


def swept(runs: Iterable[Run], name: str, profile: Profile) -> dict[float, list[float]]:
    """Valid losses (inf: diverged) of every seed by learning rate, of the runs of a sweep."""
    (cell,) = sweep(name, profile, [1e-3]).values()
    found = by_rate(runs, scaled(cell.experiment, profile))
    return {rate: [run.valid_loss for run in seeds.values()] for rate, seeds in found.items()}


def best_of(losses: dict[float, list[float]]) -> float:
    """The rate with the lowest mean loss."""
    return min(losses, key=lambda rate: sum(losses[rate]) / len(losses[rate]))


def run_sweeps(profile: Profile, corpus, folder: Path, seed: int, **how) -> None:
    """Sweep both models over the same rates until the best of each lies between two others."""
    rates, runs = list(FIRST_RATES), []
    while rates:
        cells = {}
        for name in TUNED.values():
            cells |= sweep(name, profile, rates)
        done = run_cells(cells, [seed], profile, corpus, folder, **how)
        runs += [run for by_seed in done.values() for run in by_seed.values()]
        losses = [swept(runs, name, profile) for name in TUNED.values()]
        rates = sorted({rate for of_one in losses for rate in wider(of_one)})


def wider(losses: dict[float, list[float]]) -> list[float]:
    """The rate still to be tried beyond the edge the best lies at, if it does."""
    rates, best = sorted(losses), best_of(losses)
    beyond = {rates[0]: -1, rates[-1]: 1}.get(best, 0)
    place = min(range(len(LADDER)), key=lambda i: abs(math.log(LADDER[i] / best))) + beyond
    return [LADDER[place]] if beyond and 0 <= place < len(LADDER) else []


def tuned(name: str, profile: Profile, losses: dict[float, list[float]]) -> Experiment:
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
