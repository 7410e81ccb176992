"""The trainer's side of a run's folder (see `runs`): writes it, guards it, keeps checkpoints."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load, save
from torch import Tensor

from musota.errors import MusotaError
from musota.files import as_path, jsonable, sha256, system_error, write_bytes, write_sealed
from musota.plan.config import Experiment
from musota.training.runs import Run


class RunFolder:
    """A run folder, guarded against other experiments and other processes.

    What cannot be written (a full disk) is told and tried again with the next checkpoint: `trouble`
    says what is still unsaved. One of several processes writes, the others only read.
    """

    def __init__(self, path: str | os.PathLike, identity: dict, writes: bool = True):
        self.path = as_path(path)
        self.checkpoints = self.path / "checkpoints"
        self.metrics_path = self.path / "metrics.jsonl"
        self.summary_path = self.path / "summary.json"
        self.identity, self.writes = identity, writes
        self.metrics = b""  # of metrics.jsonl, as it should be
        self.trouble = self.copy_trouble = ""
        self.last = ""  # checkpoint known to be good
        self.lock = FileLock(self.checkpoints / ".lock")

    @property
    def finished(self) -> bool:
        """Whether this very run stands here finished. Raises MusotaError for another's folder."""
        if not (self.path / "config.json").exists():
            return False
        run = Run(self.path)
        self._refuse_other(run.config, f"folder {self.path}")
        return run.finished

    @contextmanager
    def held(self, fresh: bool = False) -> Iterator[None]:
        """Within it the folder is there and locked, at first empty of an earlier run if `fresh`.

        Raises MusotaError if it cannot be written or another process trains in it.
        """
        try:
            if self.writes:
                self._prepare(fresh)
            yield
        finally:
            self.lock.release()

    def _prepare(self, fresh: bool) -> None:
        with self._told():
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            try:
                self.lock.acquire(timeout=0)
            except Timeout:
                other = f"Another process is training in {self.path}"
                raise MusotaError(f"{other}: wait for it, or use another folder.") from None
            except PermissionError:
                raise
            except (OSError, NotImplementedError):
                print(f"The disk of {self.path} knows no locks: train in it once at a time.")
            for left in self.checkpoints.glob(".step-*"):  # of a process that was killed
                left.unlink(missing_ok=True)
            if fresh:
                shutil.rmtree(self.checkpoints / "best", ignore_errors=True)
                for name in ("checkpoints/step-*", "config.json", "metrics.jsonl", "summary.json"):
                    for path in self.path.glob(name):
                        path.unlink()

    def _refuse_other(self, found: dict, where: str) -> None:
        """Raises MusotaError, naming what differs, where `found` describes another run."""
        wanted, present = _compared(self.identity), _compared(found)
        for key in sorted(wanted.keys() | present.keys(), key=lambda key: (key != "model", key)):
            if wanted.get(key) != present.get(key):
                differs = f"its {key} is {present.get(key)!r}, not {wanted.get(key)!r}"
                instead = "use another folder, or start over with fresh=True (--fresh)"
                raise MusotaError(f"The {where} belongs to another run: {differs}; {instead}.")

    def attempt(self, write: Callable[[], object] | None) -> bool:
        """Write something, if there is something; False, and a sentence, where that fails."""
        if not self.writes or not write:
            return True
        try:
            write()
        except OSError as error:
            told, self.trouble = self.trouble, error.strerror or str(error)
            if not told:
                again = "Training goes on; the next checkpoint tries again"
                print(f"\nNot saved: {self.path}: {self.trouble}. {again}.", flush=True)
            return False
        return True

    def attempt_copy(self, copy: Callable[[], object] | None) -> None:
        """`attempt` of a copy elsewhere, whose last try alone counts."""
        if not self.writes or not copy:
            return
        try:
            copy()
            self.copy_trouble = ""
        except OSError as error:
            self.copy_trouble = f"{error.filename or 'its place'}: {error.strerror or error}"
            print(f"\nNot copied to {self.copy_trouble}. What is here is whole.", flush=True)

    def say(self, text: str) -> None:
        if self.writes:
            print(text, flush=True)

    def append(self, record: dict) -> None:
        """A line for metrics.jsonl."""
        self.metrics += (json.dumps(jsonable(record), ensure_ascii=False) + "\n").encode()
        self.attempt(self.write_metrics)

    def write_metrics(self) -> None:
        """Let metrics.jsonl be as it should: add what is missing, or replace what is not so."""
        held = self._held_metrics()
        if self.metrics.startswith(held):
            with self.metrics_path.open("ab") as file:
                file.write(self.metrics[len(held) :])
        else:
            write_bytes(self.metrics_path, self.metrics)

    def _held_metrics(self) -> bytes:
        return self.metrics_path.read_bytes() if self.metrics_path.exists() else b""

    def write_config(self, choices: dict) -> None:
        """Once. Raises MusotaError where it cannot be written."""
        path = self.path / "config.json"
        if self.writes and not path.exists():
            with self._told():
                write_sealed(path, {**self.identity, **choices})

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            instead = "choose another results folder"
            raise system_error(f"The run folder {self.path}", error, instead) from None

    def refuse_unsaved(self) -> None:
        """Raises MusotaError where the end of a run, or its copy, could not be saved."""
        if self.trouble:
            lost = f"The end of the run could not be saved in {self.path}: {self.trouble}"
            anew = "" if self.last else " with fresh=True (--fresh)"
            raise MusotaError(f"{lost}. Make room there and repeat the call{anew}.")
        if self.copy_trouble:
            lost = f"The run in {self.path} could not be copied to {self.copy_trouble}"
            raise MusotaError(f"{lost}. Mount it again or make room, and repeat the call.")

    def write_summary(self, summary: dict) -> None:
        """With the hash of metrics.jsonl, which it vouches for; an empty one is removed."""
        if not summary:
            self.attempt(lambda: self.summary_path.unlink(missing_ok=True))
        elif self.attempt(self.write_metrics):
            known = {"metrics_sha256": sha256(self.metrics), "metrics_bytes": len(self.metrics)}
            self.attempt(lambda: write_sealed(self.summary_path, {**summary, **known}))

    def save_checkpoint(self, tensors: Mapping[str, Tensor], state: dict) -> bool:
        """Write what to resume from, metrics.jsonl included, and keep the last two; False, and a
        sentence, where that fails."""

        def write() -> None:
            self.write_metrics()
            about = {"metrics": self.metrics.decode(), "identity": self.identity}
            data = save(dict(tensors), {"state": json.dumps({**jsonable(state), **about})})
            name = f"step-{state['step']:09d}-{sha256(data)[:16]}.safetensors"
            write_bytes(self.checkpoints / name, data)
            for old in self.checkpoints.glob("step-*.safetensors"):  # damaged ones go, too
                if old.name not in (name, self.last):
                    old.unlink()
            self.last = name

        return self.attempt(write)

    def load_checkpoint(self) -> tuple[dict[str, Tensor], dict] | None:
        """Tensors and state to resume from, with metrics.jsonl as it was; None to start anew, where
        nothing was measured.

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
                state = json.loads(file.metadata()["state"])
            self._refuse_other(state.pop("identity"), f"checkpoint {path}")
            self.metrics = state.pop("metrics").encode()
            if not self._held_metrics().startswith(self.metrics):
                print(f"{self.metrics_path} was damaged: it is restored from the checkpoint.")
            self.attempt(self.write_metrics)
            self.last = path.name
            return load(data), state
        if found or ((self.path / "config.json").exists() and self.summary_path.exists()):
            none = f"{self.path} has measurements, but no checkpoint that can be read"
            raise MusotaError(f"{none}: start over with fresh=True (--fresh).")
        if self.writes:
            self.metrics_path.unlink(missing_ok=True)
        self.write_summary({})
        return None


def _compared(described: dict) -> dict:
    """What a run is, by field, with defaults where a record is older than a field."""
    experiment = Experiment.from_dict(described["experiment"])
    corpus = {"corpus.fingerprint": described["corpus"]["fingerprint"]}
    kind = {"model": type(experiment.model).__name__}
    return experiment.fields() | kind | {"seed": described["seed"]} | corpus
