"""Profiles: the sizes at which an experiment runs, from `full` (the plan's own) down to `tiny`."""

import dataclasses
from dataclasses import dataclass

from musota.config import Experiment, RedesignedConfig, check_value
from musota.errors import MusotaError, find_named
from musota.matching import match_transformer, split_sizes
from musota.registry import REGISTRY, experiments, find_experiment

# The plan reports 16,733 training sequences of 128 tokens; its share of warm-up follows from that.
PLAN_TRAIN_TOKENS = 16_733 * 128
REDESIGN_SWITCHES = ("n_block", "blocks", "gate")  # not passed on to the other row


@dataclass(frozen=True)
class Profile:
    """How an experiment is scaled. Numbers from `layers` on are factors; None keeps the plan's
    value. The token limits cut the corpus, so that the length of a run is known beforehand."""

    name: str
    vocab_size: int | None = None
    train_tokens: int | None = None
    valid_tokens: int | None = None
    layers: float = 1.0
    sequence: float = 1.0
    epochs: float = 1.0
    accumulation: float = 1.0
    learning_rate: float = 1.0
    fewest_epochs: int = 3


_PROFILES = (
    Profile("full"),
    Profile("study", 8192, 330_000, 40_000, 1 / 3, 1 / 2, 1 / 10, 1 / 4, 30.0),
    Profile("quick", 3072, 64_000, 12_000, 1 / 6, 1 / 2, 1 / 10, 1 / 8, 15.0, 4),
    Profile("tiny", 512, 12_000, 3_000, 1 / 6, 1 / 4, 1 / 10, 1 / 8, 30.0),
)
# The root-cause grid of notebook 06 trains dozens of runs, so each of them is smaller still.
_GRID_PROFILES = (
    Profile("full"),
    Profile("study", 8192, 100_000, 40_000, 1 / 3, 1 / 2, 1 / 10, 1 / 4, 10.0, 1),
    Profile("quick", 2048, 24_000, 12_000, 1 / 6, 1 / 2, 1 / 10, 1 / 4, 10.0, 1),
    Profile("tiny", 512, 6_000, 3_000, 1 / 12, 1 / 4, 1 / 10, 1 / 4, 10.0, 1),
)
PROFILES = {profile.name: profile for profile in _PROFILES}
GRID_PROFILES = {profile.name: profile for profile in _GRID_PROFILES}


def find_profile(name: str, grid: bool = False) -> Profile:
    """A profile by name, with `grid` that of the root-cause grid. `auto` is `full` where there is a
    CUDA device (with `grid`, which may take a day there, `study`), otherwise `quick`."""
    if name == "auto":
        import torch

        name = ("study" if grid else "full") if torch.cuda.is_available() else "quick"
    find_named("profile", name, ["auto", *PROFILES])
    return (GRID_PROFILES if grid else PROFILES)[name]


def check_changes(changes: dict) -> dict:
    """Checked changes, numpy's numbers as Python's. Raises MusotaError for a field that no
    experiment has, or a value that it cannot have."""
    if not isinstance(changes, dict):
        raise MusotaError(f'changes must be like {{"learning_rate": 0.003}}, not {changes!r}.')
    parts = [part for one in experiments.values() for part in (one.model, one.training)]
    kinds = {field.name: field.type for part in parts for field in dataclasses.fields(part)}
    return {n: check_value(n, v, find_named("field", n, kinds)) for n, v in changes.items()}


def scaled(experiment: str | Experiment, profile: str | Profile, **changes) -> Experiment:
    """An experiment at the size of a profile, with fields changed afterwards.

    A name is a row of the registry: a row that is matched to another is matched to the other as
    scaled and changed; only a size of its own (`split_sizes`) leaves it unmatched. An Experiment is
    never matched. Raises MusotaError for unknown names and fields.
    """
    profile = find_profile(profile) if isinstance(profile, str) else profile
    if isinstance(experiment, Experiment):
        return _scale(experiment, profile).with_(**changes)
    row = find_named("experiment", experiment, REGISTRY)
    if not row.matched_to:
        return _scale(find_experiment(experiment), profile).with_(**changes)
    own, shared = split_sizes(changes)
    switches = {}
    if row.match is not match_transformer:  # a redesign, whose blocks are its own
        switches = {name: shared.pop(name) for name in REDESIGN_SWITCHES if name in shared}
    other = scaled(row.matched_to, profile, **shared)
    training = _scale(find_experiment(experiment), profile).training
    own |= {name: changes[name] for name in changes if name in vars(training)}
    return Experiment(row.match(other.model, **switches), training).with_(**own)


def _scale(experiment: Experiment, profile: Profile) -> Experiment:
    """An experiment at the size of a profile: with fewer epochs (not under its fewest), smaller
    steps, and the same share of warm-up."""
    if profile.name == "full":
        return experiment
    model, training, factor = experiment.model, experiment.training, profile.learning_rate
    if isinstance(model, RedesignedConfig):  # its rate was found on small runs
        factor = 1.0
    small = experiment.with_(
        vocab_size=profile.vocab_size,
        max_seq_len=round(model.max_seq_len * profile.sequence),
        n_layer=max(1, round(model.n_layer * profile.layers)),
        epochs=max(profile.fewest_epochs, round(training.epochs * profile.epochs)),
        accumulation_steps=max(1, round(training.accumulation_steps * profile.accumulation)),
        learning_rate=factor * training.learning_rate,
    )
    share = training.warmup_steps / _steps(experiment, PLAN_TRAIN_TOKENS)
    return small.with_(warmup_steps=round(share * _steps(small, profile.train_tokens)))


def _steps(experiment: Experiment, tokens: int) -> float:
    """The number of optimizer steps on a text of so many tokens."""
    training = experiment.training
    per_step = training.sequences_per_step * experiment.model.max_seq_len
    return training.epochs * tokens / per_step
