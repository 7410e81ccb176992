"""What the curves of one run say."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import signal

from musota.rules.findings import Finding
from musota.rules.stats import paired_bootstrap, weights_per_doubling

PLATEAU_GAIN, PLATEAU_EPOCHS = 0.01, 3
STRETCHES, SWING_NATS, SWINGS = 25, 0.05, 3
LONG_WARMUP = 0.3  # of all steps
LOWER_RATE = "halve the learning rate (the plan, coming from 1e-4: 5e-5)"


def plateau(
    history: pd.DataFrame,
    planned_epochs: int,
    block_nats: Sequence[Sequence[float]],
    block_tokens: Sequence[int],
    window: int = PLATEAU_EPOCHS,
    least_gain: float = PLATEAU_GAIN,
) -> Finding:
    """Has validation stopped improving, and since which epoch?

    The rule: the best valid PPL improved by less than `least_gain` over the last `window` epochs
    (the plan's rule: 1 % over three), and the slope of the valid loss per doubling of training
    tokens over the same epochs, bootstrapped over blocks of text (total nats by epoch and block,
    tokens by block), has no interval below 0. `history` as `Run.history`.
    """
    best = history.ppl.cummin().to_numpy()
    span = f"{window} epoch{'s' if window > 1 else ''}"
    rule = f"a plateau gains < {least_gain:.1%} over {span}"
    if len(best) <= window:
        saw = f"{len(best)} epochs"
        return Finding("Plateau", "too early", saw, rule, "too early to say: train on")
    gain = 1 - best[-1] / best[-1 - window]
    recent = history.tail(window + 1)
    weights = weights_per_doubling(recent.tokens.to_numpy(float))
    per_block = weights @ np.array(block_nats[-len(recent) :], float)
    slope = paired_bootstrap(per_block, np.zeros_like(per_block), block_tokens)
    saw = (
        f"best valid PPL {best[-1 - window]:.1f} → {best[-1]:.1f}, {gain:.1%} lower over "
        f"{span}; valid loss per doubling of tokens {slope}"
    )
    if gain >= least_gain:
        return Finding("Plateau", "none", saw, rule, "no plateau: still improving")
    if slope.side < 0:
        conclusion = "no plateau: slow, but improving beyond the noise of the text"
        return Finding("Plateau", "slow", saw, rule, conclusion)
    # The first epoch after which everything gained stays under the threshold.
    since = int(history.epoch.iloc[np.argmax(1 - best[-1] / best < least_gain)])
    conclusion = f"a plateau since epoch {since}"
    if slope.side > 0:
        conclusion += ", and the valid loss rises: look at training against valid for overfitting"
    next_step = "measure the learning rate (a sweep) before training on"
    if len(best) > planned_epochs / 2:
        next_step = f"the plan reads this as “learning rate still too high”; {next_step}"
    return Finding("Plateau", "plateau", saw, rule, conclusion, next_step, since)


def warmup(warmup_steps: int, total_steps: int) -> Finding | None:
    """Whether warm-up takes so much of a run that the rate asked for is hardly trained with; None
    where it does not. The plan's own takes 19 % (google-research/tuning_playbook: 5 % at most)."""
    share = warmup_steps / total_steps
    if share <= LONG_WARMUP:
        return None
    verdict, conclusion = "long", "most of the run trains below the rate that was asked for"
    if share > 1:
        verdict = "never ends"
        conclusion = f"the rate only reaches {1 / share:.0%} of what was asked for"
    return Finding(
        "Warm-up",
        verdict,
        f"{warmup_steps:,} warm-up steps in a run of {total_steps:,}",
        f"at most {LONG_WARMUP:.0%} of the steps",
        f"{conclusion}: this alone may look like a plateau",
        f"set warmup_steps={max(1, total_steps // 10)}, a tenth of the steps",
    )


def oscillation(steps: pd.DataFrame, warmup_steps: int) -> Finding:
    """Does the training loss swing up and down, or run away? `steps` as `Run.steps`.

    The logged losses after warm-up are averaged in 25 equal stretches. A swing is a rise of that
    curve which is later undone, larger than 0.05 nats and than four standard errors of a difference
    of two stretches (their spread around a straight line). Three swings are an oscillation. A last
    rise that is not undone, of five times that size, is a divergence.
    """
    losses = steps.loss[steps.step > warmup_steps].to_numpy(float)
    rule = f"{SWINGS} rises of more than {SWING_NATS} nats and four standard errors"
    if len(losses) < 4 * STRETCHES:
        saw = f"{len(losses)} logged losses after warm-up"
        return Finding("Oscillation", "too early", saw, rule, "too early to say")
    stretches = np.array_split(losses, STRETCHES)
    means = np.array([stretch.mean() for stretch in stretches])
    noise = [signal.detrend(stretch).std(ddof=2) for stretch in stretches]  # around a line
    error = np.mean(noise / np.sqrt([len(stretch) for stretch in stretches]))
    least = max(SWING_NATS, 4 * math.sqrt(2) * error)
    swings = signal.find_peaks(means, prominence=least)[0]
    unfinished = means[-1] - means[swings[-1] if len(swings) else 0 :].min()
    verdict, conclusion, next_step = "none", "no oscillation", ""
    if unfinished > 5 * least:
        verdict, next_step = "diverging", LOWER_RATE
        conclusion = f"diverging: {unfinished:.2f} nats above the lowest before"
    elif len(swings) >= SWINGS:
        verdict, conclusion, next_step = "oscillating", "the loss oscillates", LOWER_RATE
    saw = f"{len(swings)} swings of more than {least:.2f} nats, last loss {means[-1]:.2f} nats"
    return Finding("Oscillation", verdict, saw, rule, conclusion, next_step)


def health(
    epochs: Sequence[Mapping],
    grad_norms: Sequence[float],
    grad_clip: float,
    d_model: int,
    length: int,
    warmed_up: bool = True,
) -> list[Finding]:
    """What the health statistics of a run say, a finding each; `warmed_up`: the learning rate
    came to its peak.

    `epochs` are records as `Run.health` gives them, `grad_norms` the logged norms after warm-up,
    `length` the model's max_seq_len.
    Bands: updates, CS231n; clipping, google-research/tuning_playbook; scores and entropy, Wortsman
    et al. 2309.14322; rank, Godey et al. 2404.07647.
    """
    found = [*_training_health(epochs, grad_norms, grad_clip, warmed_up)] if epochs else []
    if epochs and "effective_rank" in epochs[-1]:  # nobody knows the inside of one's own model
        found += _inner_health(epochs[0], epochs[-1], d_model, length)
    return found


def _training_health(
    epochs: Sequence[Mapping], grad_norms: Sequence[float], grad_clip: float, warmed_up: bool
) -> Iterator[Finding]:
    groups = epochs[-1]["update_ratio"]
    ratios = {g: float(np.median([epoch["update_ratio"][g] for epoch in epochs])) for g in groups}
    low, high = min(ratios, key=ratios.get), max(ratios, key=ratios.get)
    middle = float(np.median(list(ratios.values())))
    saw = f"{middle:.1e}, from {ratios[low]:.1e} ({low}) to {ratios[high]:.1e} ({high})"
    verdict, means = "good", "the learning rate moves the weights as is usual"
    if not warmed_up:
        verdict, means = "warming up", "says nothing of the rate asked for: warm-up never ended"
    elif middle < 1e-4:
        verdict, means = "low", "the weights hardly move: the learning rate is too low"
    elif middle > 1e-2:
        verdict, means = "high", "the weights are thrown about: the learning rate is too high"
    band = "1e-4 to 1e-2, about 1e-3 is usual"
    yield Finding("Update of a step ÷ weights", verdict, saw, band, means)

    if len(grad_norms):
        clipped = float(np.mean(np.asarray(grad_norms) > grad_clip))
        verdict, means = "good", "clipping catches exceptions only"
        if clipped > 0.5:
            verdict, means = "high", "lower the learning rate"
        yield Finding("Clipped steps", verdict, f"{clipped:.0%}", "at most 50 %", means)

    train, valid = epochs[-1]["clean_train_loss"], epochs[-1]["valid_loss"]
    saw = f"{train:.2f} → {valid:.2f} nats, {valid - train:+.2f}"
    verdict, means = "gap", "training text is known better: more data would help"
    if valid - min(epoch["valid_loss"] for epoch in epochs) > 0.01:
        verdict, means = "overfit", "valid rises while training goes on: regularise, or stop"
    elif valid - train < 0.1:
        verdict = "small"
        means = "no overfitting: budget, learning rate, capacity or architecture hold it back"
    band = "under 0.1 nats; valid not rising"
    yield Finding("Train (no dropout) → valid loss", verdict, saw, band, means)


def _inner_health(first: Mapping, last: Mapping, d_model: int, length: int) -> Iterator[Finding]:
    before, score = first["largest_score"], last["largest_score"]
    verdict, means = "good", "attention is stable"
    if score > 2 * before and score > 50:
        verdict, means = "growing", "attention grows unstable"
    saw, band = f"{before:.1f} → {score:.1f}", "not over 50 and doubling"
    yield Finding("Largest attention score", verdict, saw, band, means)

    by_layer = last["attention_entropy"]
    lowest, mean = min(by_layer), float(np.mean(by_layer))
    uniform = math.lgamma(length + 1) / length  # mean of ln t over the positions t
    saw = f"{lowest:.2f} nats in the lowest layer, mean {mean:.2f}"
    verdict, means = "good", "attention chooses among several tokens"
    if lowest < 0.1:
        verdict, means = "low", f"layer {by_layer.index(lowest) + 1} looks at one token only"
    elif mean > 0.98 * uniform:
        verdict, means = "uniform", "attention weighs all tokens alike: it does not choose"
    band = f"not towards 0, nor {uniform:.2f} (all alike)"
    yield Finding("Attention entropy", verdict, saw, band, means)

    if "gate_mean" in last:
        gate, saturated = last["gate_mean"], float(np.mean(last["gate_saturated"]))
        saw = (
            f"mean {np.mean(gate):.2f} (blocks {min(gate):.2f} to {max(gate):.2f}), over tokens "
            f"±{np.mean(last['gate_spread']):.3f}, {saturated:.0%} saturated"
        )
        verdict, means = "good", "the gates can still react to their token"
        if saturated > 0.5:
            verdict, means = "saturated", "most gates no longer react to their token"
        yield Finding("Gate", verdict, saw, "at most 50 % saturated", means)

    rank = last["effective_rank"]
    verdict, means = "good", "the width is used"
    if rank < d_model / 2:
        verdict, means = "low", "the output layer sees few directions"
    saw, band = f"{rank:.0f} of {d_model}", "at least half the width"
    yield Finding("Effective rank before the output", verdict, saw, band, means)
