"""The plan's rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from musota.rules.findings import Finding
from musota.rules.stats import seed_interval

REPORTED = {"ppl": 402.17, "accuracy": 0.1725, "epochs": 10, "plateau_after_epoch": 6}
PLAN_LADDER = {"uniform": 50_000.0, "bigram": 10_000.0}  # the plan's guesses, not measured


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
    if ppl <= 250:
        letter, low, high = "A", 0.30, 0.50
        conclusion = "scenario A, success"
        next_step = "scale to 50 epochs, or switch to WikiText-103"
    elif ppl <= 350:
        letter, low, high = "B", 0.20, 0.30
        conclusion = "scenario B, partial success"
        if baseline_ppl is None:
            next_step = "train the baseline (notebook 03): whether it is better decides"
        elif baseline_ppl > ppl:
            next_step = "the baseline is worse: train 50 epochs or more"
        else:
            next_step = "the baseline is better: simplify (notebook 05)"
    else:
        letter, low, high = "C", 0.0, 0.25
        conclusion = "scenario C, failure"
        next_step = "blocks 16 → 8, layers 12 → 8, or WikiText-103"
    if not low <= accuracy <= high:
        where = "under" if accuracy < low else "over"
        conclusion += f", though the accuracy is {where} that scenario's {low:.0%}–{high:.0%}"
    return Finding(
        "Scenario",
        letter,
        f"valid PPL {ppl:.1f}, accuracy {accuracy:.1%}",
        "A ≤ 250 < B ≤ 350 < C",
        conclusion,
        next_step,
    )


def bottom_line(ppl: float) -> Finding:
    """The plan's other scale, which disagrees with the scenarios between 300 and 350."""
    if ppl < 200:
        verdict, conclusion = "validated", "architecture validated, ready to publish"
        if ppl < 100:
            conclusion += "; the stretch goal (< 100) is met"
    elif ppl <= 300:
        verdict, conclusion = "compare", "compare with the baseline, or train on"
    else:
        verdict, conclusion = "redesign", "the architecture needs redesign"
        if ppl <= 350:
            conclusion += "; the plan's scenario B calls the same PPL a partial success"
    return Finding(
        "Bottom line", verdict, f"valid PPL {ppl:.1f}", "< 200 · 200–300 · > 300", conclusion
    )


def expectation(ppl: float, accuracy: float) -> Finding:
    """Which of the plan's two expectations was met, by PPL; accuracy is reported beside it."""
    if ppl <= 180:
        verdict = "optimistic"
        conclusion = "the optimistic expectation is met" + (" and exceeded" if ppl < 120 else "")
    elif ppl <= 250:
        verdict, conclusion = "conservative", "the conservative expectation is met"
    else:
        verdict, conclusion = "neither", "neither expectation is met"
    floor = {"optimistic": 0.35, "conservative": 0.25, "neither": 0.0}[verdict]
    if accuracy < floor:
        conclusion += f" by PPL, but not by accuracy ({accuracy:.1%} is under {floor:.0%})"
    return Finding(
        "Expectation",
        verdict,
        f"valid PPL {ppl:.1f}, accuracy {accuracy:.1%}",
        "conservative 200–250 and 25–30 %; optimistic 120–180 and 35–45 %",
        conclusion,
    )


def option_three(ppl: float | None, comparison: Finding | None) -> Finding:
    """Whether the plan's condition for simplifying holds.

    `ppl` is None where the plan's threshold does not apply (see `plan_does_not_apply`);
    `comparison` is the finding of `helps_or_hurts`, None where no baseline was trained.
    """
    verdict = comparison.verdict if comparison else None
    too_high, loses = ppl is not None and ppl > 300, verdict == "hurts"
    about_ppl = {
        None: "the PPL threshold does not apply here",
        True: "the PPL is over 300",
        False: "the PPL is at most 300",
    }[None if ppl is None else too_high]
    about_baseline = {
        None: "no baseline was trained",
        "hurts": "the baseline wins",
        "helps": "the baseline does not win",
        "undecided": "it is undecided whether the baseline wins",
    }[verdict]
    if comparison and comparison.conclusion.startswith("provisional"):
        about_baseline += " (provisional, seeds not measured)"
    return Finding(
        "Option 3",
        "simplify" if too_high or loses else "keep",
        f"{about_ppl}, {about_baseline}",
        "PPL > 300 after all epochs, or the baseline wins",
        "simplify" if too_high or loses else "the plan gives no reason to simplify",
    )


def on_the_ladder(ppl: float, rungs: Mapping[str, float]) -> Finding:
    """Where a perplexity stands among the measured rungs of the same tokens."""
    beaten = [name for name, rung in rungs.items() if ppl < rung]
    best = min(beaten, key=rungs.get) if beaten else None
    missed = [name for name, rung in rungs.items() if ppl >= rung]
    nearest = max(missed, key=rungs.get) if missed else None
    if best is None:
        conclusion = "worse than guessing uniformly"
    elif nearest is None:
        conclusion = f"better than every rung, the {best} ({rungs[best]:.0f}) included"
    else:
        conclusion = (
            f"better than the {best} ({rungs[best]:.0f}), not yet the {nearest} "
            f"({rungs[nearest]:.0f})"
        )
    return Finding(
        "Ladder",
        best or "none",
        f"valid PPL {ppl:.1f}",
        "measured on the same tokens: "
        + " · ".join(f"{name} {rung:,.0f}" for name, rung in rungs.items()),
        conclusion,
    )


def broke_through(ppls: Sequence[float], name: str, reason: str | None) -> Finding:
    """The plan's goals, PPL under 200 and under 100, judged by the best valid PPL of each seed.

    `reason` is why the goals speak of something else (see `plan_does_not_apply`), if they do.
    """
    mean, spread = float(np.mean(np.log(ppls))), ""
    low = high = math.exp(mean)
    if len(ppls) > 1:
        interval = seed_interval(np.log(ppls))
        low, high = math.exp(interval.low), math.exp(interval.high)
        spread = f" [{low:,.1f}, {high:,.1f}] over {len(ppls)} seeds"
    reached = [goal for goal in (100, 200) if high < goal]
    open_goals = [goal for goal in (100, 200) if low < goal <= high]
    verdict = f"< {reached[0]}" if reached else "undecided" if open_goals else "≥ 200"
    conclusion = {
        "< 100": "under 200, and under the stretch goal of 100",
        "< 200": "under 200, not under 100",
        "undecided": f"undecided, the interval reaches over {open_goals[0] if open_goals else 0}",
        "≥ 200": "not under 200",
    }[verdict]
    if reason:
        conclusion += f"; but {reason}, so the plan's goals are not answered by this"
    saw = f"valid PPL {math.exp(mean):,.1f}{spread}"
    return Finding(f"Goal, {name}", verdict, saw, "goals < 200, stretch < 100", conclusion)


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
