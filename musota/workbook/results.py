"""Recorded results: the runs of a folder, grouped by model, and what was measured on them."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from musota.config import Experiment, MuConfig, RedesignedConfig
from musota.errors import MusotaError
from musota.files import as_path
from musota.lab.ablate import ablation_effects
from musota.lab.grid_runs import Row, read_table
from musota.lab.plan_rules import other_text, plan_verdicts
from musota.lab.profiles import PROFILES
from musota.lab.root_causes import Cause, advice, by_name, judge
from musota.lab.stats import Interval
from musota.lab.sweep import best_rate, swept
from musota.lab.verdicts import Verdict, compare, compare_with_matched
from musota.matching import is_match
from musota.registry import REGISTRY
from musota.training.run import Run, load_runs
from musota.workbook.naming import find_folders, shown

Key = tuple[Experiment, str]  # of a model: experiment and corpus fingerprint
JUDGED = ("optimized", "original")  # the plan's rules are applied to the first that has ended
QUESTIONS = {
    "best": "Is the redesign better?",
    "architecture": "Does the architecture help or hurt?",
    "causes": "Which causes hold the model back?",
    "rate": "Is the learning rate right?",
    "parts": "Which parts of the model are used?",
    "plan": "What do the plan's rules say?",
}


def group_runs(runs: Iterable[Run]) -> dict[Key, list[Run]]:
    """Runs grouped by model. Seeds that diverged in their first epoch come last; unfinished seeds
    are left out where others have ended."""
    groups: dict[Key, list[Run]] = {}
    for run in {run.path.resolve(): run for run in runs}.values():  # each once
        groups.setdefault(run.key, []).append(run)
    ended = {key: [run for run in g if run.ended] or g for key, g in groups.items()}
    return {key: sorted(group, key=lambda run: not run.summary) for key, group in ended.items()}


def mean_loss(group: Sequence[Run]) -> float:
    """The valid loss of a model in nats/token, the mean over its seeds; inf where one diverged."""
    return sum(run.valid_loss for run in group) / len(group)


def by_title(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The seeds of each model by its title; equal titles are followed by a run's folder."""
    groups, found = [*group_runs(runs).values()], {}
    counts = Counter(group[0].title for group in groups)
    for group in groups:
        folder, title = group[0].path, group[0].title
        same = f" ({folder.parent.name}/{folder.name})" if counts[title] > 1 else ""
        found[f"{title} ({folder})" if title + same in found else title + same] = group
    return found


def tell_apart(runs: Iterable[Run]) -> None:
    """Makes the titles of different models different."""
    for title, group in by_title(runs).items():
        for run in group:
            run.title = title


def label(run: Run) -> str:
    """The title of a run with its seed."""
    return f"{run.title}, seed {run.seed}"


def progress(run: Run) -> str:
    """How far a run is: "3" epochs for a finished one, "2 of 3", or "diverged at step 120"."""
    if run.diverged:
        return f"diverged at step {run.diverged_at}"
    planned = run.experiment.training.epochs
    return str(planned) if run.finished else f"{len(run.history)} of {planned}"


def footer(corpus: str, size: int, profile: str | None) -> str:
    """The line under every figure: what was measured on which text."""
    name = corpus if "wikitext" in corpus else f"{corpus} (not WikiText!)"
    where = f" · profile {profile}" if profile else ""
    return f"measured: {name} · byte-level BPE {size:,}{where} · valid, windows not overlapping"


def footer_of(run: Run) -> str:
    """`footer` of a run."""
    corpus = run.config["corpus"]
    return footer(corpus["name"], corpus["vocabulary_in_use"], run.profile)


class Results:
    """What is recorded in a results folder on one corpus: by default that of most of its runs.
    Damaged runs are left out and named. Raises MusotaError for other damaged files."""

    def __init__(self, folder: str | os.PathLike, fingerprint: str | None = None):
        self.folder, self.note = as_path(folder), ""
        found = load_runs(self.folder)
        counts = Counter(run.fingerprint for run in found)
        self.fingerprint = fingerprint or next((f for f, _ in counts.most_common(1)), "")
        place = {name: index for index, name in enumerate(REGISTRY)}
        self.runs = sorted(
            (run for run in found if run.fingerprint == self.fingerprint),
            key=lambda run: (place.get(run.name, len(place)), run.title, run.name, run.seed),
        )
        if (others := len(found) - len(self.runs)) and not fingerprint:
            print(f"{self.folder}: {others} runs on other texts are left out.")
        self.groups = group_runs(self.runs)
        tell_apart(self.runs)
        # Models with a seed that has ended an epoch, and those of them that verdicts are on.
        measured = [g for g in self.groups.values() if any(run.summary for run in g)]
        self.ended = [g for g in measured if all(run.ended for run in g)]
        self.measured = [*self.ended, *(group for group in measured if group not in self.ended)]
        self.judged = next((g for name in JUDGED if (g := self.group(name)) in self.ended), [])

    def group(self, name: str) -> list[Run]:
        """The seeds of the first model of that name; empty where there is none."""
        return next((group for group in self.groups.values() if group[0].name == name), [])

    @property
    def footer(self) -> str:
        return footer_of(self.runs[0]) if self.runs else ""

    @property
    def at_plan_size(self) -> bool:
        """Whether the plan's reported numbers are of this corpus and vocabulary."""
        return bool(self.runs) and not other_text(self.runs[0])

    @cached_property
    def ngrams(self) -> dict[str, float]:
        """Perplexities of the n-gram baselines on the same tokens; empty if not measured."""
        return read_ngrams(ngrams_path(self.folder, self.fingerprint))

    def matched_to(self, group: Sequence[Run]) -> list[Run] | None:
        """The recorded parameter-matched transformer of a model: the one trained at the same
        learning rate, else the one with the lowest loss."""
        model, training = group[0].experiment.model, group[0].experiment.training
        rate = training.learning_rate
        found = [
            other
            for other in self.measured
            if is_match(other[0].experiment.model, model)
            and other[0].experiment.with_(learning_rate=rate).training == training
        ]
        same = [other for other in found if other[0].experiment.training == training]
        return min(same or found, key=mean_loss, default=None)

    @cached_property
    def ablated(self) -> dict[Run, dict[str, Interval]]:
        """`read_ablations` of the runs for which they are recorded."""
        found = {run: read_ablations(run) for run in self.runs if run.finished}
        return {run: effects for run, effects in found.items() if effects}

    @cached_property
    def grid_rows(self) -> dict[str, dict[int, Row]]:
        """The runs of the root-cause grid by name and seed; empty where none was trained."""
        return by_name(read_table(self.folder / "grid.csv"))

    @cached_property
    def grid(self) -> list[Cause]:
        """The judged suspects of the root-cause grid, the largest gain first."""
        return judge(self.grid_rows) if self.grid_rows else []

    @cached_property
    def sweeps(self) -> dict[str, dict[float, list[float]]]:
        """Valid losses of every seed by learning rate, by title of the swept model."""
        rows = read_table(self.folder / "sweep.csv")
        return next(filter(None, (swept(rows, profile) for profile in PROFILES.values())), {})

    def architecture(self) -> dict[str, Verdict]:
        """Each model that has ended against its parameter-matched transformer, by title."""
        found = {}
        for group in self.ended:
            if (matched := self.matched_to(group)) in self.ended:
                found[group[0].title] = compare_with_matched(group, matched)
        return found

    def verdicts(self) -> dict[str, list[Verdict]]:
        """The verdicts on runs that have ended, by key of QUESTIONS."""
        found: dict[str, list[Verdict]] = {name: [] for name in QUESTIONS}
        found["architecture"] = [*self.architecture().values()]
        with_blocks = [g for g in self.ended if getattr(g[0].experiment.model, "layout", None)]
        redesigned, mu = (
            [group for group in with_blocks if isinstance(group[0].experiment.model, kind)]
            for kind in (RedesignedConfig, MuConfig)
        )
        if mu and redesigned:
            found["best"] = [compare(min(redesigned, key=mean_loss), min(mu, key=mean_loss))]
        if self.grid:
            found["causes"] = [advice(self.grid)]
        usual = {run.recorded_title: run.experiment.training.learning_rate for run in self.runs}
        for title, losses in self.sweeps.items():
            found["rate"].append(best_rate(title, losses, usual.get(title)))
        if self.judged:
            found["plan"] = plan_verdicts(self.judged, self.matched_to(self.judged))
        return found


def ngrams_path(folder: Path, fingerprint: str) -> Path:
    """Where the n-gram baselines of a corpus are recorded."""
    return folder / f"ngrams-{fingerprint}.json"


def read_ngrams(path: Path) -> dict[str, float]:
    """Recorded perplexities of n-gram baselines; empty if not measured. Raises MusotaError for
    damage."""
    return {name: float(ppl) for name, ppl in _read_json(path).get("ppl", {}).items()}


def read_ablations(run: Run) -> dict[str, Interval]:
    """The loss in nats from disabling each part of a run's model; empty if not measured."""
    found = _read_json(run.path / "ablations.json")
    if "nats" not in found or found.get("weights") != run.summary.get("weights_sha256"):
        return {}
    return ablation_effects(found)


def _read_json(path: Path) -> dict:
    """What a JSON file holds; empty where there is none. Raises MusotaError for damage."""
    try:
        return json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError:
        raise MusotaError(f"{path} is damaged: delete it, and it is measured again.") from None


def find_runs(name: str, root: str | os.PathLike, profile: str) -> list[Run]:
    """The seeds of a recorded model, or one run; arguments and errors as in `find_folders`."""
    first, *others = group_runs(map(Run, find_folders(name, root, profile))).values()
    if others:
        places = ", ".join(str(group[0].path) for group in (first, *others))
        raise MusotaError(f"Several models are called {name!r}: give the folder of one ({places}).")
    return first


def find_models(names: Iterable[str], roots: Sequence[Path], profile: str) -> list[list[Run]]:
    """`find_runs` for each name, in the first of `roots` that has it; their titles differ."""
    found = []
    for name in names:
        for root in roots:
            with suppress(MusotaError):
                found.append(find_runs(name, root, profile))
                break
        else:
            find_runs(name, roots[0], profile)  # raises the first error again
    tell_apart(run for group in found for run in group)
    return found


def find_results(
    names: Sequence[str], folders: Sequence[Path], fingerprint: str | None = None, home=None
) -> Results:
    """The results of the first of `folders` that holds all of `names`, else of the first; `note`
    says which these are and what is missing. `fingerprint`, and `home`, where it belongs, are of
    the first folder only."""
    here = shown(home or folders[0])
    first = Results(folders[0], fingerprint)
    first.note = f"Runs of {here}."
    missing = [name for name in names if not first.group(name)]
    if missing:
        lacks = f"{', '.join(missing)}: not trained yet in {here}"
        first.note = f"{lacks}; run the notebook that trains it first."
        for folder in folders[1:]:
            found = Results(folder)
            if all(found.group(name) in found.ended for name in names):
                found.note = f"{lacks}; shown are the results in {shown(folder)}."
                return found
    return first
