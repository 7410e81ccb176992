"""Any recorded runs side by side: which they are, where they differ, and what that did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from musota.errors import MusotaError, nearest_name
from musota.files import as_path
from musota.plan.registry import title_of
from musota.rules.findings import Finding
from musota.rules.stats import Interval
from musota.rules.verdicts import better_or_worse
from musota.training.runs import Run
from musota.workbook.evidence import Evidence, by_name, read_evidence
from musota.workbook.records import labelled, read_probes, read_runs
from musota.workbook.tables import differences_table


def find_runs(name: str, results: Path, profile: str) -> list[Run]:
    """The seeds of a recorded run, or the one that is named with its seed.

    `name` is a run's folder, or a label of `results/<profile>` as tables have it (`optimized`,
    `optimized,epochs=50-seed0`) or of another folder there (`study/tuned`). Raises MusotaError,
    with the nearest label, where there is none.
    """
    path = as_path(name)
    if (path / "config.json").exists():
        return [Run(path)]
    folder, known = results / (path.parent if path.parent.name else profile), {}
    for fingerprint in {run.fingerprint for run in read_runs(folder)[0]}:
        for run in read_evidence(folder, fingerprint).runs:
            for label in (run.name, run.path.name):
                known.setdefault(label, []).append(run)
    if path.name in known:
        return known[path.name]
    if not known:
        raise MusotaError(f"There is no run {name}: give its folder, or a label of {folder}.")
    raise nearest_name("run", path.name, sorted(known))


def chosen_runs(names: Sequence[str], results: Path, profile: str) -> Evidence:
    """The runs of `names` (see `find_runs`) in that order, with the rungs of the first; `.note`
    says where they differ. Raises MusotaError for fewer than two models that have been measured.
    """
    found = [run for name in names for run in find_runs(name, results, profile)]
    runs = labelled({run.identity: run for run in found if run.summary}.values(), {})
    if len(by_name(runs)) < 2:
        raise MusotaError(
            "A comparison needs two models or more that have finished an epoch and differ in more "
            "than the seed."
        )
    folder = runs[0].path.parent
    note = f"They differ in {', '.join(differences_table(runs).index)}."
    if len({run.valid_text for run in runs}) > 1:
        note += " They were validated on other tokens: compare them in bits per byte alone."
    return Evidence(folder, tuple(runs), read_probes(folder), note=note)


def against_first(runs: Sequence[Run]) -> Iterator[tuple[Finding, Interval]]:
    """The verdict on every model against the first, and its interval: over seeds, or over blocks
    of text if they share no more than one. None on a model validated on other tokens."""
    first, *others = by_name(runs).values()
    for group in others:
        if group[0].valid_text != first[0].valid_text:
            continue
        sides = [{run.seed: run.summary for run in side} for side in (group, first)]
        if not sides[0].keys() & sides[1].keys():
            sides = [{0: side[0].summary} for side in (group, first)]
        names = (title_of(side[0].name) for side in (group, first))
        finding, text, seeds = better_or_worse(*sides, *names)
        yield finding, seeds or text
