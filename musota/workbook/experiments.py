"""Experiments by name: rows of the registry, modules FILE.py:NAME, and their transformers."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields

import torch
from torch import nn

from musota.config import Experiment, TrainConfig
from musota.errors import MusotaError
from musota.lab.profiles import Profile, scaled
from musota.matching import split_sizes, twin
from musota.models.module import module_config
from musota.own import load_module
from musota.registry import REGISTRY
from musota.workbook.naming import ROWS, is_module

MODULE_FIELDS = {"vocab_size", "max_seq_len", *(f.name for f in fields(TrainConfig))}


def experiment_at(name: str, profile: Profile, changes: Mapping) -> Experiment:
    """An experiment at the size of a profile, with fields changed afterwards. `name` is a row of
    the registry or a module FILE.py:NAME; `<either>_twin` is its parameter-matched transformer."""
    if (name := ROWS.get(name, name)).endswith("_twin") and name not in REGISTRY:
        sizes, others = split_sizes(changes)
        return twin(experiment_at(name.removesuffix("_twin"), profile, others)).with_(**sizes)
    if not is_module(name):
        return scaled(name, profile, **changes)
    module, like = module_at(name, profile, changes)
    sizes = like.model.vocab_size, like.model.max_seq_len
    return Experiment(module_config(module, *sizes), like.training)


def module_at(
    source: str, profile: Profile, changes: Mapping, seed: int = 0
) -> tuple[nn.Module, Experiment]:
    """The module that FILE.py:NAME makes, and an experiment with the vocabulary, sequence length
    and training that it gets. Raises MusotaError for changes of other fields."""
    if others := ", ".join(sorted(changes.keys() - MODULE_FIELDS)):
        raise MusotaError(f"{source} has its own sizes: leave {others} out of changes.")
    like = scaled("optimized", profile, **changes)
    torch.manual_seed(seed)
    return load_module(source, like.model.vocab_size, like.model.max_seq_len), like


def effective_changes(name: str, profile: Profile, changes: Mapping) -> dict:
    """The changes that make a difference to an experiment, in the order of its fields."""
    experiment, effective = experiment_at(name, profile, changes), {}
    order = [*experiment.fields(), *changes]
    for one in sorted(changes, key=order.index):
        others = {f: value for f, value in changes.items() if f != one}
        with suppress(MusotaError):  # the others do not fit without this one
            if experiment_at(name, profile, others) == experiment:
                continue
        effective[one] = changes[one]
    return effective
