"""Profiles scale an experiment, never its rules; a twin matches its parameters."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from musota.errors import nearest_name
from musota.plan.architectures import DenseConfig, ModelConfig, OwnConfig, RedesignedConfig
from musota.plan.config import Experiment, TrainConfig

# The plan counts "16,733 training sequences" of 128 tokens; its warm-up shares follow from that.
PLAN_TRAIN_TOKENS = 16_733 * 128
OWN_SIZES = {"d_model", "block_size", "d_ff"}  # what a match would choose
OF_MU = "blocks,gate,names"  # the changes that its dense twin goes without
SHARED = ("vocab_size", "max_seq_len", "n_layer", "dropout")  # what twins have in common


def match_width(target: int, config: DenseConfig) -> DenseConfig:
    """`config` at the even d_model whose parameter count is nearest `target`. Heads: the divisor of
    d_model whose head size is nearest 16 (the larger head on a tie)."""

    def at(width: int) -> DenseConfig:
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        n_head = min(divisors, key=lambda n: (abs(width / n - 16), n))
        return dataclasses.replace(config, d_model=width, n_head=n_head)

    width = 2
    while at(width).n_parameters < target:
        width += 2
    return min(at(max(2, width - 2)), at(width), key=lambda c: abs(c.n_parameters - target))


def twin(experiment: Experiment) -> Experiment:
    """The dense experiment of the same parameter count, depth, sequence length and training: of a
    redesigned model the modern one, which has every change that is not MU-SOTA's own."""
    model = experiment.model
    if isinstance(model, RedesignedConfig):
        return redesign(experiment, model.n_block, f"{model.without},{OF_MU}")
    shared = {name: getattr(model, name) for name in SHARED}
    dense = match_width(model.n_parameters, DenseConfig(**shared))
    return Experiment(dense, experiment.training, twin_of=model)


def redesign(experiment: Experiment, n_block: int = 8, without: str = "names") -> Experiment:
    """The redesign at another model's parameter count, depth, sequence length and training: with
    the widest blocks beside which the feed-forward is still three times the width."""
    model = experiment.model
    matched = experiment.twin_of or model
    shared = {name: getattr(model, name) for name in SHARED}

    def at(block_size: int) -> RedesignedConfig:
        """With the feed-forward that brings its parameter count nearest the other's."""
        least = RedesignedConfig(
            n_block=n_block, block_size=block_size, d_ff=1, without=without, **shared
        )
        more = (matched.n_parameters - least.n_parameters) / (2 * least.n_layer * least.d_model)
        return dataclasses.replace(least, d_ff=1 + max(0, round(more)))

    block_size = 2
    while at(block_size + 2).d_ff >= 3 * at(block_size + 2).d_model:
        block_size += 2
    return Experiment(at(block_size), experiment.training, matched)


def changed(experiment: Experiment, changes: Mapping) -> Experiment:
    """`experiment` with fields changed by name (see `Experiment.with_`).

    A comparison stays fair: a model that is matched to another is matched anew, to that other as
    changed. Only a width of its own (`OWN_SIZES`) leaves it matched to nobody.
    """
    model, other = experiment.model, experiment.twin_of
    if not other or OWN_SIZES & changes.keys():
        return experiment.with_(**changes)
    start = Experiment(other, experiment.training)
    if isinstance(model, DenseConfig):
        return twin(start.with_(**changes))
    own = {name: changes.get(name, getattr(model, name)) for name in ("n_block", "without")}
    return redesign(start.with_(**{k: v for k, v in changes.items() if k not in own}), **own)


@dataclass(frozen=True)
class Profile:
    """How far an experiment is scaled down. Factors multiply; `None` leaves the plan's value. Token
    limits cut the corpus, at a line end, so that a run's length is known beforehand."""

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


def _by_name(*rows: Profile) -> dict[str, Profile]:
    return {profile.name: profile for profile in rows}


profiles = _by_name(
    Profile("full"),
    Profile("study", 8192, 330_000, 40_000, 1 / 3, 1 / 2, 1 / 10, 1 / 4, 30.0),
    Profile("quick", 8192, 100_000, 20_000, 1 / 3, 1 / 2, 1 / 10, 1 / 4, 30.0),
    Profile("tiny", 512, 12_000, 3_000, 1 / 6, 1 / 4, 1 / 10, 1 / 8, 30.0),
)
# The grid of notebook 06 trains dozens of runs, so each is smaller still; `full` stays what it is.
grid_profiles = _by_name(
    Profile("full"),
    Profile("study", 8192, 100_000, 40_000, 1 / 3, 1 / 2, 1 / 10, 1 / 4, 10.0, 1),
    Profile("quick", 2048, 40_000, 12_000, 1 / 6, 1 / 2, 1 / 10, 1 / 4, 10.0, 1),
    Profile("tiny", 512, 6_000, 3_000, 1 / 12, 1 / 4, 1 / 10, 1 / 4, 10.0, 1),
)


def find_profile(name: str, grid: bool = False) -> Profile:
    """A profile by name, with `grid` at the size of notebook 06. `auto` is `full` where a CUDA
    device is at hand (with `grid`, which would take a day, `study`), else `quick`."""
    if name == "auto":
        import torch

        large = "study" if grid else "full"
        name = large if torch.cuda.is_available() else "quick"
    if not isinstance(name, str) or name not in profiles:
        raise nearest_name("profile", name, ["auto", *profiles])
    return (grid_profiles if grid else profiles)[name]


def rate_factor(model: ModelConfig, profile: Profile) -> float:
    """What a profile multiplies a learning rate by: a small run needs more than the plan's rates.
    The redesign's rate was found on small runs."""
    return 1.0 if isinstance(model, RedesignedConfig) else profile.learning_rate


def scaled(experiment: Experiment, profile: Profile | str) -> Experiment:
    """`experiment` at a profile's size: the same rules, smaller numbers.

    The profile's fewest epochs remain, warm-up keeps its share of the steps, and a model that is
    matched to another is matched anew. `full` returns the experiment itself.
    """
    profile = find_profile(profile) if isinstance(profile, str) else profile
    if profile.name == "full":
        return experiment
    model, training = experiment.model, experiment.training
    if experiment.twin_of:
        smaller = scaled(Experiment(experiment.twin_of, training), profile)
        if isinstance(model, DenseConfig):
            return twin(smaller)
        redesigned = redesign(smaller, model.n_block, model.without)
        return redesigned.with_(learning_rate=training.learning_rate)
    sizes = {
        "vocab_size": profile.vocab_size,
        "max_seq_len": round(model.max_seq_len * profile.sequence),
    }
    if not isinstance(model, OwnConfig):  # whose depth is its author's
        sizes["n_layer"] = max(1, round(model.n_layer * profile.layers))
    new_model = dataclasses.replace(model, **sizes)
    new_training = dataclasses.replace(
        training,
        epochs=max(profile.fewest_epochs, round(training.epochs * profile.epochs)),
        accumulation_steps=max(1, round(training.accumulation_steps * profile.accumulation)),
        learning_rate=training.learning_rate * rate_factor(model, profile),
    )
    plan_steps = _steps(training, PLAN_TRAIN_TOKENS, model.max_seq_len)
    steps = _steps(new_training, profile.train_tokens, new_model.max_seq_len)
    warmup = round(training.warmup_steps / plan_steps * steps)
    return Experiment(new_model, dataclasses.replace(new_training, warmup_steps=warmup))


def _steps(training: TrainConfig, tokens: int, length: int) -> float:
    return training.epochs * tokens / (training.sequences_per_step * length)
