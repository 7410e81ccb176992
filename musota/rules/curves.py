"""What the curves of one run say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from musota.rules.findings import Finding
from musota.rules.stats import MIN_BLOCKS, Interval, paired_bootstrap, slope_weights

PLATEAU_GAIN, PLATEAU_EPOCHS = 0.01, 3


STRETCHES, SWING_NATS, SWINGS = 25, 0.05, 3


LOWER_RATE = "halve the learning rate (the plan, coming from 1e-4: 5e-5)"


STILL_IMPROVING = 0.01  # a phase that lowers the best PPL by less has stalled


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
    weights = slope_weights(np.log2(recent.tokens.to_numpy(float)))
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
