"""What an audit of a language model says: does it see what it must not, is its loss a loss?"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from musota.rules.findings import Finding

GUILTY = (
    "looks ahead", "rows talk", "keeps a state", "under the floor", "not shifted", "shifted twice",
)  # fmt: skip
SURE = 5  # standard errors: a false alarm in millions
SHIFTS = ("not shifted", "shifted once", "shifted twice")  # targets against logits
Setting = tuple[str, str]  # the mode, and what was done to the weights
SETTINGS = tuple(
    (mode, weights)
    for mode in ("in evaluation", "in training")
    for weights in ("as it is", "with its weights shaken")
)


def _only(found: Collection[Setting]) -> str:
    """Which mode and which weights all of these settings share; nothing where there is none."""
    shared = [{setting[part] for setting in found} for part in (0, 1)]
    same = [name for names in shared if len(names) == 1 for name in names]
    return f" (only {', '.join(same)})" if same else ""


def looks_ahead(ahead: Mapping[Setting, Sequence[int]], unsure: Collection[Setting]) -> Finding:
    """`ahead` says by setting how far ahead of the logits that moved the replaced token stood;
    `unsure` settings gave unlike answers to one question."""
    rule, band = "Looking ahead", "changing a token must move no logit before it"
    if guilty := [setting for setting, distances in ahead.items() if distances]:
        near, far = (of(of(ahead[setting]) for setting in guilty) for of in (min, max))
        saw = f"the logits at t see token t+{near}" + (f", and up to t+{far}" if far > near else "")
        conclusion = "it sees the future: its perplexity means nothing"
        step = "mask everything after a position in whatever mixes positions"
        return Finding(rule, "looks ahead", saw + _only(guilty), band, conclusion, step)
    if unsure:
        saw = f"one question got unlike answers{_only(unsure)}"
        return Finding(rule, "undecided", saw, band, "cannot be told", "make it repeatable")
    saw = f"no logit before a changed token moved, in {len(ahead)} settings"
    return Finding(rule, "causal", saw, band, "it does not see the future")


def other_sequences(talk: Collection[Setting], kept: Collection[Setting]) -> Finding:
    """`talk`: settings in which a row of the batch moved another; `kept`: in which a call changed
    the answer to the next."""
    rule, band = "Other sequences", "a row's logits depend on that row alone"
    if talk:
        saw = f"changing one row of a batch moved another{_only(talk)}"
        conclusion = "rows of a batch talk to each other: results depend on what is beside them"
        step = "normalise and mix within a sequence only"
        return Finding(rule, "rows talk", saw, band, conclusion, step)
    if kept:
        saw = f"asked again, it answered otherwise than at first{_only(kept)}"
        conclusion = "it keeps a state from call to call: a text's loss depends on what came before"
        return Finding(rule, "keeps a state", saw, band, conclusion, "start every call afresh")
    saw = "no row moved another, no call the next"
    return Finding(rule, "apart", saw, band, "sequences are kept apart")


def random_floor(losses: Sequence[float], symbols: int) -> Finding:
    """`losses` in nats a token, one a training step, each on fresh tokens drawn evenly from
    `symbols`: whoever does not see them in advance pays ln(symbols) on average."""
    rule, floor = "Random tokens", math.log(symbols)
    last = np.asarray(losses[-max(2, len(losses) // 4) :], float)
    band = f"no honest model gets under ln {symbols} = {floor:.3f} nats"
    if len(last) < 2 or not np.isfinite(last).all():
        saw = "the loss did not stay a number, or could not be trained"
        return Finding(rule, "undecided", saw, band, "cannot be told", "mend its training first")
    mean, error = float(last.mean()), float(last.std(ddof=1)) / math.sqrt(len(last))
    saw = f"{mean:.3f} ± {error:.3f} nats after {len(losses)} steps on fresh random tokens"
    if mean < floor - SURE * error:
        conclusion = f"{floor - mean:.3f} nats under what can be known: it is told what to predict"
        step = "look at the mask, the shift of the targets, and what the loss hands to the model"
        return Finding(rule, "under the floor", saw, band, conclusion, step)
    return Finding(rule, "holds", saw, band, "it did not learn to foretell what is random")


def which_shift(own: Sequence[float], plain: Sequence[Sequence[float]]) -> tuple[int | None, float]:
    """Which of `SHIFTS` a loss is the cross-entropy of, and times what; (None, 1) for another.

    `own` losses of some batches, and for each shift the cross-entropy of the model's logits there.
    """
    ratios = np.asarray(own, float) / np.asarray(plain, float)  # of a shift alike in every batch?
    spread = np.ptp(ratios, axis=1) / np.abs(ratios.mean(1))
    best = int(spread.argmin())
    return (best, float(ratios[best].mean())) if spread[best] < 1e-3 else (None, 1.0)


def loss_is_the_loss(own: Sequence[float], plain: Sequence[Sequence[float]]) -> Finding:
    """The author's loss; arguments as for `which_shift`, empty where no loss was given."""
    rule, band = "Its own loss", "cross-entropy of the logits, targets shifted once"
    if not len(own):
        saw = "none was given, so the workbook's was used"
        return Finding(rule, "not given", saw, band, "nothing to compare")
    best, scale = which_shift(own, plain)
    if best is None:
        saw = f"{own[0]:.4f} nats where cross-entropy is {plain[1][0]:.4f}"
        return Finding(rule, "another", saw, band, "it has other terms: report PPL without them")
    saw = f"the cross-entropy with targets {SHIFTS[best]}"
    saw += "" if abs(scale - 1) < 1e-3 else f", times {scale:.3g}"
    if best == 1:
        return Finding(rule, SHIFTS[best], saw, band, "it is the loss it should be")
    wrong = "to repeat each token" if best == 0 else "the token after the next"
    step = "compare logits[:, :-1] with ids[:, 1:], and shift in one place only"
    return Finding(rule, SHIFTS[best], saw, band, f"it learns {wrong}", step)
