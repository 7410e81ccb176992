"""What the rules say of recorded runs, in sentences: no tables, no figures."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

from musota.errors import MusotaError
from musota.plan.architectures import MuConfig
from musota.plan.registry import title_of
from musota.rules import curves, plan, verdicts
from musota.rules.findings import Finding, not_applicable
from musota.rules.stats import Interval
from musota.studies import names
from musota.training.runs import Run
from musota.workbook.evidence import Evidence, plan_reason, smaller_budget
from musota.workbook.naming import labelled, models_of

GOALS = ("original", "optimized", "tuned")  # rows the plan has goals for, changed or not


def run_findings(
    run: Run, rungs: Mapping[str, float], baseline: Run | None = None
) -> list[Finding]:
    """Every rule that speaks of one run: the plan's where they apply, the rungs, the curve's shape.

    The plan's rules judge MU-SOTA; of a dense model only rungs and the curve are told.
    """
    ppl, accuracy = run.summary["ppl"], run.summary["accuracy"]
    found, is_mu = [], isinstance(run.experiment.model, MuConfig)
    if is_mu and (reason := plan_reason(run) or smaller_budget(run)):
        found = [not_applicable("Scenario, bottom line, expectation", reason)]
    elif is_mu:
        found = [
            plan.scenario(ppl, accuracy, baseline.summary["ppl"] if baseline else None),
            plan.bottom_line(ppl),
            plan.expectation(ppl, accuracy),
        ]
    if rungs:
        found.append(plan.on_the_ladder(ppl, rungs))
    plateau = plateau_of(run)
    if slow := warmup_of(run):
        found.append(slow)
        if plateau.verdict == "plateau":
            plateau = dataclasses.replace(plateau, next_step=f"first {slow.next_step}")
    warmup = run.experiment.training.warmup_steps
    return [*found, plateau, curves.oscillation(run.steps, warmup)]


def plateau_of(run: Run, **rule) -> Finding:
    """`curves.plateau` of a run; `rule` may change its window and least gain."""
    blocks = run.valid_block_nats, run.summary["valid_block_tokens"]
    return curves.plateau(run.history, run.experiment.training.epochs, *blocks, **rule)


def warmup_of(run: Run) -> Finding | None:
    """`curves.warmup` of a run; None where its warm-up is as it should be."""
    first, training = run.history.iloc[0], run.experiment.training
    return curves.warmup(training.warmup_steps, int(first.step / first.epoch) * training.epochs)


def set_beside(
    runs: Sequence[Run], first: Sequence[Run], name: str, first_name: str
) -> tuple[Finding, Interval] | None:
    """The verdict on a model's seeds against another's, and its interval: over seeds, or over
    blocks of text if they share no more than one. None if validated on other tokens."""
    if runs[0].valid_text != first[0].valid_text:
        return None
    sides = [{run.seed: run.summary for run in side} for side in (runs, first)]
    if not sides[0].keys() & sides[1].keys():
        sides = [{0: side[0].summary} for side in (runs, first)]
    words = ("better", f"better than {first_name}"), ("worse", f"worse than {first_name}")
    title = f"{name} against {first_name}"
    finding, intervals = verdicts.compared(*sides, title, words=words)
    return finding, [*intervals.values()][-1]


def compare(a: Run | Sequence[Run], b: Run | Sequence[Run]) -> tuple[Finding, Interval]:
    """How a run, or the seeds of one model, stands against another's on the same valid text.

    Returns the verdict (`.sentence` says it) and its 95 % interval in nats a token, negative where
    `a` is better: over seeds, or over blocks of text where they share no more than one. Raises
    MusotaError for what is no run that has ended an epoch, and for runs on other valid text.
    """
    sides = [[side] if isinstance(side, Run) else list(side or ()) for side in (a, b)]
    for run in [*sides[0], *sides[1]]:
        if not isinstance(run, Run) or not run.summary:
            raise MusotaError(f"compare needs runs that have ended an epoch, not {run!r:.80}.")
    if not all(sides):
        raise MusotaError("compare needs a run, or several, on either side.")
    named = labelled([side[0] for side in sides], {})  # unnamed runs are told by what differs
    found = set_beside(*sides, *(title_of(run.name) for run in named))
    if not found:
        raise MusotaError(
            "They were validated on other tokens: compare their bits per byte (.summary) alone."
        )
    return found


def against_first(runs: Sequence[Run]) -> Iterator[tuple[Finding, Interval]]:
    """What `set_beside` says of every model against the first of `runs`."""
    first, *others = models_of(runs).values()
    for group in others:
        if found := set_beside(group, first, title_of(group[0].name), title_of(first[0].name)):
            yield found


def rule_lines(evidence: Evidence) -> list[str]:
    """What the plan's rules say of the optimized model, or else of the original one."""
    best = evidence.best
    row = next(filter(best, ("optimized", "original")), "")
    ours = best(row)
    reason = ours and (plan_reason(ours) or smaller_budget(ours))
    rows = [name for name in evidence.names if name.split(",")[0] == row]  # changed ones, too
    twins = (best(evidence.twin_of(name)) for name in rows)
    baseline, found = best("baseline") or next(filter(None, twins), None), []
    if baseline and baseline.finished and not reason:
        found.append(plan.plans_own_test(baseline.summary["ppl"]))
    if ours:
        compared = next((evidence.compared[n][0] for n in rows if n in evidence.compared), None)
        found += run_findings(ours, evidence.rungs, baseline)
        found.append(plan.option_three(None if reason else ours.summary["ppl"], compared))
    return [finding.sentence for finding in found]


def answers(evidence: Evidence) -> dict[str, list[str]]:
    """The plan's questions, each with the sentences that answer it from what is recorded."""
    goals = [evidence.goal(n) for n in evidence.names if n.split(",")[0] in GOALS]
    sweeps, lost, causes = [], [], evidence.grid[1]
    if optimized := evidence.best("optimized"):
        own = optimized.experiment.training.learning_rate
        sweeps = [verdicts.best_rate(losses, own, n) for n, losses in evidence.sweeps.items()]
    if looked := evidence.ablated:
        ranks = [f for f in health_of(looked[0]) if f.rule.startswith("Effective rank")]
        lost = evidence.weak_spots() + ranks

    def told(findings: Iterable[Finding | None]) -> list[str]:
        return [finding.sentence for finding in findings if finding]

    means = [
        f"{title_of(row)}: {verdicts.names_mean(measured, names.EXPECTED).sentence}"
        for row, (_, measured) in evidence.measured("names").items()
    ]
    said = {
        "Did the plateau break (PPL < 200? < 100?)": told(goals),
        "Does the architecture help or hurt?": told(f for f, _ in evidence.compared.values()),
        "Was the learning rate right?": told(sweeps),
        "Which suspects were guilty?": [verdicts.root_cause_advice(causes)] if causes else [],
        "Where does the architecture lose, and what should a redesign change?": told(lost),
        "Do the blocks' names mean anything?": means,
    }
    return {question: sentences for question, sentences in said.items() if sentences}


def health_of(run: Run) -> list[Finding]:
    """The health statistics of a run as findings; empty where none were kept."""
    model, training, steps = run.experiment.model, run.experiment.training, run.steps
    norms = steps.grad_norm[steps.step > training.warmup_steps].dropna()  # fp16 skips steps
    sizes = training.grad_clip, getattr(model, "d_model", 0), model.max_seq_len
    slow = warmup_of(run) if run.health else None
    return curves.health(run.health, norms, *sizes, not slow or slow.verdict != "never ends")
