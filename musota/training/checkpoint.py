"""The write side of a run's folder (read side: `run`): records, checkpoints, the best weights."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from musota.config import Experiment
from musota.data.corpus import Corpus
from musota.errors import MusotaError
from musota.files import START_OVER, as_path, jsonable, sentence, sha256, write_bytes, write_sealed
from musota.models.hub import save_model
from musota.training.run import BEST, CHECKPOINTS, CONFIG, METRICS, SUMMARY, Run
from musota.training.state import TrainState

CHECKPOINT_SECONDS = 180  # between checkpoints inside an epoch


class RunDir:
    """The folder of one run, which refuses other runs and other processes.

    A write that fails (a full disk) is reported and repeated with the next checkpoint; `trouble`
    says why something is unsaved. Of several processes one writes.
    """

    def __init__(self, path: str | os.PathLike, identity: dict, corpus: Corpus, writes: bool, copy):
        self.path = as_path(path)
        self.checkpoints, self.best = self.path / CHECKPOINTS, self.path / BEST
        self.config_path, self.summary_path = self.path / CONFIG, self.path / SUMMARY
        self.metrics_path = self.path / METRICS
        self.identity = {**identity, "corpus": _described(corpus)}
        self.tokenizer, self.writes, self.copy = corpus.tokenizer, writes, copy if writes else None
        self.metrics = b""  # the bytes that metrics.jsonl should hold
        self.trouble = ""
        self.last = ""  # name of the newest checkpoint known to be good
        self.saved_at, self.copied_at = time.monotonic(), float("-inf")

    @property
    def finished(self) -> bool:
        """Whether the folder holds this run, finished. Raises MusotaError for another run."""
        if not os.path.exists(self.config_path):  # False for a path that cannot be read, too
            return False
        run = Run(self.path)
        self._refuse_other(run.config, f"folder {self.path}")
        return run.finished

    @contextmanager
    def locked(self, fresh: bool) -> Iterator[None]:
        """Within it the folder exists and is locked; `fresh` first removes an earlier run. Raises
        MusotaError if it cannot be written or another process trains in it."""
        lock = FileLock(self.checkpoints / ".lock")
        try:
            if self.writes:
                with self._writable():
                    self.checkpoints.mkdir(parents=True, exist_ok=True)
                    lock.acquire(timeout=0)
                    self._clear(fresh)
            yield
        finally:
            lock.release()

    def _clear(self, fresh: bool) -> None:
        """Remove what a killed process left half-written, and with `fresh` an earlier run."""
        left = [*self.path.rglob(".*-" + 12 * "[0-9a-f]")]  # of `write_whole`
        if fresh:
            left += [*self.checkpoints.glob("step-*"), *self.best.glob("*")]
            left += [self.config_path, self.metrics_path, self.summary_path]
        for path in left:
            path.unlink(missing_ok=True)

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except Timeout:
            other = f"Another process is training in {self.path}"
            raise MusotaError(f"{other}: wait for it, or use another folder.") from None
        except OSError as error:
            raise MusotaError(sentence(error)) from None

    @contextmanager
    def attempt(self, done: str = "saved") -> Iterator[None]:
        """A context in which to write. What fails is reported, and `trouble` says why."""
        try:
            yield
        except OSError as error:
            place = error.filename or self.path
            known, self.trouble = self.trouble, f"{done}: {place}: {error.strerror or error}"
            if not known:
                print(f"\nThe run in {self.path} could not be {self.trouble}.", flush=True)

    def copy_out(self, every: float = 0) -> None:
        """Call `copy`, if that was `every` seconds ago."""
        if self.copy and time.monotonic() - self.copied_at > every:
            self.copied_at = time.monotonic()
            with self.attempt("copied"):
                self.copy()

    def refuse_unsaved(self) -> None:
        """Raises MusotaError if the end of a run, or its copy, could not be saved."""
        if self.trouble:
            lost = f"The end of the run in {self.path} could not be {self.trouble}"
            raise MusotaError(f"{lost}. Mount the disk or free some space, and repeat the call.")

    def write_config(self, choices: dict) -> None:
        """Write config.json, once."""
        if self.writes and not self.config_path.exists():
            with self._writable():
                write_sealed(self.config_path, {**self.identity, **choices})

    def log(self, record: dict) -> None:
        """Append a record to metrics.jsonl."""
        self.metrics += (json.dumps(jsonable(record), ensure_ascii=False) + "\n").encode()
        if self.writes:
            with self.attempt():
                self._write_metrics()

    def _write_metrics(self) -> None:
        """Add to metrics.jsonl what is missing."""
        with self.metrics_path.open("ab") as file:
            file.write(self.metrics[file.tell() :])

    def write_summary(self, summary: Mapping) -> None:
        """Write metrics.jsonl and, once an epoch has ended, summary.json with its hash."""
        if self.writes:
            known = {"metrics_sha256": sha256(self.metrics), "metrics_bytes": len(self.metrics)}
            with self.attempt():
                self._write_metrics()
                if summary:
                    write_sealed(self.summary_path, {**summary, **known})

    def checkpoint_due(self) -> bool:
        return time.monotonic() - self.saved_at > CHECKPOINT_SECONDS

    def save(self, state: TrainState) -> None:
        """Write a checkpoint with metrics.jsonl inside, keep the last two, then write best/ if its
        weights are new; until then they are in the checkpoint."""
        self.saved_at = time.monotonic()  # in processes that do not write, too
        if self.writes:
            self.trouble = ""
            with self.attempt():
                self._write_metrics()
                self._write_checkpoint(state)
                if state.unsaved_best:
                    self._write_best(state)
            self.write_summary(state.summary)

    def _write_checkpoint(self, state: TrainState) -> None:
        tensors, numbers = state.state_dict()
        numbers |= {"metrics": self.metrics.decode(), "identity": self.identity}
        data = save(tensors, {"state": json.dumps(numbers)})
        name = f"step-{state.step:09d}-{sha256(data)[:16]}.safetensors"
        write_bytes(self.checkpoints / name, data)
        for old in self.checkpoints.glob("step-*.safetensors"):  # damaged ones as well
            if old.name not in (name, self.last):
                old.unlink()
        self.last = name

    def _write_best(self, state: TrainState) -> None:
        self.best.mkdir(exist_ok=True)  # fails where the run's folder has vanished
        save_model(self.best, state.model.config, state.unsaved_best, self.tokenizer)
        files = sorted(path for path in self.best.iterdir() if not path.name.startswith("."))
        state.summary["best_files"] = {path.name: sha256(path.read_bytes()) for path in files}
        state.unsaved_best = None

    def restore(self) -> tuple[dict[str, Tensor], dict] | None:
        """What `TrainState.state_dict` gave at the last checkpoint; None if nothing was measured.
        A damaged checkpoint is named, and the one before it taken; records without any weights get
        the suffix .old. Raises MusotaError for another run, and one without a good checkpoint."""
        saved, found = None, sorted(self.checkpoints.glob("step-*.safetensors"))
        for path in reversed(found):
            data = path.read_bytes()
            if sha256(data)[:16] == path.stem.rsplit("-", 1)[1]:
                with safe_open(path, "pt") as file:
                    numbers = json.loads(file.metadata()["state"])
                self._refuse_other(numbers.pop("identity"), f"checkpoint {path}")
                self.metrics, self.last = numbers.pop("metrics").encode(), path.name
                saved = load(data), numbers
                break
            print(f"The checkpoint {path} is damaged and is skipped.")
        measured = self.summary_path.exists()
        if measured and not found and not any(self.best.glob("*")):  # shared as a record
            if self.writes:
                print(f"{self.path} is recorded without checkpoints: it is trained from the start.")
                with self._writable():
                    for path in (self.config_path, self.metrics_path, self.summary_path):
                        path.replace(f"{path}.old")
        elif not saved and (found or measured):
            none = f"{self.path} has measurements, but no checkpoint that can be read"
            raise MusotaError(f"{none}: start over with {START_OVER}.")
        return saved

    def discard_later(self) -> None:
        """Remove records, which may be of a later step than the checkpoint: they are written again,
        from `metrics`, when they are due."""
        if self.writes:
            with self._writable():
                self.summary_path.unlink(missing_ok=True)
                self.metrics_path.unlink(missing_ok=True)

    def _refuse_other(self, found: dict, where: str) -> None:
        """Raises MusotaError, naming what differs, if `found` describes another run."""
        wanted, present = _compared(self.identity), _compared(found)
        for key in wanted | present:  # the kind of model first
            if wanted.get(key) != present.get(key):
                differs = f"its {key} is {present.get(key)!r}, not {wanted.get(key)!r}"
                instead = f"use another folder, or start over with {START_OVER}"
                raise MusotaError(f"The {where} belongs to another run: {differs}; {instead}.")


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


def _compared(described: dict) -> dict:
    """What a run is, field by field."""
    experiment = Experiment.from_dict(described["experiment"])
    kind = {"model": type(experiment.model).__name__}
    corpus = {"corpus.fingerprint": described["corpus"]["fingerprint"]}
    return kind | experiment.fields() | {"seed": described["seed"]} | corpus
