"""The root-cause grid: suspected causes of the stalled run, the runs that decide on them, and what
they say."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np

from musota.lab.grid_runs import GridRun, Row
from musota.lab.stats import RELEVANT, Interval, pooled_contrast
from musota.lab.verdicts import Verdict, in_nats
from musota.registry import experiments

MISSED = "not in the plan"
FACTORS = (1 / 10, 1 / 3, 1, 3, 10, 30, 100)  # of the learning rate
Rows = Mapping[str, Mapping[int, Row]]  # by name and seed


@dataclass(frozen=True)
class Suspect:
    """A suspected cause: two grid runs, which differ in the change that would remove it."""

    name: str
    confidence: str  # the plan's (reported)
    before: str
    after: str
    advice: str  # what to do if it is a cause


@dataclass(frozen=True)
class Cause(Suspect):
    """A suspect with what was measured."""

    effect: Interval | None  # change of the valid loss; None where a run diverged
    ppl_before: float
    ppl_after: float
    decision: str  # cause | not a cause | undecided
    changed: str  # the fields that differ, at the size at which the two runs were trained


# Changes that the plan makes, a grid run each: suspect, the plan's confidence, advice, fields.
PLANNED = {
    "epochs": ("too few epochs", "70 %", "train longer", "epochs"),
    "learning_rate": ("learning rate too high", "60 %", "lower the learning rate", "learning_rate"),
    "warmup": ("warm-up too short", "50 %", "warm up longer", "warmup_steps"),
    "sequence": (
        "sequences too short",
        "40 %",
        "train on longer sequences",
        "max_seq_len batch_size accumulation_steps",
    ),
}
# Changes that the plan is unsure of or did not think of: the same, with new values.
SMALLER = {"matrix_size": 6, "n_block": 8, "n_head": 6}
SMALL_STEPS = {"batch_size": 2, "warmup_steps": 1500}
OTHERS = {
    "blocks_8": ("too many blocks", "unknown", "use fewer blocks", {"n_block": 8}),
    "layers_8": ("too many layers", "unknown", "use fewer layers", {"n_layer": 8}),
    "matrix_6": ("matrix too large", "unknown", "use the smaller matrix", SMALLER),
    "small_steps": ("too many tokens a step", MISSED, "take smaller steps", SMALL_STEPS),
}
MORE_TEXT, PREFER = "get more text", "prefer the transformer"
COMPARE = "compare with the transformer, each at its own best rate"
DATA = "too little data (in as many steps)"
ARCHITECTURE = "architecture (a matched transformer instead)"


def grid(profile: str) -> tuple[dict[str, GridRun], list[Suspect], range]:
    """The grid runs of a profile by name, the suspects they decide on, and the seeds.

    From `original` one suspect at a time takes its value in `optimized`, or one that the plan did
    not think of. `tiny` has two runs.
    """
    original, planned = experiments["original"], experiments["optimized"].fields()
    runs, suspects = {"original": GridRun(original)}, []
    for key, (name, confidence, advice, changes) in (PLANNED | OTHERS).items():
        if key in PLANNED:
            changes = {field: planned[field] for field in changes.split()}
        runs[key] = GridRun(original.with_(**changes))
        suspects.append(Suspect(name, confidence, "original", key, advice))
    if profile == "tiny":
        return {key: runs[key] for key in ("original", "learning_rate")}, suspects[1:2], range(2)
    for factor in FACTORS:
        changed = original.with_(learning_rate=factor * original.training.learning_rate)
        runs[at_rate("dense", factor)] = GridRun(changed, matched=True)
        runs.setdefault(after := at_rate("original", factor), GridRun(changed))
        if factor > 1:
            name = f"learning rate too low (× {factor})"
            suspects.append(Suspect(name, MISSED, "original", after, "raise the learning rate"))
    twice = original.with_(epochs=2 * original.training.epochs)
    runs["original_half"] = GridRun(twice, 1 / 2)  # in equally many steps
    suspects.append(Suspect(DATA, "30 %", "original_half", "original", MORE_TEXT))
    suspects.append(Suspect(ARCHITECTURE, "unknown", "original", "dense", COMPARE))
    return runs, suspects, range(2 if profile == "quick" else 3)


def at_rate(name: str, factor: float) -> str:
    """The grid run that is `original` or `dense` at a factor of its learning rate."""
    if (name, factor) == ("original", 1 / 3):
        return "learning_rate"  # the plan's own 1e-4
    return name if factor == 1 else f"{name}_rate_x{factor:.3g}"


def varied_fields(runs: Mapping[str, GridRun]) -> set[str]:
    """The fields in which the MU-SOTA runs of a grid differ."""
    described = [run.experiment.fields() for run in runs.values()]
    return {name for name in described[0] if len({fields[name] for fields in described}) > 1}


def by_name(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """The rows of a table by name and seed."""
    named = {row.name: {} for row in rows}
    for row in rows:
        named[row.name][row.seed] = row
    return named


def valid_losses(rows: Rows) -> dict[str, dict[int, float]]:
    """Best valid losses of recorded runs by name and seed, of those trained with every seed of the
    grid. Runs that are no longer part of the grid count too: they share the spread of seeds."""
    runs = Counter(seed for name in grid("full")[0] for seed in rows.get(name, ()))
    seeds = {seed for seed in runs if 2 * runs[seed] > max(runs.values())}  # no stray runs
    return {
        name: {seed: by_seed[seed].best_valid_loss for seed in sorted(seeds)}
        for name, by_seed in rows.items()
        if by_seed.keys() >= seeds
    }


def sweep_losses(rows: Rows, name: str) -> dict[float, list[float]]:
    """Valid losses of every seed by learning rate, of `original` or `dense` at each rate."""
    losses = valid_losses(rows)
    rates = {r: _first(rows, r).experiment.training.learning_rate for r in _swept(losses, name)}
    return {rate: [*losses[run].values()] for run, rate in rates.items()}


def _swept(losses: Mapping, name: str) -> list[str]:
    """The recorded grid runs that are `original` or `dense` at each learning rate, ascending."""
    return [run for run in (at_rate(name, factor) for factor in FACTORS) if run in losses]


def _first(rows: Rows, name: str) -> Row:
    return next(iter(rows[name].values()))


def judge(rows: Rows) -> list[Cause]:
    """The suspects whose runs are recorded, judged, the largest gain first.

    A cause lowers the loss by the relevant difference or more, with a 95 % interval below 0; what
    certainly lowers it by less is not a cause. A run that ends above a uniform guess with any seed
    has diverged: it gets no interval, and its suspect is not a cause. The architecture is judged
    once more with both models at their best rates, which stays undecided at the edge of a sweep.
    """
    losses = valid_losses(rows)
    judged = (_judge_one(one, rows, losses) for one in grid("full")[1])
    causes = [cause for cause in judged if cause]
    sweeps = [_swept(losses, name) for name in ("original", "dense")]
    if all(len(sweep) > 1 for sweep in sweeps):
        pair = [min(sweep, key=lambda run: np.mean([*losses[run].values()])) for sweep in sweeps]
        name = f"{ARCHITECTURE}, each at its best rate"
        fair = _judge_one(Suspect(name, "unknown", *pair, PREFER), rows, losses)
        if any(run in (sweep[0], sweep[-1]) for run, sweep in zip(pair, sweeps, strict=True)):
            fair = replace(fair, name=f"{name} (at an edge)", decision="undecided")
        else:  # the comparison at the best rates has been made
            causes = [replace(c, advice="") if c.advice == COMPARE else c for c in causes]
        causes.append(fair)
    return sorted(causes, key=lambda cause: cause.effect.mean if cause.effect else math.inf)


def _judge_one(suspect: Suspect, rows: Rows, losses: Mapping) -> Cause | None:
    """A judged suspect; None where one of its two runs is missing."""
    pair = suspect.before, suspect.after
    if not {*pair} <= losses.keys():
        return None
    guess = math.log(_first(rows, suspect.before).experiment.model.vocab_size)
    usable = {name: of_run for name, of_run in losses.items() if max(of_run.values()) <= guess}
    effect, decision = None, "not a cause" if suspect.before in usable else "undecided"
    if {*pair} <= usable.keys():
        effect = pooled_contrast(usable, *pair)
        if effect.low <= -RELEVANT:
            certain = effect.high < 0 and effect.mean <= -RELEVANT
            decision = "cause" if certain else "undecided"
    ppls = [float(np.exp(np.mean([*losses[name].values()]))) for name in pair]
    changed = _changed(*(_first(rows, name) for name in pair))
    return Cause(*astuple(suspect), effect, *ppls, decision, changed)


def _changed(before: Row, after: Row) -> str:
    """The fields in which two rows differ, with both values: `learning_rate 0.003 → 0.009`."""
    old, new = (
        {"d_model": row.experiment.model.d_model}
        | row.experiment.fields()
        | {"training tokens": row.train_tokens}
        for row in (before, after)
    )
    if type(before.experiment.model) is type(after.experiment.model):
        del old["d_model"]
    differing = [name for name in old if name in new and old[name] != new[name]]
    return ", ".join(f"{name} {old[name]:,.9g} → {new[name]:,.9g}" for name in differing)


def advice(causes: Sequence[Cause]) -> Verdict:
    """The cause with the largest certain gain, and what to change, the largest gain first."""
    question = "Which cause holds the model back most in the grid runs?"
    left = [cause for cause in causes if cause.decision == "cause" and cause.advice]
    if not left:
        reason = f"suspects measured: {len(causes)}; none certainly costs {RELEVANT} nats"
        return Verdict(question, "none found", reason=reason)
    most, steps = left[0], list(dict.fromkeys(cause.advice for cause in left))[:3]
    order = f"{', then '.join(steps)}; measure again after each"
    reason = f"change of the valid loss when it is removed: {most.changed}"
    found = in_nats(most.effect) | {"reason": reason, "next_step": order}
    return Verdict(question, most.name, good=True, **found)
