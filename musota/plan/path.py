"""The path from `optimized` to `redesigned`: one change a row, and each change taken back alone."""

from dataclasses import dataclass, replace

from musota.plan.architectures import CHANGES
from musota.plan.config import Experiment
from musota.plan.profiles import changed, redesign, twin
from musota.plan.registry import experiments

EARNED = 0.02  # nats that a change must bring


@dataclass(frozen=True)
class Step:
    """One row: its experiment at full size, and the row it is set against: a single change away,
    but of twins and `LONGER` ones."""

    title: str
    experiment: Experiment
    before: str = ""
    kind: str = "made"  # on the way; or added, taken back, twin, longer


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
LAST = "whole queries"
# From it: each change alone, of `CHANGES` or of the blocks' width.
TAKEN_BACK = {
    "norm before": "norms after each part",
    "tied": "an output layer of its own",
    "one table": "an affinity table a layer",
    "wide heads": "16 blocks half as wide",
    "rotary": "learned positions",
    "query norm": "queries and keys as they are",
    "quiet start": "maps that all start at 0.02",
    "embedding norm": "a token's cells as they are",
    "blocks": "keys that read the whole token, too",
    "gate": "no gate",
}
# Tried against overfitting, on the redesign and its twin alike.
REGULARISED = {
    "averaged weights": {"averaging": 0.1},
    "weight decay 0.3": {"weight_decay": 0.3},
    "dropout 0.2": {"dropout": 0.2},
}
TWIN, GPT2 = "modern dense twin", "dense GPT-2 twin"

# The models that count, trained half as long again: is the order the same? Their titles, and which
# of them each is set against.
LONGER = {
    "optimized": ("MU-SOTA optimized", ""),
    LAST: ("the redesign", "optimized"),
    TWIN: (TWIN, LAST),
    GPT2: (GPT2, LAST),
}


def steps() -> dict[str, Step]:
    """Every row by name, all of one size; of one budget, a third more epochs than the redesign, but
    those that are longer."""
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

    def add(kind: str, name: str, experiment: Experiment, against: str = LAST) -> None:
        rows[name] = Step(name, experiment, against, kind)

    add("twin", GPT2, twin(start))
    add("twin", TWIN, twin(rows[LAST].experiment))
    for change, back in TAKEN_BACK.items():
        n_block, *changes = (16,) if change == "wide heads" else (8, change)
        without = ",".join([*left, *changes])
        add("taken back", f"the redesign, but {back}", redesign(start, n_block, without))
    names = "block I kept and C1 from the token before"
    add("added", f"the redesign, {names}", redesign(start, without=""))
    add("added", f"{TWIN}, {names}", redesign(start, without="blocks,gate"), TWIN)
    for name, (title, against) in LONGER.items():
        longer = rows[name].experiment.with_(epochs=60, warmup_steps=training.warmup_steps * 3 // 2)
        before = against and f"{against}, longer"
        kind = "twin" if rows[name].kind == "twin" else "longer"
        rows[f"{name}, longer"] = Step(f"{title}, longer", longer, before, kind)
        for tried, fields in REGULARISED.items() if name in (LAST, TWIN) else ():
            regularised = changed(longer, fields)
            add("added", f"{title}, longer, {tried}", regularised, f"{name}, longer")
    return rows
