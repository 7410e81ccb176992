"""What was recorded, in a results folder or as chosen, and what the rules say of it: no tables."""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from musota.errors import MusotaError, nearest_name
from musota.files import as_path
from musota.plan.architectures import DenseConfig, RedesignedConfig
from musota.plan.config import Experiment
from musota.plan.profiles import grid_profiles, profiles, scaled, twin
from musota.plan.registry import PAIRS, TUNED, find_experiment, registry, title_of
from musota.plan.suspects import grid
from musota.rules import plan, verdicts
from musota.rules.findings import Finding
from musota.rules.stats import Interval
from musota.rules.verdicts import Cause
from musota.studies.campaign import swept, tuned
from musota.studies.grid import judge as judge_grid
from musota.studies.path import Judged, sort_out
from musota.studies.path import judge as judge_path
from musota.training.runs import Run
from musota.workbook.naming import by_name, footer_of, labelled
from musota.workbook.records import read_probes, read_runs

# Parts of a results folder.
GRID, SWEEP, PATH, TRIES = "root_causes", "sweep", "path", "tries"
ABLATED = (*TUNED, "optimized", "original")  # MU-SOTA as looked into: the first that was


def _rate(run: Run) -> float:
    return run.experiment.training.learning_rate


@dataclass(frozen=True)
class Evidence:
    """Runs with what else was measured on their corpus. Runs of equal name differ in seed alone:
    each is called after the row of the registry that it is (see `naming.labelled`)."""

    folder: Path
    runs: tuple[Run, ...]
    probes: Mapping[str, dict] = field(default_factory=dict)
    sweep_runs: tuple[Run, ...] = ()
    roles: Mapping[str, Experiment] = field(default_factory=dict)  # each row at the runs' size
    aliases: Mapping[str, str] = field(default_factory=dict)  # rows that are another bit for bit
    left_out: Mapping[str, str] = field(default_factory=dict)  # why, by path
    note: str = ""  # why these runs and not others, in one sentence

    def only(self, *names: str) -> "Evidence":
        wanted = {self.aliases.get(name, name) for name in names}
        return dataclasses.replace(self, runs=tuple(r for r in self.runs if r.name in wanted))

    @property
    def names(self) -> list[str]:
        """The rows that have runs, in their order, then the aliases among them."""
        own = [*dict.fromkeys(run.name for run in self.runs)]
        return own + [alias for alias, name in self.aliases.items() if name in own]

    def title(self, name: str) -> str:
        """What people read for a row, with the rows that are the same bit for bit."""
        also = [title_of(alias) for alias, other in self.aliases.items() if other == name]
        return title_of(name) + (f" (also: {', '.join(also)})" if also else "")

    def seeds(self, name: str) -> dict[int, Run]:
        """The finished runs of a row, by seed."""
        return {run.seed: run for run in self.only(name).runs if run.finished}

    def best(self, name: str) -> Run | None:
        """The run of a row with the lowest seed: the one shown where one stands for all."""
        return next(iter(self.only(name).runs), None)

    @property
    def spread(self) -> float:
        """Standard deviation of the valid loss (nats/token) over seeds, pooled over the rows that
        have several; 0 where none has."""
        losses = [
            [run.summary["valid_loss"] for run in self.seeds(name).values()]
            for name in by_name(self.runs)
        ]
        squares = sum(len(row) * np.var(row) for row in losses if row)
        return math.sqrt(squares / max(1, sum(len(row) - 1 for row in losses if row)))

    @property
    def footer(self) -> str:
        return footer_of(self.runs[0]) if self.runs else ""

    @property
    def plan_does_not_apply(self) -> str | None:
        return plan_reason(self.runs[0]) if self.runs else "there are no runs"

    @property
    def at_the_plans_size(self) -> bool:
        """Whether these runs stand beside what the plan reported: its text and vocabulary."""
        run = self.runs[0]
        about = run.config["corpus"]["name"], run.experiment.model.vocab_size
        return plan.plan_does_not_apply(*about, "full") is None

    @cached_property
    def rungs(self) -> dict[str, float]:
        """Perplexities of the rungs measured on the same tokens; empty if none were."""
        return read_rungs(self.probes, self.runs[0].fingerprint if self.runs else None)

    @property
    def sweeps(self) -> dict[str, dict[float, list[float]]]:
        """Valid losses by learning rate of both large models, where sweeps are recorded."""
        if not self.sweep_runs:
            return {}
        profile = profiles[self.sweep_runs[0].config["profile"]]
        found = {title_of(n): swept(self.sweep_runs, n, profile) for n in TUNED.values()}
        return {title: losses for title, losses in found.items() if losses}

    @cached_property
    def grid(self) -> tuple[list[Run], list[Cause]]:
        """The first cell of the root-cause grid recorded here, a run a seed, and the judged
        suspects. A run belongs to the cell whose experiment it is."""
        recorded, runs = read_runs(self.folder, GRID)[0], {}
        if not recorded:
            return [], []
        profile = recorded[0].config["profile"]
        cells, suspects, _ = grid(profile)
        for name, cell in cells.items():
            experiment = scaled(cell.experiment, grid_profiles[profile])
            if own := {run.seed: run for run in recorded if run.experiment == experiment}:
                runs[name] = own
        first = next(iter(runs.values()), {})
        return list(first.values()), judge_grid(runs, suspects) if runs else []

    @cached_property
    def tries(self) -> list[Run]:
        """Short runs from which the rate of longer ones was chosen."""
        return [run for run in read_runs(self.folder, TRIES)[0] if run.summary]

    def measured(self, kind: str) -> dict[str, tuple[Run, dict]]:
        """What was measured of models (`kind`: ablations, names), by row, with the run whose
        weights they were."""
        runs = {run.summary["weights_sha256"]: run for run in self.runs if run.finished}
        found = [data for name, data in self.probes.items() if name.startswith(f"{kind}_")]
        of_runs = [(runs[data["weights"]], data) for data in found if data.get("weights") in runs]
        return {run.name: (run, data) for run, data in of_runs}

    @cached_property
    def path(self) -> dict[str, Judged]:
        """The rows of the path to the redesign that are recorded here, judged."""
        runs = read_runs(self.folder, PATH)[0]
        return judge_path(sort_out(runs, profiles[runs[0].config["profile"]])) if runs else {}

    @property
    def ablated(self) -> tuple[Run, dict[str, Interval]] | None:
        """MU-SOTA's run that was looked into, and what disabling each of its parts costs."""
        return next(filter(None, map(self.ablation_of, ABLATED)), None)

    def ablation_of(self, name: str) -> tuple[Run, dict[str, Interval]] | None:
        """A row's run and what disabling each of its parts costs, if that was measured."""
        if name not in (found := self.measured("ablations")):
            return None
        run, measured = found[name]
        return run, verdicts.ablation_effects(measured["nats"], measured["tokens"])

    def weak_spots(self) -> list[Finding]:
        """Which parts of `ablated` earn their parameters; empty if no model was looked into."""
        if not self.ablated:
            return []
        run, effects = self.ablated
        names = run.experiment.model.layout.names
        return verdicts.weak_spots(effects, run.summary["parameter_ledger"], names)

    def goal(self, name: str) -> Finding | None:
        """The plan's goals against the seeds of a row; None without a finished one."""
        runs = [*self.seeds(name).values()]
        if not runs:
            return None
        why = plan_reason(runs[0]), smaller_budget(runs[0])
        return plan.broke_through([run.summary["ppl"] for run in runs], title_of(name), *why)

    def twin_of(self, name: str) -> str:
        """The recorded dense twin of a row, changed or not; empty where there is none. A tuned
        row's is tuned, too; another's has its learning rate, or both were given one of their own.
        """
        run, (row, *changes) = self.best(name), name.split(",")
        model = run and run.experiment.model
        is_modern_twin = isinstance(model, RedesignedConfig) and not model.layout
        if not run or is_modern_twin or isinstance(model, DenseConfig):
            return ""
        expected = twin(run.experiment)
        twins = [r for r in self.runs if r.experiment == expected.with_(learning_rate=_rate(r))]
        if row in TUNED:
            tuned_twin = self.best(",".join([PAIRS[row], *changes]))
            twins = [other for other in twins if tuned_twin and other.name == tuned_twin.name]
        else:
            same = [other for other in twins if _rate(other) == _rate(run)]
            given = "learning_rate="
            twins = same or [other for other in twins if given in name and given in other.name]
        return twins[0].name if twins else ""

    @cached_property
    def compared(self) -> dict[str, tuple[Finding, dict[str, Interval]]]:
        """What `compare` says of every model whose dense twin is recorded, by name."""
        names = dict.fromkeys([*PAIRS, *(run.name for run in self.runs)])
        return {name: found for name in names if (found := self.compare(name))}

    def compare(self, name: str = "optimized") -> tuple[Finding, dict[str, Interval]] | None:
        """The verdict on a row against its dense twin and its intervals; None without both."""
        own, other = self.seeds(name), self.seeds(self.twin_of(name))
        if not own.keys() & other.keys():
            return None
        rates = "at the one learning rate both were given"
        tries = [len(losses) for losses in self.sweeps.values()]
        if tries and name.split(",")[0] in TUNED:
            rates = f"each at its own best of {min(tries)} learning rates"
        elif len({_rate(run) for run in (*own.values(), *other.values())}) > 1:
            rates = "each at a learning rate of its own"
        sides = [{seed: run.summary for seed, run in runs.items()} for runs in (own, other)]
        title = title_of(name)
        one = "MU-SOTA" if title.startswith("MU-SOTA") else title.split(",")[0]
        rule = f"{verdicts.DECIDED}, {rates}"
        about = f"{title} against its dense twin", f"{one} minus dense twin"
        return verdicts.compared(*sides, *about, verdicts.HELPS, rule)


def read_evidence(folder: str | os.PathLike, fingerprint: str | None = None) -> Evidence:
    """The runs of a results folder in the registry's order, with what was measured beside them.

    Runs on another corpus than `fingerprint` (default: that of the first run) are left out.
    """
    folder = as_path(folder)
    found, left_out = read_runs(folder)
    fingerprint, runs = fingerprint or (found[0].fingerprint if found else ""), []
    for run in found:
        if run.fingerprint == fingerprint and run.summary:
            runs.append(run)
        else:
            reason = "diverged" if run.fingerprint == fingerprint else "another corpus"
            left_out[run.path.relative_to(folder).as_posix()] = reason
    sweep_runs = [run for run in read_runs(folder, SWEEP)[0] if run.fingerprint == fingerprint]
    roles, aliases = _roles(runs, sweep_runs)
    place = {name: index for index, name in enumerate(registry)}
    runs = labelled(runs, roles)
    runs.sort(key=lambda run: (place.get(run.name, len(place)), run.name, run.seed))
    measured = read_probes(folder), tuple(sweep_runs)
    return Evidence(folder, tuple(runs), *measured, roles, aliases, left_out)


def _roles(runs: list[Run], sweep_runs: Iterable[Run]) -> tuple[dict[str, Experiment], dict]:
    """What each row of the registry is at the size of these runs, and which rows are the same: the
    second of two equal rows is an alias of the first."""
    roles: dict[str, Experiment] = {}
    aliases: dict[str, str] = {}
    profile = profiles.get(runs[0].config["profile"]) if runs else None  # None: from Python alone
    for name in registry if profile else ():
        if name not in TUNED:
            experiment = find_experiment(name)
        elif losses := swept(sweep_runs, TUNED[name], profile):
            experiment = tuned(name, profile, losses)
        else:
            continue
        experiment = scaled(experiment, profile)
        if same := next((other for other, e in roles.items() if e == experiment), None):
            aliases[name] = same
        roles[name] = experiment
    return roles, aliases


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
        found = read_evidence(folder, fingerprint)
        for run in found.runs:
            same = [alias for alias, name in found.aliases.items() if name == run.name]
            for label in (run.name, run.path.name, *same):
                known.setdefault(label, []).append(run)
    if not known:
        raise MusotaError(f"There is no run {name}: give its folder, or a label of {folder}.")
    if path.name not in known:
        raise nearest_name("run", path.name, sorted(known))
    return known[path.name]


def chosen_runs(names: Sequence[str], results: Path, profile: str) -> Evidence:
    """The runs of `names` (see `find_runs`) in that order, with the rungs of the first.

    Raises MusotaError for fewer than two models that have been measured.
    """
    found = [run for name in names for run in find_runs(name, results, profile)]
    runs = labelled({run.identity: run for run in found if run.summary}.values(), {})
    if len(by_name(runs)) < 2:
        raise MusotaError(
            "A comparison needs two models or more that have finished an epoch and differ in more "
            "than the seed."
        )
    folder, note = runs[0].path.parent, ""
    if len({run.valid_text for run in runs}) > 1:
        note = "They were validated on other tokens: compare them in bits per byte alone."
    return Evidence(folder, tuple(runs), read_probes(folder), note=note)


def read_rungs(probes: Mapping[str, dict], fingerprint: str | None) -> dict[str, float]:
    """The rungs among recorded probes; empty if there are none, or of another corpus.

    Raises MusotaError where they are damaged.
    """
    for name, recorded in probes.items():
        try:
            if name.split(",")[0] == "ladder" and recorded["fingerprint"] == fingerprint:
                return {rung: float(ppl) for rung, ppl in recorded["ppl"].items()}
        except (KeyError, TypeError, ValueError, AttributeError):
            message = f"{name}.json is damaged: delete it, and it is measured anew."
            raise MusotaError(message) from None
    return {}


def plan_reason(run: Run) -> str | None:
    """Why the plan's thresholds say nothing about a run, or None where they do: the text, the
    vocabulary and the budget must be the plan's, whatever the run is called."""
    about = run.config["corpus"]["name"], run.experiment.model.vocab_size, run.config["profile"]
    other = None if _planned_epochs(run) else "the model is none of the plan's"
    return plan.plan_does_not_apply(*about, run.finished) or other


def smaller_budget(run: Run) -> str:
    """How many of the plan's epochs a run had, where it had fewer."""
    epochs, planned = run.experiment.training.epochs, _planned_epochs(run)
    return f"{epochs} of the plan's {planned} epochs" if planned and epochs < planned else ""


def _planned_epochs(run: Run) -> int | None:
    """The fewest that the plan gives this very model; None if it is none of the plan's."""
    rows = [find_experiment(name) for name in registry if name not in TUNED]
    return min((e.training.epochs for e in rows if e.model == run.experiment.model), default=None)
