"""The experiments: what each is, how it is called and drawn."""

from __future__ import annotations

from musota.errors import nearest_name
from musota.plan.config import DenseConfig, Experiment, MuConfig, TrainConfig
from musota.plan.profiles import twin

_optimized = Experiment(MuConfig(), TrainConfig())


experiments: dict[str, Experiment] = {
    "original": Experiment(
        MuConfig(max_seq_len=128),
        TrainConfig(
            epochs=10, learning_rate=3e-4, warmup_steps=500, batch_size=6, accumulation_steps=4
        ),
    ),
    "optimized": _optimized,
    "baseline": Experiment(DenseConfig(), TrainConfig()),
    "simplified": Experiment(
        MuConfig(n_layer=8, matrix_size=6, n_block=8, n_head=6), TrainConfig()
    ),
}


# These train at the best rate of a sweep (see `campaign`), so only results can say what they are.
TUNED = {"tuned": "optimized", "tuned_baseline": "baseline"}  # and what each is tuned from


def find_experiment(name: str) -> Experiment:
    """One of `experiments`, or `<name>_twin` for its dense twin. Raises MusotaError if unknown."""
    if name in experiments:
        return experiments[name]
    if name.endswith("_twin") and name.removesuffix("_twin") in experiments:
        return twin(experiments[name.removesuffix("_twin")])
    raise nearest_name("experiment", name, [*experiments, "simplified_twin", *TUNED])


LABELS = {
    "original": "MU-SOTA original",
    "optimized": "MU-SOTA optimized",
    "baseline": "dense baseline",
    "simplified": "MU-SOTA simplified",
    "simplified_twin": "dense twin of simplified",
    "tuned": "MU-SOTA, its best rate",
    "tuned_baseline": "dense, its best rate",
    "epochs": "original, more epochs",
    "dense": "dense twin of original",
}


STYLES = {  # colour, line style, marker
    "original": ("#E69F00", "-.", "v"),
    "optimized": ("#0072B2", "-", "o"),
    "baseline": ("#D55E00", "--", "s"),
    "simplified": ("#56B4E9", "-", "^"),
    "simplified_twin": ("#CC79A7", "--", "D"),
    "tuned": ("#000080", "-", "*"),
    "tuned_baseline": ("#8B2500", "--", "p"),
    "epochs": ("#009E73", "-", "P"),
    "dense": ("#D55E00", ":", "X"),
}


OTHER_STYLE = ("#000000", ":", "x")


def title_of(name: str) -> str:
    """What people read for a row's name."""
    return LABELS.get(name, name.replace("_", " "))


def style_of(name: str) -> tuple[str, str, str]:
    """Colour, line style and marker of a row."""
    return STYLES.get(name, OTHER_STYLE)
