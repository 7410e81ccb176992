"""What the curves of one run say."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import signal

from musota.rules.findings import Finding, judged
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
    # The first epoch after which everything gained stays under the threshold.
    since = int(history.epoch.iloc[np.argmax(1 - best[-1] / best < least_gain)])
    rising = ", and the valid loss rises: look at training against valid for overfitting"
    next_step = "measure the learning rate (a sweep) before training on"
    if len(best) > planned_epochs / 2:
        next_step = f"the plan reads this as “learning rate still too high”; {next_step}"
    return judged(
        ("Plateau", saw, rule),
        (gain >= least_gain, "none", "no plateau: still improving"),
        (slope.side < 0, "slow", "no plateau: slow, but improving beyond the noise of the text"),
        (slope.side > 0, "plateau", f"a plateau since epoch {since}{rising}", next_step, since),
        (True, "plateau", f"a plateau since epoch {since}", next_step, since),
    )


def warmup(warmup_steps: int, total_steps: int) -> Finding | None:
    """Whether warm-up takes so much of a run that the rate asked for is hardly trained with; None
    where it does not. The plan's own takes 19 % (google-research/tuning_playbook: 5 % at most)."""
    share = warmup_steps / total_steps
    if share <= LONG_WARMUP:
        return None
    peak = f"the rate only reaches {1 / share:.0%} of what was asked for"
    most = "most of the run trains below the rate that was asked for"
    alone = "this alone may look like a plateau"
    step = f"set warmup_steps={max(1, total_steps // 10)}, a tenth of the steps"
    saw = f"{warmup_steps:,} warm-up steps in a run of {total_steps:,}"
    return judged(
        ("Warm-up", saw, f"at most {LONG_WARMUP:.0%} of the steps"),
        (share > 1, "never ends", f"{peak}: {alone}", step),
        (True, "long", f"{most}: {alone}", step),
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
    risen = means[-1] - means[swings[-1] if len(swings) else 0 :].min()
    away = f"diverging: {risen:.2f} nats above the lowest before"
    saw = f"{len(swings)} swings of more than {least:.2f} nats, last loss {means[-1]:.2f} nats"
    return judged(
        ("Oscillation", saw, rule),
        (risen > 5 * least, "diverging", away, LOWER_RATE),
        (len(swings) >= SWINGS, "oscillating", "the loss oscillates", LOWER_RATE),
        (True, "none", "no oscillation"),
    )


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
    `length` the model's max_seq_len. The bands' sources: docs/verdicts.md.
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
    yield judged(
        ("Update of a step ÷ weights", saw, "1e-4 to 1e-2, about 1e-3 is usual"),
        (not warmed_up, "warming up", "says nothing of the rate asked for: warm-up never ended"),
        (middle < 1e-4, "low", "the weights hardly move: the learning rate is too low"),
        (middle > 1e-2, "high", "the weights are thrown about: the learning rate is too high"),
        (True, "good", "the learning rate moves the weights as is usual"),
    )
    if len(grad_norms):
        clipped = float(np.mean(np.asarray(grad_norms) > grad_clip))
        yield judged(
            ("Clipped steps", f"{clipped:.0%}", "at most 50 %"),
            (clipped > 0.5, "high", "lower the learning rate"),
            (True, "good", "clipping catches exceptions only"),
        )
    train, valid = epochs[-1]["clean_train_loss"], epochs[-1]["valid_loss"]
    risen = valid - min(epoch["valid_loss"] for epoch in epochs)
    small = "no overfitting: budget, learning rate, capacity or architecture hold it back"
    saw = f"{train:.2f} → {valid:.2f} nats, {valid - train:+.2f}"
    yield judged(
        ("Train (no dropout) → valid loss", saw, "under 0.1 nats; valid not rising"),
        (risen > 0.01, "overfit", "valid rises while training goes on: regularise, or stop"),
        (valid - train < 0.1, "small", small),
        (True, "gap", "training text is known better: more data would help"),
    )


def _inner_health(first: Mapping, last: Mapping, d_model: int, length: int) -> Iterator[Finding]:
    before, score = first["largest_score"], last["largest_score"]
    yield judged(
        ("Largest attention score", f"{before:.1f} → {score:.1f}", "not over 50 and doubling"),
        (score > max(50, 2 * before), "growing", "attention grows unstable"),
        (True, "good", "it does not run away"),
    )
    by_layer = last["attention_entropy"]
    lowest, mean = min(by_layer), float(np.mean(by_layer))
    uniform = math.lgamma(length + 1) / length  # mean of ln t over the positions t
    alike = "attention weighs all tokens alike: it does not choose"
    saw = f"{lowest:.2f} nats in the lowest layer, mean {mean:.2f}"
    yield judged(
        ("Attention entropy", saw, f"not towards 0, nor {uniform:.2f} (all alike)"),
        (lowest < 0.1, "low", f"layer {by_layer.index(lowest) + 1} looks at one token only"),
        (mean > 0.98 * uniform, "uniform", alike),
        (True, "good", "attention chooses among several tokens"),
    )
    if "gate_mean" in last:
        gate, saturated = last["gate_mean"], float(np.mean(last["gate_saturated"]))
        saw = (
            f"mean {np.mean(gate):.2f} (blocks {min(gate):.2f} to {max(gate):.2f}), over tokens "
            f"±{np.mean(last['gate_spread']):.3f}, {saturated:.0%} saturated"
        )
        yield judged(
            ("Gate", saw, "at most 50 % saturated"),
            (saturated > 0.5, "saturated", "most gates no longer react to their token"),
            (True, "good", "the gates can still react to their token"),
        )
    rank = last["effective_rank"]
    yield judged(
        ("Effective rank before the output", f"{rank:.0f} of {d_model}", "at least half the width"),
        (rank < d_model / 2, "low", "the output layer sees few directions"),
        (True, "good", "the width is used"),
    )
