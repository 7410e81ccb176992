"""The path from `optimized` to `redesigned`: one change a row, and each change taken back alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from musota.plan.architectures import CHANGES
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
    "quiet start": "updates start at 0: the first redesign",
    "embedding norm": "a token's cells enter at unit size",
    "whole queries": "the whole token asks, a block answers: the redesign",
}
FIRST, LAST = "quiet start", "whole queries"
# What was taken back: of the first redesign, and of the last.
TAKEN_BACK = {
    FIRST: {
        "norm before": "norms after each part",
        "tied": "an output layer of its own",
        "one table": "an affinity table a layer",
        "wide heads": "16 blocks half as wide",
        "rotary": "learned positions",
        "query norm": "queries and keys as they are",
        "blocks": "queries and keys that read the whole token",
        "gate": "no gate",
    },
    LAST: {
        "norm before": "norms after each part",
        "embedding norm": "a token's cells as they are",
        "blocks": "keys that read the whole token, too",
        "gate": "no gate",
    },
}
# The models that count, trained half as long again (is the order the same?), and which of them each
# is set against.
LONGER = {
    "optimized": ("", "MU-SOTA optimized"),
    LAST: ("optimized", "the redesign"),
    FIRST: (LAST, "the first redesign"),
    "modern dense twin": (LAST, "modern dense twin"),
    "modern dense twin of the first redesign": (LAST, "modern dense twin of the first redesign"),
    "dense GPT-2 twin": (LAST, "dense GPT-2 twin"),
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
        rows[change] = Step(title, redesign(start, n_block, ",".join(left)), last)
        last = change

    first, dense = "the first redesign", "modern dense twin"

    def add(kind: str, name: str, experiment: Experiment, against: str = LAST) -> None:
        rows[name] = Step(name, experiment, against, kind)

    add("twin", "dense GPT-2 twin", twin(start))
    for body, of, name in ((LAST, "", "the redesign"), (FIRST, f" of {first}", first)):
        add("twin", f"{dense}{of}", twin(rows[body].experiment))
        for change, back in TAKEN_BACK[body].items():
            n_block, *changes = (16,) if change == "wide heads" else (8, change)
            without = ",".join([rows[body].experiment.model.without, *changes])
            add("taken back", f"{name}, but {back}", redesign(start, n_block, without), body)
        named = redesign(start, without=rows[body].experiment.model.without.replace("names", ""))
        add("added", f"{name}, block I kept and C1 from the token before", named, body)
    without = rows[FIRST].experiment.model.without
    dropped = redesign(start.with_(dropout=0.2), without=without)
    add("added", f"{first}, dropout 0.2", dropped, FIRST)
    add("added", f"{dense} of {first}, dropout 0.2", twin(dropped), f"{dense} of {first}")
    for name, (against, title) in LONGER.items():
        longer = rows[name].experiment.with_(epochs=60, warmup_steps=training.warmup_steps * 3 // 2)
        before = against and f"{against}, longer"
        kind = "twin" if rows[name].kind == "twin" else "longer"
        rows[f"{name}, longer"] = Step(f"{title}, longer", longer, before, kind)
    return rows
