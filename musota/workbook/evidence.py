"""What was recorded in a results folder, and what the rules say of it: no tables, no figures."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from musota.errors import MusotaError
from musota.plan.config import MuConfig
from musota.plan.registry import LABELS, TUNED
from musota.plan.suspects import Suspect, grid
from musota.rules import curves, plan, verdicts
from musota.rules.findings import Finding, not_applicable
from musota.rules.stats import Interval
from musota.studies.campaign import MODELS, read_sweep
from musota.studies.grid import judge
from musota.training.runs import Run, load_runs

ORDER = (*MODELS, *TUNED)


GRID_FOLDER = "root_causes"  # of a results folder


ABLATED = ("tuned", "optimized")  # looked into: the first that was


PAIRS = {  # a model and its dense twin
    "optimized": "baseline",
    "tuned": "tuned_baseline",
    "simplified": "simplified_twin",
}


def footer(corpus: str, vocabulary: int, profile: str | None) -> str:
    """The line under every figure: what was measured on what."""
    name = f"{corpus} (not WikiText!)" if "wikitext" not in corpus else corpus
    return (
        f"measured: {name} · byte-level BPE {vocabulary:,} · profile {profile} · valid, windows "
        "without overlap"
    )


@dataclass(frozen=True)
class Evidence:
    """Finished and unfinished runs on one corpus, with the rungs measured on the same tokens."""

    folder: Path
    runs: tuple[Run, ...]
    rungs: Mapping[str, float]
    note: str = ""  # why these runs and not others, in one sentence

    def only(self, *names: str) -> Evidence:
        return dataclasses.replace(self, runs=tuple(r for r in self.runs if r.name in names))

    @property
    def names(self) -> set[str]:
        return {run.name for run in self.runs}

    def best(self, name: str) -> Run | None:
        """The run of a name with the lowest seed: the one shown where one stands for all."""
        return next((run for run in self.runs if run.name == name), None)

    @property
    def footer(self) -> str:
        if not self.runs:
            return ""
        run = self.runs[0]
        corpus = run.config["corpus"]
        return footer(corpus["name"], corpus["vocabulary_in_use"], run.config["profile"])

    @property
    def plan_does_not_apply(self) -> str | None:
        if not self.runs:
            return "there are no runs"
        return _reason(self.runs[0])

    @property
    def sweeps(self) -> dict[str, dict[float, list[float]]]:
        """Valid losses by learning rate of both large models, where sweeps are recorded."""
        swept = {name: read_sweep(self.folder, name) for name in TUNED.values()}
        return {LABELS[name]: losses for name, losses in swept.items() if losses}

    @property
    def ablated(self) -> tuple[Run, dict[str, Interval]] | None:
        """The run that was looked into, and what disabling each of its parts costs."""
        for name in ABLATED:
            path, run = self.folder / f"ablations_{name}.json", self.best(name)
            if run and path.exists():
                recorded = json.loads(path.read_text(encoding="utf-8"))
                return run, verdicts.ablation_effects(recorded["nats"], recorded["tokens"])
        return None

    def goal(self, name: str) -> Finding | None:
        """The plan's goals against the seeds of a model; None without a finished one."""
        ppls = [run.summary["ppl"] for run in self.runs if run.name == name and run.finished]
        if not ppls:
            return None
        return plan.broke_through(ppls, LABELS[name], self.plan_does_not_apply)

    def compare(self, name: str = "optimized") -> tuple[Finding, dict[str, Interval]] | None:
        """The verdict on a model against its dense twin and its intervals; None without both."""
        sides = [
            {run.seed: run.summary for run in self.runs if run.name == side and run.finished}
            for side in (name, PAIRS[name])
        ]
        if not sides[0].keys() & sides[1].keys():
            return None
        rates = "at the one learning rate both were given"
        if name in TUNED:
            rates = "each at its own best learning rate"
            if tries := [len(losses) for losses in self.sweeps.values()]:  # not where it was tuned
                rates = f"each at its own best of {min(tries)} learning rates"
        finding, text, seeds = verdicts.helps_or_hurts(*sides, LABELS[name], rates)
        intervals = {"over blocks of text\n(these trained models)": text}
        if seeds:
            intervals["over seeds\n(training again)"] = seeds
        return finding, intervals


def read_evidence(folder: str | os.PathLike, fingerprint: str | None = None) -> Evidence:
    """The runs of a results folder in the plan's order, with the rungs recorded beside them.

    Runs on another corpus than `fingerprint` (default: that of the first run) are left out.
    """
    folder = Path(folder)
    runs = load_runs(folder)
    if fingerprint is None and runs:
        fingerprint = runs[0].config["corpus"]["fingerprint"]
    runs = [run for run in runs if run.config["corpus"]["fingerprint"] == fingerprint]
    place = {name: index for index, name in enumerate(ORDER)}
    runs.sort(key=lambda run: (place.get(run.name, len(ORDER)), run.name, run.seed))
    return Evidence(folder, tuple(runs), read_rungs(folder, fingerprint))


def read_rungs(folder: Path, fingerprint: str | None) -> dict[str, float]:
    """The rungs recorded in a results folder; empty if there are none, or of another corpus."""
    path = folder / "ladder.json"
    if not path.exists():
        return {}
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
        rungs = {name: float(ppl) for name, ppl in recorded["ppl"].items()}
        return rungs if recorded["fingerprint"] == fingerprint else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise MusotaError(f"{path} is damaged: delete it, and it is measured anew.") from None


def read_grid(folder: Path) -> tuple[dict[str, dict[int, Run]], list[Suspect]]:
    """The recorded runs of a root-cause grid by cell and seed, and its suspects."""
    runs: dict[str, dict[int, Run]] = {}
    for path in sorted(folder.glob("*/config.json")):
        run = Run(path.parent)
        runs.setdefault(run.name, {})[run.seed] = run
    profile = next(iter(runs["original"].values())).config["profile"] if runs else "quick"
    cells, suspects, _ = grid(profile)
    return {name: by_seed for name, by_seed in runs.items() if name in cells}, suspects


def _reason(run: Run) -> str | None:
    corpus, vocab_size = run.config["corpus"]["name"], run.experiment.model.vocab_size
    return plan.plan_does_not_apply(corpus, vocab_size, run.config["profile"], run.finished)


def run_findings(
    run: Run, rungs: Mapping[str, float], baseline: Run | None = None
) -> list[Finding]:
    """Every rule that speaks of one run: the plan's where they apply, the rungs, the curve's shape.

    The plan's rules judge MU-SOTA; of a dense model only rungs and the curve are told.
    """
    ppl, accuracy = run.summary["ppl"], run.summary["accuracy"]
    reason = _reason(run)
    findings, judged = [], isinstance(run.experiment.model, MuConfig)
    if judged and reason:
        findings = [not_applicable("Scenario, bottom line, expectation", reason)]
    elif judged:
        findings = [
            plan.scenario(ppl, accuracy, baseline.summary["ppl"] if baseline else None),
            plan.bottom_line(ppl),
            plan.expectation(ppl, accuracy),
        ]
    if rungs:
        findings.append(plan.on_the_ladder(ppl, rungs))
    training, steps = run.experiment.training, run.steps
    findings += curves.phases(run.history, training.epochs)
    findings.append(plateau_of(run))
    findings.append(curves.oscillation(steps, training.warmup_steps))
    return findings


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
    lines = []
    reason = evidence.plan_does_not_apply
    optimized, baseline = evidence.best("optimized"), evidence.best("baseline")
    if baseline and not reason:
        lines.append(plan.plans_own_test(baseline.summary["ppl"]).sentence)
    if optimized:
        lines += [f.sentence for f in run_findings(optimized, evidence.rungs, baseline)]
        compared = evidence.compare()
        ppl = None if reason else optimized.summary["ppl"]
        lines.append(plan.option_three(ppl, compared[0] if compared else None).sentence)
    return lines


def answers(evidence: Evidence, short: bool = False) -> dict[str, list[str]]:
    """The plan's questions, each with the sentences that answer it from what is recorded.

    `short` leaves the thresholds out.
    """
    goals = [evidence.goal(name) for name in ("original", "optimized", "tuned")]
    compared = [evidence.compare(name) for name in PAIRS]
    sweeps = []
    if optimized := evidence.best("optimized"):
        own = optimized.experiment.training.learning_rate
        sweeps = [verdicts.best_rate(losses, own, n) for n, losses in evidence.sweeps.items()]
    runs, suspects = read_grid(evidence.folder / GRID_FOLDER)
    causes = judge(runs, suspects) if runs else []
    lost = []
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
    sizes = training.grad_clip, model.d_model, model.max_seq_len
    return curves.health(run.health, norms, *sizes)
