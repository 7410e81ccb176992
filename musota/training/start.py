"""Where training starts: where its last checkpoint stands, at another run's weights, or anew."""

from __future__ import annotations

import os

from torch import Tensor

from musota.data.corpus import Corpus
from musota.errors import MusotaError
from musota.models.base import CausalLM, weights_sha256
from musota.models.sharing import build_model
from musota.plan.config import Experiment
from musota.rules import curves
from musota.training import keeping
from musota.training.remedies import SHORTER
from musota.training.runs import Run


def started_from(
    source: Run | str | os.PathLike, experiment: Experiment, corpus: Corpus
) -> tuple[Experiment, dict[str, Tensor]]:
    """`experiment` as one that starts from the best weights of a run, and those weights.

    Raises MusotaError for a run without its checkpoint, of another model or of other tokens.
    """
    run = source if isinstance(source, Run) else Run(source)
    model, wanted = run.load_model(), experiment.model
    if type(model.config) is not type(wanted):
        kinds = type(model.config).__name__, type(wanted).__name__
        raise MusotaError(f"{run.path} holds a {kinds[0]}, not a {kinds[1]}: start from its like.")
    for name, value in vars(wanted).items():
        held = getattr(model.config, name)
        if held != value and name != "dropout":  # which has no weights
            raise MusotaError(
                f"{run.path} has {name}={held}, not {value}: weights fit a model of their own "
                "shape only."
            )
    if model.tokenizer.backend.to_str() != corpus.tokenizer.backend.to_str():
        raise MusotaError(
            f"{run.path} was trained on another tokenizer's tokens: its weights mean nothing here."
        )
    return experiment.with_(started_from=weights_sha256(model)[:12]), model.state_dict()


def first_model(trainer) -> CausalLM:
    """The model before its first step. Raises MusotaError where its weights are not at hand."""
    if trainer.training.started_from and not (trainer.saved or trainer.start):
        raise MusotaError(
            f"This experiment starts from the weights {trainer.training.started_from}: name the "
            "run that has them with continue_from= (--continue-from)."
        )
    model = build_model(trainer.experiment.model)
    if trainer.start:
        model.load_state_dict(trainer.start)
    return model


def begin(trainer) -> None:
    """Go on from the last checkpoint, if there is one; and what is to be said before a step."""
    if trainer.saved:
        keeping.restore(trainer, trainer.saved)
        trainer.say(
            f"{trainer.folder.path}: going on after step {trainer.step} of {trainer.total_steps}."
        )
    elif trainer.auto_remedy:
        keeping.checkpoint(trainer)  # to have something to go back to
    if trainer.instead_of and not trainer.step:
        longer = trainer.instead_of.model.max_seq_len
        short = f"{SHORTER} tokens a sequence, not {longer}, which is another experiment"
        trainer.tell(f"out of memory: {short}")
    if slow := curves.warmup(trainer.training.warmup_steps, trainer.total_steps):
        trainer.say(slow.sentence)
    trainer.saved = trainer.start = None
