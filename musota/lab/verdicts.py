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
FORMATS = {NATS: "+.3f", PPL: ",.1f", PERCENT: ".1f"}


@dataclass(frozen=True)
class Verdict:
    """The answer to one question. `decision` is a short fixed word for programs to compare;
    `value` with its interval is in `unit`; `reason` is a clause that says what was measured."""

    question: str
    decision: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    reason: str = ""
    next_step: str = ""

    def __str__(self) -> str:
        """The verdict as a sentence."""
        because = "; ".join(filter(None, (measured(self), self.reason)))
        answer = self.decision[:1].upper() + self.decision[1:]
        colon = "" if self.question.endswith("?") else ":"  # a statistic is no question
        step = f" Next: {self.next_step}." if self.next_step else ""
        return f"{self.question}{colon} {answer}{f' ({because})' if because else ''}.{step}"


def measured(verdict: Verdict) -> str:
    """The value of a verdict with its unit and interval; empty where it has none."""
    if verdict.value is None:
        return ""
    style = FORMATS.get(verdict.unit, ".3g" if abs(verdict.value) < 1000 else ",.0f")
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
    """Whether `a`, a run or the seeds of one model, is better than `b`: better, worse or tie.

    The value is the valid loss of a minus that of b. Two or more common seeds: Student's interval
    over them decides. Otherwise a difference within twice the spread of seeds measured at `study`
    is a tie. Raises MusotaError for runs that have not ended an epoch, for runs of several models
    on one side, and for different valid texts.
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
    """The best n-gram baseline that a run is better than. `ppls`: perplexities measured on the
    same tokens, by name. The decision is a name, or "none"."""
    ppl = _ppl([run])
    best = min((name for name in ppls if ppl < ppls[name]), key=ppls.get, default="none")
    reason = " · ".join(f"{name} {baseline:,.0f}" for name, baseline in ppls.items())
    question = f"Which n-gram baseline is “{run.title}” better than?"
    return Verdict(question, best, ppl, unit=PPL, reason=reason)


def as_runs(side: Run | Sequence[Run]) -> list[Run]:
    """A run, or the seeds of one model, as a list. Raises MusotaError for anything else."""
    runs = list(side) if isinstance(side, Iterable) and not isinstance(side, str) else [side]
    if not runs:
        raise MusotaError("compare needs a run, or several, on either side.")
    for run in runs:
        if not (getattr(run, "summary", None) or getattr(run, "diverged", False)):
            raise MusotaError(f"compare needs runs that have ended an epoch, not {run!r:.80}.")
    if len({run.key for run in runs}) > 1 or len({run.seed for run in runs}) < len(runs):
        listed = ", ".join(str(run.path) for run in runs)
        raise MusotaError(f"The runs of one side must differ in the seed alone: {listed}.")
    return runs


def _labels(a: Run, b: Run) -> tuple[str, str]:
    """What to call two runs: their titles, or names or folders where those are equal."""
    labels = [(a.title, b.title), (a.name, b.name), (str(a.path), str(b.path))]
    return next((pair for pair in labels if pair[0] != pair[1]), labels[0])


def _compare(a: list[Run], b: list[Run], question: str, words: tuple[str, str]) -> Verdict:
    """The verdict on checked runs; `words` are the decisions for better and for worse."""
    if a[0].valid_text != b[0].valid_text:
        raise MusotaError(
            f"{a[0].path} and {b[0].path} were validated on different texts: "
            "compare their bits per byte (.summary) alone."
        )
    facts = [*_incomplete(a), *_incomplete(b)]
    diverged = [any(run.diverged for run in side) for side in (a, b)]
    if any(diverged):
        decision = "tie" if all(diverged) else words[0] if diverged[1] else words[1]
        return Verdict(question, decision, unit=NATS, reason="; ".join(facts))
    interval, about_seeds, next_step = _difference(a, b)
    decision = {-1: words[0], 0: "tie", 1: words[1]}[interval.beyond(0)]
    ppls = "valid PPL {:,.1f} against {:,.1f}".format(*map(_ppl, (a, b)))
    reason = "; ".join([f"{ppls}, {_rates(a[0], b[0])}", about_seeds, *facts])
    return Verdict(question, decision, **in_nats(interval), reason=reason, next_step=next_step)


def _difference(a: list[Run], b: list[Run]) -> tuple[Interval, str, str]:
    """The difference in valid loss, what its interval is over, and what to do next."""
    of_a, of_b = ({run.seed: run.valid_loss for run in side} for side in (a, b))
    common = sorted(of_a.keys() & of_b.keys())
    if len(common) > 1:
        interval = seed_interval([of_a[seed] - of_b[seed] for seed in common])
        return interval, f"95 % interval over {len(common)} seeds", ""
    about, next_step = "no seed in common", "train both with the same seeds"
    if common:
        about, next_step = "one seed", "train both with more seeds"
        of_a, of_b = ({seed: side[seed] for seed in common} for side in (of_a, of_b))
    mean = float(np.mean([*of_a.values()]) - np.mean([*of_b.values()]))
    interval = Interval(mean, mean - 2 * SEED_SPREAD, mean + 2 * SEED_SPREAD)
    return interval, f"{about}; the spread of seeds measured at study is the yardstick", next_step


def _incomplete(side: list[Run]) -> list[str]:
    """A clause for each run that diverged or has not finished."""
    clauses = []
    for run in side:
        about = f"{run.title}, seed {run.seed},"
        if run.diverged:
            clauses.append(f"{about} diverged at step {run.diverged_at}")
        elif not run.finished:
            clauses.append(f"{about} is unfinished after epoch {run.history.epoch.max()}")
    return clauses


def _ppl(side: list[Run]) -> float:
    return exp_nats(float(np.mean([run.valid_loss for run in side])))


def _rates(a: Run, b: Run) -> str:
    rates = [run.experiment.training.learning_rate for run in (a, b)]
    if rates[0] == rates[1]:
        return f"both at learning rate {rates[0]:g}"
    return f"at learning rates {rates[0]:g} and {rates[1]:g}"
