"""Configuration: frozen dataclasses, the plan's four experiments, and the profiles that scale them.

Everything here is plain arithmetic on names and numbers, so it imports in milliseconds.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass

from musota.layout import BlockLayout

# The plan counts "16,733 training sequences" of 128 tokens; its warm-up shares follow from that.
PLAN_TRAIN_TOKENS = 16_733 * 128
# Each semantic block attends with two heads, whatever its size (DESIGN section 2).
HEADS_PER_BLOCK = 2
LARGEST_MATRIX = 64
LARGEST_MODEL = 20_000_000_000  # parameters; what is larger is a slip of the keyboard
LARGEST_DROPOUT = 0.99


class MusotaError(ValueError):
    """A mistake the user can mend: one sentence saying what, which value, what to do."""


def nearest_name(kind: str, name: str, known) -> MusotaError:
    """The error for an unknown `name`, suggesting the closest of the `known` ones."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}."
    return MusotaError(f"Unknown {kind} {name!r}: {hint}")


def check_seed(seed) -> None:
    """Raises MusotaError for what cannot seed a run."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise MusotaError(f"seed must be a whole number from 0 to {2**31 - 1}, not {seed!r}.")


def _require_positive(config, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise MusotaError(f"{name} must be a whole number of at least 1, not {value!r}.")


def _require_dropout(config) -> None:
    dropout = config.dropout
    is_number = isinstance(dropout, (int, float)) and not isinstance(dropout, bool)
    if not is_number or not 0 <= dropout <= LARGEST_DROPOUT:
        raise MusotaError(f"dropout must lie in [0, {LARGEST_DROPOUT}], not {config.dropout!r}.")


def _require_sane_size(config) -> None:
    if config.n_parameters > LARGEST_MODEL:
        raise MusotaError(
            f"A model of {config.n_parameters:,} parameters (vocab_size={config.vocab_size:,}, "
            f"n_layer={config.n_layer:,}) is beyond the {LARGEST_MODEL:,} allowed: choose smaller "
            "sizes."
        )


@dataclass(frozen=True)
class MuConfig:
    """MU-SOTA: each token a matrix of `matrix_size`² cells cut into `n_block` semantic blocks.

    `n_head` counts the heads of the attention across all blocks; inside a block there are two.
    Raises MusotaError for a layout that does not tile the matrix or heads that do not divide.
    """

    vocab_size: int = 50_000
    max_seq_len: int = 192
    n_layer: int = 12
    n_head: int = 8
    dropout: float = 0.1
    matrix_size: int = 8
    n_block: int = 16

    def __post_init__(self):
        _require_positive(self, "vocab_size", "max_seq_len", "n_layer", "n_head", "matrix_size")
        _require_positive(self, "n_block")
        _require_dropout(self)
        if self.d_model % self.n_head:
            raise MusotaError(
                f"n_head={self.n_head} does not divide the {self.d_model} cells of a "
                f"{self.matrix_size}×{self.matrix_size} matrix: choose a divisor."
            )
        if self.matrix_size > LARGEST_MATRIX or self.n_block > self.d_model:
            raise MusotaError(
                f"matrix_size={self.matrix_size} with n_block={self.n_block} is beyond what this "
                f"model is made for: at most {LARGEST_MATRIX}, and a cell for each block."
            )
        for block in self.layout.blocks:
            if block.size % HEADS_PER_BLOCK:
                raise MusotaError(
                    f"Block {block.name} has {block.size} cells, which {HEADS_PER_BLOCK} heads do "
                    "not divide: choose another n_block."
                )
        _require_sane_size(self)

    @property
    def layout(self) -> BlockLayout:
        try:
            return BlockLayout.standard(self.matrix_size, self.n_block)
        except ValueError as error:
            raise MusotaError(str(error)) from None

    @property
    def d_model(self) -> int:
        """Cells of a token's matrix."""
        return self.matrix_size**2

    @property
    def n_parameters(self) -> int:
        """Parameters by hand; a test holds the built model to it."""
        vocab, d, blocks = self.vocab_size, self.d_model, self.n_block
        block_attention = sum(4 * (block.size**2 + block.size) for block in self.layout.blocks)
        cross_attention = 4 * (d * d + d)
        feed_forward = 8 * d * d + 5 * d
        gate = (blocks + 1) * 2 * blocks + 2 * blocks + 2 * blocks * blocks + blocks + blocks
        layer = block_attention + cross_attention + feed_forward + 4 * d + gate + vocab * blocks
        return vocab * d + self.max_seq_len * d + self.n_layer * layer + 2 * d + vocab * d + vocab

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of a training step per token, by hand (see `_step_flops`)."""
        d, blocks = self.d_model, self.n_block
        block_maps = sum(4 * block.size**2 for block in self.layout.blocks)
        gate = (blocks + 1) * 2 * blocks + 2 * blocks * blocks
        # Maps of both attentions and of the feed-forward; each attention's scores and averages.
        layer = block_maps + 4 * d * d + 8 * d * d + gate + 2 * (2 * d * self.max_seq_len)
        return _step_flops(self.n_layer * layer + d * self.vocab_size)


@dataclass(frozen=True)
class DenseConfig:
    """The baseline: a GPT-2 style transformer. Raises MusotaError on bad values."""

    vocab_size: int = 50_000
    max_seq_len: int = 192
    n_layer: int = 12
    n_head: int = 13
    dropout: float = 0.1
    d_model: int = 208

    def __post_init__(self):
        _require_positive(self, "vocab_size", "max_seq_len", "n_layer", "n_head", "d_model")
        _require_dropout(self)
        if self.d_model % self.n_head:
            raise MusotaError(
                f"n_head={self.n_head} does not divide d_model={self.d_model}: choose a divisor."
            )
        _require_sane_size(self)

    @property
    def n_parameters(self) -> int:
        """Parameters by hand; a test holds the built model to it."""
        d = self.d_model
        return (self.vocab_size + self.max_seq_len + 2) * d + self.n_layer * (12 * d * d + 13 * d)

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of a training step per token, by hand (see `_step_flops`)."""
        d = self.d_model
        layer = 12 * d * d + 2 * d * self.max_seq_len
        return _step_flops(self.n_layer * layer + d * self.vocab_size)


def _step_flops(multiplications: int) -> int:
    """Of so many multiply-adds in the forward pass: two operations each, and backward costs two
    more products for each. Matrix products only, attention as full squares, nothing recomputed."""
    return 3 * 2 * multiplications


ModelConfig = MuConfig | DenseConfig


@dataclass(frozen=True)
class TrainConfig:
    """How to train: AdamW, linear warm-up then cosine to 0, all counted in optimizer steps."""

    epochs: int = 30
    learning_rate: float = 1e-4
    warmup_steps: int = 2000
    batch_size: int = 4
    accumulation_steps: int = 8
    weight_decay: float = 0.01
    grad_clip: float = 1.0

    def __post_init__(self):
        _require_positive(self, "epochs", "batch_size", "accumulation_steps")
        for name in ("learning_rate", "weight_decay", "grad_clip", "warmup_steps"):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 <= value < float("inf"):
                raise MusotaError(f"{name} must be a finite number of at least 0, not {value!r}.")
        if not self.learning_rate or not self.grad_clip:
            raise MusotaError("learning_rate and grad_clip must be above 0.")

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.accumulation_steps


@dataclass(frozen=True)
class Experiment:
    """A model and how to train it."""

    model: ModelConfig
    training: TrainConfig

    def with_(self, **changes) -> Experiment:
        """A copy with fields of the model or of the training changed, by name."""
        model_fields = {field.name for field in dataclasses.fields(self.model)}
        training_fields = {field.name for field in dataclasses.fields(self.training)}
        for name in changes:
            if name not in model_fields | training_fields:
                raise nearest_name("experiment field", name, sorted(model_fields | training_fields))
        model = {name: value for name, value in changes.items() if name in model_fields}
        training = {name: value for name, value in changes.items() if name in training_fields}
        return Experiment(
            dataclasses.replace(self.model, **model), dataclasses.replace(self.training, **training)
        )

    def to_dict(self) -> dict:
        kind = "mu" if isinstance(self.model, MuConfig) else "dense"
        model = {"kind": kind, **dataclasses.asdict(self.model)}
        return {"model": model, "training": dataclasses.asdict(self.training)}

    def fields(self) -> dict:
        """Every field of model and training by name."""
        return dataclasses.asdict(self.model) | dataclasses.asdict(self.training)

    @classmethod
    def from_dict(cls, data: dict) -> Experiment:
        """The inverse of `to_dict`. Raises MusotaError for fields or kinds it does not know."""
        try:
            model = dict(data["model"])
            config_class = {"mu": MuConfig, "dense": DenseConfig}[model.pop("kind")]
            return cls(config_class(**model), TrainConfig(**data["training"]))
        except (KeyError, TypeError) as error:
            raise MusotaError(f"Not the description of an experiment: {error}.") from None


def match_width(target: int, config: DenseConfig) -> DenseConfig:
    """`config` at the even d_model whose parameter count is nearest `target`.

    Heads: the divisor of d_model whose head size is nearest 16 (the larger head on a tie).
    """

    def at(width: int) -> DenseConfig:
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        n_head = min(divisors, key=lambda n: (abs(width / n - 16), n))
        return dataclasses.replace(config, d_model=width, n_head=n_head)

    width = 2
    while at(width).n_parameters < target:
        width += 2
    return min((at(max(2, width - 2)), at(width)), key=lambda c: abs(c.n_parameters - target))


def twin(experiment: Experiment) -> Experiment:
    """The dense experiment of the same parameter count, depth, sequence length and training."""
    model = experiment.model
    shared = {
        name: getattr(model, name) for name in ("vocab_size", "max_seq_len", "n_layer", "dropout")
    }
    dense = match_width(model.n_parameters, DenseConfig(**shared))
    return dataclasses.replace(experiment, model=dense)


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


@dataclass(frozen=True)
class Profile:
    """How far an experiment is scaled down. Factors multiply; `None` leaves the plan's value.

    Token limits cut the corpus, at a line end, so that a run's length is known beforehand.
    """

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


profiles: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("full"),
        Profile("study", 8192, 330_000, 40_000, 1 / 3, 1 / 2, 1 / 10, 1 / 4, 30.0),
        Profile("quick", 8192, 100_000, 20_000, 1 / 3, 1 / 2, 1 / 10, 1 / 4, 30.0),
        Profile("tiny", 512, 12_000, 3_000, 1 / 6, 1 / 4, 1 / 10, 1 / 8, 30.0),
    )
}

# The grid of notebook 06 trains dozens of runs, so each is smaller still; `full` stays what it is.
grid_profiles: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        profiles["full"],
        Profile("study", 8192, 100_000, 40_000, 1 / 3, 1 / 2, 1 / 10, 1 / 4, 10.0, 1),
        Profile("quick", 2048, 40_000, 12_000, 1 / 6, 1 / 2, 1 / 10, 1 / 4, 10.0, 1),
        Profile("tiny", 512, 6_000, 3_000, 1 / 12, 1 / 4, 1 / 10, 1 / 4, 10.0, 1),
    )
}


def find_profile(name: str, grid: bool = False) -> Profile:
    """A profile by name, with `grid` at the size of notebook 06.

    `auto` is `full` where a CUDA device is at hand, else `quick`.
    """
    if name == "auto":
        import torch

        name = "full" if torch.cuda.is_available() else "quick"
    if not isinstance(name, str) or name not in profiles:
        raise nearest_name("profile", name, ["auto", *profiles])
    return (grid_profiles if grid else profiles)[name]


def _warmup_share(training: TrainConfig, max_seq_len: int) -> float:
    """Warm-up as a share of all optimizer steps, with the plan's own count of training tokens."""
    steps = training.epochs * PLAN_TRAIN_TOKENS / (training.sequences_per_step * max_seq_len)
    return training.warmup_steps / steps


def scaled(experiment: Experiment, profile: Profile | str) -> Experiment:
    """`experiment` at a profile's size: the same rules, smaller numbers.

    The profile's fewest epochs remain, warm-up keeps its share of the steps, and a dense model is
    matched anew to the MU-SOTA layout it is the twin of. `full` returns the experiment itself.
    """
    if isinstance(profile, str):
        profile = find_profile(profile)
    if profile.name == "full":
        return experiment
    model, training = experiment.model, experiment.training
    sizes = {
        "vocab_size": profile.vocab_size,
        "max_seq_len": round(model.max_seq_len * profile.sequence),
        "n_layer": max(1, round(model.n_layer * profile.layers)),
    }
    if isinstance(model, DenseConfig):
        new_model = match_width(
            dataclasses.replace(_sibling(model), **sizes).n_parameters,
            dataclasses.replace(model, **sizes),
        )
    else:
        new_model = dataclasses.replace(model, **sizes)
    epochs = max(profile.fewest_epochs, round(training.epochs * profile.epochs))
    accumulation = max(1, round(training.accumulation_steps * profile.accumulation))
    tokens_per_step = training.batch_size * accumulation * new_model.max_seq_len
    steps = epochs * profile.train_tokens / tokens_per_step
    new_training = dataclasses.replace(
        training,
        epochs=epochs,
        accumulation_steps=accumulation,
        learning_rate=training.learning_rate * profile.learning_rate,
        warmup_steps=round(_warmup_share(training, model.max_seq_len) * steps),
    )
    return Experiment(new_model, new_training)


def _sibling(model: DenseConfig) -> MuConfig:
    """The MU-SOTA layout nearest in size to a dense model: the one it is the twin of."""
    shape = {"vocab_size": model.vocab_size, "max_seq_len": model.max_seq_len}
    layouts = [
        MuConfig(n_layer=model.n_layer, **shape),
        MuConfig(n_layer=model.n_layer, matrix_size=6, n_block=8, n_head=6, **shape),
        MuConfig(n_layer=model.n_layer, n_block=8, **shape),
    ]
    return min(layouts, key=lambda layout: abs(layout.n_parameters - model.n_parameters))
