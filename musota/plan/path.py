"""The path from `optimized` to `redesigned`: one change a row, and each change taken back alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from musota.plan.architectures import CHANGES, TRIED
from musota.plan.config import Experiment
from musota.plan.profiles import redesign, twin
from musota.plan.registry import experiments

EARNED = 0.02  # nats that a change must bring


@dataclass(frozen=True)
class Step:
    """One row: its experiment at full size, and the row it is set against: a single change away,
    but of twins and `LONGER` ones."""

    title: str
    experiment: Experiment
    before: str = ""
    kind: str = "made"  # on the way; or added to the redesign, taken back from it, twin, longer


# In the order they were made. What a change saves goes into wider blocks, as far as it can.
MADE = {
    "one attention": "one attention, a head a block; the gate a table",
    "stream": "the gate no longer shrinks the residual stream",
    "norm before": "norms before each part, not after",
    "tied": "output tied to the embedding, wider blocks",
    "one table": "one affinity table for all layers, wider blocks",
    "wide heads": "8 blocks in place of 16, each twice as wide",
    "rotary": "rotary positions in place of learned ones",
    "query norm": "queries and keys normalised",
    "quiet start": "updates start at 0",
    "norm after": "norms after each part, as before: the redesign",
}
# What was taken back: of the redesign as it was before its last change, and as it is.
TAKEN_BACK = {
    "quiet start": {
        "tied": "an output layer of its own",
        "one table": "an affinity table a layer",
        "": "16 blocks half as wide",
        "rotary": "learned positions",
        "query norm": "queries and keys as they are",
    },
    "norm after": {"blocks": "queries and keys read every block", "gate": "no gate"},
}
# The models that count, trained half as long again (is the order the same once each has turned?),
# and which of them each is set against.
LONGER = {
    "optimized": ("", "MU-SOTA optimized"),
    "norm after": ("optimized", "the redesign"),
    "quiet start": ("norm after", "the redesign with norms before"),
    "modern dense twin": ("norm after", "modern dense twin"),
    "modern dense twin, norms before": ("norm after", "modern dense twin, norms before"),
    "dense GPT-2 twin": ("norm after", "dense GPT-2 twin"),
}


def steps() -> dict[str, Step]:
    """Every row by name, all of one size; of one budget, a third more epochs than the redesign, but
    the `LONGER` ones."""
    training = experiments["redesigned"].training
    training = replace(training, epochs=40, warmup_steps=training.warmup_steps * 4 // 3)
    start = Experiment(experiments["optimized"].model, training)
    rows, last = {"optimized": Step("MU-SOTA optimized", start)}, "optimized"
    left, n_block = [change for change in CHANGES if change not in ("blocks", "gate")], 16
    for change, title in MADE.items():
        n_block = 8 if change == "wide heads" else n_block
        left = [other for other in left if other != change]
        left += ["norm before"] * (change == "norm after")
        rows[change] = Step(title, redesign(start, n_block, ",".join(left)), last)
        last = change  # in the end the redesign

    def add(kind: str, name: str, experiment: Experiment, against: str = last) -> None:
        rows[name] = Step(name, experiment, against, kind)

    dense = "modern dense twin"
    add("twin", dense, twin(redesign(start)))
    add("twin", f"{dense}, norms before", twin(redesign(start, without="names")))
    add("twin", "dense GPT-2 twin", twin(start))
    for against, body, without, tried, title in (
        ("quiet start", ", norms before", "names", {"dropout": 0.2}, "dropout 0.2"),
        (last, "", TRIED, {"weight_decay": 0.3}, "weight decay 0.3"),
    ):
        for change, back in TAKEN_BACK[against].items():
            other = redesign(start, 8 if change else 16, f"{change},{without}")
            add("taken back", f"redesigned{body}, but {back}", other, against)
        named = redesign(start, without=without.replace("names", ""))
        add("added", f"redesigned{body}, block I kept and C1 from the token before", named, against)
        other = redesign(start.with_(**tried), without=without)
        add("added", f"redesigned{body}, {title}", other, against)
        add("added", f"{dense}{body}, {title}", twin(other), f"{dense}{body}")
    for name, (against, title) in LONGER.items():
        longer = rows[name].experiment.with_(epochs=60, warmup_steps=training.warmup_steps * 3 // 2)
        before = against and f"{against}, longer"
        kind = "twin" if rows[name].kind == "twin" else "longer"
        rows[f"{name}, longer"] = Step(f"{title}, longer", longer, before, kind)
    return rows
