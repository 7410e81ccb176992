"""Models matched to the parameter count of another: same depth, sequence length and training."""

import dataclasses
from collections.abc import Mapping

from musota.config import DenseConfig, Experiment, ModelConfig, RedesignedConfig, TrainConfig
from musota.errors import MusotaError

SHARED = ("vocab_size", "max_seq_len", "n_layer", "dropout")  # fields that matched models share


def split_sizes(changes: Mapping) -> tuple[dict, dict]:
    """Changes of sizes that matching would choose (`n_head` only beside `d_model`), and others."""
    names = {"d_model", "block_size", "d_ff"} | ({"n_head"} if "d_model" in changes else set())
    own = {name: changes[name] for name in changes if name in names}
    return own, {name: changes[name] for name in changes if name not in names}


def _shared(model: ModelConfig) -> dict:
    return {name: getattr(model, name) for name in SHARED}


def match_width(target: int, config: DenseConfig) -> DenseConfig:
    """`config` at the even d_model whose parameter count is nearest to `target`. The number of
    heads is the divisor of d_model with a head size nearest to 16 (the larger head on a tie)."""

    def at(width: int) -> DenseConfig:
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        n_head = min(divisors, key=lambda n: (abs(width / n - 16), n))
        return dataclasses.replace(config, d_model=width, n_head=n_head)

    width = 2
    while at(width).n_parameters < target:
        width += 2
    return min(at(max(2, width - 2)), at(width), key=lambda c: abs(c.n_parameters - target))


def match_redesign(model: ModelConfig, **switches) -> RedesignedConfig:
    """The redesign at the parameter count of `model`, with the widest blocks at which the feed-
    forward layer is three times as wide as the model. `switches`: n_block, blocks, gate."""

    def at(block_size: int) -> RedesignedConfig:
        """With the feed-forward width whose parameter count is nearest."""
        least = RedesignedConfig(**_shared(model), block_size=block_size, d_ff=1, **switches)
        more = (model.n_parameters - least.n_parameters) / (2 * least.n_layer * least.d_model)
        return dataclasses.replace(least, d_ff=1 + max(0, round(more)))

    block_size = 2
    while (wider := at(block_size + 2)).d_ff >= 3 * wider.d_model:
        block_size += 2
    return at(block_size)


def match_transformer(model: ModelConfig) -> DenseConfig | RedesignedConfig:
    """The plain transformer of the same parameter count: for the redesign a modern one (the
    redesign without blocks and gate), otherwise GPT-2 style."""
    if isinstance(model, RedesignedConfig):
        return match_redesign(model, n_block=model.n_block, blocks=False, gate=False)
    return match_width(model.n_parameters, DenseConfig(**_shared(model)))


def is_match(transformer: ModelConfig, model: ModelConfig) -> bool:
    """Whether `transformer` is a plain transformer matched to `model`: of the kind that
    `match_transformer` makes, with the same shared sizes and, within 3 %, as many parameters."""
    plain = [getattr(config, "layout", config) is None for config in (transformer, model)]
    modern = [isinstance(config, RedesignedConfig) for config in (transformer, model)]
    alike = modern[0] == modern[1] and _shared(transformer) == _shared(model)
    near = abs(transformer.n_parameters / model.n_parameters - 1) <= 0.03
    return plain == [True, False] and alike and near


def twin(experiment, vocab_size: int | None = None, max_seq_len: int | None = None) -> Experiment:
    """The parameter-matched plain transformer of an Experiment, with the same training; or of a
    torch module, given its vocabulary and sequence length, with the plan's training.

    Raises MusotaError for anything else, and for a module whose output does not fit.
    """
    if isinstance(experiment, Experiment):
        return Experiment(match_transformer(experiment.model), experiment.training)
    from torch import nn

    from musota.models.module import module_config

    if not isinstance(experiment, nn.Module) or not (vocab_size and max_seq_len):
        needed = "an Experiment, or a torch module with its vocab_size and max_seq_len"
        raise MusotaError(f"twin needs {needed}, not {experiment!r:.80}.")
    model = module_config(experiment, vocab_size, max_seq_len)
    return Experiment(match_transformer(model), TrainConfig())
