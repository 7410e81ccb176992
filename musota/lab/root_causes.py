"""The root-cause grid: suspected causes of the stalled run, the runs that decide on them, and what
they say."""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from musota.lab.grid_runs import GridRun, Row
from musota.lab.profiles import GRID_PROFILES, scaled
from musota.lab.stats import Interval, pooled_contrast, weights_per_doubling
from musota.lab.sweep import RELEVANT, lowest
from musota.lab.verdicts import Verdict, in_nats
from musota.registry import experiments

MISSED = "not in the plan"
FACTORS = (1 / 10, 1 / 3, 1, 3, 10, 30, 100)  # of the learning rate
DATA_STARVED = 0.1  # nats/token gained per doubling of the text
Rows = Mapping[str, Mapping[int, Row]]  # by name and seed


@dataclass(frozen=True)
class Suspect:
    """A suspected cause. The grid runs `before` and `after` differ in the change that would remove
    it; `advice` says in words what to do if it is a cause."""

    name: str
    confidence: str  # the plan's (reported)
    before: str
    after: str
    advice: str


@dataclass(frozen=True)
class Cause(Suspect):
    """A suspect with what was measured: the change of the valid loss (None where a run diverged),
    perplexities before and after, and the decision. `changed` names the fields that differ between
    the two runs, at the size at which they were trained."""

    effect: Interval | None
    ppl_before: float
    ppl_after: float
    decision: str  # cause | not a cause | undecided
    changed: str


# Changes that the plan makes, a grid run each: suspect, the plan's confidence, advice, fields.
PLANNED = {
    "epochs": ("too few epochs (10 → 30)", "70 %", "train longer", ("epochs",)),
    "learning_rate": (
        "learning rate too high (3e-4 → 1e-4)",
        "60 %",
        "lower the learning rate",
        ("learning_rate",),
    ),
    "warmup": (
        "warm-up too short (500 → 2,000 steps)",
        "50 %",
        "lengthen warm-up",
        ("warmup_steps",),
    ),
    "sequence": (
        "sequences too short (128 → 192, batch 24 → 32)",
        "40 %",
        "train on longer sequences",
        ("max_seq_len", "batch_size", "accumulation_steps"),
    ),
}
# Changes that the plan is unsure of or did not think of: the same, with new values.
SMALLER = {"matrix_size": 6, "n_block": 8, "n_head": 6}
SMALL_STEPS = {"batch_size": 2, "warmup_steps": 1500}
OTHERS = {
    "blocks_8": ("16 blocks (→ 8 of 2×4)", "unknown", "use fewer blocks", {"n_block": 8}),
    "layers_8": ("12 layers (→ 8)", "unknown", "use fewer layers", {"n_layer": 8}),
    "matrix_6": ("8×8 matrix (→ 6×6, 8 blocks)", "unknown", "use the smaller matrix", SMALLER),
    "small_steps": ("too many tokens a step (÷ 3)", MISSED, "take smaller steps", SMALL_STEPS),
}
MORE_TEXT, PREFER = "get more text", "prefer the transformer"
COMPARE = "compare with the transformer, each at its own best rate"
ARCHITECTURE = "architecture (→ parameter-matched transformer)"
COMMANDS = {  # for advice that changes no field
    MORE_TEXT: "run --only 01,02,03,04 --corpus wikitext-103",
    COMPARE: "evidence --only sweep,tuned",
    PREFER: "run --only 03",
}


def grid(profile: str) -> tuple[dict[str, GridRun], list[Suspect], range]:
    """The grid runs of a profile by name, the suspects they decide on, and the seeds.

    From `original` one suspect at a time takes its value in `optimized`, or one that the plan did
    not think of; `study` and `full` also put one value at a time back in `optimized`. `tiny` has
    two runs.
    """
    original, optimized = experiments["original"], experiments["optimized"]
    new, old = optimized.fields(), original.fields()
    runs, suspects, back = {"original": GridRun(original)}, [], []
    for key, (name, confidence, advice, fields) in PLANNED.items():
        runs[key] = GridRun(original.with_(**{field: new[field] for field in fields}))
        suspects.append(Suspect(name, confidence, "original", key, advice))
        back.append(replace(suspects[-1], before=f"without_{key}", after="optimized"))
    if profile == "tiny":
        return {key: runs[key] for key in ("original", "learning_rate")}, suspects[1:2], range(2)
    for key, (name, confidence, advice, changes) in OTHERS.items():
        runs[key] = GridRun(original.with_(**changes))
        suspects.append(Suspect(name, confidence, "original", key, advice))
    for factor in FACTORS:
        changed = original.with_(learning_rate=factor * original.training.learning_rate)
        end = "" if factor == 1 else f"_rate_x{factor:.3g}"
        runs[f"dense{end}"] = GridRun(changed, matched=True)
        if factor not in (1 / 3, 1):  # a third is the plan's own 1e-4
            runs[f"original{end}"] = GridRun(changed)
        if factor > 1:
            name, after = f"learning rate too low (× {factor})", f"original{end}"
            suspects.append(Suspect(name, MISSED, "original", after, "raise the learning rate"))
    epochs = original.training.epochs
    for end, parts in (("half", 2), ("quarter", 4)):  # in equally many steps
        runs[f"original_{end}"] = GridRun(original.with_(epochs=parts * epochs), 1 / parts)
    suspects += _general("original", "dense")
    if profile == "quick":
        return runs, suspects, range(2)
    runs["optimized"] = GridRun(optimized)
    runs["optimized_dense"] = GridRun(optimized, matched=True)
    longer = optimized.with_(epochs=2 * optimized.training.epochs)
    runs["optimized_half"] = GridRun(longer, 1 / 2)
    for key, (*_, fields) in PLANNED.items():
        kept = {field: old[field] for field in fields}
        runs[f"without_{key}"] = GridRun(optimized.with_(**kept))
    back += _general("optimized", "optimized_dense")
    suspects += [replace(one, name=f"from optimized: {one.name}") for one in back]
    return runs, suspects, range(3)


def _general(name: str, transformer: str) -> list[Suspect]:
    """The suspects that are not a setting: data and architecture."""
    data = "too little data (half → all, same steps)"
    return [
        Suspect(data, "30 %", f"{name}_half", name, MORE_TEXT),
        Suspect(ARCHITECTURE, "unknown", name, transformer, COMPARE),
    ]


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
    """Best valid losses of grid runs by name and seed, of those trained with every seed."""
    known = {name: rows[name] for name in grid("full")[0] if name in rows}
    seeds = {seed for by_seed in known.values() for seed in by_seed}
    return {
        name: {seed: by_seed[seed].best_valid_loss for seed in sorted(seeds)}
        for name, by_seed in known.items()
        if by_seed.keys() == seeds
    }


def sweep_losses(rows: Rows, name: str) -> dict[float, list[float]]:
    """Valid losses of every seed by learning rate, all else as in the grid run `name`."""
    losses = valid_losses(rows)
    return {rate: [*losses[run].values()] for rate, run in _sweep(rows, name).items()}


def _sweep(rows: Rows, name: str) -> dict[float, str]:
    """By learning rate, the grid runs that differ from the run `name` in nothing else."""
    ones = {run: _first(rows, run) for run in valid_losses(rows)}
    if name not in ones:
        return {}
    experiment, found = ones[name].experiment, {}
    for run, row in ones.items():
        rate = row.experiment.training.learning_rate
        same_text = row.fingerprint == ones[name].fingerprint
        if same_text and row.experiment == experiment.with_(learning_rate=rate):
            found[rate] = run
    return dict(sorted(found.items()))


def _first(rows: Rows, name: str) -> Row:
    return next(iter(rows[name].values()))


def judge(rows: Rows, suspects: Sequence[Suspect] = ()) -> list[Cause]:
    """The suspects of a grid (those given, or all) as far as it has been trained, the largest gain
    first.

    A cause lowers the loss by the relevant difference or more, with a 95 % interval below 0; what
    certainly lowers it by less is not a cause. A run that ends above a uniform guess with any seed
    has diverged: it gets no interval, and its suspect is not a cause. The architecture is judged
    once more with both models at their best rates, which stays undecided at the edge of a sweep.
    """
    losses, suspects = valid_losses(rows), [*(suspects or grid("full")[1])]
    sweeps = {name: sweep_losses(rows, name) for name in ("original", "dense")}
    fair, at_edge = None, False
    if all(len(sweep) > 1 for sweep in sweeps.values()):
        best = {name: lowest(sweep) for name, sweep in sweeps.items()}
        at_edge = any(best[name] in (min(sweep), max(sweep)) for name, sweep in sweeps.items())
        name = f"{ARCHITECTURE}, each at its best rate" + (" (at an edge)" if at_edge else "")
        fair = Suspect(name, "unknown", *(_sweep(rows, n)[r] for n, r in best.items()), PREFER)
        if not at_edge:  # the comparison at the best rates has been made
            suspects = [replace(s, advice="") if s.advice == COMPARE else s for s in suspects]
        suspects.append(fair)
    causes = [
        replace(cause, decision="undecided") if at_edge and cause.name == fair.name else cause
        for cause in (_judge_one(s, rows, losses) for s in suspects)
        if cause
    ]
    return sorted(causes, key=lambda cause: cause.effect.mean if cause.effect else math.inf)


def _judge_one(suspect: Suspect, rows: Rows, losses: Mapping) -> Cause | None:
    """A judged suspect; None where one of its two runs is missing."""
    pair = suspect.before, suspect.after
    if not {*pair} <= losses.keys():
        return None
    guess = math.log(_first(rows, suspect.before).experiment.model.vocab_size)
    usable = {name: of_run for name, of_run in losses.items() if max(of_run.values()) <= guess}
    effect, decision = None, "not a cause"
    if {*pair} <= usable.keys():
        effect = pooled_contrast(usable, {suspect.before: -1, suspect.after: 1})
        if effect.low <= -RELEVANT:
            certain = effect.high < 0 and effect.mean <= -RELEVANT
            decision = "cause" if certain else "undecided"
    before, after = (float(np.exp(np.mean([*losses[name].values()]))) for name in pair)
    changed = _changed(*(_first(rows, name) for name in pair))
    return Cause(
        **asdict(suspect),
        effect=effect,
        ppl_before=before,
        ppl_after=after,
        decision=decision,
        changed=changed,
    )


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


def causes_left(causes: Sequence[Cause]) -> list[Cause]:
    """The causes about which something is left to do."""
    return [cause for cause in causes if cause.decision == "cause" and cause.advice]


def advice(causes: Sequence[Cause]) -> Verdict:
    """The cause with the largest certain gain, and what to change, the largest gain first."""
    question, left = "Which cause holds the model back most?", causes_left(causes)
    if not left:
        reason = "no suspect lowers the loss by enough, and certainly"
        return Verdict(question, "none found", reason=reason)
    steps = list(dict.fromkeys(cause.advice for cause in left))[:3]
    order = f"{', then '.join(steps)}; measure again after each"
    reason = f"the change of the valid loss without it ({left[0].changed})"
    return Verdict(
        question, left[0].name, **in_nats(left[0].effect), reason=reason, next_step=order
    )


def next_command(causes: Sequence[Cause], profile: str, corpus: str) -> str:
    """A sentence with the command that makes the change of the largest certain gain, and the same
    change as a parameter of the notebooks; `corpus` as the user named it."""
    left = causes_left(causes)
    if not left:
        return "No change is advised: more seeds, or a larger profile, may decide."
    step, changes = left[0].advice, {}
    if step not in COMMANDS:
        changes = advised_changes(left[0], profile)
    line = f"{COMMANDS.get(step, 'run --only 02,03,04')} --profile {profile}"
    line += "" if "--corpus" in line else f" --corpus {shlex.quote(corpus)}"
    line += "".join(f" --set {name}={value}" for name, value in changes.items())
    notebooks = f", or in notebooks 02 to 04 `changes = {changes}`" if changes else ""
    return f"To {step}: `musota {line}`{notebooks}."


def advised_changes(suspect: Suspect, profile: str) -> dict[str, float]:
    """What to change in `optimized` at the size of a profile, by field; nothing where `optimized`
    has it already. Rates are those that were measured. Counts change in proportion, because the
    models of the grid are smaller."""
    pair = [grid(profile)[0][name] for name in (suspect.before, suspect.after)]
    before, after = (run.at(GRID_PROFILES[profile]).fields() for run in pair)
    full, planned = pair[1].experiment.fields(), experiments["optimized"].fields()
    present, changes = scaled("optimized", profile).fields(), {}
    for name, new in after.items():
        value = float(f"{new:.9g}") if isinstance(new, float) else new
        if isinstance(new, int):
            in_proportion = max(1, round(present[name] * new / max(1, before[name])))
            value = present[name] if full[name] == planned[name] else in_proportion
        if new != before[name] and value != present[name]:
            changes[name] = value
    return changes


def data_losses(rows: Rows, name: str = "original") -> dict[int, dict[int, float]]:
    """Valid losses by number of training tokens and seed, of a quarter, a half and all of the text
    read in equally many steps."""
    losses, names = valid_losses(rows), (f"{name}_quarter", f"{name}_half", name)
    return {_first(rows, run).train_tokens: losses[run] for run in names if run in losses}


def data_halving(losses: Mapping[int, Mapping[int, float]]) -> Verdict:
    """Whether more text would lower the loss by more than 0.1 nats/token per doubling. Argument:
    `data_losses` of two or more amounts."""
    weights = weights_per_doubling(np.array([*losses], float))
    slope = pooled_contrast(losses, dict(zip(losses, weights, strict=True)))
    decision = {-1: "yes", 0: "undecided", 1: "no"}[slope.beyond(-DATA_STARVED)]
    reason = f"per doubling of the training text, {len(losses)} amounts in equally many steps"
    step = MORE_TEXT if decision == "yes" else ""
    question = "Is the model short of training text?"
    return Verdict(question, decision, **in_nats(slope), reason=reason, next_step=step)
