"""What runs and models are called in tables and pictures, and which runs are one model's seeds."""

import copy
from collections.abc import Iterable, Mapping, Sequence

from musota.plan.config import Experiment
from musota.plan.registry import title_of
from musota.training.runs import Run


def labelled(runs: Iterable[Run], roles: Mapping[str, Experiment]) -> list[Run]:
    """Copies of `runs`, named by what they are: equal names differ in seed alone.

    A run is called after the first of `roles` whose experiment it is, else as it was recorded;
    where that is a role's name, changed or not, by the fields in which it differs from the role.
    """
    names: dict[tuple, str] = {}  # by experiment and corpus
    owners = dict(roles)  # a row's name belongs to the row, whatever a run was recorded as
    copies = []
    for run in runs:
        key = run.experiment, run.fingerprint
        if key not in names:
            row = run.name.split(",")[0]
            recorded = row if row in roles else run.name
            name = next((role for role, e in roles.items() if e == run.experiment), recorded)
            owner = owners.get(name, run.experiment)
            if owner != run.experiment or name in names.values():
                told, corpus = run.experiment.differences(owner), f"corpus={run.fingerprint[:8]}"
                name = ",".join([name, *(told or [corpus])])
                name += f",{corpus}" * (name in names.values())
            owners.setdefault(name, run.experiment)
            names[key] = name
        copies.append(copy.copy(run))
        copies[-1].name = names[key]
    return copies


def label_of(run: Run) -> str:
    return f"{title_of(run.name)}, seed {run.seed}"


def progress_of(run: Run) -> str:
    return f"{run.summary['epochs_done']} of {run.experiment.training.epochs} epochs"


def footer(corpus: str, vocabulary: int, profile: str | None) -> str:
    """The line under every figure: what was measured on what."""
    name = corpus if "wikitext" in corpus else f"{corpus} (not WikiText!)"
    how = f"byte-level BPE {vocabulary:,} · profile {profile} · valid, windows without overlap"
    return f"measured: {name} · {how}"


def footer_of(run: Run) -> str:
    corpus = run.config["corpus"]
    return footer(corpus["name"], corpus["vocabulary_in_use"], run.config["profile"])


def by_name(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of every name, in the order given."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.name, []).append(run)
    return groups


def models_of(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """`by_name`, without the unfinished seeds of models that have finished ones."""
    groups = by_name(runs).items()
    return {name: [run for run in group if run.finished] or group for name, group in groups}


def brief_titles(groups: Mapping[str, Sequence[Run]], between: str = ", ") -> dict[str, str]:
    """What people read for each name: where some were changed, epochs and rate in place of all
    that was changed in the training, if that tells them apart."""
    brief = {name: title_of(name) for name in groups}
    for name, (run, *_) in groups.items() if any("," in name for name in groups) else ():
        training, (row, *changes) = run.experiment.training, name.split(",")
        kept = [change for change in changes if not hasattr(training, change.split("=")[0])]
        budget = f"{training.epochs} epochs at {training.learning_rate:g}"
        brief[name] = f"{title_of(','.join([row, *kept]))}{between}{budget}"
    apart = len(set(brief.values())) == len(brief)
    return brief if apart else {name: title_of(name) for name in groups}
