"""What the curves and health statistics of one run show, as verdicts."""

import math
from collections.abc import Iterator

import numpy as np

from musota.config import MuConfig
from musota.lab.stats import Interval, block_bootstrap
from musota.lab.verdicts import PERCENT, Verdict, decide
from musota.training.run import Run

PLATEAU_GAIN, PLATEAU_EPOCHS = 0.01, 3  # the plan's rule: 1 % over three epochs
STRETCHES, SWING_NATS, SWINGS = 25, 0.05, 3
LONG_WARMUP = 0.3  # of all steps
LOWER_RATE = "halve the learning rate (the plan: from 1e-4 to 5e-5)"
# Bands of the health statistics (sources: docs/metrics-and-verdicts.md).
UPDATE_RATIO = 1e-4, 1e-2
CLIPPED_STEPS = 50  # percent
LOSS_GAP, LOSS_RISE = 0.1, 0.01  # nats
LARGEST_SCORE = 50
LEAST_ENTROPY, UNIFORM_ENTROPY = 0.1, 0.98  # nats; share of the entropy of equal weights
SATURATED_GATES = 50  # percent
LEAST_RANK = 0.5  # of d_model


def plateau(run: Run, window: int = PLATEAU_EPOCHS, least_gain: float = PLATEAU_GAIN) -> Verdict:
    """Whether validation has stopped improving: yes, no or too early.

    On a plateau the best valid PPL improves by less than `least_gain` over the last `window` epochs
    (the value, in percent), and the slope of the valid loss per doubling of training tokens,
    bootstrapped over blocks of text, has no interval below 0.
    """
    question = "Has the valid PPL reached a plateau?"
    span = f"{window} epoch{'s' if window > 1 else ''}"
    rule = f"a plateau improves by less than {least_gain:.1%} over {span}"
    if len(run.history) <= window:
        return Verdict(question, "too early", reason=f"{len(run.history)} epochs; {rule}")
    best, gain, slope = _progress(run, window)
    start, steps = plateau_start(run, window, least_gain), run.total_steps
    since, step = f"since epoch {start}", "measure the learning rate (a sweep) before training on"
    if run.experiment.training.warmup_steps > LONG_WARMUP * steps:  # looks like a plateau
        step = f"set warmup_steps={max(1, steps // 10)}, a tenth of the steps"
    return decide(
        question,
        f"valid PPL {best[-1 - window]:.1f} → {best[-1]:.1f} over {span}, valid loss per doubling "
        f"of tokens {slope}; {rule}",
        (gain >= least_gain, "no", "still improving"),
        (start is None, "no", "improving slowly, but beyond the noise of the text"),
        (slope.beyond(0) > 0, "yes", f"{since}, and the valid loss rises: it overfits", step),
        (True, "yes", since, step),
        value=100 * gain,
        unit=PERCENT,
    )


def plateau_start(run: Run, window=PLATEAU_EPOCHS, least_gain=PLATEAU_GAIN) -> int | None:
    """The epoch after which all improvement together stays under `least_gain`; None for a run
    without a plateau (see `plateau`)."""
    if len(run.history) <= window:
        return None
    best, gain, slope = _progress(run, window)
    if gain >= least_gain or slope.beyond(0) < 0:
        return None
    return int(run.history.epoch.iloc[np.argmax(1 - best[-1] / best < least_gain)])


def _progress(run: Run, window: int) -> tuple[np.ndarray, float, Interval]:
    """The best valid PPL by epoch, the share by which it fell over the last `window` epochs, and
    the slope of the valid loss per doubling of training tokens over them."""
    best = run.history.ppl.cummin().to_numpy()
    doublings = np.log2(run.history.tokens.to_numpy(float)[-1 - window :])
    centred = doublings - doublings.mean()
    weights = centred / (centred**2).sum()  # of a least-squares slope
    per_block = weights @ np.array(run.valid_block_nats[-len(weights) :], float)
    slope = block_bootstrap(per_block, run.summary["valid_block_tokens"])
    return best, float(1 - best[-1] / best[-1 - window]), slope


def oscillation(run: Run) -> Verdict:
    """Whether the training loss is stable: yes, oscillates, diverges or too early.

    The logged losses after warm-up are averaged in equal stretches. A swing is a rise that is later
    undone, larger than SWING_NATS and than four standard errors of the difference of two stretches.
    A last rise of five times that size is a divergence.
    """
    question = "Is the training loss stable?"
    if run.diverged:
        return Verdict(question, "diverges", reason=f"at step {run.diverged_at}")
    after_warmup = run.steps.step > run.experiment.training.warmup_steps
    losses = run.steps.loss[after_warmup].dropna().to_numpy(float)
    if len(losses) < 4 * STRETCHES:
        return Verdict(question, "too early", reason=f"{len(losses)} logged losses after warm-up")
    from scipy import signal  # which takes a second to import

    stretches = np.array_split(losses, STRETCHES)
    means = np.array([stretch.mean() for stretch in stretches])
    noise = [signal.detrend(stretch).std(ddof=2) for stretch in stretches]  # around a line
    error = np.mean(noise / np.sqrt([len(stretch) for stretch in stretches]))
    least = max(SWING_NATS, 4 * math.sqrt(2) * error)
    swings = signal.find_peaks(means, prominence=least)[0]
    risen = means[-1] - means[swings[-1] if len(swings) else 0 :].min()
    return decide(
        question,
        f"{len(swings)} swings of more than {least:.2f} nats, last loss {means[-1]:.2f} nats",
        (risen > 5 * least, "diverges", f"{risen:.2f} nats above the lowest before", LOWER_RATE),
        (len(swings) >= SWINGS, "oscillates", f"{SWINGS} swings are an oscillation", LOWER_RATE),
        (True, "yes", ""),
    )


def health(run: Run) -> list[Verdict]:
    """A verdict for each recorded health statistic of a run: "ok", or what is wrong. Attention,
    gate and rank are known for models of this package only."""
    return [*_training_health(run), *_inner_health(run)] if run.health else []


def _judge(statistic: str, value: float, seen: str, *cases: tuple, unit: str = "") -> Verdict:
    """The verdict on one statistic: the first of `cases` that holds, else ok."""
    if math.isnan(value):
        return Verdict(statistic, "not measured", reason=seen)
    return decide(statistic, seen, *cases, (True, "ok", ""), value=value, unit=unit)


def _number(value) -> float:
    """The mean of one or more recorded numbers; null in a record is NaN."""
    return float(np.array(value, float).mean())


def _training_health(run: Run) -> Iterator[Verdict]:
    epochs, training = run.health, run.experiment.training
    by_epoch = [epoch["update_ratio"] for epoch in epochs]
    ratios = {name: float(np.median([_number(e[name]) for e in by_epoch])) for name in by_epoch[-1]}
    least, most = min(ratios, key=ratios.get), max(ratios, key=ratios.get)
    middle, (low, high) = float(np.median([*ratios.values()])), UPDATE_RATIO
    yield _judge(
        "Update of a step ÷ weights",
        middle,
        f"{ratios[least]:.1e} ({least}) to {ratios[most]:.1e} ({most}); {low:g} to {high:g} usual",
        (training.warmup_steps > run.total_steps, "warming up", "the rate never peaks"),
        (middle < low, "too low", "the weights hardly move: the learning rate is too low"),
        (middle > high, "too high", "the learning rate is too high"),
    )
    norms = run.steps.grad_norm[run.steps.step > training.warmup_steps].dropna()  # fp16 skips steps
    if len(norms):
        clipped = 100 * float(np.mean(norms > training.grad_clip))
        step = "raise grad_clip" + ", or lower the learning rate" * (middle >= low)
        yield _judge(
            "Clipped steps",
            clipped,
            f"at most {CLIPPED_STEPS} % is usual",
            (clipped > CLIPPED_STEPS, "too many", step),
            unit=PERCENT,
        )
    losses = np.array([epoch["valid_loss"] for epoch in epochs], float)
    train, valid = _number(epochs[-1]["clean_train_loss"]), float(losses[-1])
    rises = valid - np.nanmin(losses) > LOSS_RISE
    yield _judge(
        "Valid loss − training loss without dropout (nats/token)",
        valid - train,
        f"training {train:.2f}, valid {valid:.2f}; under {LOSS_GAP} and not rising is usual",
        (rises, "overfits", "valid rises while training goes on: regularise, or stop"),
        (valid - train >= LOSS_GAP, "gap", "more data would help"),
        (True, "ok", "no overfitting: budget, learning rate or architecture limits the model"),
    )


def _inner_health(run: Run) -> Iterator[Verdict]:
    last, model = run.health[-1], run.experiment.model
    if "effective_rank" not in last:
        return
    before, score = (_number(epoch["largest_score"]) for epoch in (run.health[0], last))
    yield _judge(
        "Largest attention score",
        score,
        f"{before:,.1f} in the first epoch; at most {LARGEST_SCORE} is usual",
        (score > LARGEST_SCORE, "too large", "large scores make attention unstable"),
    )
    by_layer = np.array(last["attention_entropy"], float)
    lowest, mean = int(by_layer.argmin()), _number(by_layer)
    which = ", cross attention alone" if isinstance(model, MuConfig) else ""
    uniform = math.lgamma(model.max_seq_len + 1) / model.max_seq_len  # mean of ln t, t = 1 … T
    yield _judge(
        f"Attention entropy (nats, mean of the layers{which})",
        mean,
        f"{by_layer[lowest]:.2f} in layer {lowest + 1} (lowest), {uniform:.2f} for equal weights",
        (by_layer[lowest] < LEAST_ENTROPY, "too low", "that layer hardly reads more than a token"),
        (mean > UNIFORM_ENTROPY * uniform, "uniform", "all tokens weigh almost the same"),
    )
    if "gate_mean" in last:
        gate, spread = _number(last["gate_mean"]), _number(last["gate_spread"])
        saturated = 100 * _number(last["gate_saturated"])
        yield _judge(
            "Saturated gates",
            saturated,
            f"mean gate {gate:.2f} ± {spread:.3f} over tokens; at most {SATURATED_GATES} % usual",
            (saturated > SATURATED_GATES, "too many", "most gates do not react to their token"),
            unit=PERCENT,
        )
    rank = _number(last["effective_rank"])
    yield _judge(
        "Effective rank before the output",
        rank,
        f"d_model is {model.d_model}; at least half of it is usual",
        (rank < LEAST_RANK * model.d_model, "too low", "the output layer has few directions"),
    )
