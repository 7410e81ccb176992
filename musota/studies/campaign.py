"""The plan carried out with several seeds: five models, learning-rate sweeps, both models tuned.

Every part is a set of cells for `probes.run_cells`: what has finished is loaded, the rest trained.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

from musota.errors import MusotaError
from musota.plan.config import Experiment
from musota.plan.profiles import Profile
from musota.plan.registry import TUNED, find_experiment
from musota.plan.suspects import Cell
from musota.studies.cells import run_cells
from musota.studies.grid import sweep_losses
from musota.training.runs import Run

MODELS = ("original", "optimized", "baseline", "simplified", "simplified_twin")


SWEEP_FOLDER = "sweep"  # of a results folder


SWEEP_EPOCHS = 5  # of the plan's 30, with warm-up's share of the steps kept


# About a factor of 3 apart. A sweep starts with the middle six and is widened where it must be.
LADDER = tuple(float(f"{mantissa}e{power}") for power in range(-6, 1) for mantissa in (1, 3))


FIRST_RATES = LADDER[4:10]  # 1e-4 … 3e-2


def models() -> dict[str, Cell]:
    """The plan's four experiments and the simplified model's twin."""
    return {name: Cell(find_experiment(name)) for name in MODELS}


def sweep(name: str, profile: Profile, rates=FIRST_RATES) -> dict[str, Cell]:
    """Short runs of an experiment at `rates`, which are what the scaled model trains with."""
    experiment = find_experiment(name)
    share = SWEEP_EPOCHS / experiment.training.epochs
    short = {
        "epochs": SWEEP_EPOCHS,
        "warmup_steps": round(share * experiment.training.warmup_steps),
    }
    return {
        f"{name}_rate_{rate:g}": Cell(
            experiment.with_(learning_rate=rate / profile.learning_rate, **short)
        )
        for rate in rates
    }


def read_sweep(folder: str | os.PathLike, name: str) -> dict[float, list[float]]:
    """Valid losses by learning rate, as recorded in a results folder; empty if nothing is."""
    runs = {}
    for path in sorted((Path(folder) / SWEEP_FOLDER).glob(f"{name}_rate_*/config.json")):
        run = Run(path.parent)  # also one that diverged before its first epoch's end
        if run.finished or run.diverged:
            runs.setdefault(run.name, {})[run.seed] = run
    return sweep_losses(runs, next(iter(runs))) if runs else {}


def best_of(losses: dict[float, list[float]]) -> float:
    """The rate with the lowest mean loss."""
    return min(losses, key=lambda rate: sum(losses[rate]) / len(losses[rate]))


def run_sweeps(profile: Profile, corpus, folder: Path, seed: int, **how) -> None:
    """Sweep both models over the same rates until the best of each lies between two others."""
    rates = list(FIRST_RATES)
    while rates:
        cells = {}
        for name in TUNED.values():
            cells |= sweep(name, profile, rates)
        run_cells(cells, [seed], profile, corpus, folder / SWEEP_FOLDER, **how)
        swept = [read_sweep(folder, name) for name in TUNED.values()]
        rates = sorted({rate for losses in swept for rate in _wider(losses)})


def _wider(losses: dict[float, list[float]]) -> list[float]:
    """The rate still to be tried beyond the edge the best lies at, if it does."""
    rates, best = sorted(losses), best_of(losses)
    beyond = {rates[0]: -1, rates[-1]: 1}.get(best, 0)
    place = min(range(len(LADDER)), key=lambda i: abs(math.log(LADDER[i] / best))) + beyond
    return [LADDER[place]] if beyond and 0 <= place < len(LADDER) else []


def tuned(name: str, profile: Profile, *folders: str | os.PathLike) -> Experiment:
    """`tuned` or `tuned_baseline` at full size: its model at the best rate of the recorded sweep.

    The first of the results folders with a sweep decides. Raises MusotaError where there is none.
    """
    origin = TUNED[name]
    losses = next((found for folder in folders if (found := read_sweep(folder, origin))), {})
    if not losses:
        raise MusotaError(
            f"{name} trains at the best learning rate of a sweep, and {folders[0]} holds none: run "
            f"`python -m musota evidence --profile {profile.name} --only sweep` first."
        )
    return find_experiment(origin).with_(learning_rate=best_of(losses) / profile.learning_rate)
