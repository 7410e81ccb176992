"""The suspected causes, and the cells of the grid that decide on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from musota.plan.config import Experiment
from musota.plan.profiles import twin
from musota.plan.registry import experiments

MISSED = "not in the plan"


@dataclass(frozen=True)
class Suspect:
    """A suspected cause: the cells `before` and `after` differ in what would be mended."""

    name: str
    confidence: str  # the plan's (reported)
    before: str
    after: str
    advice: str  # what to do if it is a cause


@dataclass(frozen=True)
class Cell:
    """One point of the grid: an experiment at full size, and its share of the training text."""

    experiment: Experiment
    share: float = 1.0


SWEEP = (1 / 10, 1 / 3, 1, 3, 10, 30, 100)  # wide enough for MU-SOTA and for the dense twin


# What the plan changes from `original` to `optimized`: fields, suspicion, its confidence, advice.
_PLAN = {
    "epochs": (("epochs",), "too few epochs (10 → 30)", "70 %", "train longer"),
    "learning_rate": (
        ("learning_rate",),
        "learning rate too high (3e-4 → 1e-4)",
        "60 %",
        "lower the learning rate",
    ),
    "warmup": (
        ("warmup_steps",),
        "warm-up too short (500 → 2,000 steps)",
        "50 %",
        "lengthen warm-up",
    ),
    "sequence": (
        ("max_seq_len", "batch_size", "accumulation_steps"),
        "sequences too short (128 → 192, batch 24 → 32)",
        "40 %",
        "train on longer sequences",
    ),
}


_DATA = ("too little data (half → all, same steps)", "30 %", "get more text")


_TWIN = ("architecture (→ dense twin)", "unknown", "compare with the twin at its own best rate")


def rate_sweep(
    name: str, experiment: Experiment, factors: Sequence[float] = SWEEP
) -> dict[str, Cell]:
    """Cells of `experiment` at its learning rate times factors about 3 apart."""
    own = experiment.training.learning_rate
    return {
        name if factor == 1 else f"{name}_rate_x{factor:.3g}": Cell(
            experiment.with_(learning_rate=factor * own)
        )
        for factor in factors
    }


def data_shares(name: str, experiment: Experiment) -> dict[str, Cell]:
    """Cells of `experiment` on a quarter, a half and all of the text, with equally many steps."""
    epochs = experiment.training.epochs
    return {
        f"{name}_quarter": Cell(experiment.with_(epochs=4 * epochs), 1 / 4),
        f"{name}_half": Cell(experiment.with_(epochs=2 * epochs), 1 / 2),
        name: Cell(experiment),
    }


def grid(profile: str) -> tuple[dict[str, Cell], list[Suspect], range]:
    """Cells by name, the suspects they decide on, and the seeds, as a profile has them.

    From `original` one suspect at a time takes its `optimized` value, or one that the plan did not
    think of; `study` and `full` also put one back at a time from `optimized`. `tiny` has two cells.
    """
    original, optimized = experiments["original"], experiments["optimized"]
    cells, suspects = {"original": Cell(original)}, []
    for key, (fields, name, confidence, advice) in _PLAN.items():
        cells[key] = Cell(original.with_(**{f: optimized.fields()[f] for f in fields}))
        suspects.append(Suspect(name, confidence, "original", key, advice))
    if profile == "tiny":
        only = suspects[1]
        return {name: cells[name] for name in (only.before, only.after)}, [only], range(2)
    rates = [factor for factor in SWEEP if factor != 1 / 3]  # which is the plan's own 1e-4
    cells |= rate_sweep("original", original, rates)
    cells |= rate_sweep("dense", twin(original)) | data_shares("original", original)
    steps = {"batch_size": 2, "warmup_steps": 3 * original.training.warmup_steps}
    others = {
        "blocks_8": ({"n_block": 8}, "16 blocks (→ 8 of 2×4)", "unknown", "use fewer blocks"),
        "layers_8": ({"n_layer": 8}, "12 layers (→ 8)", "unknown", "use fewer layers"),
        "matrix_6": (
            {"matrix_size": 6, "n_block": 8, "n_head": 6},
            "8×8 matrix (→ 6×6, 8 blocks)",
            "unknown",
            "use the smaller matrix",
        ),
        "small_steps": (steps, "too many tokens a step (÷ 3)", MISSED, "take smaller steps"),
    }
    for key, (changes, *about, advice) in others.items():
        cells[key] = Cell(original.with_(**changes))
        suspects.append(Suspect(*about, "original", key, advice))
    suspects += [
        Suspect(*_DATA[:2], "original_half", "original", _DATA[2]),
        Suspect(*_TWIN[:2], "original", "dense", _TWIN[2]),
        *(
            Suspect(
                f"learning rate too low (× {factor})", MISSED, "original",
                f"original_rate_x{factor}", "raise the learning rate",
            )
            for factor in SWEEP[3:]
        ),
    ]  # fmt: skip
    if profile == "quick":
        return cells, suspects, range(2)
    cells |= {
        "optimized": Cell(optimized),
        "optimized_half": data_shares("optimized", optimized)["optimized_half"],
        "optimized_dense": Cell(twin(optimized)),
    }
    back = "from optimized: "
    for key, (fields, name, confidence, advice) in _PLAN.items():
        cells[f"without_{key}"] = Cell(optimized.with_(**{f: original.fields()[f] for f in fields}))
        suspects.append(Suspect(back + name, confidence, f"without_{key}", "optimized", advice))
    suspects += [
        Suspect(back + _DATA[0], _DATA[1], "optimized_half", "optimized", _DATA[2]),
        Suspect(back + _TWIN[0], _TWIN[1], "optimized", "optimized_dense", _TWIN[2]),
    ]
    return cells, suspects, range(3)
