"""What the curves of one run say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from musota.rules.findings import Finding
from musota.rules.stats import Interval, paired_bootstrap, slope_weights

PLATEAU_GAIN, PLATEAU_EPOCHS = 0.01, 3
STRETCHES, SWING_NATS, SWINGS = 25, 0.05, 3
LOWER_RATE = "halve the learning rate (the plan, coming from 1e-4: 5e-5)"


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
    if block_nats is not None:
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
    found = [_updates(epochs)]
    if len(grad_norms):
        clipped = float(np.mean(np.asarray(grad_norms) > grad_clip))
        verdict = "high" if clipped > 0.5 else "good"
        found.append(_healthy("Clipped steps", verdict, f"{clipped:.0%}", "at most 50 %"))
    found += [_overfitting(epochs), _largest_score(first, last), _attention_entropy(last, length)]
    if "gate_mean" in last:
        found.append(_gate(last))
    rank = last["effective_rank"]
    verdict, saw = "low" if rank < d_model / 2 else "good", f"{rank:.0f} of {d_model}"
    rule = "Effective rank before the output"
    return [*found, _healthy(rule, verdict, saw, "at least half the width")]


# What a statistic's verdict means. Adding one is a rule of `health` and a row here.
_MEANINGS = {
    "Update of a step ÷ weights": {
        "low": "the weights hardly move: the learning rate is too low",
        "high": "the weights are thrown about: the learning rate is too high",
        "good": "the learning rate moves the weights as is usual",
    },
    "Clipped steps": {
        "high": "lower the learning rate",
        "good": "clipping catches exceptions only",
    },
    "Train (no dropout) → valid loss": {
        "overfit": "valid rises while training goes on: regularise, or stop",
        "small": "no overfitting: budget, learning rate, capacity or architecture hold it back",
        "gap": "training text is known better: more data would help",
    },
    "Largest attention score": {
        "growing": "attention grows unstable",
        "good": "attention is stable",
    },
    "Attention entropy": {
        "low": "layer {} looks at one token only",
        "uniform": "attention weighs all tokens alike: it does not choose",
        "good": "attention chooses among several tokens",
    },
    "Gate": {
        "saturated": "most gates no longer react to their token",
        "good": "the gates can still react to their token",
    },
    "Effective rank before the output": {
        "low": "the output layer sees few directions",
        "good": "the width is used",
    },
}


def _healthy(rule: str, verdict: str, saw: str, band: str, *details) -> Finding:
    return Finding(rule, verdict, saw, band, _MEANINGS[rule][verdict].format(*details))


def _updates(epochs: Sequence[Mapping]) -> Finding:
    groups = epochs[-1]["update_ratio"]
    ratios = {g: float(np.median([epoch["update_ratio"][g] for epoch in epochs])) for g in groups}
    low, high = min(ratios, key=ratios.get), max(ratios, key=ratios.get)
    middle = float(np.median(list(ratios.values())))
    verdict = "low" if middle < 1e-4 else "high" if middle > 1e-2 else "good"
    saw = f"{middle:.1e}, from {ratios[low]:.1e} ({low}) to {ratios[high]:.1e} ({high})"
    band = "1e-4 to 1e-2, about 1e-3 is usual"
    return _healthy("Update of a step ÷ weights", verdict, saw, band)


def _overfitting(epochs: Sequence[Mapping]) -> Finding:
    last = epochs[-1]
    gap = last["valid_loss"] - last["clean_train_loss"]
    rising = last["valid_loss"] - min(epoch["valid_loss"] for epoch in epochs)
    verdict = "overfit" if rising > 0.01 else "small" if gap < 0.1 else "gap"
    saw = f"{last['clean_train_loss']:.2f} → {last['valid_loss']:.2f} nats, {gap:+.2f}"
    band = "under 0.1 nats; valid not rising"
    return _healthy("Train (no dropout) → valid loss", verdict, saw, band)


def _largest_score(first: Mapping, last: Mapping) -> Finding:
    before, score = first["largest_score"], last["largest_score"]
    verdict = "growing" if score > 2 * before and score > 50 else "good"
    saw = f"{before:.1f} → {score:.1f}"
    return _healthy("Largest attention score", verdict, saw, "not over 50 and doubling")


def _attention_entropy(last: Mapping, length: int) -> Finding:
    by_layer = last["attention_entropy"]
    lowest, mean = min(by_layer), float(np.mean(by_layer))
    uniform = math.lgamma(length + 1) / length  # mean of ln t over the positions t
    verdict = "low" if lowest < 0.1 else "uniform" if mean > 0.98 * uniform else "good"
    saw = f"{lowest:.2f} nats in the lowest layer, mean {mean:.2f}"
    band = f"not towards 0, nor {uniform:.2f} (all alike)"
    return _healthy("Attention entropy", verdict, saw, band, int(np.argmin(by_layer)) + 1)


def _gate(last: Mapping) -> Finding:
    mean, saturated = last["gate_mean"], float(np.mean(last["gate_saturated"]))
    saw = (
        f"mean {np.mean(mean):.2f} (blocks {min(mean):.2f} to {max(mean):.2f}), over tokens "
        f"±{np.mean(last['gate_spread']):.3f}, {saturated:.0%} saturated"
    )
    verdict = "saturated" if saturated > 0.5 else "good"
    return _healthy("Gate", verdict, saw, "at most 50 % saturated")
