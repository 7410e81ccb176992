"""Another run's weights to start from."""

from __future__ import annotations

import os

from torch import Tensor

from musota.data.corpus import Corpus
from musota.errors import MusotaError
from musota.models.base import weights_sha256
from musota.plan.architectures import describe
from musota.plan.config import Experiment
from musota.training.runs import Run


def started_from(
    source: Run | str | os.PathLike, experiment: Experiment, corpus: Corpus
) -> tuple[Experiment, dict[str, Tensor]]:
    """`experiment` as one that starts from the best weights of a run, and those weights.

    Raises MusotaError for a run without its checkpoint, of another model or of other tokens.
    """
    run = source if isinstance(source, Run) else Run(source)
    model = run.load_model()
    held = describe(model.config)
    for name, value in describe(experiment.model).items():  # the kind first
        if held[name] != value and name != "dropout":  # which has no weights
            differs = f"{run.path} has {name}={held[name]}, not {value}"
            raise MusotaError(f"{differs}: weights fit a model of their own shape only.")
    if model.tokenizer.backend.to_str() != corpus.tokenizer.backend.to_str():
        other = f"{run.path} was trained on another tokenizer's tokens"
        raise MusotaError(f"{other}: its weights mean nothing here.")
    return experiment.with_(started_from=weights_sha256(model)[:12]), model.state_dict()
