"""A run's folder: what was asked for, what was measured, and the checkpoints.

config.json    experiment, seed, corpus, choices of the trainer     (written once)
metrics.jsonl  one JSON a line: kind step | epoch | event           (appended to)
summary.json   the best epoch, the test score, where and how long   (rewritten whole)
checkpoints/   step-*.safetensors to resume from, best/ to use      (not committed)

Damage shows: config and summary carry a hash of themselves, the summary those of metrics.jsonl and
best/, a checkpoint has its own in its name and all of metrics.jsonl inside. Nothing is unpickled.
"""

import json
import math
import os
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from musota.data.corpus import Corpus
from musota.errors import MusotaError
from musota.files import as_path, read_sealed, sha256
from musota.models.base import CausalLM, weights_sha256
from musota.models.sharing import load_model
from musota.plan.architectures import describe
from musota.plan.config import Experiment

KINDS = ("step", "epoch", "event")  # of records


class Run:
    """A recorded run, read from its folder. Raises MusotaError if that holds no readable run."""

    def __init__(self, path: str | os.PathLike):
        self.path = as_path(path)
        self._describe(read_sealed(self.path / "config.json"))

    @classmethod
    def from_records(
        cls, path: str | os.PathLike, config: dict, summary: dict, records: list[dict]
    ) -> "Run":
        """A run whose folder has been packed: what its files held."""
        run = cls.__new__(cls)
        run.path = Path(path)
        run._describe(config)
        run.summary, run.records = summary, records  # in place of what would be read
        return run

    def _describe(self, config: dict) -> None:
        try:
            self.config = config
            self.experiment = Experiment.from_dict(config["experiment"])
            self.name, self.seed = config["name"], config["seed"]
            self.fingerprint = config["corpus"]["fingerprint"]
        except (KeyError, TypeError, MusotaError) as error:
            place = self.path / "config.json"
            raise MusotaError(f"{place} does not describe a run: {error}") from None

    @property
    def identity(self) -> tuple[Experiment, str, int]:
        """What a run is, whatever it is called: experiment, corpus, seed."""
        return self.experiment, self.fingerprint, self.seed

    @property
    def valid_text(self) -> tuple:
        """What it was validated on: where this is equal, losses are of the same tokens."""
        corpus = self.config["corpus"]
        counts = [corpus[key]["valid"] for key in ("tokens", "words", "bytes")]
        return corpus["vocabulary_in_use"], *counts

    @cached_property
    def summary(self) -> dict:
        """The numbers of summary.json; empty before the first epoch has ended."""
        path = self.path / "summary.json"
        return read_sealed(path) if path.exists() else {}

    @property
    def finished(self) -> bool:
        return self.summary.get("finished", False)

    @property
    def diverged(self) -> bool:
        """Whether it ended because its loss was no longer a number."""
        return not self.finished and any(event == "diverged" for _, event in self.events)

    @property
    def ended(self) -> bool:
        return self.finished or self.diverged

    @property
    def valid_loss(self) -> float:
        """Of the best epoch in nats a token, inf where it diverged."""
        return math.inf if self.diverged else self.summary["valid_loss"]

    @cached_property
    def records(self) -> list[dict]:
        path, expected = self.path / "metrics.jsonl", self.summary.get("metrics_sha256")
        data = path.read_bytes() if path.exists() else b""
        # Of a run under way the summary vouches for what was there when its last epoch ended.
        known = data if self.finished else data[: self.summary.get("metrics_bytes", 0)]
        if expected and expected != sha256(known):
            raise MusotaError(f"{path} is damaged or was changed by hand: restore it.")
        return read_metrics(data, path)

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
        return steps_table(self.records)

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
        """(step, what happened) of everything out of the ordinary."""
        return [(event["step"], event["event"]) for event in self._of_kind("event")]

    @property
    def has_model(self) -> bool:
        """Whether the checkpoint of the best epoch is here; committed runs come without."""
        return (self.path / "checkpoints" / "best" / "model.safetensors").exists()

    def load_model(self, device: str | torch.device = "cpu") -> CausalLM:
        """The model of the best epoch. Raises MusotaError where it was not kept, or is damaged."""
        folder = self.path / "checkpoints" / "best"
        for name, expected in self.summary.get("best_files", {}).items():
            path = folder / name
            if path.exists() and sha256(path.read_bytes()) != expected:
                raise MusotaError(f"{path} is damaged: train the run again with fresh=True.")
        return load_model(folder, device)

    def __repr__(self) -> str:
        ppl = f", valid PPL {self.summary['ppl']:.1f}" if self.summary else ""
        return f"Run({self.name}, seed {self.seed}{ppl}, {self.path})"


def steps_table(records: list[dict]) -> pd.DataFrame:
    """One row a logged step of the records of a metrics.jsonl."""
    rows = [record for record in records if record["kind"] == "step"]
    table = pd.DataFrame(rows).drop(columns="kind", errors="ignore")
    return table.astype(float).astype({"step": int, "tokens": int}) if rows else table


def read_metrics(data: bytes, path: Path) -> list[dict]:
    """The records of the bytes of a metrics.jsonl. A half-written last line is left out.

    Raises MusotaError for damage anywhere else, naming `path`.
    """
    records = []
    for line in data.split(b"\n")[:-1]:  # what follows the last line end is half
        try:
            record = json.loads(line)
            if record["kind"] not in KINDS:
                raise ValueError("another kind of record")
            records.append(record)
        except (ValueError, KeyError, TypeError):
            where = f"Line {len(records) + 1} of {path}"
            raise MusotaError(f"{where} is damaged: delete it, or train the run again.") from None
    return records


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
    own = model.tokenizer and model.tokenizer.backend.to_str()
    if own != corpus.tokenizer.backend.to_str():
        other = f"{run.path} was trained on another tokenizer's tokens"
        raise MusotaError(f"{other}: its weights mean nothing here.")
    return experiment.with_(started_from=weights_sha256(model)[:12]), model.state_dict()
