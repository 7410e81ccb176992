"""The write side of a run's folder (read side: `run`): records, checkpoints, the best weights."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from musota.config import Experiment
from musota.data.corpus import Corpus
from musota.errors import MusotaError
from musota.files import as_path, jsonable, sha256, system_error, write_bytes, write_sealed
from musota.models.hub import save_model
from musota.training.run import Run, nan_for_null
from musota.training.state import TrainState

CHECKPOINT_SECONDS = 180  # between checkpoints inside an epoch
COPY_SECONDS = 600  # between copies; a run ends with one, however it ends


class RunDir:
    """The folder of one run, which refuses other runs and other processes.

    A write that fails (a full disk) is reported and repeated with the next checkpoint; `trouble`
    says what is still unsaved. One of several processes writes; the others only read.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        identity: dict,
        corpus: Corpus,
        writes: bool = True,
        copy: Callable[[], object] | None = None,
    ):
        self.path = as_path(path)
        self.checkpoints = self.path / "checkpoints"
        names = "config.json", "metrics.jsonl", "summary.json"
        self.config_path, self.metrics_path, self.summary_path = (self.path / n for n in names)
        self.identity = {**identity, "corpus": _described(corpus)}
        self.tokenizer, self.writes, self.copy = corpus.tokenizer, writes, copy
        self.metrics = b""  # the bytes that metrics.jsonl should hold
        self.trouble = self.copy_trouble = ""
        self.last = ""  # name of the newest checkpoint known to be good
        self.saved_at, self.copied_at = time.monotonic(), float("-inf")
        self.lock = FileLock(self.checkpoints / ".lock")

    @property
    def finished(self) -> bool:
        """Whether the folder holds this very run, finished. Raises MusotaError for another run."""
        if not self.config_path.exists():
            return False
        run = Run(self.path)
        _refuse_other(self.identity, run.config, f"folder {self.path}")
        return run.finished

    @contextmanager
    def locked(self, fresh: bool = False) -> Iterator[None]:
        """Within it the folder exists and is locked; `fresh` first removes an earlier run.

        Raises MusotaError if it cannot be written or another process trains in it.
        """
        try:
            if self.writes:
                with self._writable():
                    self.checkpoints.mkdir(parents=True, exist_ok=True)
                    _acquire(self.lock, self.path)
                    for left in self.checkpoints.glob(".step-*"):  # by a process that was killed
                        left.unlink(missing_ok=True)
                    if fresh:
                        _clear(self.path)
            yield
        finally:
            self.lock.release()

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            instead = "choose another results folder"
            raise system_error(f"The run folder {self.path}", error, instead) from None

    def attempt(self, write: Callable[[], object]) -> bool:
        """Write something; where that fails, report it and return False."""
        if not self.writes:
            return True
        try:
            write()
        except OSError as error:
            known, self.trouble = self.trouble, error.strerror or str(error)
            if not known:
                again = "Training goes on; the next checkpoint tries again"
                print(f"\nNot saved: {self.path}: {self.trouble}. {again}.", flush=True)
            return False
        return True

    def copy_out(self) -> None:
        """Call `copy`; only the last failure counts."""
        if not self.writes or not self.copy:
            return
        self.copied_at, self.copy_trouble = time.monotonic(), ""
        try:
            self.copy()
        except OSError as error:
            self.copy_trouble = f"{error.filename or 'its place'}: {error.strerror or error}"
            print(f"\nNot copied to {self.copy_trouble}. The run here is complete.", flush=True)

    def refuse_unsaved(self) -> None:
        """Raises MusotaError if the end of a run, or its copy, could not be saved."""
        if self.trouble:
            lost = f"The end of the run could not be saved in {self.path}: {self.trouble}"
            anew = "" if self.last else " with fresh=True (--fresh)"
            raise MusotaError(f"{lost}. Make room there and repeat the call{anew}.")
        if self.copy_trouble:
            lost = f"The run in {self.path} could not be copied to {self.copy_trouble}"
            raise MusotaError(f"{lost}. Mount it again or make room, and repeat the call.")

    def say(self, text: str) -> None:
        if self.writes:
            print(text, flush=True)

    def write_config(self, choices: dict) -> None:
        """Write config.json once. Raises MusotaError if it cannot be written."""
        if self.writes and not self.config_path.exists():
            with self._writable():
                write_sealed(self.config_path, {**self.identity, **choices})

    def log(self, record: dict) -> None:
        """Append a record to metrics.jsonl."""
        self.metrics += (json.dumps(jsonable(record), ensure_ascii=False) + "\n").encode()
        self.attempt(self.write_metrics)

    def write_metrics(self) -> None:
        """Add to metrics.jsonl what is missing, or replace it where it differs."""
        present = self._present_metrics()
        if self.metrics.startswith(present):
            with self.metrics_path.open("ab") as file:
                file.write(self.metrics[len(present) :])
        else:
            write_bytes(self.metrics_path, self.metrics)

    def _present_metrics(self) -> bytes:
        return self.metrics_path.read_bytes() if self.metrics_path.exists() else b""

    def write_summary(self, summary: Mapping) -> None:
        """Write summary.json, with the hash of metrics.jsonl; remove it if `summary` is empty."""
        if not summary:
            self.attempt(lambda: self.summary_path.unlink(missing_ok=True))
        elif self.attempt(self.write_metrics):
            known = {"metrics_sha256": sha256(self.metrics), "metrics_bytes": len(self.metrics)}
            self.attempt(lambda: write_sealed(self.summary_path, {**summary, **known}))

    def checkpoint_due(self) -> bool:
        return time.monotonic() - self.saved_at > CHECKPOINT_SECONDS

    def save(self, state: TrainState) -> None:
        """Write a checkpoint with metrics.jsonl inside, keep the last two, then write best/ if its
        weights are new. Until then they are in the checkpoint."""
        self.saved_at = time.monotonic()  # in processes that do not write, too
        if not self.writes:
            return
        self.trouble = ""
        tensors, numbers = state.state_dict()
        if self.attempt(lambda: self._write_checkpoint(tensors, numbers)) and state.unsaved_best:
            self.attempt(lambda: self._write_best(state))
        if time.monotonic() - self.copied_at > COPY_SECONDS:
            self.copy_out()

    def _write_checkpoint(self, tensors: dict[str, Tensor], numbers: dict) -> None:
        self.write_metrics()
        about = {"metrics": self.metrics.decode(), "identity": self.identity}
        data = save(tensors, {"state": json.dumps({**jsonable(numbers), **about})})
        name = f"step-{numbers['step']:09d}-{sha256(data)[:16]}.safetensors"
        write_bytes(self.checkpoints / name, data)
        for old in self.checkpoints.glob("step-*.safetensors"):  # damaged ones as well
            if old.name not in (name, self.last):
                old.unlink()
        self.last = name

    def _write_best(self, state: TrainState) -> None:
        best = self.checkpoints / "best"
        best.mkdir(exist_ok=True)  # fails where the run's folder has vanished
        save_model(best, state.model.config, state.unsaved_best, self.tokenizer)
        files = sorted(path for path in best.iterdir() if not path.name.startswith("."))
        state.summary["best_files"] = {path.name: sha256(path.read_bytes()) for path in files}
        state.unsaved_best = None

    def restore(self) -> tuple[dict[str, Tensor], dict] | None:
        """What `TrainState.state_dict` gave at the last checkpoint, with metrics.jsonl as it was
        then; None if nothing was measured.

        A damaged checkpoint is named, and the one before it taken. Raises MusotaError if all are,
        if one is another run's, and if a run has measurements but no checkpoint.
        """
        found = self.checkpoints.glob("step-*.safetensors")
        found = sorted(found, key=lambda path: (path.name[:14], path.stat().st_mtime))
        for path in reversed(found):
            data = path.read_bytes()
            if sha256(data)[:16] != path.stem.rsplit("-", 1)[1]:
                print(f"The checkpoint {path} is damaged and is skipped.")
                continue
            with safe_open(path, "pt") as file:
                numbers = json.loads(file.metadata()["state"])
            _refuse_other(self.identity, numbers.pop("identity"), f"checkpoint {path}")
            self.metrics = numbers.pop("metrics").encode()
            if not self._present_metrics().startswith(self.metrics):
                print(f"{self.metrics_path} was damaged: it is restored from the checkpoint.")
            self.attempt(self.write_metrics)
            self.last = path.name
            return load(data), nan_for_null(numbers)
        if found or (self.config_path.exists() and self.summary_path.exists()):
            none = f"{self.path} has measurements, but no checkpoint that can be read"
            raise MusotaError(f"{none}: start over with fresh=True (--fresh).")
        if self.writes:
            self.metrics_path.unlink(missing_ok=True)
        self.write_summary({})
        return None


def _described(corpus: Corpus) -> dict:
    return {
        "name": corpus.name,
        "fingerprint": corpus.fingerprint,
        "source": corpus.source,
        "vocabulary_in_use": corpus.tokenizer.size,
        "tokens": {split: len(corpus.split(split)) for split in corpus.words},
        "words": corpus.words,
        "bytes": corpus.bytes,
        "valid_sha256": corpus.valid_sha256,
    }


def _refuse_other(identity: dict, found: dict, where: str) -> None:
    """Raises MusotaError, naming what differs, if `found` describes another run."""
    wanted, present = _compared(identity), _compared(found)
    for key in sorted(wanted.keys() | present.keys(), key=lambda key: (key != "model", key)):
        if wanted.get(key) != present.get(key):
            differs = f"its {key} is {present.get(key)!r}, not {wanted.get(key)!r}"
            instead = "use another folder, or start over with fresh=True (--fresh)"
            raise MusotaError(f"The {where} belongs to another run: {differs}; {instead}.")


def _compared(described: dict) -> dict:
    """What a run is, field by field."""
    experiment = Experiment.from_dict(described["experiment"])
    corpus = {"corpus.fingerprint": described["corpus"]["fingerprint"]}
    kind = {"model": type(experiment.model).__name__}
    return experiment.fields() | kind | {"seed": described["seed"]} | corpus


def _acquire(lock: FileLock, folder: Path) -> None:
    """Raises MusotaError if another process has the lock."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        other = f"Another process is training in {folder}"
        raise MusotaError(f"{other}: wait for it, or use another folder.") from None
    except PermissionError:
        raise
    except (OSError, NotImplementedError):
        print(f"The disk of {folder} has no locks: do not train in it twice at a time.")


def _clear(folder: Path) -> None:
    """Remove an earlier run."""
    shutil.rmtree(folder / "checkpoints" / "best", ignore_errors=True)
    for name in ("checkpoints/step-*", "config.json", "metrics.jsonl", "summary.json"):
        for path in folder.glob(name):
            path.unlink()
