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


# In the order they were made: a change, and what it is to take it back. What a change saves goes
# into wider blocks, as far as it can. Norms before were tried, and given up last: what was made
# with them was taken back with them, what is MU-SOTA's own from the redesign itself.
FORWARD = {
    "stream": ("the gate no longer shrinks the residual stream", ""),
    "norm before": ("norms before each part, not after", ""),
    "tied": ("output tied to the embedding, wider blocks", "an output layer of its own"),
    "one table": ("one affinity table for all layers, wider blocks", "an affinity table a layer"),
    "wide heads": ("8 blocks in place of 16, each twice as wide", "16 blocks half as wide"),
    "rotary": ("rotary positions in place of learned ones", "learned positions"),
    "query norm": ("queries and keys normalised", "queries and keys as they are"),
    "quiet start": ("updates start at 0", ""),
    "norm after": ("norms after each part, as before: the redesign", ""),
    "blocks": ("", "queries and keys read every block"),
    "gate": ("", "no gate"),
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
    left, n_block = [change for change in CHANGES if change not in ("blocks", "gate")], 16
    rows, last = {"optimized": Step("MU-SOTA optimized", start)}, "optimized"
    first = {"one attention": ("one attention, a head a block; the gate a table", "")}
    for change, (title, _) in (first | FORWARD).items():
        if title:
            n_block = 8 if change == "wide heads" else n_block
            left = [other for other in left if other != change]
            left += ["norm before"] * (change == "norm after")
            rows[change] = Step(title, redesign(start, n_block, ",".join(left)), last)
            last = change  # in the end the redesign
    before, after = "quiet start", last
    others = {
        "modern dense twin": (twin(rows[after].experiment), after, "twin"),
        "modern dense twin, norms before": (twin(rows[before].experiment), after, "twin"),
        "dense GPT-2 twin": (twin(start), after, "twin"),
    }
    for change, (title, back) in FORWARD.items():
        if back:
            body, name, without = (
                (before, ", norms before,", "names") if title else (after, ",", TRIED)
            )
            size = (16, without) if change == "wide heads" else (8, f"{change},{without}")
            others[f"redesigned{name} but {back}"] = redesign(start, *size), body, "taken back"
    named = "block I kept and C1 from the token before"
    others[f"redesigned, {named}"] = redesign(start, without="norm before"), after, "added"
    others[f"redesigned, norms before, {named}"] = redesign(start, without=""), before, "added"
    dropped = redesign(start.with_(dropout=0.2), without="names")
    others["redesigned, norms before, dropout 0.2"] = dropped, before, "added"
    dense = "modern dense twin, norms before"
    others[f"{dense}, dropout 0.2"] = twin(dropped), dense, "added"
    rows |= {name: Step(name, *other) for name, other in others.items()}
    for name, (against, title) in LONGER.items():
        longer = rows[name].experiment.with_(epochs=60, warmup_steps=training.warmup_steps * 3 // 2)
        before = against and f"{against}, longer"
        kind = "twin" if rows[name].kind == "twin" else "longer"
        rows[f"{name}, longer"] = Step(f"{title}, longer", longer, before, kind)
    return rows
