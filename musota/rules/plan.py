"""The plan's rules: its thresholds and words, on numbers measured here."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from musota.rules.findings import Finding, judged
from musota.rules.stats import Interval, seed_interval

REPORTED = {"ppl": 402.17, "accuracy": 0.1725, "epochs": 10, "plateau_after_epoch": 6}
PLAN_LADDER = {"uniform": 50_000.0, "bigram": 10_000.0}  # the plan's guesses, not measured
SCENARIOS = (  # up to a PPL: letter, meaning, accuracy from and to, next step
    (250, "A", "success", 0.30, 0.50, "scale to 50 epochs, or switch to WikiText-103"),
    (350, "B", "partial success", 0.20, 0.30, "train the baseline (notebook 03), which decides"),
    (math.inf, "C", "failure", 0.0, 0.25, "blocks 16 → 8, layers 12 → 8, or WikiText-103"),
)


def plan_does_not_apply(
    corpus: str, vocab_size: int, profile: str | None, finished: bool = True
) -> str | None:
    """Why the plan's PPL thresholds say nothing about a run, or None where they do."""
    reasons = []
    if corpus != "wikitext-2":
        reasons.append(f"the corpus is {corpus}, not wikitext-2")
    if vocab_size != 50_000:
        reasons.append(f"the vocabulary is {vocab_size:,}, not 50,000")
    if profile != "full":
        reasons.append(f"the profile is {profile}, not the full budget")
    elif not finished:
        reasons.append("the run has not spent its full budget yet")
    return "; ".join(reasons) or None


def scenario(ppl: float, accuracy: float, baseline_ppl: float | None = None) -> Finding:
    """The plan's scenario A, B or C. PPL decides; a contradicting accuracy is mentioned."""
    _, letter, meaning, low, high, next_step = next(row for row in SCENARIOS if ppl <= row[0])
    if letter == "B" and baseline_ppl is not None:
        worse = baseline_ppl > ppl
        step = "worse: train 50 epochs or more" if worse else "better: simplify (notebook 05)"
        next_step = f"the baseline is {step}"
    conclusion = f"scenario {letter}, {meaning}"
    if not low <= accuracy <= high:
        where = "under" if accuracy < low else "over"
        conclusion += f", though the accuracy is {where} that scenario's {low:.0%}–{high:.0%}"
    saw = f"valid PPL {ppl:.1f}, accuracy {accuracy:.1%}"
    return Finding("Scenario", letter, saw, "A ≤ 250 < B ≤ 350 < C", conclusion, next_step)


def bottom_line(ppl: float) -> Finding:
    """The plan's other scale, which disagrees with the scenarios between 300 and 350."""
    return judged(
        ("Bottom line", f"valid PPL {ppl:.1f}", "< 200 · 200–300 · > 300"),
        (ppl < 200, "validated", "by the plan's words: architecture validated, ready to publish"),
        (ppl <= 300, "compare", "compare with the baseline, or train on"),
        (True, "redesign", "the architecture needs redesign"),
    )


def expectation(ppl: float, accuracy: float) -> Finding:
    """Which of the plan's two expectations was met, by PPL; accuracy is shown beside it."""
    rule = "conservative 200–250 and 25–30 %; optimistic 120–180 and 35–45 %"
    return judged(
        ("Expectation", f"valid PPL {ppl:.1f}, accuracy {accuracy:.1%}", rule),
        (ppl <= 180, "optimistic", "the optimistic expectation is met"),
        (ppl <= 250, "conservative", "the conservative expectation is met"),
        (True, "neither", "neither expectation is met"),
    )


def option_three(ppl: float | None, comparison: Finding | None) -> Finding:
    """Whether the plan's condition for simplifying holds.

    `ppl` is None where the plan's threshold does not apply (see `plan_does_not_apply`);
    `comparison` is the finding of `compared`, None where no baseline was trained.
    """
    about_ppl = "the PPL threshold does not apply here"
    if ppl is not None:
        about_ppl = f"the PPL is {'over' if ppl > 300 else 'at most'} 300"
    about_baseline = {
        None: "no baseline was trained",
        "hurts": "the baseline wins",
        "helps": "the baseline does not win",
        "undecided": "it is undecided whether the baseline wins",
    }[comparison and comparison.verdict]
    if comparison and comparison.conclusion.startswith("provisional"):
        about_baseline += " (provisional, seeds not measured)"
    verdict, conclusion = "keep", "the plan gives no reason to simplify"
    if (ppl or 0) > 300 or (comparison and comparison.verdict == "hurts"):
        verdict = conclusion = "simplify"
    rule = "PPL > 300 after all epochs, or the baseline wins"
    return Finding("Option 3", verdict, f"{about_ppl}, {about_baseline}", rule, conclusion)


def on_the_ladder(ppl: float, rungs: Mapping[str, float]) -> Finding:
    """Where a perplexity stands among the measured rungs of the same tokens."""
    shown = {name: f"the {name} ({rung:.0f})" for name, rung in rungs.items()}
    best = min((name for name in rungs if ppl < rungs[name]), key=rungs.get, default=None)
    missed = max((name for name in rungs if ppl >= rungs[name]), key=rungs.get, default=None)
    if best is None:
        conclusion = "worse than guessing uniformly"
    elif missed is None:
        conclusion = f"better than every rung, {shown[best]} included"
    else:
        conclusion = f"better than {shown[best]}, not yet {shown[missed]}"
    measured = " · ".join(f"{name} {rung:,.0f}" for name, rung in rungs.items())
    rule = f"measured on the same tokens: {measured}"
    return Finding("Ladder", best or "none", f"valid PPL {ppl:.1f}", rule, conclusion)


def broke_through(
    ppls: Sequence[float], name: str, reason: str | None, budget: str = ""
) -> Finding:
    """The plan's goals, PPL under 200 and under 100, judged by the best valid PPL of each seed.

    `reason` is why the goals speak of something else (see `plan_does_not_apply`), if they do;
    `budget` says how much less than the plan's was spent: enough to reach a goal, not to miss one.
    """
    mean = float(np.mean(np.log(ppls)))
    loss = seed_interval(np.log(ppls)) if len(ppls) > 1 else Interval(mean, mean, mean)
    low, high = math.exp(loss.low), math.exp(loss.high)
    if budget and high >= 200:
        reason = reason or f"it had {budget}"
    but = f"; but {reason}, so the plan's goals are not answered by this" if reason else ""
    seeds = f" [{low:,.1f}, {high:,.1f}] over {len(ppls)} seeds" if len(ppls) > 1 else ""
    after = f" after {budget}" if budget else ""
    saw = f"valid PPL {math.exp(mean):,.1f}{seeds}{after}"
    return judged(
        (f"Goal, {name}", saw, "goals < 200, stretch < 100"),
        (high < 100, "< 100", f"under 200, and under the stretch goal of 100{but}"),
        (high < 200 and low < 100, "< 200", f"under 200, undecided whether under 100{but}"),
        (high < 200, "< 200", f"under 200, not under 100{but}"),
        (low < 200, "undecided", f"undecided, the interval reaches over 200{but}"),
        (True, "≥ 200", f"not under 200{but}"),
    )


def plans_own_test(baseline_ppl: float) -> Finding:
    """The plan's test: baseline above or below the reported 402. Reported, never the verdict."""
    above = baseline_ppl > REPORTED["ppl"]
    return Finding(
        "The plan's own test (reported, not a verdict)",
        "above" if above else "below",
        f"baseline valid PPL {baseline_ppl:.1f}",
        f"the {REPORTED['ppl']} reported for ten epochs at another learning rate",
        f"the plan would say the architecture {'helps' if above else 'hurts'}; the two runs share "
        "neither budget nor settings",
    )
