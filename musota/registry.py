"""The named experiments: one row each, with title, plot style, and what it is matched to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from musota.config import Experiment, ModelConfig, MuConfig, TrainConfig
from musota.errors import find_named
from musota.matching import match_redesign, match_transformer


@dataclass(frozen=True)
class Row:
    """A named experiment: its own `model` and `training`, or a model matched to that of another
    row. `training` of a matched row replaces fields of the other row's training."""

    title: str
    style: tuple[str, str, str]  # colour, line style, marker
    model: ModelConfig | None = None
    matched_to: str = ""  # another row
    match: Callable = match_transformer
    training: Mapping = field(default_factory=dict)


# Learning rate and warm-up were found on small runs; the plan's are for MU-SOTA.
_REDESIGN_TRAINING = {"learning_rate": 3e-3, "warmup_steps": 500}
_ORIGINAL_TRAINING = {
    "epochs": 10,
    "learning_rate": 3e-4,
    "warmup_steps": 500,
    "batch_size": 6,
    "accumulation_steps": 4,
}
REGISTRY: dict[str, Row] = {
    "original": Row(
        "MU-SOTA, original settings",
        ("#E69F00", "-.", "v"),
        MuConfig(max_seq_len=128),
        training=_ORIGINAL_TRAINING,
    ),
    "optimized": Row("MU-SOTA, optimized settings", ("#0072B2", "-", "o"), MuConfig()),
    "baseline": Row(
        "Transformer matched to optimized (GPT-2 style)",
        ("#D55E00", "--", "s"),
        matched_to="optimized",
    ),
    "simplified": Row(
        "MU-SOTA, simplified",
        ("#56B4E9", "-", "^"),
        MuConfig(n_layer=8, matrix_size=6, n_block=8, n_head=6),
    ),
    "simplified_twin": Row(
        "Transformer matched to simplified (GPT-2 style)",
        ("#CC79A7", "--", "D"),
        matched_to="simplified",
    ),
    "redesigned": Row(
        "Redesign",
        ("#009E73", "-", "P"),
        matched_to="optimized",
        match=match_redesign,
        training=_REDESIGN_TRAINING,
    ),
    "modern_twin": Row(
        "Transformer matched to the redesign (modern)",
        ("#7A5C00", "--", "X"),
        matched_to="optimized",
        match=partial(match_redesign, blocks=False, gate=False),
        training=_REDESIGN_TRAINING,
    ),
}


def find_experiment(name: str) -> Experiment:
    """The experiment of a row at full size. Raises MusotaError for an unknown name."""
    row = find_named("experiment", name, REGISTRY)
    if not row.matched_to:
        return Experiment(row.model, TrainConfig(**row.training))
    other = find_experiment(row.matched_to)
    return Experiment(row.match(other.model), other.training).with_(**row.training)


_PUBLIC = ("original", "optimized", "baseline", "simplified", "redesigned")
experiments: dict[str, Experiment] = {name: find_experiment(name) for name in _PUBLIC}
