"""The one table of experiments: what each is, whose twin, tuned from what, its title and style."""

from dataclasses import dataclass

from musota.errors import nearest_name
from musota.plan.architectures import MuConfig, OwnConfig
from musota.plan.config import Experiment, TrainConfig
from musota.plan.profiles import redesign, twin


@dataclass(frozen=True)
class Row:
    """An experiment as people meet it: an `experiment`, the dense twin of another row, or a row
    `tuned_from` another: at the best rate of a recorded sweep, so that only results say what."""

    title: str
    style: tuple[str, str, str]  # colour, line style, marker
    experiment: Experiment | None = None
    twin_of: str = ""
    tuned_from: str = ""


_first_run = TrainConfig(
    epochs=10, learning_rate=3e-4, warmup_steps=500, batch_size=6, accumulation_steps=4
)
_small = MuConfig(n_layer=8, matrix_size=6, n_block=8, n_head=6)
_optimized = Experiment(MuConfig(), TrainConfig())
# The rate and the warm-up that small runs found, in place of the plan's.
_redesigned = redesign(_optimized).with_(learning_rate=3e-3, warmup_steps=500)
registry: dict[str, Row] = {
    "original": Row(
        "MU-SOTA original",
        ("#E69F00", "-.", "v"),
        Experiment(MuConfig(max_seq_len=128), _first_run),
    ),
    "optimized": Row("MU-SOTA optimized", ("#0072B2", "-", "o"), _optimized),
    "baseline": Row("dense baseline", ("#D55E00", "--", "s"), twin_of="optimized"),
    "simplified": Row(
        "MU-SOTA simplified", ("#56B4E9", "-", "^"), Experiment(_small, TrainConfig())
    ),
    "simplified_twin": Row(
        "dense twin of simplified", ("#CC79A7", "--", "D"), twin_of="simplified"
    ),
    "redesigned": Row("redesigned", ("#009E73", "-", "P"), _redesigned),
    "modern_twin": Row(
        "modern dense twin of redesigned", ("#7A5C00", "--", "X"), twin_of="redesigned"
    ),
    "tuned": Row("MU-SOTA, its best rate", ("#000080", "-", "*"), tuned_from="optimized"),
    "tuned_baseline": Row(
        "dense, its best rate", ("#8B2500", "--", "p"), tuned_from="baseline", twin_of="tuned"
    ),
}


def find_experiment(name: str) -> Experiment:
    """A row's experiment at full size, `FILE.py:NAME` (trained as the plan trains), or the twin of
    either: `<name>_twin`. Raises MusotaError for an unknown name, a tuned row, an unread file."""
    if ".py:" in name:
        own = Experiment(OwnConfig(name.removesuffix("_twin")), TrainConfig())
        return twin(own) if name.endswith("_twin") else own
    row = registry.get(name)
    if row and row.experiment:
        return row.experiment
    other = row.twin_of if row else name.removesuffix("_twin")
    if (row and row.tuned_from) or other not in registry or other == name:
        known = [name for name, row in registry.items() if not row.tuned_from]
        raise nearest_name("experiment", name, known)
    return twin(find_experiment(other))


FIRST_REDESIGN = "embedding norm,whole queries,names"  # what it was without, see plan/path.py
PUBLIC = ("original", "optimized", "baseline", "simplified", "redesigned")
experiments: dict[str, Experiment] = {name: find_experiment(name) for name in PUBLIC}
TUNED = {name: row.tuned_from for name, row in registry.items() if row.tuned_from}
PAIRS = {row.twin_of: name for name, row in registry.items() if row.twin_of}  # and its twin


def run_name(name: str, experiment: Experiment) -> str:
    """What runs of a row are called; of FILE.py:NAME, FILE.NAME@hash: versions are kept apart."""
    if ".py:" not in name:
        return name
    model, twins = experiment.twin_of or experiment.model, "_twin" * bool(experiment.twin_of)
    return f"{model.source.replace('.py:', '.')}@{model.sha256[:6]}{twins}"


def title_of(name: str) -> str:
    """What people read for a row's name, or for `row,field=value,…`."""
    row, *changes = name.replace(f"without={FIRST_REDESIGN}", "as it first was").split(",")
    changes = ["names built in" if change == "without=" else change for change in changes]
    if row in registry:
        return ", ".join([registry[row].title, *changes])
    if row == "redesigned_twin":  # of a changed one
        return ", ".join([registry["modern_twin"].title, *changes])
    of = row.removesuffix("_twin")
    title = registry[of].title if of in registry else of if "@" in of else of.replace("_", " ")
    return ", ".join([f"dense twin of {title}" if of != row else title, *changes])


def style_of(name: str) -> tuple[str, str, str]:
    """Colour, line style and marker of a row."""
    return registry[name].style if name in registry else ("#000000", ":", "x")
