"""The plan's rules and the statistics behind the verdicts: numbers in, findings out. Draws nothing.

Every rule returns a Finding: what was seen, against which threshold, what follows, what to do next.
The thresholds are those of the action plan; they speak of the best validation perplexity per token
on WikiText-2 at a vocabulary of 50,000 with the full budget (see `plan_does_not_apply`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from musota.intervals import Interval, paired_bootstrap, pooled_contrasts, seed_interval

REPORTED = {"ppl": 402.17, "accuracy": 0.1725, "epochs": 10, "plateau_after_epoch": 6}
PLAN_LADDER = {"uniform": 50_000.0, "bigram": 10_000.0}  # the plan's guesses, not measured
PLATEAU_GAIN, PLATEAU_EPOCHS = 0.01, 3
STRETCHES, SWING_NATS, SWINGS = 25, 0.05, 3
LOWER_RATE = "halve the learning rate (the plan, coming from 1e-4: 5e-5)"
STILL_IMPROVING = 0.01  # a phase that lowers the best PPL by less has stalled
RELEVANT = 0.05  # nats/token, 5 % of the PPL: what less brings is not worth a search
DATA_STARVED = 0.1  # nats gained per doubling of the text
MISSED = "not in the plan"
MIN_BLOCKS = 10  # of text: fewer say too little about other text


@dataclass(frozen=True)
class Finding:
    """One rule's answer. `verdict` is a short fixed word or letter for programs to compare."""

    rule: str
    verdict: str
    saw: str
    threshold: str
    conclusion: str
    next_step: str = ""
    since: int | None = None  # the first epoch it speaks of, where it has one

    @property
    def short(self) -> str:
        """The finding without its threshold."""
        step = f" {self.next_step[0].upper()}{self.next_step[1:]}." if self.next_step else ""
        return f"{self.rule}: {self.saw} — {self.conclusion}.{step}"

    @property
    def sentence(self) -> str:
        step = f" Next: {self.next_step}." if self.next_step else ""
        return f"{self.rule}: {self.saw} ({self.threshold}) — {self.conclusion}.{step}"


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


def not_applicable(rule: str, reason: str) -> Finding:
    return Finding(
        rule,
        "not applicable",
        reason,
        "the plan speaks of wikitext-2, V 50,000, full budget",
        "not applicable here: read the run against the measured rungs instead",
    )


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


def phases(history: pd.DataFrame, planned_epochs: int) -> list[Finding]:
    """One line for each third of the plan (epochs 1–10, 10–20, 20–30 of 30).

    `history` needs the columns epoch and ppl. A third not yet begun gives no line.
    """
    bounds = [round(planned_epochs * third / 3) for third in range(4)]
    expected = ("rapid learning", "still improving", "converging")
    findings = []
    for index, (start, stop) in enumerate(pairwise(bounds)):
        inside = history[(history.epoch > start) & (history.epoch <= stop)]
        if inside.empty:
            continue
        last = int(inside.epoch.max())
        before = history[history.epoch <= start].ppl.min() if start else inside.ppl.iloc[0]
        best = min(before, inside.ppl.min())
        gain = 1 - best / before
        verdict = "improving" if gain >= STILL_IMPROVING else "stalled"
        if start == 0 and len(inside) == 1:
            verdict = "too early to say"
        conclusion = f"{verdict} (the plan: {expected[index]})"
        if index == 0:
            conclusion += (
                "; the plan's “should match the previous run” cannot be checked, the learning "
                "rates differ"
            )
        findings.append(
            Finding(
                f"Epochs {start + 1}–{last}" if last > start + 1 else f"Epoch {last}",
                verdict,
                f"best valid PPL {before:.1f} → {best:.1f}, {gain:.1%} lower",
                f"{STILL_IMPROVING:.0%} counts as improving",
                conclusion,
            )
        )
    return findings


def plateau(
    history: pd.DataFrame,
    planned_epochs: int,
    block_nats: Sequence[Sequence[float]] | None = None,
    block_tokens: Sequence[int] | None = None,
    window: int = PLATEAU_EPOCHS,
    least_gain: float = PLATEAU_GAIN,
) -> Finding:
    """Has validation stopped improving, and since which epoch?

    The rule: the best valid PPL improved by less than `least_gain` over the last `window` epochs
    (the plan's rule: 1 % over three). Given total nats by epoch and block of text and the blocks'
    tokens, the slope of the valid loss per doubling of training tokens over the same epochs is
    bootstrapped over blocks, and the plateau holds only if its interval does not lie below 0.

    `history` needs the columns epoch, tokens, ppl and valid_loss, one row an epoch.
    """
    best = history.ppl.cummin().to_numpy()
    span = f"{window} epoch{'s' if window > 1 else ''}"
    threshold = f"a plateau gains < {least_gain:.1%} over {span}"
    if len(best) <= window:
        saw = f"{len(best)} epochs"
        return Finding("Plateau", "too early", saw, threshold, "too early to say: train on")
    gain = 1 - best[-1] / best[-1 - window]
    recent = history.tail(window + 1)
    weights = _slope_weights(np.log2(recent.tokens.to_numpy(float)))
    slope = Interval(float(weights @ recent.valid_loss.to_numpy(float)), -math.inf, math.inf)
    if block_nats is not None and len(block_tokens) >= MIN_BLOCKS:
        per_block = weights @ np.array(block_nats[-len(recent) :], float)
        slope = paired_bootstrap(per_block, np.zeros_like(per_block), block_tokens)
    saw = (
        f"best valid PPL {best[-1 - window]:.1f} → {best[-1]:.1f}, {gain:.1%} lower over "
        f"{span}; valid loss per doubling of tokens {slope}"
    )
    if gain >= least_gain:
        return Finding("Plateau", "none", saw, threshold, "no plateau: still improving")
    if slope.side < 0:
        conclusion = "no plateau: slow, but improving beyond the noise of the text"
        return Finding("Plateau", "slow", saw, threshold, conclusion)
    # The first epoch after which everything gained stays under the threshold.
    since = int(history.epoch.iloc[np.argmax(1 - best[-1] / best < least_gain)])
    conclusion = f"a plateau since epoch {since}"
    if slope.side > 0:
        conclusion += ", and the valid loss rises: look at training against valid for overfitting"
    next_step = "measure the learning rate (a sweep) before training on"
    if len(best) > planned_epochs / 2:
        next_step = f"the plan reads this as “learning rate still too high”; {next_step}"
    return Finding("Plateau", "plateau", saw, threshold, conclusion, next_step, since)


def _slope_weights(x: np.ndarray) -> np.ndarray:
    """Weights w such that w · y is the least-squares slope of y on x."""
    centred = x - x.mean()
    return centred / (centred**2).sum()


def oscillation(steps: pd.DataFrame, warmup_steps: int) -> Finding:
    """Does the training loss swing up and down, or run away?

    The logged losses after warm-up are averaged in 25 equal stretches, which leaves the noise of
    single batches behind. A swing is a rise of that curve from a low to the next high which is
    later undone, larger than 0.05 nats and than four standard errors of a difference of two
    stretches (their spread around a straight line). Three swings are an oscillation. A last rise
    that is not undone, of five times that size, is a divergence.

    `steps` needs the columns step and loss.
    """
    losses = steps.loss[steps.step > warmup_steps].to_numpy(float)
    rule = f"{SWINGS} rises of more than {SWING_NATS} nats and four standard errors"
    if len(losses) < 4 * STRETCHES:
        saw = f"{len(losses)} logged losses after warm-up"
        return Finding("Oscillation", "too early", saw, rule, "too early to say")
    stretches = np.array_split(losses, STRETCHES)
    means = np.array([stretch.mean() for stretch in stretches])
    error = np.mean([_noise(stretch) / math.sqrt(len(stretch)) for stretch in stretches])
    least = max(SWING_NATS, 4 * math.sqrt(2) * error)
    swings, unfinished = _swings(means, least)
    saw = f"{swings} swings of more than {least:.2f} nats, last loss {means[-1]:.2f} nats"
    if unfinished > 5 * least:
        conclusion = f"diverging: {unfinished:.2f} nats above the lowest before"
        return Finding("Oscillation", "diverging", saw, rule, conclusion, LOWER_RATE)
    if swings >= SWINGS:
        conclusion = "the loss oscillates"
        return Finding("Oscillation", "oscillating", saw, rule, conclusion, LOWER_RATE)
    return Finding("Oscillation", "none", saw, rule, "no oscillation")


def _noise(losses: np.ndarray) -> float:
    """Standard deviation of losses around a straight line through them."""
    place = np.arange(len(losses))
    return float((losses - np.polyval(np.polyfit(place, losses, 1), place)).std(ddof=2))


def _swings(means: np.ndarray, least: float) -> tuple[int, float]:
    """How often the curve rises by `least` and falls by as much again, and its last open rise."""
    swings, low, high = 0, means[0], None
    for value in means[1:]:
        if high is None:
            low = min(low, value)
            if value - low > least:
                high = value
        else:
            high = max(high, value)
            if high - value > least:
                swings, low, high = swings + 1, value, None
    return swings, 0.0 if high is None else float(means[-1] - low)


def health(
    epochs: Sequence[Mapping],
    grad_norms: Sequence[float],
    grad_clip: float,
    d_model: int,
    length: int,
) -> list[Finding]:
    """What the health statistics of a run say, a finding each.

    `epochs` are records as `Run.health` gives them, `grad_norms` the logged norms after warm-up,
    `length` the model's max_seq_len.
    Bands: updates, CS231n; clipping, google-research/tuning_playbook; scores and entropy, Wortsman
    et al. 2309.14322; rank, Godey et al. 2404.07647. Empty for a run that kept no statistics.
    """
    if not epochs:
        return []
    first, last = epochs[0], epochs[-1]
    ratios = {
        group: float(np.median([epoch["update_ratio"][group] for epoch in epochs]))
        for group in last["update_ratio"]
    }
    low, high = min(ratios, key=ratios.get), max(ratios, key=ratios.get)
    middle = float(np.median(list(ratios.values())))
    verdict = "low" if middle < 1e-4 else "high" if middle > 1e-2 else "good"
    meaning = {
        "low": "the weights hardly move: the learning rate is too low",
        "high": "the weights are thrown about: the learning rate is too high",
        "good": "the learning rate moves the weights as is usual",
    }[verdict]
    saw = f"{middle:.1e}, from {ratios[low]:.1e} ({low}) to {ratios[high]:.1e} ({high})"
    band = "1e-4 to 1e-2, about 1e-3 is usual"
    found = [Finding("Update of a step ÷ weights", verdict, saw, band, meaning)]

    if len(grad_norms):
        clipped = float(np.mean(np.asarray(grad_norms) > grad_clip))
        verdict = "high" if clipped > 0.5 else "good"
        meaning = "clipping catches exceptions only"
        if verdict == "high":
            meaning = "lower the learning rate"
        found.append(Finding("Clipped steps", verdict, f"{clipped:.0%}", "at most 50 %", meaning))

    gap = last["valid_loss"] - last["clean_train_loss"]
    rising = last["valid_loss"] - min(epoch["valid_loss"] for epoch in epochs)
    if rising > 0.01:
        verdict, meaning = "overfit", "valid rises while training goes on: regularise, or stop"
    elif gap < 0.1:
        verdict = "small"
        meaning = "no overfitting: budget, learning rate, capacity or architecture hold it back"
    else:
        verdict, meaning = "gap", "training text is known better: more data would help"
    saw = f"{last['clean_train_loss']:.2f} → {last['valid_loss']:.2f} nats, {gap:+.2f}"
    band = "under 0.1 nats; valid not rising"
    found.append(Finding("Train (no dropout) → valid loss", verdict, saw, band, meaning))

    score = last["largest_score"]
    growing = score > 2 * first["largest_score"] and score > 50
    verdict = "growing" if growing else "good"
    meaning = "attention grows unstable" if growing else "attention is stable"
    saw = f"{first['largest_score']:.1f} → {score:.1f}"
    band = "not over 50 and doubling"
    found.append(Finding("Largest attention score", verdict, saw, band, meaning))

    lowest, mean = min(last["attention_entropy"]), float(np.mean(last["attention_entropy"]))
    uniform = math.lgamma(length + 1) / length  # mean of ln t over the positions t
    verdict = "low" if lowest < 0.1 else "uniform" if mean > 0.98 * uniform else "good"
    meaning = {
        "low": f"layer {int(np.argmin(last['attention_entropy'])) + 1} looks at one token only",
        "uniform": "attention weighs all tokens alike: it does not choose",
        "good": "attention chooses among several tokens",
    }[verdict]
    saw = f"{lowest:.2f} nats in the lowest layer, mean {mean:.2f}"
    band = f"not towards 0, nor {uniform:.2f} (all alike)"
    found.append(Finding("Attention entropy", verdict, saw, band, meaning))

    if "gate_mean" in last:
        saturated = float(np.mean(last["gate_saturated"]))
        verdict = "saturated" if saturated > 0.5 else "good"
        spread = float(np.mean(last["gate_spread"]))
        meaning = "most gates no longer react to their token"
        if verdict == "good":
            meaning = "the gates can still react to their token"
        saw = (
            f"mean {np.mean(last['gate_mean']):.2f} (blocks {min(last['gate_mean']):.2f} to "
            f"{max(last['gate_mean']):.2f}), over tokens ±{spread:.3f}, {saturated:.0%} saturated"
        )
        found.append(Finding("Gate", verdict, saw, "at most 50 % saturated", meaning))

    rank = last["effective_rank"]
    verdict = "low" if rank < d_model / 2 else "good"
    meaning = "the output layer sees few directions" if verdict == "low" else "the width is used"
    saw = f"{rank:.0f} of {d_model}"
    band = "at least half the width"
    return [*found, Finding("Effective rank before the output", verdict, saw, band, meaning)]


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


def helps_or_hurts(
    mu: Mapping[int, Mapping],
    dense: Mapping[int, Mapping],
    name: str = "MU-SOTA",
    rates: str = "at the one learning rate both were given",
) -> tuple[Finding, Interval, Interval | None]:
    """Does MU-SOTA help against its dense twin? Summaries by seed; seeds in both are paired.

    Returns the finding, the bootstrap interval over blocks of text (losses averaged over seeds) and
    the interval over seeds (None from one seed, when the verdict is only provisional). Negative
    differences favour MU-SOTA. With fewer than ten blocks the verdict stays open. Raises
    ValueError without a common seed or common text.
    """
    seeds = sorted(mu.keys() & dense.keys())
    if not seeds:
        raise ValueError("MU-SOTA and the dense twin have no seed in common: train both with one.")
    pairs = [(mu[seed], dense[seed]) for seed in seeds]
    tokens = pairs[0][0]["valid_block_tokens"]
    if any(summary["valid_block_tokens"] != tokens for pair in pairs for summary in pair):
        raise ValueError("The runs were validated on different texts and cannot be compared.")
    nats_mu, nats_dense = (
        np.mean([pair[side]["valid_block_nats"] for pair in pairs], axis=0) for side in (0, 1)
    )
    text = paired_bootstrap(nats_mu, nats_dense, tokens)
    over_seeds = on_test = None
    if len(seeds) > 1:
        over_seeds = seed_interval([a["valid_loss"] - b["valid_loss"] for a, b in pairs])
        if all("test_loss" in summary for pair in pairs for summary in pair):
            on_test = seed_interval([a["test_loss"] - b["test_loss"] for a, b in pairs])
    too_little = len(tokens) < MIN_BLOCKS
    sides = {0 if too_little else text.side, over_seeds.side if over_seeds else text.side}
    side = sides.pop() if len(sides) == 1 else 0
    verdict = {-1: "helps", 0: "undecided", 1: "hurts"}[side]
    doubt = (
        "the intervals do not both exclude 0 on one side"
        if over_seeds
        else ("the interval includes 0")
    )
    if too_little:
        doubt = f"{len(tokens)} blocks are too little text"
    conclusion = {
        "helps": "the architecture helps",
        "hurts": "the architecture hurts",
        "undecided": f"undecided, {doubt}",
    }[verdict]
    saw = f"MU-SOTA minus dense twin {text} over blocks of text"
    if over_seeds:
        saw += f"; {over_seeds} over {len(seeds)} seeds"
        saw += f"; on test, scored once and not decided by, {on_test}" if on_test else ""
    else:
        conclusion = f"provisional, seeds not measured: {conclusion}"
    next_step = "" if over_seeds else "train both with more seeds (-p seed 1, -p seed 2)"
    finding = Finding(
        f"{name} against its dense twin",
        verdict,
        saw,
        f"decided by 95 % intervals that exclude 0, {rates}",
        conclusion,
        next_step,
    )
    return finding, text, over_seeds


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


# --- what the probes say ---


@dataclass(frozen=True)
class Suspect:
    """A suspected cause: the cells `before` and `after` differ in what would be mended."""

    name: str
    confidence: str  # the plan's (reported)
    before: str
    after: str
    advice: str  # what to do if it is a cause


@dataclass(frozen=True)
class Cause:
    """What mending a suspect does: the effect in nats (None: it diverges), and the verdict."""

    suspect: Suspect
    effect: Interval | None
    ppl_before: float
    ppl_after: float
    verdict: str  # cause | not a cause | undecided
    here: str = ""  # what was changed at the size that was measured


def root_causes(
    suspects: Sequence[Suspect], losses: Mapping[str, Mapping[int, float]], vocab_size: int
) -> list[Cause]:
    """Each suspect judged, the largest gain first.

    `losses`: valid nats/token by cell and seed, the same seeds everywhere. A cause is what lowers
    the loss by 0.05 nats or more, with an interval (see `pooled_contrasts`) below 0; what certainly
    brings less is none; the rest is undecided. A cell that ends above the uniform guess (ln V) with
    any seed has diverged: it gets no interval, and its suspect is no cause.
    """
    usable = {
        cell: by_seed
        for cell, by_seed in losses.items()
        if max(by_seed.values()) <= math.log(vocab_size)
    }
    measured = [s for s in suspects if s.before in usable and s.after in usable]
    pairs = [{suspect.before: -1, suspect.after: 1} for suspect in measured]
    effects = dict(zip(measured, pooled_contrasts(usable, pairs) if pairs else (), strict=True))
    causes = []
    for suspect in suspects:
        effect = effects.get(suspect)
        ppls = [
            float(np.exp(np.mean(list(losses[cell].values()))))
            for cell in (suspect.before, suspect.after)
        ]
        verdict = "undecided"
        if effect is None or effect.low > -RELEVANT:
            verdict = "not a cause"
        elif effect.high < 0 and effect.mean <= -RELEVANT:
            verdict = "cause"
        causes.append(Cause(suspect, effect, *ppls, verdict))
    return sorted(causes, key=lambda cause: cause.effect.mean if cause.effect else math.inf)


def root_cause_advice(causes: Sequence[Cause]) -> str:
    """One paragraph: what holds the model back, what does not, what to do, in ranked order."""
    by_verdict = {
        verdict: [cause for cause in causes if cause.verdict == verdict]
        for verdict in ("cause", "not a cause", "undecided")
    }

    def names(verdict: str, planned: bool) -> str:
        return "; ".join(
            f"{cause.suspect.name}, {cause.suspect.confidence}" if planned else cause.suspect.name
            for cause in by_verdict[verdict]
            if (cause.suspect.confidence != MISSED) == planned
        )

    guilty = by_verdict["cause"]
    said = ["No suspect was found guilty."]
    if guilty:
        first = guilty[0]
        said = [
            f"The largest measured gain: {first.suspect.name}, {first.effect} (PPL "
            f"{first.ppl_before:,.0f} → {first.ppl_after:,.0f})."
        ]
    for verdict, label in (
        ("cause", "Of the plan's suspects (with its confidence) guilty"),
        ("not a cause", "not guilty"),
        ("undecided", "undecided"),
    ):
        said.append(f"{label}: {names(verdict, True) or 'none'}.".capitalize())
    if missed := names("cause", False):
        said.append(f"Guilty, though the plan does not name it: {missed}.")
    if guilty:
        advice = list(dict.fromkeys(cause.suspect.advice for cause in guilty))
        said.append(f"In this order: {', then '.join(advice)}; measure again after each.")
    return " ".join(said)


def best_rate(losses: Mapping[float, Sequence[float]], own: float, model: str) -> Finding:
    """Where a learning-rate sweep has its best, and whether it must be widened.

    `losses`: valid nats/token of each seed by learning rate; `own` is the `model`'s usual rate.
    """
    means = {rate: float(np.mean(values)) for rate, values in sorted(losses.items())}
    best = min(means, key=means.get)
    at_edge = best in (min(means), max(means))
    saw = f"best at {best:g}: PPL {math.exp(means[best]):,.1f}"
    if own in means:
        saw += f", {means[best] - means[own]:+.2f} nats against {own:g}"
    conclusion = "the best is at the edge" if at_edge else "the best is bracketed"
    next_step = "widen the sweep on that side" if at_edge else ""
    if not at_edge and own in means and means[own] - means[best] >= RELEVANT:
        next_step = f"{'raise' if best > own else 'lower'} the learning rate to {best:g}"
    rule = f"{len(means)} rates from {min(means):g} to {max(means):g}"
    verdict = "edge" if at_edge else "bracketed"
    return Finding(f"Learning-rate sweep, {model}", verdict, saw, rule, conclusion, next_step)


def annealing(
    before: Sequence[float], decayed: Sequence[float], held: Sequence[float], tokens: Sequence[int]
) -> tuple[Finding, dict[str, Interval]]:
    """Is learning-rate noise hiding what the model has learned?

    Nats by block of valid text at a checkpoint, after steps whose rate falls to 0, and after as
    many at the held rate; the blocks' tokens. The held steps show what mere training brings: noise
    is what the falling rate brings beyond that, 0.05 nats or more.
    """
    intervals = {
        "rate falling to 0": paired_bootstrap(decayed, before, tokens),
        "rate held": paired_bootstrap(held, before, tokens),
        "falling − held": paired_bootstrap(decayed, held, tokens),
    }
    noise = intervals["falling − held"]
    verdict, next_step = "undecided", ""
    conclusion = "undecided, the interval reaches over the threshold"
    if noise.high < 0 and noise.mean <= -RELEVANT:
        verdict, conclusion = "noise", "learning-rate noise hides what was learned"
        next_step = "decay the rate to 0, or lower it, before judging the model"
    elif noise.low > -RELEVANT:
        verdict, conclusion = "not the rate", "the learning rate's noise is not what holds it back"
    saw = f"falling to 0 {intervals['rate falling to 0']}, beyond the held rate {noise}"
    rule = f"a gain of {RELEVANT} nats beyond the held rate is noise"
    return Finding("Anneal probe", verdict, saw, rule, conclusion, next_step), intervals


def data_halving(losses: Mapping[int, Mapping[int, float]]) -> tuple[Finding, Interval]:
    """Nats gained per doubling of the training text, at equal numbers of steps.

    `losses`: valid nats/token by number of training tokens and seed. Interval: `pooled_contrasts`.
    """
    weights = _slope_weights(np.log2(np.array([*losses], float)))
    (slope,) = pooled_contrasts(losses, [dict(zip(losses, weights, strict=True))])
    verdict, conclusion = "undecided", "undecided, the interval reaches over the threshold"
    next_step = ""
    if slope.high < -DATA_STARVED:
        verdict, conclusion, next_step = "data-starved", "data-starved", "get more text"
    elif slope.low > -DATA_STARVED:
        verdict, conclusion = "not data-starved", "data is not what holds it back"
    saw = f"per doubling of the text {slope}"
    rule = f"more than {DATA_STARVED} nats gained per doubling"
    return Finding("Data halving", verdict, saw, rule, conclusion, next_step), slope


def ablation_effects(
    nats: Mapping[str, Sequence[float]], tokens: Sequence[int]
) -> dict[str, Interval]:
    """What disabling each part costs: nats by part and block of text, `none` among the parts."""
    return {
        part: paired_bootstrap(blocks, nats["none"], tokens)
        for part, blocks in nats.items()
        if part != "none"
    }


_REDESIGN = {  # what to do with a mechanism that is hardly used
    "block attention": "give the blocks more cells, or let the cross attention do its work",
    "cross attention": "drop it, or widen it until it helps",
    "gate": "drop it: a fixed number per block does as well",
    "affinity tables": "drop them and spend their parameters on width",
}


def weak_spots(
    effects: Mapping[str, Interval], ledger: Mapping[str, int], blocks: Sequence[str]
) -> list[Finding]:
    """Which parts of a trained MU-SOTA earn their parameters, from what disabling each one costs.

    `effects` as `ablation_effects` gives them, `ledger` the parameters by group, `blocks` the
    names of the semantic blocks.
    """
    total, rule = sum(ledger.values()), f"under {RELEVANT} nats a part is hardly used"
    found = []
    for part, advice in _REDESIGN.items():
        cost = effects[part]
        share = f"{ledger[part] / total:.1%} of the parameters"
        idle = cost.high < RELEVANT
        verdict = "idle" if idle else "used" if cost.low >= RELEVANT else "undecided"
        conclusion = {"idle": "hardly used", "used": "used", "undecided": "undecided"}[verdict]
        saw = f"disabling it costs {cost}, it holds {share}"
        name = part.capitalize()
        found.append(Finding(name, verdict, saw, rule, conclusion, advice if idle else ""))
    if "both attentions" in effects:
        cost = effects["both attentions"]
        idle = cost.high < RELEVANT
        share = (ledger["block attention"] + ledger["cross attention"]) / total
        conclusion = "the text before the current token is used"
        next_step = ""
        if idle:
            conclusion = (
                "the text before the current token is hardly used: this is a table of which token "
                "follows which, and cannot be much better than the bigram rung"
            )
            next_step = "give attention a residual path that the gate does not scale, and width"
        saw = f"disabling both attentions costs {cost}, they hold {share:.1%} of the parameters"
        context = Finding("Context", "idle" if idle else "used", saw, rule, conclusion, next_step)
        found.insert(0, context)  # the first thing to know
    costs = {block: effects[block] for block in blocks}
    idle = [block for block, cost in costs.items() if cost.high < RELEVANT]
    most = max(costs, key=lambda block: costs[block].mean)
    saw = f"zeroing a block's cells costs at most {costs[most]} ({most})"
    conclusion = f"{len(idle)} of {len(blocks)} hardly used"
    verdict = "idle" if len(idle) > len(blocks) / 2 else "used"
    next_step = "fewer blocks of more cells" if verdict == "idle" else ""
    return [*found, Finding("Semantic blocks", verdict, saw, rule, conclusion, next_step)]
