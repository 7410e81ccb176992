"""The root-cause grid: a row a suspect, and the cells (small trainings) that decide on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from musota.plan.config import Experiment
from musota.plan.profiles import twin
from musota.plan.registry import experiments

MISSED = "not in the plan"
SWEEP = (1 / 10, 1 / 3, 1, 3, 10, 30, 100)  # wide enough for MU-SOTA and for the dense twin


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


# What the plan itself changes, a cell each: suspicion, its confidence, advice.
PLANNED = {
    "epochs": ("too few epochs (10 → 30)", "70 %", "train longer"),
    "learning_rate": ("learning rate too high (3e-4 → 1e-4)", "60 %", "lower the learning rate"),
    "warmup": ("warm-up too short (500 → 2,000 steps)", "50 %", "lengthen warm-up"),
    "sequence": (
        "sequences too short (128 → 192, batch 24 → 32)",
        "40 %",
        "train on longer sequences",
    ),
}
# The fields, where they are not called like the cell.
FIELDS = {
    "warmup": ("warmup_steps",),
    "sequence": ("max_seq_len", "batch_size", "accumulation_steps"),
}
# What it only wonders about, or did not think of; with the changes from `original`.
SMALLER = {"matrix_size": 6, "n_block": 8, "n_head": 6}
SMALL_STEPS = {"batch_size": 2, "warmup_steps": 1500}
OTHERS = {
    "blocks_8": ("16 blocks (→ 8 of 2×4)", "unknown", "use fewer blocks", {"n_block": 8}),
    "layers_8": ("12 layers (→ 8)", "unknown", "use fewer layers", {"n_layer": 8}),
    "matrix_6": ("8×8 matrix (→ 6×6, 8 blocks)", "unknown", "use the smaller matrix", SMALLER),
    "small_steps": ("too many tokens a step (÷ 3)", MISSED, "take smaller steps", SMALL_STEPS),
}
DATA = ("too little data (half → all, same steps)", "30 %")
TWIN = ("architecture (→ dense twin)", "unknown")
MORE_TEXT, COMPARE = "get more text", "compare with the twin at its own best rate"


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
    """Cells by name, the suspects they decide on, and the seeds, as a profile has them. From
    `original` one suspect at a time takes its `optimized` value, or one that the plan did not think
    of; `study` and `full` also put one back at a time from `optimized`. `tiny` has two cells."""
    original, optimized = experiments["original"], experiments["optimized"]
    cells, suspects, put_back = {"original": Cell(original)}, [], {}
    for key, (name, confidence, advice, *changes) in (PLANNED | OTHERS).items():
        if not changes:
            fields = FIELDS.get(key, (key,))
            changes = [{field: optimized.fields()[field] for field in fields}]
            old = {field: original.fields()[field] for field in fields}
            put_back[f"without_{key}"] = Cell(optimized.with_(**old))
        cells[key] = Cell(original.with_(**changes[0]))
        suspects.append(Suspect(name, confidence, "original", key, advice))
    if profile == "tiny":
        only = suspects[1]
        return {name: cells[name] for name in (only.before, only.after)}, [only], range(2)
    rates = [factor for factor in SWEEP if factor != 1 / 3]  # which is the plan's own 1e-4
    cells |= rate_sweep("original", original, rates) | data_shares("original", original)
    cells |= rate_sweep("dense", twin(original))
    suspects += [
        Suspect(*DATA, "original_half", "original", MORE_TEXT),
        Suspect(*TWIN, "original", "dense", COMPARE),
    ]
    for factor in SWEEP[3:]:
        name, after = f"learning rate too low (× {factor})", f"original_rate_x{factor}"
        suspects.append(Suspect(name, MISSED, "original", after, "raise the learning rate"))
    if profile == "quick":
        return cells, suspects, range(2)
    cells |= {
        "optimized": Cell(optimized),
        "optimized_half": data_shares("optimized", optimized)["optimized_half"],
        "optimized_dense": Cell(twin(optimized)),
        **put_back,
    }
    back = "from optimized: "
    for key, (name, confidence, advice) in PLANNED.items():
        suspects.append(Suspect(back + name, confidence, f"without_{key}", "optimized", advice))
    suspects += [
        Suspect(back + DATA[0], DATA[1], "optimized_half", "optimized", MORE_TEXT),
        Suspect(back + TWIN[0], TWIN[1], "optimized", "optimized_dense", COMPARE),
    ]
    return cells, suspects, range(3)


def turned_by(cells: Mapping[str, Cell]) -> set[str]:
    """The fields in which a grid's cells differ, whatever their architecture."""
    first, *others = (cell.experiment for cell in cells.values())
    alike = (other for other in others if type(other.model) is type(first.model))
    return {d.split("=")[0] for other in alike for d in other.differences(first)}
