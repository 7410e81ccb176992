"""Checks of what is to be trained, modules of the user's own, and weights to start from."""

import os

import torch
from torch import Tensor, nn

from musota.config import Experiment, ModuleConfig, TrainConfig, describe
from musota.data.corpus import Corpus
from musota.errors import MusotaError, nearest_name
from musota.files import as_path
from musota.models.base import weights_sha256
from musota.models.diagnostics import evaluating
from musota.models.hub import load_model
from musota.models.module import logits_of, materialized_copy, module_config
from musota.training.optim import OPTIMIZERS, SCHEDULES
from musota.training.run import Run


def checked(experiment, corpus, training, max_seq_len) -> tuple[Experiment, nn.Module | None]:
    """The experiment, and a copy of the module it trains, if it is one. Raises MusotaError for what
    cannot be trained."""
    for value, kind in ((experiment, Experiment | nn.Module), (corpus, Corpus)):
        if not isinstance(value, kind):
            raise MusotaError(f"train needs an Experiment and a Corpus, not {value!r:.80}.")
    module = None
    if isinstance(experiment, nn.Module):
        module, model = _prepare_module(experiment, corpus, max_seq_len)
        experiment = Experiment(model, training or TrainConfig())
    elif training or max_seq_len:
        raise MusotaError("training and max_seq_len belong to a module: use experiment.with_(…).")
    for kind, table in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        name = getattr(experiment.training, kind)
        if name not in table:
            raise nearest_name(kind, name, table)
    size = experiment.model.vocab_size
    if corpus.tokenizer.size > size:
        large = f"The corpus uses {corpus.tokenizer.size} tokens but the model's vocab_size is"
        raise MusotaError(f"{large} {size}: load the corpus with that vocab_size.")
    for split in ("valid", "test"):
        if len(corpus.split(split)) < 2:
            raise MusotaError(f"The {split} text has under two tokens: use more text.")
    return experiment, module


def _prepare_module(module, corpus, max_seq_len) -> tuple[nn.Module, ModuleConfig]:
    """A copy of a module, and its description with the vocabulary that its output has."""
    kind = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise MusotaError(f"{kind} is scripted: train the module it was made from.")
    if not max_seq_len:
        raise MusotaError("A module needs max_seq_len, the tokens of a training sequence.")
    module = materialized_copy(module, max_seq_len)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trained:
        raise MusotaError(f"{kind} has no parameters to train: set requires_grad of some to True.")
    ids = torch.zeros(1, max_seq_len, dtype=torch.long, device=trained[0].device)
    with torch.random.fork_rng([]), torch.no_grad(), evaluating(module):
        shape = getattr(logits_of(module, ids), "shape", ())
    vocab_size = shape[-1] if len(shape) else corpus.tokenizer.size
    return module, module_config(module, vocab_size, max_seq_len)


def start_from(
    source: Run | str | os.PathLike, experiment: Experiment, corpus: Corpus
) -> tuple[Experiment, dict[str, Tensor]]:
    """`experiment` as one that starts from the weights of a run or saved model, and those weights.

    Raises MusotaError if there are none, or if they are of another model or of other tokens.
    """
    if isinstance(experiment.model, ModuleConfig):
        raise MusotaError("continue_from is for experiments: use Run.load_weights(module) first.")
    path = source.path if isinstance(source, Run) else as_path(source)
    is_run = (path / "metrics.jsonl").exists()
    model = Run(path).load_model() if is_run else load_model(path)
    present = describe(model.config)
    for name, value in describe(experiment.model).items():  # the kind first
        if present[name] != value and name != "dropout":  # which has no weights
            differs = f"{path} has {name}={present[name]}, not {value}"
            raise MusotaError(f"{differs}: weights fit only a model of the same shape.")
    tokenizer = model.tokenizer and model.tokenizer.backend.to_str()
    if tokenizer != corpus.tokenizer.backend.to_str():
        other = f"{path} was trained with another tokenizer"
        raise MusotaError(f"{other}: start from a run on the same corpus and vocab_size.")
    return experiment.with_(started_from=weights_sha256(model)[:12]), model.state_dict()
