"""Configuration: frozen dataclasses."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from musota.errors import MusotaError, nearest_name
from musota.plan.layout import BlockLayout

# Each semantic block attends with two heads, whatever its size (DESIGN section 2).
HEADS_PER_BLOCK = 2


LARGEST_MATRIX = 64


LARGEST_MODEL = 20_000_000_000  # parameters; what is larger is a slip of the keyboard


LARGEST_DROPOUT = 0.99


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
