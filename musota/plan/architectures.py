"""The models as frozen dataclasses: their sizes, and what follows from those by hand."""

import dataclasses
import json
import sys
from dataclasses import dataclass
from functools import cached_property

from musota.errors import MusotaError, nearest_name
from musota.plan import own
from musota.plan.layout import NAMES, BlockLayout

HEADS_PER_BLOCK = 2  # whatever its size
LARGEST_MODEL = 20_000_000_000  # parameters; what is larger is a slip of the keyboard
TINY, HUGE = sys.float_info.min, sys.float_info.max
# What a field may be, where it is not "a whole number from 1 on" or "a number from 0 on".
BOUNDS = {
    "dropout": (0, 0.99),
    "averaging": (0, 1),
    "warmup_steps": (0, HUGE),
    "learning_rate": (TINY, HUGE),
    "grad_clip": (TINY, HUGE),
    "matrix_size": (1, 64),
    "n_block": (1, 4096),
}


def check_fields(config) -> None:
    """Raises MusotaError for a value that no experiment may have."""
    for field in dataclasses.fields(config):
        check_field(field, getattr(config, field.name))


def check_field(field: dataclasses.Field, value) -> None:
    kind = getattr(field.type, "__name__", field.type)
    allowed, python_type = "a name", {"int": int, "str": str}.get(kind, (int, float))
    fits = isinstance(value, python_type) and not isinstance(value, bool)
    if kind != "str":
        low, high = BOUNDS.get(field.name, (int(kind == "int"), HUGE))
        fits = fits and low <= value <= high
        allowed = f"a {'whole' if kind == 'int' else 'finite'} number "
        allowed += "above 0" if low == TINY else f"of at least {low}"
        allowed += f", at most {high}" if high < HUGE else ""
    if not fits:
        raise MusotaError(f"{field.name} must be {allowed}, not {value!r}.")


@dataclass(frozen=True)
class Sizes:
    """What the models of this workbook share. A subclass says the rest: `d_model`, `n_head`,
    `n_parameters`, and `layer_products`, the multiply-adds of a layer for a token."""

    vocab_size: int = 50_000
    max_seq_len: int = 192
    n_layer: int = 12

    def __post_init__(self):
        check_fields(self)
        if self.d_model % self.n_head:
            raise MusotaError(
                f"n_head={self.n_head} does not divide d_model={self.d_model}: choose a divisor."
            )
        if self.n_parameters > LARGEST_MODEL:
            raise MusotaError(
                f"A model of {self.n_parameters:,} parameters is beyond the {LARGEST_MODEL:,} "
                "allowed: choose smaller sizes."
            )

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of a training step per token. Matrix products only: two a
        multiply-add, backward twice the forward, attention as full squares, nothing recomputed."""
        products = self.n_layer * self.layer_products + self.d_model * self.vocab_size
        return 3 * 2 * products


@dataclass(frozen=True)
class MuConfig(Sizes):
    """MU-SOTA: each token a matrix of `matrix_size`² cells cut into `n_block` semantic blocks.
    `n_head` counts the heads of the attention across all blocks; inside a block there are two.
    Raises MusotaError on bad values, blocks that do not tile, heads that do not divide."""

    n_head: int = 8
    dropout: float = 0.1
    matrix_size: int = 8
    n_block: int = 16

    def __post_init__(self):
        super().__post_init__()
        if any(size % HEADS_PER_BLOCK for size in self.layout.sizes):
            odd = f"n_block={self.n_block} makes blocks of an odd number of cells"
            raise MusotaError(f"{odd}: choose another.")

    @property
    def layout(self) -> BlockLayout:
        return BlockLayout.standard(self.matrix_size, self.n_block)

    @property
    def d_model(self) -> int:
        return self.matrix_size**2

    @property
    def n_parameters(self) -> int:
        V, d, N = self.vocab_size, self.d_model, self.n_block
        attention = sum(4 * (c * c + c) for c in self.layout.sizes) + 4 * (d * d + d)
        feed_forward_and_norms = 8 * d * d + 5 * d + 4 * d
        gate = 4 * N * N + 6 * N + V * N
        layers = self.n_layer * (attention + feed_forward_and_norms + gate)
        return V * d + self.max_seq_len * d + layers + 2 * d + V * d + V

    @property
    def layer_products(self) -> int:
        d, N = self.d_model, self.n_block
        maps = sum(4 * c * c for c in self.layout.sizes) + 12 * d * d + 4 * N * N + 2 * N
        return maps + 2 * (2 * d * self.max_seq_len)  # both attentions' scores and averages


@dataclass(frozen=True)
class DenseConfig(Sizes):
    """The baseline: a GPT-2 style transformer. Raises MusotaError on bad values."""

    n_head: int = 13
    dropout: float = 0.1
    d_model: int = 208

    @property
    def n_parameters(self) -> int:
        d = self.d_model
        return (self.vocab_size + self.max_seq_len + 2) * d + self.n_layer * (12 * d * d + 13 * d)

    @property
    def layer_products(self) -> int:
        return 12 * self.d_model**2 + 2 * self.d_model * self.max_seq_len


# What separates the redesign from MU-SOTA's way of building, in the order of the path. A model
# `without` some of them takes those back.
CHANGES = (
    "stream",  # an update is added to the residual stream, which no gate shrinks
    "norm before",  # each part reads a normalised copy of the stream
    "tied",  # the output layer is the embedding
    "one table",  # one affinity table for all layers
    "rotary",  # positions enter where tokens are compared
    "query norm",  # queries and keys are normalised, a head learns how sharply it chooses
    "quiet start",  # maps start at 1/√fan-in, those that end attention and feed-forward at 0
    "embedding norm",  # a token's cells enter the stream at unit mean square
    "whole queries",  # a block's queries read the whole token
    "blocks",  # a block's keys read that block alone; its queries, too, if they are not whole
    "gate",  # a token's affinity decides how far each of its blocks moves
    "names",  # tried: block I never moves, block C1 begins with the previous token's cells
)


@dataclass(frozen=True)
class RedesignedConfig(Sizes):
    """The redesign: each token `n_block` named blocks of `block_size` cells, one head a block.
    `without` names changes (of `CHANGES`, separated by commas) that are taken back. Raises
    MusotaError on bad values."""

    n_block: int = 8
    block_size: int = 26
    d_ff: int = 854
    dropout: float = 0.1
    without: str = "names"

    def __post_init__(self):
        super().__post_init__()
        taken_back = [change.strip() for change in self.without.split(",")]
        for change in filter(None, taken_back):
            if change not in CHANGES:
                raise nearest_name("change", change, CHANGES)
        in_order = ",".join(change for change in CHANGES if change in taken_back)
        object.__setattr__(self, "without", in_order)  # equal when they are without the same
        if self.has("names") and self.n_block not in NAMES:
            raise MusotaError(
                f"Names need 8 or 16 blocks, not n_block={self.n_block}: add 'names' to without."
            )
        if self.has("rotary") and self.block_size % 2:
            raise MusotaError(
                f"block_size={self.block_size} is odd: rotary positions need an even one."
            )

    def has(self, change: str) -> bool:
        """Whether a change is made; without a gate there is no table."""
        taken_back = self.without.split(",")
        return change not in taken_back and not (change == "one table" and "gate" in taken_back)

    @property
    def layout(self) -> BlockLayout | None:
        """None of the modern twin, whose cells are one whole."""
        if not (self.has("blocks") or self.has("gate")):
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
        V, d, N, L, has = self.vocab_size, self.d_model, self.n_block, self.n_layer, self.has
        tables = V * N + L * (N * N + N) if has("one table") else V * N * L * has("gate")
        positions = self.max_seq_len * d * (not has("rotary"))
        output = (V * d + V) * (not has("tied"))
        norms = (2 * L + 1) * d + L * N * has("query norm")
        return V * d + positions + L * self._maps + norms + tables + output

    @property
    def parts_read(self) -> tuple[int, int]:
        """Into how many parts a token is cut for the queries, and for the keys: each block's read
        one of them."""
        keys = self.n_block if self.has("blocks") else 1
        return 1 if self.has("whole queries") else keys, keys

    @property
    def _maps(self) -> int:
        """Weights of a layer's maps of activations."""
        d = self.d_model
        read_by_query, read_by_key = (d // parts for parts in self.parts_read)
        return d * (read_by_query + read_by_key) + 2 * d * d + 2 * d * self.d_ff

    @property
    def layer_products(self) -> int:
        gate = self.n_block**2 * self.has("one table")
        return self._maps + gate + 2 * self.d_model * self.max_seq_len


@dataclass(frozen=True)
class OwnConfig:
    """A model of the reader's own: what a function or class in a Python file makes.

    `OwnConfig("my_model.py:build", {"width": 64})` calls `build(width=64, vocab_size=…,
    max_seq_len=…)`, the last two where it takes them. The file's name and sha256 belong to what the
    experiment is, its folder does not. A config read from a record remembers its size, and builds
    no model until the caller has named that file by such a call. Raises MusotaError for what goes
    wrong in reading the file, and in building its model.
    """

    source: str
    arguments: str = "{}"  # JSON; a dict is taken too
    vocab_size: int = 50_000
    max_seq_len: int = 192
    sha256: str = ""

    def __post_init__(self):
        given, fixed = self.arguments, {}
        try:
            given = dict(json.loads(given) if isinstance(given, str) else given)
            fixed["arguments"] = json.dumps(given, sort_keys=True)
        except (TypeError, ValueError):
            raise MusotaError(
                f"arguments must be a dict of plain values (or its JSON), not {given!r}."
            ) from None
        if not self.sha256:
            fixed["source"], fixed["sha256"] = own.name_file(self.source)
        for name, value in fixed.items():
            object.__setattr__(self, name, value)
        check_fields(self)

    def build(self):
        """The author's torch module, initialised from torch's random state."""
        sizes = {"vocab_size": self.vocab_size, "max_seq_len": self.max_seq_len}
        return own.build(self.source, self.sha256, json.loads(self.arguments), sizes)

    @cached_property
    def size(self) -> own.Size:
        """Measured on the model, built in a random state of its own."""
        import torch

        with torch.random.fork_rng():
            return own.size_of(self.build().eval(), self.vocab_size, self.max_seq_len)

    n_parameters = property(lambda self: self.size.n_parameters)
    flops_per_token = property(lambda self: self.size.flops_per_token)
    # Of its dense twin: the length of its longest list of layers, and the largest of its dropouts.
    n_layer = property(lambda self: self.size.n_layer)
    dropout = property(lambda self: self.size.dropout)


ModelConfig = MuConfig | DenseConfig | RedesignedConfig | OwnConfig
# As records name them.
KINDS = {"mu": MuConfig, "dense": DenseConfig, "redesigned": RedesignedConfig, "own": OwnConfig}


def describe(model: ModelConfig) -> dict:
    """A model's configuration for JSON; `model_config` is the inverse."""
    kind = next(kind for kind, its_class in KINDS.items() if type(model) is its_class)
    size = {"size": model.size} if isinstance(model, OwnConfig) else {}
    return {"kind": kind, **dataclasses.asdict(model), **size}


def model_config(described: dict) -> ModelConfig:
    """Raises KeyError or TypeError for a kind or field it does not know."""
    fields = {**described}
    kind, size = KINDS[fields.pop("kind")], fields.pop("size", None)
    if kind is OwnConfig and not fields["sha256"]:  # which would name a file, unasked
        raise KeyError("sha256")
    config = kind(**fields)
    if size:
        config.__dict__["size"] = own.Size(*size)  # where cached_property looks
    return config
