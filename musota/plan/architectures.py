"""The models as frozen dataclasses: their sizes, and what follows from those by hand.

Everything here is plain arithmetic on names and numbers, so it imports in milliseconds.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from functools import cached_property

from musota.errors import MusotaError, nearest_name
from musota.plan import own
from musota.plan.layout import NAMES, BlockLayout

# Each semantic block attends with two heads, whatever its size.
HEADS_PER_BLOCK = 2
LARGEST_MODEL = 20_000_000_000  # parameters; what is larger is a slip of the keyboard
# What a field may be, where it is not "a whole number from 1 on" or "a number from 0 on".
BOUNDS = {
    "dropout": (0, 0.99),
    "warmup_steps": (0, math.inf),
    "matrix_size": (1, 64),
    "n_block": (1, 4096),
}
ABOVE_ZERO = ("learning_rate", "grad_clip")


def check_fields(config) -> None:
    """Raises MusotaError for the first field whose value is not allowed."""
    for field in dataclasses.fields(config):
        check_field(field, getattr(config, field.name))


def check_field(field: dataclasses.Field, value) -> None:
    name, whole = field.name, field.type == "int"
    if field.type == "str":
        if not isinstance(value, str):
            raise MusotaError(f"{name} must be a name, not {value!r}.")
        return
    low, high = BOUNDS.get(name, (1 if whole else 0, math.inf))
    allowed = f"a {'whole ' if whole else 'finite '}number of at least {low}"
    allowed += f", at most {high}" if high < math.inf else ""
    if name in ABOVE_ZERO:
        allowed = "a finite number above 0"
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not fits or not low <= value <= high or value == math.inf or (
        name in ABOVE_ZERO and not value
    ):  # fmt: skip
        raise MusotaError(f"{name} must be {allowed}, not {value!r}.")


@dataclass(frozen=True)
class Sizes:
    """What the models of this workbook share. A subclass says the rest, and what follows from it:
    `d_model`, `n_head`, `n_parameters`, `flops_per_token`."""

    vocab_size: int = 50_000
    max_seq_len: int = 192
    n_layer: int = 12

    def __post_init__(self):
        """Raises MusotaError for bad fields, heads that do not divide, or an absurd size."""
        check_fields(self)
        if self.d_model % self.n_head:
            raise MusotaError(
                f"n_head={self.n_head} does not divide d_model={self.d_model}: choose a divisor."
            )
        if self.n_parameters > LARGEST_MODEL:
            raise MusotaError(
                f"A model of {self.n_parameters:,} parameters (vocab_size={self.vocab_size:,}, "
                f"n_layer={self.n_layer:,}) is beyond the {LARGEST_MODEL:,} allowed: choose "
                "smaller sizes."
            )


@dataclass(frozen=True)
class MuConfig(Sizes):
    """MU-SOTA: each token a matrix of `matrix_size`² cells cut into `n_block` semantic blocks.

    `n_head` counts the heads of the attention across all blocks; inside a block there are two.
    Raises MusotaError for a layout that does not tile the matrix or heads that do not divide.
    """

    n_head: int = 8
    dropout: float = 0.1
    matrix_size: int = 8
    n_block: int = 16

    def __post_init__(self):
        super().__post_init__()
        for block in self.layout.blocks:
            if block.size % HEADS_PER_BLOCK:
                raise MusotaError(
                    f"Block {block.name} has {block.size} cells, which {HEADS_PER_BLOCK} heads do "
                    "not divide: choose another n_block."
                )

    @property
    def layout(self) -> BlockLayout:
        return BlockLayout.standard(self.matrix_size, self.n_block)

    @property
    def d_model(self) -> int:
        """Cells of a token's matrix."""
        return self.matrix_size**2

    @property
    def n_parameters(self) -> int:
        """Parameters by hand; a test holds the built model to it."""
        vocab, d, blocks = self.vocab_size, self.d_model, self.n_block
        block_attention = sum(4 * (size**2 + size) for size in self.layout.sizes)
        cross_attention = 4 * (d * d + d)
        feed_forward = 8 * d * d + 5 * d
        gate = (blocks + 1) * 2 * blocks + 2 * blocks + 2 * blocks * blocks + blocks + blocks
        layer = block_attention + cross_attention + feed_forward + 4 * d + gate + vocab * blocks
        return vocab * d + self.max_seq_len * d + self.n_layer * layer + 2 * d + vocab * d + vocab

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of a training step per token, by hand (see `_step_flops`)."""
        d, blocks = self.d_model, self.n_block
        block_maps = sum(4 * size**2 for size in self.layout.sizes)
        gate = (blocks + 1) * 2 * blocks + 2 * blocks * blocks
        # Maps of both attentions and of the feed-forward; each attention's scores and averages.
        layer = block_maps + 4 * d * d + 8 * d * d + gate + 2 * (2 * d * self.max_seq_len)
        return _step_flops(self.n_layer * layer + d * self.vocab_size)


@dataclass(frozen=True)
class DenseConfig(Sizes):
    """The baseline: a GPT-2 style transformer. Raises MusotaError on bad values."""

    n_head: int = 13
    dropout: float = 0.1
    d_model: int = 208

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


# What separates the redesign from MU-SOTA's way of building, in the order of the path. A model
# `without` some of them takes those back.
CHANGES = (
    "stream",  # an update is added to the residual stream, which no gate shrinks
    "norm before",  # each part reads a normalised copy of the stream
    "tied",  # the output layer is the embedding
    "one table",  # one affinity table for all layers
    "rotary",  # positions enter where tokens are compared
    "query norm",  # queries and keys are normalised, a head learns how sharply it chooses
    "quiet start",  # maps start at 1/√fan-in, what is added to the stream at 0
    "blocks",  # a block's queries and keys read that block alone
    "gate",  # a token's affinity decides how far each of its blocks moves
    "names",  # block I keeps the token's own cells, block C1 begins with the previous token's
)


@dataclass(frozen=True)
class RedesignedConfig(Sizes):
    """The redesign: each token `n_block` named blocks of `block_size` cells, one head a block.

    `without` names changes (of `CHANGES`, separated by commas) that are taken back. Raises
    MusotaError on bad values.
    """

    n_block: int = 8
    block_size: int = 28
    d_ff: int = 700
    dropout: float = 0.1
    without: str = "names"

    def __post_init__(self):
        for change in filter(None, self.without.split(",")):
            if change not in CHANGES:
                raise nearest_name("change", change, CHANGES)
        super().__post_init__()
        if self.has("names") and self.n_block not in NAMES:
            raise MusotaError(
                f"{self.n_block} blocks have no names: use 8 or 16, or without='names'."
            )

    def has(self, change: str) -> bool:
        """Whether a change is made; without a gate there is no table."""
        taken_back = self.without.split(",")
        return change not in taken_back and not (change == "one table" and "gate" in taken_back)

    @property
    def layout(self) -> BlockLayout | None:
        """None of the modern twin, whose cells belong to no block."""
        if not (self.has("blocks") or self.has("gate")):
            return None
        return BlockLayout.of_equal_blocks(self.n_block, self.block_size)

    @property
    def d_model(self) -> int:
        """Cells of a token's matrix."""
        return self.n_block * self.block_size

    @property
    def n_head(self) -> int:
        return self.n_block

    @property
    def n_parameters(self) -> int:
        """Parameters by hand; a test holds the built model to it."""
        vocab, d, n, L = self.vocab_size, self.d_model, self.n_block, self.n_layer
        total = vocab * d + (2 * L + 1) * d + L * self._maps
        total += 0 if self.has("rotary") else self.max_seq_len * d
        total += 0 if self.has("tied") else vocab * d + vocab
        total += L * n if self.has("query norm") else 0
        if self.has("gate"):
            total += vocab * n + L * (n * n + n) if self.has("one table") else vocab * n * L
        return total

    @property
    def _maps(self) -> int:
        """Weights of a layer's maps of activations."""
        d = self.d_model
        queries_and_keys = 2 * d * (self.block_size if self.has("blocks") else d)
        return queries_and_keys + 2 * d * d + 2 * d * self.d_ff

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of a training step per token, by hand (see `_step_flops`)."""
        d, n = self.d_model, self.n_block
        gate = n * n if self.has("one table") else 0
        layer = self._maps + gate + 2 * d * self.max_seq_len
        return _step_flops(self.n_layer * layer + d * self.vocab_size)


def _step_flops(multiplications: int) -> int:
    """Of so many multiply-adds in the forward pass: two operations each, and backward costs two
    more products for each. Matrix products only, attention as full squares, nothing recomputed."""
    return 3 * 2 * multiplications


@dataclass(frozen=True)
class OwnConfig:
    """A model of the reader's own: what a function or class in a Python file makes.

    `OwnConfig("my_model.py:build", {"width": 64})` calls `build(width=64, vocab_size=…,
    max_seq_len=…)`, the last two where it takes them. The file's name and sha256 belong to what the
    experiment is, its folder does not. A config read from a record remembers its size, and builds
    no model until the caller has named that file by such a call. Raises MusotaError for a file that
    cannot be read, and where a property has to build the model, for what goes wrong there.
    """

    source: str
    arguments: str = "{}"  # JSON; a dict is taken too
    vocab_size: int = 50_000
    max_seq_len: int = 192
    sha256: str = ""

    def __post_init__(self):
        try:
            given = self.arguments
            given = dict(json.loads(given) if isinstance(given, str) else given)
            object.__setattr__(self, "arguments", json.dumps(given, sort_keys=True))
        except (TypeError, ValueError):
            raise MusotaError(
                f"arguments must be a dict of plain values (or its JSON), not {self.arguments!r}."
            ) from None
        if not self.sha256:
            for name, value in zip(("source", "sha256"), own.name_file(self.source), strict=True):
                object.__setattr__(self, name, value)
        check_fields(self)

    def build(self):
        """The author's torch module, initialised from torch's random state."""
        sizes = {"vocab_size": self.vocab_size, "max_seq_len": self.max_seq_len}
        return own.build(self.source, self.sha256, json.loads(self.arguments), sizes)

    @cached_property
    def size(self) -> own.Size:
        return own.measured(self)

    @property
    def n_parameters(self) -> int:
        return self.size.n_parameters

    @property
    def flops_per_token(self) -> int:
        return self.size.flops_per_token

    @property
    def n_layer(self) -> int:
        """The depth of its dense twin: the length of its longest list of layers."""
        return self.size.n_layer

    @property
    def dropout(self) -> float:
        """The dropout of its dense twin: the largest of its own."""
        return self.size.dropout


ModelConfig = MuConfig | DenseConfig | RedesignedConfig | OwnConfig
KINDS = {  # as records name them
    "mu": MuConfig,
    "dense": DenseConfig,
    "redesigned": RedesignedConfig,
    "own": OwnConfig,
}


def describe(model: ModelConfig) -> dict:
    """A model's configuration for JSON; `model_config` is the inverse."""
    kind = next(kind for kind, config_class in KINDS.items() if type(model) is config_class)
    size = {"size": model.size} if isinstance(model, OwnConfig) else {}
    return {"kind": kind, **dataclasses.asdict(model), **size}


def model_config(described: dict) -> ModelConfig:
    """Raises KeyError or TypeError for a kind or field it does not know."""
    fields = dict(described)
    kind, size = KINDS[fields.pop("kind")], fields.pop("size", None)
    if kind is OwnConfig and not fields["sha256"]:  # which would name a file, unasked
        raise KeyError("sha256")
    config = kind(**fields)
    if size:
        config.__dict__["size"] = own.Size(*size)  # where cached_property looks
    return config
