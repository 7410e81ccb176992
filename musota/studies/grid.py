"""What the root-cause grid says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from musota.plan.suspects import TWIN, Suspect
from musota.rules.verdicts import Cause, root_causes
from musota.training.runs import Run


def valid_losses(runs: Mapping[str, Mapping[int, Run]]) -> dict[str, dict[int, float]]:
    """Best valid nats/token by cell and seed, inf where it diverged; whole cells only."""
    seeds = {seed for by_seed in runs.values() for seed in by_seed}
    return {
        cell: {
            seed: math.inf if run.diverged else run.summary["valid_loss"]
            for seed, run in by_seed.items()
        }
        for cell, by_seed in runs.items()
        if by_seed.keys() == seeds and all(r.finished or r.diverged for r in by_seed.values())
    }


def _sweep(runs: Mapping[str, Mapping[int, Run]], name: str) -> dict[float, str]:
    """By learning rate, the cells that differ from the cell `name` in nothing else."""
    ones = {cell: next(iter(runs[cell].values())) for cell in valid_losses(runs)}
    if name not in ones:
        return {}
    base = ones[name]
    found = {}
    for cell, run in ones.items():
        rate = run.experiment.training.learning_rate
        alike = base.experiment.with_(learning_rate=rate) == run.experiment
        if alike and run.fingerprint == base.fingerprint:
            found[rate] = cell
    return dict(sorted(found.items()))


def sweep_losses(runs: Mapping[str, Mapping[int, Run]], name: str) -> dict[float, list[float]]:
    """Valid losses of every seed by learning rate, all else as in the cell `name`."""
    losses = valid_losses(runs)
    return {rate: list(losses[cell].values()) for rate, cell in _sweep(runs, name).items()}


def data_losses(runs: Mapping[str, Mapping[int, Run]], name: str) -> dict[int, dict[int, float]]:
    """Valid losses by number of training tokens, of the cells that `data_shares(name, …)` made."""
    return {
        next(iter(runs[cell].values())).config["corpus"]["tokens"]["train"]: losses
        for cell, losses in valid_losses(runs).items()
        if cell in (name, f"{name}_half", f"{name}_quarter")
    }


def judge(runs: Mapping[str, Mapping[int, Run]], suspects: Sequence[Suspect]) -> list[Cause]:
    """`verdicts.root_causes` of a grid, as far as it has been trained.

    Where both rates were swept, the architecture is judged once more with each model at its own
    best rate: the plan's rates were made for neither. With a best rate at the edge of its sweep
    that stays undecided.
    """
    losses = valid_losses(runs)
    best, at_edge = [], False
    for name in ("original", "dense"):
        swept = _sweep(runs, name)
        if len(swept) > 1:
            rate = min(swept, key=lambda rate: sum(losses[swept[rate]].values()))
            best.append(swept[rate])
            at_edge |= rate in (min(swept), max(swept))
    fair = Suspect("", TWIN[1], *best, "prefer the dense transformer") if len(best) == 2 else None
    if fair:
        name = f"{TWIN[0]}, each at its best rate" + (" (at an edge)" if at_edge else "")
        fair = replace(fair, name=name)
        suspects = [*suspects, fair]
    known = [s for s in suspects if s.before in losses and s.after in losses]
    vocab_size = next(iter(runs["original"].values())).experiment.model.vocab_size
    causes = root_causes(known, losses, vocab_size)
    return [
        replace(
            cause,
            here=_changes(runs, cause.suspect),
            verdict="undecided" if at_edge and cause.suspect == fair else cause.verdict,
        )
        for cause in causes
    ]


def _changes(runs: Mapping[str, Mapping[int, Run]], suspect: Suspect) -> str:
    """What the cells of a suspect really differ in: names, values before and after."""
    pair = [next(iter(runs[cell].values())) for cell in (suspect.before, suspect.after)]
    before, after = (
        run.experiment.fields() | {"training tokens": run.config["corpus"]["tokens"]["train"]}
        for run in pair
    )
    if before.keys() != after.keys():
        before = {"d_model": pair[0].experiment.model.d_model, **before}
    return ", ".join(
        f"{name} {_shown(before[name])} → {_shown(after[name])}"
        for name in before
        if name in after and before[name] != after[name]
    )


def _shown(value) -> str:
    return value if isinstance(value, str) else f"{value:,.9g}"
