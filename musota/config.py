"""Configurations of models and training, as frozen dataclasses, and experiments made of both.

Parameter and FLOP counts are formulas here; tests compare them with the built models.
"""

import dataclasses
import numbers
from dataclasses import dataclass

from musota.errors import MusotaError, find_named
from musota.models.layout import BlockLayout

HEADS_PER_BLOCK = 2  # of MU-SOTA's attention inside a block
LARGEST_MODEL = 20_000_000_000  # parameters; a larger number is taken for a typing error
MOST = 10**15  # of any field
# Allowed ranges of fields, where they are not 1 to MOST (whole numbers) or 0 to MOST.
BOUNDS = {
    "dropout": (0, 0.99),
    "warmup_steps": (0, MOST),
    "learning_rate": (1e-15, MOST),
    "grad_clip": (1e-15, MOST),
    "matrix_size": (1, 64),
    "n_block": (1, 4096),
    "seed": (0, 2**31 - 1),
}


def check_value(name: str, value, kind: type, low: float | None = None, high: float = MOST):
    """`value`, numpy's numbers as Python's. Raises MusotaError if it is not of this kind (bool,
    str, int, float) or, as a number, not from `low` to `high` (by default as in BOUNDS)."""
    if kind is bool and type(value).__module__ == "numpy" and not getattr(value, "shape", 1):
        value = value.item()
    if kind in (bool, str):
        fits, allowed = isinstance(value, kind), "True or False" if kind is bool else "a name"
    else:
        if low is None:
            low, high = BOUNDS.get(name, (int(kind is int), MOST))
        number = numbers.Integral if kind is int else numbers.Real
        fits = isinstance(value, number) and not isinstance(value, bool) and low <= value <= high
        open_ended = high == MOST and not (isinstance(value, number) and value > high)
        bounds = f"of at least {low}" if open_ended else f"from {low} to {high:,}"
        allowed = f"a {'whole ' if kind is int else ''}number {bounds}"
    if not fits:
        raise MusotaError(f"{name} must be {allowed}, not {value!r}.")
    return value if type(value) in (int, float, bool, str) else kind(value)


class Checked:
    """A dataclass that raises MusotaError for the first field with a value out of range."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = check_value(field.name, getattr(self, field.name), field.type)
            object.__setattr__(self, field.name, value)


@dataclass(frozen=True)
class Sizes(Checked):
    """Fields and checks common to the models. A subclass adds `d_model`, `n_head`, `n_parameters`,
    `layer_products` (the multiply-adds of one layer's linear maps for one token), `kind`, its name
    in records, and `built_by`, the place and name of the model's class."""

    vocab_size: int = 50_000
    max_seq_len: int = 192
    n_layer: int = 12
    attentions_per_layer = 1

    def __post_init__(self):
        super().__post_init__()
        if self.d_model % self.n_head:
            raise MusotaError(f"n_head={self.n_head} must divide d_model={self.d_model}.")
        if self.n_parameters > LARGEST_MODEL:
            large = f"A model of {self.n_parameters:,} parameters is over the limit"
            raise MusotaError(f"{large} of {LARGEST_MODEL:,}: choose smaller sizes.")

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of a training step per token: matrix products only, two per
        multiply-add, the backward pass twice the forward pass, attention as full squares."""
        scores_and_averages = 2 * self.d_model * self.max_seq_len
        layer = self.layer_products + self.attentions_per_layer * scores_and_averages
        return 3 * 2 * (self.n_layer * layer + self.d_model * self.vocab_size)


@dataclass(frozen=True)
class MuConfig(Sizes):
    """MU-SOTA. A token is a matrix of `matrix_size`² channels, split into `n_block` semantic
    blocks. `n_head` is the number of heads of the attention across blocks."""

    n_head: int = 8
    dropout: float = 0.1
    matrix_size: int = 8
    n_block: int = 16
    attentions_per_layer = 2
    kind, built_by = "mu", "musota.models.mu_sota:MuSota"

    def __post_init__(self):
        super().__post_init__()
        if any(size % HEADS_PER_BLOCK for size in self.layout.sizes):
            raise MusotaError(f"n_block={self.n_block} must make blocks of an even size.")

    @property
    def layout(self) -> BlockLayout:
        return BlockLayout.standard(self.matrix_size, self.n_block)

    @property
    def d_model(self) -> int:
        return self.matrix_size**2

    @property
    def n_parameters(self) -> int:
        V, d, N = self.vocab_size, self.d_model, self.n_block
        layer = self.layer_products + 17 * d + 4 * N + V * N  # maps, biases, norms, β, affinities
        return (2 * V + self.max_seq_len + 2) * d + self.n_layer * layer + V

    @property
    def layer_products(self) -> int:
        d, N = self.d_model, self.n_block
        return sum(4 * c * c for c in self.layout.sizes) + 12 * d * d + 4 * N * N + 2 * N


@dataclass(frozen=True)
class DenseConfig(Sizes):
    """The baseline: a GPT-2 style transformer."""

    n_head: int = 13
    dropout: float = 0.1
    d_model: int = 208
    layout = None  # no blocks
    kind, built_by = "dense", "musota.models.dense:DenseTransformer"

    @property
    def n_parameters(self) -> int:
        layer = self.layer_products + 13 * self.d_model
        return (self.vocab_size + self.max_seq_len + 2) * self.d_model + self.n_layer * layer

    @property
    def layer_products(self) -> int:
        return 12 * self.d_model**2


@dataclass(frozen=True)
class RedesignedConfig(Sizes):
    """The redesign. A token is `n_block` semantic blocks of `block_size` channels, one attention
    head per block. `blocks`: the keys of a head read its own block only. `gate`: the token's
    affinities scale the updates of each block. With both off it is a plain modern transformer."""

    n_block: int = 8
    block_size: int = 26
    d_ff: int = 854
    dropout: float = 0.1
    blocks: bool = True
    gate: bool = True
    kind, built_by = "redesigned", "musota.models.redesigned:Redesigned"

    def __post_init__(self):
        super().__post_init__()
        if self.block_size % 2:
            raise MusotaError(f"block_size must be even, not {self.block_size}.")

    @property
    def layout(self) -> BlockLayout | None:
        """None for the plain transformer, which has no blocks."""
        if not (self.blocks or self.gate):
            return None
        return BlockLayout.of_equal_blocks(self.n_block, self.block_size)

    @property
    def d_model(self) -> int:
        return self.n_block * self.block_size

    @property
    def n_head(self) -> int:
        return self.n_block

    @property
    def n_parameters(self) -> int:
        V, d, N = self.vocab_size, self.d_model, self.n_block
        layer = self.layer_products + 2 * d + N + N * self.gate  # maps, norms, sharpness, bias
        return V * d + V * N * self.gate + self.n_layer * layer + d

    @property
    def layer_products(self) -> int:
        d = self.d_model
        key = d * (self.block_size if self.blocks else d)
        return key + 3 * d * d + 2 * d * self.d_ff + self.n_block**2 * self.gate


@dataclass(frozen=True)
class ModuleConfig:
    """A user's own module as recorded: measurements and hashes, no code."""

    source: str  # FILE.py:NAME
    file_sha256: str  # of the file that defines the class
    shapes_sha256: str  # of the names and shapes of its parameters
    vocab_size: int
    max_seq_len: int
    n_parameters: int
    flops_per_token: int
    n_layer: int  # this and dropout are those of its parameter-matched transformer
    dropout: float
    kind = "module"


ModelConfig = MuConfig | DenseConfig | RedesignedConfig | ModuleConfig
KINDS = {c.kind: c for c in (MuConfig, DenseConfig, RedesignedConfig, ModuleConfig)}  # in records


def describe(model: ModelConfig) -> dict:
    """A model's configuration for JSON. Raises MusotaError for a class that KINDS does not have."""
    if KINDS.get(getattr(model, "kind", None)) is not type(model):
        raise MusotaError(f"{type(model).__name__} needs a kind, built_by and a row of KINDS.")
    return {"kind": model.kind, **dataclasses.asdict(model)}


@dataclass(frozen=True)
class TrainConfig(Checked):
    """How to train: AdamW, linear warm-up, then cosine to 0. Steps are optimizer steps."""

    epochs: int = 30
    learning_rate: float = 1e-4
    warmup_steps: int = 2000
    batch_size: int = 4
    accumulation_steps: int = 8
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    optimizer: str = "adamw"  # a key of OPTIMIZERS in training/optim.py
    schedule: str = "cosine"  # a key of SCHEDULES in training/optim.py

    @property
    def sequences_per_step(self) -> int:
        return self.batch_size * self.accumulation_steps


@dataclass(frozen=True)
class Experiment:
    """A model and how to train it. Two experiments are equal when both parts are."""

    model: ModelConfig
    training: TrainConfig

    def with_(self, **changes) -> "Experiment":
        """A copy with fields of the model or of the training changed, by name."""
        for name in changes:
            find_named("experiment field", name, sorted(self.fields()))

        def changed(part):
            names = changes.keys() & {field.name for field in dataclasses.fields(part)}
            return dataclasses.replace(part, **{name: changes[name] for name in names})

        return Experiment(changed(self.model), changed(self.training))

    def fields(self) -> dict:
        """Every field of the model and the training by name."""
        return dataclasses.asdict(self.model) | dataclasses.asdict(self.training)

    def to_dict(self) -> dict:
        """For JSON; `from_dict` is the inverse."""
        return {"model": describe(self.model), "training": dataclasses.asdict(self.training)}

    @classmethod
    def from_dict(cls, data: dict) -> "Experiment":
        """Raises MusotaError for unknown fields or kinds; missing fields take their defaults."""
        try:
            model, training = {**data["model"]}, {**data["training"]}
            training.pop("started_from", None)  # of older records
            return cls(KINDS[model.pop("kind")](**model), TrainConfig(**training))
        except (AttributeError, KeyError, TypeError) as error:
            raise MusotaError(f"Not the description of an experiment: {error}.") from None
