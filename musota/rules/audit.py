"""What an audit of a language model says: does it see what it must not, is its loss a loss?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from musota.rules.findings import Finding

GUILTY = (
    "looks ahead", "rows talk", "keeps a state", "under the floor", "not shifted", "shifted twice",
)  # fmt: skip
SURE = 5  # standard errors: a false alarm in millions
SHIFTS = ("not shifted", "shifted once", "shifted twice")  # targets against logits


@dataclass(frozen=True)
class Probe:
    """What a model showed in one mode, with its weights as they are or shaken."""

    mode: str
    weights: str
    ahead: list[int]  # how far ahead of logits that moved the replaced token stood
    talk: bool  # a row moved another
    kept: bool  # a call moved the next
    unsure: bool  # even fresh copies answer unlike
    tolerance: float  # smaller changes are rounding


def _only(found: Sequence[Probe]) -> str:
    """Which mode and which weights all of these share; nothing where there is none."""
    shared = {probe.mode for probe in found}, {probe.weights for probe in found}
    same = [name for names in shared if len(names) == 1 for name in names]
    return f" (only {', '.join(same)})" if same else ""


def looks_ahead(probes: Sequence[Probe]) -> Finding:
    """Does a token move the logits of a position before it?"""
    rule, band = "Looking ahead", "changing a token must move no logit before it"
    if guilty := [probe for probe in probes if probe.ahead]:
        near, far = (of(of(probe.ahead) for probe in guilty) for of in (min, max))
        saw = f"the logits at t see token t+{near}" + (f", and up to t+{far}" if far > near else "")
        conclusion = "it sees the future: its perplexity means nothing"
        step = "mask everything after a position in whatever mixes positions"
        return Finding(rule, "looks ahead", saw + _only(guilty), band, conclusion, step)
    if unsure := [probe for probe in probes if probe.unsure]:
        saw = f"one question got unlike answers{_only(unsure)}"
        return Finding(rule, "undecided", saw, band, "cannot be told", "make it repeatable")
    saw = f"no logit before a changed token moved, in {len(probes)} settings"
    return Finding(rule, "causal", saw, band, "it does not see the future")


def other_sequences(probes: Sequence[Probe]) -> Finding:
    """Does anything reach a sequence from another, of the same batch or of an earlier call?"""
    rule, band = "Other sequences", "a row's logits depend on that row alone"
    if talk := [probe for probe in probes if probe.talk]:
        saw = f"changing one row of a batch moved another{_only(talk)}"
        conclusion = "rows of a batch talk to each other: results depend on what is beside them"
        step = "normalise and mix within a sequence only"
        return Finding(rule, "rows talk", saw, band, conclusion, step)
    if kept := [probe for probe in probes if probe.kept]:
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
    plain = np.asarray(plain, float)
    ratios = np.asarray(own, float) / plain  # of a shift alike in every batch?
    spread, varies = (np.ptp(x, axis=1) / np.abs(x.mean(1)) for x in (ratios, plain))
    best = int(spread.argmin())
    # Beyond rounding, and far less than the batches differ: else any loss would do.
    alike = spread[best] < min(1e-3, max(2e-6, varies[best] / 50))
    return (best, float(ratios[best].mean())) if alike else (None, 1.0)


def loss_is_the_loss(own: Sequence[float], plain: Sequence[Sequence[float]]) -> Finding:
    """The author's loss; arguments as for `which_shift`, empty where no loss was given."""
    rule, band = "Its own loss", "cross-entropy of the logits, targets shifted once"
    if not own:
        saw = "none was given, so the workbook's was used"
        return Finding(rule, "not given", saw, band, "nothing to compare")
    best, scale = which_shift(own, plain)
    if best is None:
        saw = f"{own[0]:.4f} nats where cross-entropy is {plain[1][0]:.4f}"
        return Finding(rule, "another", saw, band, "it has other terms: report PPL without them")
    learned = ("to repeat each token", "what comes next", "the token after the next")[best]
    saw = f"the cross-entropy with targets {SHIFTS[best]}, times {scale:.3g}"
    step = "compare logits[:, :-1] with ids[:, 1:], and shift in one place only"
    step = "" if SHIFTS[best] == "shifted once" else step
    return Finding(rule, SHIFTS[best], saw, band, f"it learns {learned}", step)
