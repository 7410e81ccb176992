"""A run's folder: what was asked for, what was measured, and the checkpoints.

config.json    experiment, seed, corpus, choices of the trainer     (written once)
metrics.jsonl  one JSON a line: kind step | epoch | event           (append-only)
summary.json   the best epoch, the test score, where and how long   (rewritten whole)
checkpoints/   last.pt to resume from, best/ to use                 (not committed)
"""

from __future__ import annotations

import json
import os
import shutil
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch

from musota.config import Experiment, MusotaError
from musota.data import jsonable, write_whole
from musota.lm import CausalLM, load_model

# A run may be continued only by the same of these.
IDENTITY = ("experiment", "seed", "corpus")


class Run:
    """A run folder, read. Raises MusotaError if it holds no readable run."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.config = _read_json(self.path / "config.json")
        try:
            self.experiment = Experiment.from_dict(self.config["experiment"])
            self.name, self.seed = self.config["name"], self.config["seed"]
        except (KeyError, MusotaError) as error:
            raise MusotaError(
                f"{self.path / 'config.json'} does not describe a run: {error}"
            ) from None

    @cached_property
    def summary(self) -> dict:
        """The numbers of summary.json; empty before the first epoch has ended."""
        path = self.path / "summary.json"
        return _read_json(path) if path.exists() else {}

    @property
    def finished(self) -> bool:
        return self.summary.get("finished", False)

    @cached_property
    def records(self) -> list[dict]:
        return read_metrics(self.path / "metrics.jsonl")

    @cached_property
    def history(self) -> pd.DataFrame:
        """One row an epoch: epoch, step, tokens, seconds, train_loss, valid_loss, ppl, …"""
        rows = [r for r in self.records if r["kind"] == "epoch"]
        hidden = ["kind", "samples", "valid_block_nats", "health"]
        return pd.DataFrame(rows).drop(columns=hidden, errors="ignore")

    @cached_property
    def valid_block_nats(self) -> list[list[float]] | None:
        """Total nats by epoch and block of valid text; None for runs that did not keep them."""
        epochs = [r for r in self.records if r["kind"] == "epoch"]
        kept = [r["valid_block_nats"] for r in epochs if "valid_block_nats" in r]
        return kept if len(kept) == len(epochs) else None

    @cached_property
    def health(self) -> list[dict]:
        """The health statistics of each epoch that kept them, with `epoch` and `valid_loss`."""
        epochs = [r for r in self.records if r["kind"] == "epoch" and "health" in r]
        return [{"epoch": r["epoch"], "valid_loss": r["valid_loss"], **r["health"]} for r in epochs]

    @cached_property
    def steps(self) -> pd.DataFrame:
        """One row a logging interval: step, loss, learning_rate, grad_norm, tokens, seconds."""
        rows = [r for r in self.records if r["kind"] == "step"]
        return pd.DataFrame(rows).drop(columns="kind", errors="ignore")

    @cached_property
    def events(self) -> list[tuple[int, str]]:
        """(step, what happened) of everything out of the ordinary."""
        return [(r["step"], r["event"]) for r in self.records if r["kind"] == "event"]

    @property
    def diverged(self) -> bool:
        """Whether it ended because its loss was no longer a number."""
        return not self.finished and any(event == "diverged" for _, event in self.events)

    @cached_property
    def samples(self) -> pd.DataFrame:
        """One row a sample: epoch, prompt, text."""
        epochs = [r for r in self.records if r["kind"] == "epoch"]
        rows = [{"epoch": r["epoch"], **sample} for r in epochs for sample in r["samples"]]
        return pd.DataFrame(rows, columns=["epoch", "prompt", "text"])

    @property
    def has_model(self) -> bool:
        """Whether the checkpoint of the best epoch is here; committed runs come without."""
        return (self.path / "checkpoints" / "best" / "model.safetensors").exists()

    def load_model(self) -> CausalLM:
        """The model of the best epoch. Raises MusotaError where the checkpoint was not kept."""
        return load_model(self.path / "checkpoints" / "best")

    def __repr__(self) -> str:
        ppl = f", valid PPL {self.summary['ppl']:.1f}" if self.summary else ""
        return f"Run({self.name}, seed {self.seed}{ppl}, {self.path})"


class RunFolder:
    """The trainer's side of a run folder: writes it, and guards it against another experiment."""

    def __init__(self, path: str | os.PathLike, identity: dict):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.identity = identity

    @property
    def finished(self) -> bool:
        """Whether this very run stands here finished. Raises MusotaError for another's folder."""
        if not (self.path / "config.json").exists():
            return False
        self._refuse_other(_read_json(self.path / "config.json"))
        return Run(self.path).finished

    def prepare(self, fresh: bool) -> None:
        """Make the folder, empty of an earlier run if `fresh`. Raises MusotaError if it cannot."""
        try:
            if fresh:
                self._clear()
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise MusotaError(
                f"The run folder {self.path} cannot be written ({error.strerror}): choose another "
                "results folder."
            ) from None

    def _clear(self) -> None:
        """Remove what a run writes, and nothing else."""
        if (self.path / "config.json").exists():
            shutil.rmtree(self.checkpoints, ignore_errors=True)
            for name in ("config.json", "metrics.jsonl", "summary.json"):
                (self.path / name).unlink(missing_ok=True)

    def _refuse_other(self, found: dict) -> None:
        wanted = _flat({key: self.identity[key] for key in IDENTITY})
        present = _flat({key: found.get(key) for key in IDENTITY})
        for key in sorted(wanted.keys() | present.keys()):
            if wanted.get(key) != present.get(key) and key != "corpus.source":
                raise MusotaError(
                    f"The folder {self.path} belongs to another run: its {key} is "
                    f"{present.get(key)!r}, not {wanted.get(key)!r}. Use another folder, or start "
                    "over there with fresh=True (--fresh)."
                )

    def append(self, record: dict) -> None:
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(jsonable(record), ensure_ascii=False) + "\n")

    def save_checkpoint(self, state: dict) -> None:
        """Write `last.pt`; it remembers how long metrics.jsonl was."""
        metrics = self.path / "metrics.jsonl"
        state = {**state, "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0}
        write_whole(self.checkpoints / "last.pt", lambda path: torch.save(state, path))

    def load_checkpoint(self) -> dict | None:
        """The state to resume from, with metrics.jsonl cut back to it; None to start anew.

        Raises MusotaError if either file is damaged.
        """
        path, metrics = self.checkpoints / "last.pt", self.path / "metrics.jsonl"
        if not path.exists():
            metrics.unlink(missing_ok=True)
            return None
        advice = "Start over with fresh=True (--fresh), or restore the file."
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            expected = state["metrics_bytes"]
        except Exception as error:  # torch raises many types for a damaged file
            raise MusotaError(
                f"The checkpoint {path} is damaged ({type(error).__name__}). {advice}"
            ) from None
        size = metrics.stat().st_size if metrics.exists() else 0
        if size < expected:
            raise MusotaError(
                f"{metrics} is shorter ({size} bytes) than when its checkpoint was written "
                f"({expected}): part of the history is gone. {advice}"
            )
        if size:
            os.truncate(metrics, expected)
        return state


def load_runs(folder: str | os.PathLike) -> list[Run]:
    """Every run in a results folder that has finished at least one epoch, by name and seed."""
    runs = [Run(path.parent) for path in sorted(Path(folder).glob("*/config.json"))]
    return [run for run in runs if run.summary]


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl. A half-written last line is left out.

    Raises MusotaError for damage anywhere else.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line end is half
        try:
            records.append(json.loads(line))
        except ValueError:
            raise MusotaError(
                f"Line {number} of {path} is damaged: delete that line, or train the run again."
            ) from None
    return records


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MusotaError(f"There is no {path}: not a run folder.") from None
    except (ValueError, OSError) as error:
        raise MusotaError(f"{path} cannot be read: {error}.") from None


def _flat(data: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in data.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
