"""What the root-cause grid says."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace

from musota.plan.profiles import grid_profiles, scaled
from musota.plan.registry import experiments
from musota.plan.suspects import COMPARE, MORE_TEXT, TWIN, Suspect, grid
from musota.rules.verdicts import Cause, guilty_of, root_causes
from musota.studies.campaign import best_of, by_rate
from musota.training.runs import Run

DENSE = "prefer the dense transformer"
LINES = {  # for advice that changes no field
    MORE_TEXT: "run --only 01,02,03,04 --corpus wikitext-103",
    COMPARE: "evidence --only sweep,tuned",
    DENSE: "run --only 03",
}
Runs = Mapping[str, Mapping[int, Run]]  # by cell and seed


def _first(runs: Runs, cell: str) -> Run:
    return next(iter(runs[cell].values()))


def valid_losses(runs: Runs) -> dict[str, dict[int, float]]:
    """Best valid nats/token by cell and seed, inf where it diverged; whole cells only."""
    seeds = {seed for by_seed in runs.values() for seed in by_seed}
    return {
        cell: {seed: run.valid_loss for seed, run in by_seed.items()}
        for cell, by_seed in runs.items()
        if by_seed.keys() == seeds and all(run.ended for run in by_seed.values())
    }


def _sweep(runs: Runs, name: str) -> dict[float, str]:
    """By learning rate, the cells that differ from the cell `name` in nothing else."""
    ones = {cell: _first(runs, cell) for cell in valid_losses(runs)}
    if name not in ones:
        return {}
    alike = {run: cell for cell, run in ones.items() if run.fingerprint == ones[name].fingerprint}
    found = by_rate(alike, ones[name].experiment)
    return {rate: alike[next(iter(seeds.values()))] for rate, seeds in found.items()}


def sweep_losses(runs: Runs, name: str) -> dict[float, list[float]]:
    """Valid losses of every seed by learning rate, all else as in the cell `name`."""
    losses = valid_losses(runs)
    return {rate: list(losses[cell].values()) for rate, cell in _sweep(runs, name).items()}


def data_losses(runs: Runs, name: str) -> dict[int, dict[int, float]]:
    """Valid losses by number of training tokens, of the cells that `data_shares(name, …)` made."""
    return {
        _first(runs, cell).config["corpus"]["tokens"]["train"]: losses
        for cell, losses in valid_losses(runs).items()
        if cell in (name, f"{name}_half", f"{name}_quarter")
    }


def judge(runs: Runs, suspects: Sequence[Suspect]) -> list[Cause]:
    """`verdicts.root_causes` of a grid, as far as it has been trained.

    Where both rates were swept, the architecture is judged once more with each model at its own
    best rate: the plan's rates were made for neither. With a best rate at the edge of its sweep
    that stays undecided.
    """
    losses, fair, at_edge = valid_losses(runs), None, False
    sweeps = {name: sweep_losses(runs, name) for name in ("original", "dense")}
    if all(len(swept) > 1 for swept in sweeps.values()):
        rates = {name: best_of(swept) for name, swept in sweeps.items()}
        at_edge = any(rates[n] in (min(swept), max(swept)) for n, swept in sweeps.items())
        best = [_sweep(runs, name)[rate] for name, rate in rates.items()]
        name = f"{TWIN[0]}, each at its best rate" + (" (at an edge)" if at_edge else "")
        fair = Suspect(name, TWIN[1], *best, DENSE)
        if not at_edge:  # what the plan's rates would advise has been done
            suspects = [replace(s, advice="") if s.advice == COMPARE else s for s in suspects]
    known = [s for s in (*suspects, fair) if s and {s.before, s.after} <= losses.keys()]
    causes = root_causes(known, losses, _first(runs, next(iter(runs))).experiment.model.vocab_size)
    return [
        replace(
            cause,
            here=_changes(runs, cause.suspect),
            verdict="undecided" if at_edge and cause.suspect is fair else cause.verdict,
        )
        for cause in causes
    ]


def next_line(causes: Sequence[Cause], profile: str, corpus: str) -> str:
    """The command that makes the change of the largest certain gain, and what that is in the
    notebooks' parameters; `corpus` as it was asked for."""
    guilty = next((cause.suspect for cause in guilty_of(causes)), None)
    if not guilty:
        return "No change is advised: more seeds, or a larger profile, may decide."
    line, changes = LINES.get(guilty.advice, "run --only 02,03,04"), {}
    if guilty.advice not in LINES:
        changes = advised_changes(guilty, profile)
    line += f" --profile {profile}"
    line += "" if "--corpus" in line else f" --corpus {shlex.quote(corpus)}"
    line += "".join(f" --set {name}={value}" for name, value in changes.items())
    then = f", or in notebooks 02 to 04 `changes = {changes}`" if changes else ""
    return f"The line for “{guilty.advice}”: `python -m musota {line}`{then}."


def advised_changes(suspect: Suspect, profile: str) -> dict[str, float]:
    """What mending a suspect changes in `optimized` at a profile's size, by field; nothing, where
    `optimized` has it already. Rates are the ones that were measured; counts change in
    proportion, for the grid's models are smaller."""
    cells, _, _ = grid(profile)
    pair = [cells[name].experiment for name in (suspect.before, suspect.after)]
    before, after = (scaled(one, grid_profiles[profile]).fields() for one in pair)
    planned = experiments["optimized"].fields()
    here, changes = scaled(experiments["optimized"], profile).fields(), {}
    for name, new in after.items():
        old, value = before[name], new
        if isinstance(new, int):
            made = pair[1].fields()[name] == planned[name]
            value = here[name] if made else max(1, round(here[name] * new / max(1, old)))
        elif isinstance(new, float):
            value = float(f"{new:.9g}")
        if new != old and value != here[name]:
            changes[name] = value
    return changes


def _changes(runs: Runs, suspect: Suspect) -> str:
    """What the cells of a suspect really differ in: names, values before and after."""
    pair = [_first(runs, cell) for cell in (suspect.before, suspect.after)]
    before, after = (
        run.experiment.fields() | {"training tokens": run.config["corpus"]["tokens"]["train"]}
        for run in pair
    )
    if before.keys() != after.keys():
        before = {"d_model": pair[0].experiment.model.d_model, **before}
    both = {n: (old, after[n]) for n, old in before.items() if n in after and old != after[n]}
    shown = {
        n: [v if isinstance(v, str) else f"{v:,.9g}" for v in pair] for n, pair in both.items()
    }
    return ", ".join(f"{name} {old} → {new}" for name, (old, new) in shown.items())
