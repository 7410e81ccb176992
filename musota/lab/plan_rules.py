"""The plan's own rules: its thresholds and its words, applied to recorded runs."""

import math
from collections.abc import Iterator, Sequence

from musota.config import MuConfig
from musota.lab import curves
from musota.lab.stats import Interval, seed_interval
from musota.lab.verdicts import PPL, Verdict, as_runs, compare_with_matched, decide, representative
from musota.registry import experiments
from musota.training.evaluate import exp_nats
from musota.training.run import Run

REPORTED = {"ppl": 402.17, "accuracy": 0.1725, "epochs": 10}
WORDS = 217_646  # of valid, line ends counted
CORPUS, VOCAB_SIZE, PROFILE = "wikitext-2", 50_000, "full"  # what its thresholds are about
SCENARIOS = (  # up to a PPL: letter, meaning, accuracy from and to, next step
    (250, "A", "success", 0.30, 0.50, "scale to 50 epochs, or switch to WikiText-103"),
    (350, "B", "partial success", 0.20, 0.30, "train the baseline (notebook 03), which decides"),
    (math.inf, "C", "failure", 0.0, 0.25, "blocks 16 → 8, layers 12 → 8, or WikiText-103"),
)
GOALS = {200: "the plan's goal", 100: "the plan's stretch goal"}
BOTTOM_LINE = 200, 300  # PPL
STILL_IMPROVING = 10, 20  # epochs between which the PPL should continue to improve
STILL_TOO_HIGH = 15  # the epoch after which a plateau means that the learning rate is too high


def other_text(run: Run) -> list[str]:
    """Why perplexities of a run are not those of the plan's corpus and vocabulary, if so."""
    corpus, vocab_size = run.config["corpus"]["name"], run.experiment.model.vocab_size
    reasons = [] if corpus == CORPUS else [f"the corpus is {corpus}, not {CORPUS}"]
    if run.config["corpus"].get("words", {"valid": WORDS})["valid"] != WORDS:
        reasons.append("its valid text is another, or a part")
    if vocab_size != VOCAB_SIZE:
        reasons.append(f"the vocabulary is {vocab_size:,}, not {VOCAB_SIZE:,}")
    return reasons


def plan_applies(run: Run) -> str:
    """Why the plan's thresholds do not apply to a run; empty where they do."""
    epochs, planned = run.experiment.training.epochs, _planned_epochs(run)
    reasons = _other_setting(run)
    if run.diverged:
        reasons.append(f"the run diverged at step {run.diverged_at}")
    elif not run.finished:
        reasons.append("the run has not finished")
    if epochs < planned:
        reasons.append(f"it trains {epochs} of the plan's {planned} epochs")
    return "; ".join(reasons)


def plan_verdicts(
    run: Run | Sequence[Run], baseline: Run | Sequence[Run] | None = None
) -> list[Verdict]:
    """What the plan's rules say about a run of MU-SOTA, or the seeds of one model. `baseline`: its
    parameter-matched transformer, of which only seeds that have ended count. Where the thresholds
    do not apply, one verdict says why. A goal can be reached with less than the plan's budget, but
    not missed."""
    runs = as_runs(run)
    others = [other for other in as_runs(baseline) if other.ended] if baseline else []
    first = representative(runs)
    if reason := plan_applies(first):
        question, step = "Do the plan's thresholds apply?", "compare with the n-gram baselines"
        verdicts = [Verdict(question, "not applicable", reason=reason, next_step=step)]
    else:
        verdicts = [_scenario(first, others), _bottom_line(first)]
    if not _other_setting(first) and not first.diverged:
        goals = [_goal(runs, ppl) for ppl in GOALS]
        verdicts += [goal for goal in goals if not reason or goal.decision == "yes"]
        verdicts += _monitoring(first)
    if others and not other_text(others[0]) and others[0].finished:
        verdicts.append(_own_test(others[0]))
    if isinstance(first.experiment.model, MuConfig):
        verdicts.append(_option_three(runs, others))
    return verdicts


def _other_setting(run: Run) -> list[str]:
    reasons = other_text(run)
    if run.profile != PROFILE:
        reasons.append(f"the profile is {run.profile}, not {PROFILE}")
    return reasons if _planned_epochs(run) else [*reasons, "the model's sizes are not the plan's"]


def _planned_epochs(run: Run) -> int:
    """The fewest epochs that the plan gives this model; 0 if it is none of the plan's MU-SOTAs."""
    plan = [e for e in experiments.values() if isinstance(e.model, MuConfig)]
    return min((e.training.epochs for e in plan if e.model == run.experiment.model), default=0)


def _scenario(run: Run, baseline: list[Run]) -> Verdict:
    """Scenario A, B or C. PPL decides; an accuracy that disagrees is reported."""
    ppl, accuracy = run.summary["ppl"], run.summary["accuracy"]
    _, letter, meaning, low, high, step = next(row for row in SCENARIOS if ppl <= row[0])
    if letter == "B" and baseline:
        worse = baseline[0].valid_loss > run.valid_loss
        found = "worse: train 50 epochs or more" if worse else "better: simplify (notebook 05)"
        step = f"the baseline is {found}"
    seen = f"{meaning}; accuracy {accuracy:.1%}"
    if not low <= accuracy <= high:
        where = "under" if accuracy < low else "over"
        seen += f", {where} that scenario's {low:.0%}–{high:.0%}"
    question = "Which of the plan's scenarios is it?"
    return Verdict(question, letter, ppl, unit=PPL, reason=seen, next_step=step)


def _bottom_line(run: Run) -> Verdict:
    """The plan's other scale, which disagrees with the scenarios between 300 and 350."""
    ppl, (low, high) = run.summary["ppl"], BOTTOM_LINE
    return decide(
        "What is the plan's bottom line?",
        f"< {low} · {low}–{high} · > {high}",
        (ppl < low, "validated", "the plan: architecture validated, ready to publish"),
        (ppl <= high, "compare", "compare with the baseline, or train on"),
        (True, "redesign", "the architecture needs redesign"),
        value=ppl,
        unit=PPL,
    )


def _goal(runs: list[Run], goal: int) -> Verdict:
    """Whether the best valid PPL is under a goal; with several seeds their interval decides."""
    losses, epochs = [run.valid_loss for run in runs], runs[0].experiment.training.epochs
    several = len(losses) > 1
    loss = seed_interval(losses) if several else Interval(losses[0], losses[0], losses[0])
    mean, low, high = map(exp_nats, (loss.mean, loss.low, loss.high))
    return decide(
        f"Is the valid PPL under {goal}?",
        f"{GOALS[goal]}; {epochs} epochs, {len(runs)} seed{'s' if several else ''}",
        (high < goal, "yes", ""),
        (low < goal, "undecided", "the interval over seeds includes it"),
        (True, "no", ""),
        value=mean,
        unit=PPL,
        **({"low": low, "high": high} if several else {}),
    )


def _monitoring(run: Run) -> Iterator[Verdict]:
    """What the plan says to watch for while training."""
    ppls = dict(zip(run.history.epoch, run.history.ppl.cummin(), strict=True))
    start, end = STILL_IMPROVING
    if end in ppls:
        seen = f"valid PPL {ppls[start]:.1f} → {ppls[end]:.1f}"
        improves = 1 - ppls[end] / ppls[start] >= curves.PLATEAU_GAIN
        question = f"Did epochs {start}–{end} continue to improve?"
        yield Verdict(question, "yes" if improves else "no", reason=seen)
    if len(ppls) > STILL_TOO_HIGH:
        since = curves.plateau_start(run)
        question = f"Did the PPL stop improving after epoch {STILL_TOO_HIGH}?"
        about = f"a plateau since epoch {since}; the plan: learning rate still too high"
        cases = (since is None, "no", "no plateau"), (True, "yes", about, curves.LOWER_RATE)
        yield decide(question, f"{len(ppls)} epochs", *cases)
    yield curves.oscillation(run)


def _own_test(baseline: Run) -> Verdict:
    """The plan's test of the architecture, which compares runs of different settings."""
    ppl, reported = baseline.summary["ppl"], REPORTED["ppl"]
    decision, effect = ("above", "helps") if ppl > reported else ("below", "hurts")
    reason = f"{reported} was reported for ten epochs at another learning rate; "
    reason += f"the plan would say that the architecture {effect}"
    question = "Is the baseline above or below the reported PPL? (the plan's own test, no verdict)"
    return Verdict(question, decision, ppl, unit=PPL, reason=reason)


def _option_three(runs: list[Run], baseline: list[Run]) -> Verdict:
    """Whether the plan's condition for simplifying holds."""
    ppl, least = runs[0].summary.get("ppl", math.inf), BOTTOM_LINE[1]
    about, fails = f"the PPL is {'over' if ppl > least else 'at most'} {least}", ppl > least
    if plan_applies(runs[0]):
        about, fails = "the PPL threshold does not apply", False
    found = compare_with_matched(runs, baseline).decision if baseline else "not compared"
    known = baseline and found != "unfinished"
    decision = "yes" if fails or found == "hurts" else "no" if known else "undecided"
    question = "Should the architecture be simplified (the plan's option 3)?"
    return Verdict(question, decision, reason=f"{about}; against the baseline: {found}")
