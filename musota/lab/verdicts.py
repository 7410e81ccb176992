"""Verdicts: what a question about runs was decided to be, as data; and the comparison of runs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from musota.errors import MusotaError
from musota.lab.stats import SEED_SPREAD, Interval, seed_interval
from musota.training.evaluate import exp_nats
from musota.training.run import Run

NATS, PPL, PERCENT = "nats/token", "PPL", "%"  # units of values
HUGE = 1e12  # a number above it is not written out
FORMATS = {NATS: "+.3f", PPL: ",.1f", PERCENT: ".1f"}


@dataclass(frozen=True)
class Verdict:
    """The answer to one question. `decision` is a short fixed word for programs to compare;
    `value` with its interval is in `unit`; `reason` is a clause that says what was measured;
    `good` says whether it is good news, None where that is open."""

    question: str
    decision: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    reason: str = ""
    next_step: str = ""
    good: bool | None = None

    @property
    def answer(self) -> str:
        """Question and decision."""
        colon = "" if self.question.endswith("?") else ":"  # a statistic is no question
        period = "" if self._seen else "."
        return f"{self.question}{colon} {self.decision[:1].upper()}{self.decision[1:]}{period}"

    @property
    def explanation(self) -> str:
        """What was measured, in brackets, and the next step."""
        seen = f"({self._seen})." if self._seen else ""
        step = f"Next: {self.next_step}." if self.next_step else ""
        return f"{seen} {step}".strip()

    @property
    def _seen(self) -> str:
        return "; ".join(filter(None, (measured(self), self.reason)))

    def __str__(self) -> str:
        """The verdict as a sentence."""
        return f"{self.answer} {self.explanation}".strip()


def measured(verdict: Verdict) -> str:
    """The value of a verdict with its unit and interval; empty where it has none."""
    if verdict.value is None:
        return ""
    size = abs(verdict.value)
    style = FORMATS.get(verdict.unit, ".3g" if size < 1000 else ",.0f") if size < HUGE else ".3g"
    text = f"{verdict.value:{style}} {verdict.unit}".rstrip()
    if verdict.low is None:
        return text
    return f"{text} [{verdict.low:{style}}, {verdict.high:{style}}]"


def decide(question: str, seen: str, *cases: tuple, **value) -> Verdict:
    """The verdict of the first case that holds. A case is (whether it holds, decision,
    explanation, next step if any); `seen` and the explanation make the reason."""
    _, decision, explanation, *next_step = next(case for case in cases if case[0])
    reason = "; ".join(filter(None, (seen, explanation)))
    return Verdict(question, decision, **value, reason=reason, next_step="".join(next_step))


def in_nats(interval: Interval) -> dict:
    """The fields `value`, `low`, `high` and `unit` of a verdict about an interval."""
    ends = {} if math.isinf(interval.low) else {"low": interval.low, "high": interval.high}
    return {"value": interval.mean, "unit": NATS, **ends}


def compare(a: Run | Sequence[Run], b: Run | Sequence[Run]) -> Verdict:
    """Whether `a`, a run or the seeds of one model, is better than `b`: better, worse or tie;
    or unfinished, where a run has not ended.

    The value is the valid loss of a minus that of b. Two or more common seeds: Student's interval
    over them decides. Otherwise a difference is a tie within two standard deviations of what seeds
    alone cause, as measured at `study`. The reason says where test disagrees with valid. Raises
    MusotaError for runs that have not ended an epoch, for runs of several models on one side, and
    for different valid texts.
    """
    a, b = as_runs(a), as_runs(b)
    names = _labels(a[0], b[0])
    return _compare(a, b, f"Is “{names[0]}” better than “{names[1]}”?", ("better", "worse"))


def compare_with_matched(a: Run | Sequence[Run], transformer: Run | Sequence[Run]) -> Verdict:
    """Whether the architecture of `a` helps or hurts (or is a tie) against its parameter-matched
    transformer. Everything else is as in `compare`."""
    a, transformer = as_runs(a), as_runs(transformer)
    label = _labels(a[0], transformer[0])[0]
    question = f"Does the architecture of “{label}” help or hurt?"
    return _compare(a, transformer, question, ("helps", "hurts"))


def against_ngrams(run: Run, ppls: Mapping[str, float]) -> Verdict:
    """Whether a run is better than the bigram baseline; a tie within two standard deviations of
    what seeds alone cause. `ppls`: perplexities of the n-gram baselines, measured on the same
    tokens, by name."""
    ppl, step = _ppl([run]), "measure the learning rate, then train longer"
    ahead = math.log(ppls["bigram"]) - run.valid_loss  # nats
    side = Interval(ahead, ahead - 2 * SEED_SPREAD, ahead + 2 * SEED_SPREAD).beyond(0)
    return decide(
        f"Is “{run.title}” better than the bigram baseline?",
        " · ".join(f"{name} {baseline:,.0f}" for name, baseline in ppls.items()),
        (side > 0, "yes", ""),
        (side < 0, "no", "", step),
        (True, "tie", "within the spread of seeds", step),
        value=ppl,
        unit=PPL,
        good={1: True, -1: False}.get(side),
    )


def least_to_beat(ppls: Mapping[str, float], reported: float | None = None) -> Verdict:
    """What a model has to be better than: the bigram baseline. `ppls` as in `against_ngrams`;
    `reported`: a result on the same tokens to judge, in its place."""
    bigram = ppls["bigram"]
    reason = " · ".join(f"{name} {baseline:,.0f}" for name, baseline in ppls.items())
    if reported is None:
        question, decision = "Perplexity that a model must beat", "that of the bigram baseline"
        return Verdict(question, decision, bigram, unit=PPL, reason=reason)
    return decide(
        "Is the reported result better than the bigram baseline?",
        reason,
        (reported < bigram, "yes", ""),
        (True, "no", f"{reported:,.0f} was reported", "measure what the same settings reach here"),
        value=bigram,
        unit=PPL,
        good=reported < bigram,
    )


def as_runs(side: Run | Sequence[Run]) -> list[Run]:
    """A run, or the seeds of one model, as a list. Raises MusotaError for anything else."""
    runs = list(side) if isinstance(side, Iterable) and not isinstance(side, str) else [side]
    if not runs:
        raise MusotaError("compare needs a run, or several, on each side.")
    for run in runs:
        if not (getattr(run, "summary", None) or getattr(run, "diverged", False)):
            raise MusotaError(f"compare needs runs that have ended an epoch, not {run!r:.80}.")
    if len({run.key for run in runs}) > 1 or len({run.seed for run in runs}) < len(runs):
        listed = ", ".join(str(run.path) for run in runs)
        raise MusotaError(f"The runs of one side must differ in the seed alone: {listed}.")
    return runs


def representative(runs: Sequence[Run]) -> Run:
    """The run whose progress stands for all seeds of a model: one that diverged, else the first."""
    return next((run for run in runs if run.diverged), runs[0])


def _labels(a: Run, b: Run) -> tuple[str, str]:
    """What to call two runs: their titles, or names or folders where those are equal."""
    labels = [(a.title, b.title), (a.name, b.name), (str(a.path), str(b.path))]
    return next((pair for pair in labels if pair[0] != pair[1]), labels[0])


def _compare(a: list[Run], b: list[Run], question: str, words: tuple[str, str]) -> Verdict:
    """The verdict on checked runs; `words` are the decisions for better and for worse."""
    if a[0].valid_text != b[0].valid_text:
        raise MusotaError(
            f"{a[0].path} and {b[0].path} were validated on different tokens. If only their "
            "tokenizers differ, compare summary['bits_per_byte']."
        )
    decided = (  # by the side of 0 on which the difference lies
        {"decision": "tie", "good": None},
        {"decision": words[1], "good": False},
        {"decision": words[0], "good": True},
    )
    sides = zip(_labels(a[0], b[0]), (a, b), strict=True)
    runs = [(f"{label}, seed {run.seed},", run) for label, side in sides for run in side]
    if going := [f"{name} after epoch {len(run.history)}" for name, run in runs if not run.ended]:
        step = "train to the end"
        return Verdict(question, "unfinished", reason="; ".join(going), next_step=step)
    if facts := [f"{name} diverged at step {r.diverged_at}" for name, r in runs if r.diverged]:
        side = any(run.diverged for run in a) - any(run.diverged for run in b)
        return Verdict(question, **decided[side], unit=NATS, reason="; ".join(facts))
    if common := {run.seed for run in a} & {run.seed for run in b}:
        a, b = ([run for run in side if run.seed in common] for side in (a, b))
    interval, about_seeds, next_step = _difference(a, b, "valid_loss")
    of_a, of_b = (format(p, ",.1f" if p < HUGE else ".3g") for p in map(_ppl, (a, b)))
    measured = in_nats(interval) | decided[interval.beyond(0)]
    rates = dict.fromkeys(f"{side[0].experiment.training.learning_rate:g}" for side in (a, b))
    ppls = f"valid PPL {of_a} against {of_b}"
    reason = f"{ppls}, learning rate{'s' * (len(rates) > 1)} {' and '.join(rates)}; {about_seeds}"
    if all("test_loss" in run.summary for run in (*a, *b)):
        test, _, _ = _difference(a, b, "test_loss")
        if test.beyond(0) != interval.beyond(0):
            reason += f"; on test {decided[test.beyond(0)]['decision']}, {test}"
    return Verdict(question, **measured, reason=reason, next_step=next_step)


def _difference(a: list[Run], b: list[Run], loss: str) -> tuple[Interval, str, str]:
    """The difference in a loss of the summary, what its interval is over, and what to do next."""
    of_a, of_b = ({run.seed: run.summary[loss] for run in side} for side in (a, b))
    common = sorted(of_a.keys() & of_b.keys())
    if len(common) > 1:
        interval = seed_interval([of_a[seed] - of_b[seed] for seed in common])
        return interval, f"95 % interval over {len(common)} seeds", ""
    about, next_step = "no seed in common", "train both with the same seeds"
    if common:
        about, next_step = "one seed", "train both with more seeds"
    mean = float(np.mean([*of_a.values()]) - np.mean([*of_b.values()]))
    half = 2 * SEED_SPREAD * math.sqrt(1 / len(of_a) + 1 / len(of_b))
    interval = Interval(mean, mean - half, mean + half)
    about += "; the interval is from the spread of seeds at profile study"
    return interval, about, next_step


def _ppl(side: list[Run]) -> float:
    return exp_nats(float(np.mean([run.valid_loss for run in side])))
