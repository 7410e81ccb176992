"""What was recorded in a results folder, and what the rules say of it: no tables, no figures."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from musota.errors import MusotaError
from musota.plan.config import Experiment, MuConfig
from musota.plan.profiles import Profile, grid_profiles, profiles, scaled, twin
from musota.plan.registry import PAIRS, TUNED, find_experiment, registry, title_of
from musota.plan.suspects import Suspect, grid
from musota.rules import curves, plan, verdicts
from musota.rules.findings import Finding, not_applicable
from musota.rules.stats import Interval
from musota.studies.campaign import swept, tuned
from musota.studies.grid import judge
from musota.training.runs import Run
from musota.workbook.records import labelled, read_probes, read_runs

GRID, SWEEP = "root_causes", "sweep"  # parts of a results folder
ABLATED = (*TUNED, *registry)  # looked into: the first that was


def footer(corpus: str, vocabulary: int, profile: str | None) -> str:
    """The line under every figure: what was measured on what."""
    name = f"{corpus} (not WikiText!)" if "wikitext" not in corpus else corpus
    return (
        f"measured: {name} · byte-level BPE {vocabulary:,} · profile {profile} · valid, windows "
        "without overlap"
    )


@dataclass(frozen=True)
class Evidence:
    """The runs of a results folder on one corpus, with what else was measured on it.

    Each run's `name` is a row of the registry where it is that row's experiment, so runs of equal
    name differ in seed alone (see `records.labelled`).
    """

    folder: Path
    runs: tuple[Run, ...]
    probes: Mapping[str, dict] = field(default_factory=dict)
    sweep_runs: tuple[Run, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)  # rows that are another bit for bit
    left_out: Mapping[str, str] = field(default_factory=dict)  # why, by path
    note: str = ""  # why these runs and not others, in one sentence

    def only(self, *names: str) -> Evidence:
        wanted = {self.aliases.get(name, name) for name in names}
        return dataclasses.replace(self, runs=tuple(r for r in self.runs if r.name in wanted))

    @property
    def names(self) -> set[str]:
        """The rows that have runs, aliases among them."""
        own = {run.name for run in self.runs}
        return own | {alias for alias, name in self.aliases.items() if name in own}

    def title(self, name: str) -> str:
        """What people read for a row, with the rows that are the same bit for bit."""
        also = [title_of(alias) for alias, other in self.aliases.items() if other == name]
        return title_of(name) + (f" (also: {', '.join(also)})" if also else "")

    def seeds(self, name: str) -> dict[int, Run]:
        """The finished runs of a row, by seed."""
        name = self.aliases.get(name, name)
        return {run.seed: run for run in self.runs if run.name == name and run.finished}

    def best(self, name: str) -> Run | None:
        """The run of a row with the lowest seed: the one shown where one stands for all."""
        name = self.aliases.get(name, name)
        return next((run for run in self.runs if run.name == name), None)

    @property
    def footer(self) -> str:
        if not self.runs:
            return ""
        corpus, profile = self.runs[0].config["corpus"], self.runs[0].config["profile"]
        return footer(corpus["name"], corpus["vocabulary_in_use"], profile)

    @property
    def plan_does_not_apply(self) -> str | None:
        return plan_reason(self.runs[0]) if self.runs else "there are no runs"

    @cached_property
    def rungs(self) -> dict[str, float]:
        """Perplexities of the rungs measured on the same tokens; empty if none were."""
        return read_rungs(self.probes, self.runs[0].fingerprint if self.runs else None)

    @property
    def sweeps(self) -> dict[str, dict[float, list[float]]]:
        """Valid losses by learning rate of both large models, where sweeps are recorded."""
        profile = _profile_of(self.runs)
        found = {name: swept(self.sweep_runs, name, profile) for name in TUNED.values() if profile}
        return {title_of(name): losses for name, losses in found.items() if losses}

    @property
    def ablated(self) -> tuple[Run, dict[str, Interval]] | None:
        """The run that was looked into, and what disabling each of its parts costs."""
        for name in ABLATED:
            run, recorded = self.best(name), self.probes.get(f"ablations_{name}")
            if run and recorded:
                return run, verdicts.ablation_effects(recorded["nats"], recorded["tokens"])
        return None

    def goal(self, name: str) -> Finding | None:
        """The plan's goals against the seeds of a row; None without a finished one."""
        ppls = [run.summary["ppl"] for run in self.seeds(name).values()]
        return plan.broke_through(ppls, title_of(name), self.plan_does_not_apply) if ppls else None

    def compare(self, name: str = "optimized") -> tuple[Finding, dict[str, Interval]] | None:
        """The verdict on a row against its dense twin and its intervals; None without both."""
        own, other = self.seeds(name), self.seeds(PAIRS[name])
        if not own.keys() & other.keys() or not _are_twins(self.best(name), self.best(PAIRS[name])):
            return None
        sides = [{seed: run.summary for seed, run in runs.items()} for runs in (own, other)]
        rates = "at the one learning rate both were given"
        if name in TUNED:
            rates = "each at its own best learning rate"
            if tries := [len(losses) for losses in self.sweeps.values()]:  # not where it was tuned
                rates = f"each at its own best of {min(tries)} learning rates"
        finding, text, seeds = verdicts.helps_or_hurts(*sides, title_of(name), rates)
        intervals = {"over blocks of text\n(these trained models)": text}
        if seeds:
            intervals["over seeds\n(training again)"] = seeds
        return finding, intervals


def _profile_of(runs: Iterable[Run]) -> Profile | None:
    """The profile these runs were made at; None for runs from Python alone."""
    named = (run.config["profile"] for run in runs)
    return next((profiles[name] for name in named if name in profiles), None)


def _are_twins(run: Run, other: Run) -> bool:
    """Whether the second is the first's dense twin, both at whatever learning rate."""
    expected = twin(run.experiment).with_(learning_rate=other.experiment.training.learning_rate)
    return expected == other.experiment


def read_evidence(folder: str | os.PathLike, fingerprint: str | None = None) -> Evidence:
    """The runs of a results folder in the registry's order, with what was measured beside them.

    Runs on another corpus than `fingerprint` (default: that of the first run) are left out.
    """
    folder = Path(folder)
    runs, left_out = read_runs(folder)
    if fingerprint is None and runs:
        fingerprint = runs[0].fingerprint
    for run in runs:
        if run.fingerprint != fingerprint or not run.summary:
            reason = "diverged" if run.fingerprint == fingerprint else "another corpus"
            left_out[run.path.relative_to(folder).as_posix()] = reason
    runs = [run for run in runs if run.fingerprint == fingerprint and run.summary]
    sweep_runs = [run for run in read_runs(folder, SWEEP)[0] if run.fingerprint == fingerprint]
    roles, aliases = _roles(runs, sweep_runs)
    place = {name: index for index, name in enumerate(registry)}
    runs = labelled(runs, roles)
    runs.sort(key=lambda run: (place.get(run.name, len(place)), run.name, run.seed))
    return Evidence(
        folder, tuple(runs), read_probes(folder), tuple(sweep_runs), aliases, left_out
    )  # fmt: skip


def _roles(runs: list[Run], sweep_runs: Iterable[Run]) -> tuple[dict[str, Experiment], dict]:
    """What each row of the registry is at the size of these runs, and which rows are the same.

    The first of two equal rows is the one that is shown; the second is its alias.
    """
    profile = _profile_of(runs)
    roles: dict[str, Experiment] = {}
    aliases: dict[str, str] = {}
    for name in registry if profile else ():
        if name in TUNED:
            losses = swept(sweep_runs, TUNED[name], profile)
            if not losses:
                continue
            experiment = scaled(tuned(name, profile, losses), profile)
        else:
            experiment = scaled(find_experiment(name), profile)
        if same := next((other for other, e in roles.items() if e == experiment), None):
            aliases[name] = same
        roles[name] = experiment
    return roles, aliases


def read_rungs(probes: Mapping[str, dict], fingerprint: str | None) -> dict[str, float]:
    """The rungs among recorded probes; empty if there are none, or of another corpus.

    Raises MusotaError where they are damaged.
    """
    recorded = probes.get("ladder")
    if recorded is None:
        return {}
    try:
        rungs = {name: float(ppl) for name, ppl in recorded["ppl"].items()}
        return rungs if recorded["fingerprint"] == fingerprint else {}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise MusotaError("ladder.json is damaged: delete it, and it is measured anew.") from None


def read_grid(folder: Path) -> tuple[dict[str, dict[int, Run]], list[Suspect]]:
    """The recorded runs of a results folder's root-cause grid by cell and seed, and its suspects:
    a run belongs to the cell whose experiment it is."""
    recorded, _ = read_runs(folder, GRID)
    profile = recorded[0].config["profile"] if recorded else "quick"
    cells, suspects, _ = grid(profile)
    named = {scaled(cell.experiment, grid_profiles[profile]): name for name, cell in cells.items()}
    runs: dict[str, dict[int, Run]] = {}
    for run in recorded:
        if run.experiment in named:
            runs.setdefault(named[run.experiment], {})[run.seed] = run
    return runs, suspects


def plan_reason(run: Run) -> str | None:
    """Why the plan's thresholds say nothing about a run, or None where they do: the text, the
    vocabulary and the budget must be the plan's, whatever the run is called."""
    corpus, experiment = run.config["corpus"]["name"], run.experiment
    size = experiment.model.vocab_size, run.config["profile"]
    if reason := plan.plan_does_not_apply(corpus, *size, run.finished):
        return reason
    rows = [find_experiment(name) for name in registry if name not in TUNED]
    planned = [row.training.epochs for row in rows if row.model == experiment.model]
    if not planned:
        return "the model is none of the plan's"
    if experiment.training.epochs < min(planned):
        return f"it had {experiment.training.epochs} epochs, not the plan's {min(planned)}"
    return None


def run_findings(
    run: Run, rungs: Mapping[str, float], baseline: Run | None = None
) -> list[Finding]:
    """Every rule that speaks of one run: the plan's where they apply, the rungs, the curve's shape.

    The plan's rules judge MU-SOTA; of a dense model only rungs and the curve are told.
    """
    ppl, accuracy = run.summary["ppl"], run.summary["accuracy"]
    found, reason = [], plan_reason(run)
    judged = isinstance(run.experiment.model, MuConfig)
    if judged and reason:
        found = [not_applicable("Scenario, bottom line, expectation", reason)]
    elif judged:
        found = [
            plan.scenario(ppl, accuracy, baseline.summary["ppl"] if baseline else None),
            plan.bottom_line(ppl),
            plan.expectation(ppl, accuracy),
        ]
    if rungs:
        found.append(plan.on_the_ladder(ppl, rungs))
    found.append(plateau_of(run))
    found.append(curves.oscillation(run.steps, run.experiment.training.warmup_steps))
    return found


def plateau_of(run: Run, **rule) -> Finding:
    """`curves.plateau` of a run; `rule` may change its window and least gain."""
    blocks = run.valid_block_nats, run.summary["valid_block_tokens"]
    return curves.plateau(run.history, run.experiment.training.epochs, *blocks, **rule)


def verdict_lines(evidence: Evidence) -> list[str]:
    """The answer in a few sentences: the comparisons first, then the plan's rules."""
    compared = [evidence.compare(name) for name in PAIRS]
    return [found[0].sentence for found in compared if found] + rule_lines(evidence)


def rule_lines(evidence: Evidence) -> list[str]:
    """What the plan's rules say of the optimized model."""
    reason = evidence.plan_does_not_apply
    optimized, baseline = evidence.best("optimized"), evidence.best("baseline")
    found = []
    if baseline and not reason:
        found.append(plan.plans_own_test(baseline.summary["ppl"]))
    if optimized:
        compared, ppl = evidence.compare(), None if reason else optimized.summary["ppl"]
        found += run_findings(optimized, evidence.rungs, baseline)
        found.append(plan.option_three(ppl, compared[0] if compared else None))
    return [finding.sentence for finding in found]


def answers(evidence: Evidence, short: bool = False) -> dict[str, list[str]]:
    """The plan's questions, each with the sentences that answer it from what is recorded.

    `short` leaves the thresholds out.
    """
    goals = [evidence.goal(name) for name in ("original", "optimized", "tuned")]
    compared = [evidence.compare(name) for name in PAIRS]
    sweeps, lost = [], []
    if optimized := evidence.best("optimized"):
        own = optimized.experiment.training.learning_rate
        sweeps = [verdicts.best_rate(losses, own, n) for n, losses in evidence.sweeps.items()]
    runs, suspects = read_grid(evidence.folder)
    causes = judge(runs, suspects) if runs else []
    if looked := evidence.ablated:
        run, effects = looked
        ledger, layout = run.summary["parameter_ledger"], run.experiment.model.layout
        lost = verdicts.weak_spots(effects, ledger, layout.names)
        lost += [f for f in health_of(run) if f.rule.startswith("Effective rank")]
    said = {
        "Did the plateau break (PPL < 200? < 100?)": [goal for goal in goals if goal],
        "Does the architecture help or hurt?": [found[0] for found in compared if found],
        "Was the learning rate right?": sweeps,
        "Which suspects were guilty?": [],
        "Where does the architecture lose, and what should a redesign change?": lost,
    }
    told = {
        question: [finding.short if short else finding.sentence for finding in findings]
        for question, findings in said.items()
    }
    if causes:
        told["Which suspects were guilty?"] = [verdicts.root_cause_advice(causes)]
    return {question: sentences for question, sentences in told.items() if sentences}


def health_of(run: Run) -> list[Finding]:
    """The health statistics of a run as findings; empty where none were kept."""
    model, training, steps = run.experiment.model, run.experiment.training, run.steps
    norms = steps.grad_norm[steps.step > training.warmup_steps]
    sizes = training.grad_clip, getattr(model, "d_model", 0), model.max_seq_len
    return curves.health(run.health, norms, *sizes)
