"""The records of a run, read from its folder (the files: docs/reliability.md).

Hashes detect damage: config.json and summary.json contain their own, the summary those of
metrics.jsonl and best/, and a checkpoint has its own in its name. Nothing is unpickled.
"""

import json
import math
import os
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load
from torch import nn

from musota.config import Experiment
from musota.data.corpus import window_count
from musota.errors import MusotaError
from musota.files import (
    CONFIG,
    METRICS,
    START_OVER,
    SUMMARY,
    as_path,
    nan_for_null,
    read_sealed,
    sha256,
)
from musota.models.base import CausalLM
from musota.models.hub import load_model, weights_sha256
from musota.models.module import call_once, load_state

# Folders in that of a run, and the weights in BEST.
CHECKPOINTS, BEST, WEIGHTS = "checkpoints", "checkpoints/best", "model.safetensors"
# Entries of config.json and summary.json that a model card states.
MEASURED = "experiment corpus seed epochs_done best_epoch weights_sha256 device date versions "
MEASURED += "ppl accuracy bits_per_byte test_ppl test_accuracy test_bits_per_byte"


class Run:
    """A recorded run. Raises MusotaError if the folder holds no readable run."""

    def __init__(self, path: str | os.PathLike):
        self.path = as_path(path)
        self.config = read_sealed(self.path / CONFIG)
        try:
            self.experiment = Experiment.from_dict(self.config["experiment"])
            self.name, self.seed = self.config["name"], self.config["seed"]
            self.fingerprint = self.config["corpus"]["fingerprint"]
        except (KeyError, TypeError, MusotaError) as error:
            raise MusotaError(f"{self.path / CONFIG} does not describe a run: {error}") from None
        self.recorded_title = self.config.get("title") or self.name
        self.title = self.recorded_title  # as shown; see workbook.results.tell_apart
        self.profile, self.model_name = (self.config.get(of) for of in ("profile", "model"))
        self.key = self.experiment, self.fingerprint  # what seeds of one model share
        # Equal for runs that were validated on the same tokens.
        self.valid_text = self.config["corpus"].get("valid_sha256", self.fingerprint)

    @cached_property
    def summary(self) -> dict:
        """The contents of summary.json; empty before the first epoch has ended."""
        path = self.path / SUMMARY
        return nan_for_null(read_sealed(path)) if path.exists() else {}

    @property
    def finished(self) -> bool:
        return self.summary.get("finished", False)

    @property
    def diverged_at(self) -> int | None:
        """The step at which the run diverged; None if it did not."""
        steps = [step for step, event in self.events if event == "diverged"]
        return steps[-1] if steps and not self.finished else None

    @property
    def diverged(self) -> bool:
        return self.diverged_at is not None

    @property
    def ended(self) -> bool:
        return self.finished or self.diverged

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        training, n_tokens = self.experiment.training, self.config["corpus"]["tokens"]["train"]
        windows = window_count(n_tokens, self.experiment.model.max_seq_len)
        return training.epochs * math.ceil(windows / training.sequences_per_step)

    @property
    def valid_loss(self) -> float:
        """Of the best epoch in nats/token; inf if the run diverged."""
        return math.inf if self.diverged else self.summary["valid_loss"]

    @cached_property
    def records(self) -> list[dict]:
        """Every record of metrics.jsonl; a half-written last line is left out."""
        path, expected = self.path / METRICS, self.summary.get("metrics_sha256")
        data = path.read_bytes() if path.exists() else b""
        # While a run trains, its summary knows metrics.jsonl as of the last epoch.
        known = data if self.finished else data[: self.summary.get("metrics_bytes", 0)]
        try:
            if expected and expected != sha256(known):
                raise ValueError("its sha256 does not match")
            records = [json.loads(line) for line in data.split(b"\n")[:-1]]
            return [nan_for_null(record) for record in records if record["kind"]]
        except (ValueError, KeyError, TypeError):
            restore = f"restore it, or train the run again with {START_OVER}"
            raise MusotaError(f"{path} is damaged or was changed by hand: {restore}.") from None

    def _of_kind(self, kind: str) -> list[dict]:
        return [record for record in self.records if record["kind"] == kind]

    @cached_property
    def history(self) -> pd.DataFrame:
        """One row an epoch: epoch, step, tokens, seconds, train_loss, valid_loss, ppl, …"""
        hidden = ["kind", "samples", "valid_block_nats", "health"]
        return pd.DataFrame(self._of_kind("epoch")).drop(columns=hidden, errors="ignore")

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row a logging interval: step, loss, learning_rate, grad_norm, tokens, seconds."""
        return pd.DataFrame(self._of_kind("step")).drop(columns="kind", errors="ignore")

    @cached_property
    def valid_block_nats(self) -> list[list[float]]:
        """Total nats by epoch and block of valid text."""
        return [record["valid_block_nats"] for record in self._of_kind("epoch")]

    @cached_property
    def health(self) -> list[dict]:
        """The health statistics of each epoch, with `epoch` and `valid_loss`."""
        epochs = [record for record in self._of_kind("epoch") if "health" in record]
        return [{"epoch": r["epoch"], "valid_loss": r["valid_loss"], **r["health"]} for r in epochs]

    @cached_property
    def samples(self) -> pd.DataFrame:
        """One row a sample: epoch, prompt, text."""
        epochs = self._of_kind("epoch")
        rows = [{"epoch": r["epoch"], **sample} for r in epochs for sample in r.get("samples", ())]
        return pd.DataFrame(rows, columns=["epoch", "prompt", "text"])

    @cached_property
    def events(self) -> list[tuple[int, str]]:
        """(step, event) of everything unusual."""
        return [(record["step"], record["event"]) for record in self._of_kind("event")]

    @property
    def has_model(self) -> bool:
        """Whether the weights of the best epoch are here; committed runs come without them."""
        return (self.path / BEST / WEIGHTS).exists()

    def _best(self) -> Path:
        """The folder of the best epoch's model. Raises MusotaError if it is missing or damaged."""
        folder = self.path / BEST
        if not self.has_model:
            raise MusotaError(f"There is no {folder / WEIGHTS}: train again with {START_OVER}.")
        for name, expected in self.summary.get("best_files", {}).items():
            path = folder / name
            if path.exists() and sha256(path.read_bytes()) != expected:
                raise MusotaError(f"{path} is damaged: train the run again with {START_OVER}.")
        return folder

    def load_model(self, device: str | torch.device = "cpu") -> CausalLM:
        """The model of the best epoch; its `measured` holds what its model card states of the run.
        Raises MusotaError if it was not kept, is damaged, or is a module of the user's own (see
        `load_weights`)."""
        model, known = load_model(self._best(), device), {**self.config, **self.summary}
        model.measured = {key: known[key] for key in MEASURED.split() if key in known}
        model.measured |= {
            "title": self.recorded_title,
            "best_weights_sha256": weights_sha256(model),
        }
        return model

    def load_weights(self, module: nn.Module) -> None:
        """Load the weights of the best epoch into a module. Raises MusotaError if they were not
        kept, are damaged or do not fit."""
        weights = load((self._best() / WEIGHTS).read_bytes())
        if weights.keys() - module.state_dict().keys():  # some are created in the first call
            call_once(module, self.experiment.model.max_seq_len)
        try:
            load_state(module, weights)
        except (RuntimeError, AttributeError) as error:
            wrong = f"The weights of {self.path} do not fit this {type(module).__name__}"
            reason = " ".join(str(error).split())
            raise MusotaError(f"{wrong}: build it as it was trained ({reason:.300}).") from None

    def __repr__(self) -> str:
        ppl = f", valid PPL {self.summary['ppl']:.1f}" if self.summary else ""
        return f"Run({self.name}, seed {self.seed}{ppl}, {self.path})"


def load_runs(folder: str | os.PathLike) -> list[Run]:
    """The runs directly in a folder that have ended an epoch or diverged, sorted by path.

    Prints a line for each folder left out. Raises MusotaError for two runs of the same experiment,
    corpus and seed.
    """
    found: dict[tuple, Run] = {}
    for path in sorted(as_path(folder).glob(f"*/{CONFIG}")):
        try:
            run = Run(path.parent)
            if not run.records or not (run.summary or run.diverged):
                raise MusotaError("no epoch has ended yet")
        except MusotaError as error:
            print(f"{path.parent} is left out: {error}")
            continue
        other = found.setdefault((*run.key, run.seed), run)
        if other is not run:
            same = "the same run (experiment, corpus and seed): remove one of them"
            raise MusotaError(f"{other.path} and {run.path} are {same}.")
    return list(found.values())
