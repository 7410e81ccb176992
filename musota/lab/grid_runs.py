"""Grids: many small trainings, one process per CPU core, and the csv table of their results."""

import json
import math
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from filelock import FileLock

from musota.config import Experiment
from musota.data.corpus import Corpus
from musota.data.sources import SPLITS
from musota.errors import MusotaError
from musota.files import as_path, jsonable, write_text
from musota.lab.profiles import Profile, scaled
from musota.matching import twin
from musota.training.evaluate import exp_nats
from musota.training.run import Run
from musota.training.trainer import Diverged, RunOptions, train


@dataclass(frozen=True)
class GridRun:
    """One run of a grid: an experiment at full size, the share of the training text it reads, and
    whether its parameter-matched transformer is trained in its place."""

    experiment: Experiment
    share: float = 1.0
    matched: bool = False

    def at(self, profile: Profile, **changes) -> Experiment:
        """The experiment at the size of a profile, with fields changed afterwards."""
        experiment = scaled(self.experiment, profile, **changes)
        return twin(experiment) if self.matched else experiment


@dataclass(frozen=True)
class Row:
    """The result of one run: a row of the csv table. Losses are in nats/token."""

    name: str
    seed: int
    experiment: Experiment  # as trained
    fingerprint: str  # of the corpus
    train_tokens: int
    valid_loss: tuple[float, ...]  # by epoch, as the next two
    train_loss: tuple[float, ...]
    clean_train_loss: tuple[float, ...]  # of training text, without dropout
    best_valid_loss: float  # inf where the run diverged
    diverged: bool

    @property
    def identity(self) -> tuple[Experiment, str, int]:
        """What the run is, whatever its name: experiment, corpus, seed."""
        return self.experiment, self.fingerprint, self.seed

    @classmethod
    def of(cls, run: Run) -> "Row":
        """The row of a run that has ended."""
        text = run.fingerprint, run.config["corpus"]["tokens"]["train"]
        losses = [tuple(run.history.get(key, ())) for key in ("valid_loss", "train_loss")]
        losses += [tuple(epoch["clean_train_loss"] for epoch in run.health), run.valid_loss]
        return cls(run.name, run.seed, run.experiment, *text, *losses, run.diverged)

    @classmethod
    def from_csv(cls, text: dict[str, str]) -> "Row":
        """The row that `to_csv` wrote. A missing loss is nan, a missing best loss inf."""
        text = text | {"best_valid_loss": text["best_valid_loss"] or "null"}
        row = {n: v if n in ("name", "fingerprint") else json.loads(v) for n, v in text.items()}
        for name in ("valid_loss", "train_loss", "clean_train_loss"):
            row[name] = tuple(math.nan if loss is None else loss for loss in row[name])
        if row["diverged"] or row["best_valid_loss"] is None:
            row["best_valid_loss"] = math.inf
        return cls(**row | {"experiment": Experiment.from_dict(row["experiment"])})

    def to_csv(self) -> dict[str, str]:
        row = vars(self) | {"experiment": self.experiment.to_dict()}
        return {n: v if isinstance(v, str) else json.dumps(jsonable(v)) for n, v in row.items()}


def read_table(path: str | os.PathLike) -> list[Row]:
    """The rows of a csv table; none where there is no file. Raises MusotaError for damage."""
    if not (path := as_path(path)).exists():
        return []
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        return [Row.from_csv(text) for text in table.to_dict("records")]
    except (ValueError, TypeError, KeyError, MusotaError) as error:
        raise MusotaError(f"{path} is damaged ({error}): restore or delete it.") from None


def add_row(path: Path, row: Row) -> None:
    """Add a row to a csv table, in place of an earlier row of the same run. Several processes may
    do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        rows = [old for old in read_table(path) if old.identity != row.identity]
        table = pd.DataFrame([each.to_csv() for each in (*rows, row)])
        write_text(path, table.to_csv(index=False, lineterminator="\n"))


def merge_table(path: Path, other: Path) -> None:
    """Add to a csv table those rows of another one that it does not have."""
    known = {row.identity for row in read_table(path)}
    for row in read_table(other):
        if row.identity not in known:
            add_row(path, row)


def print_run(row: Row | None, rows: Mapping[str, Mapping[int, Row | None]], left: int) -> None:
    """Print a line about the run that has ended (None before the first), of a grid whose `rows`
    are None where a run is left to train."""
    total = sum(map(len, rows.values()))
    text = f"{left} of {total} runs are left to train."
    if row:
        result = "diverged" if row.diverged else f"valid PPL {exp_nats(row.best_valid_loss):,.1f}"
        name = row.name.replace("_rate_x", ", rate × ").replace("_", " ")
        text = f"[{total - left}/{total}] {name}, seed {row.seed}: {result}"
    print(text, flush=True)


def run_many(
    runs: Mapping[str, GridRun],
    seeds: Sequence[int],
    profile: Profile,
    corpus: Corpus,
    table: str | os.PathLike,
    folder: str | os.PathLike,
    *,
    fresh: bool = False,
    changes: Mapping = {},
    each: Callable = print_run,
) -> dict[str, dict[int, Row]]:
    """Train every run of a grid with every seed, at the size of `profile` and with `changes`.
    Returns rows by name and seed. Runs in the csv `table` (same experiment, text and seed) count as
    done, unless `fresh`. The rest train in `folder`; each is added to the table as soon as it ends,
    and its folder removed. On a CPU every core trains a run, on a GPU they take turns. `each` is
    called at the start and after every run, as `print_run`. Raises MusotaError if a process dies.
    """
    table, folder = as_path(table), as_path(folder)
    known = {} if fresh else {row.identity: row for row in read_table(table)}
    jobs = find_jobs(runs, seeds, profile, corpus, changes)
    left = [job for job in jobs.values() if identity_of(job) not in known]
    found = {name: {s: known.get(identity_of(jobs[name, s])) for s in seeds} for name in runs}
    each(None, found, len(left))
    for job in left:
        job["options"] = RunOptions(watch=_no_bar)
        job |= {"run_dir": Path(folder) / f"{job['name']}-seed{job['seed']}", "resume": not fresh}
    for done, row in enumerate(_train_all(left), start=1):
        for (name, seed), job in jobs.items():
            if identity_of(job) == row.identity:
                found[name][seed] = row
        add_row(Path(table), row)
        shutil.rmtree(Path(folder) / f"{row.name}-seed{row.seed}", ignore_errors=True)
        each(row, found, len(left) - done)
    return found


def find_jobs(
    runs: Mapping[str, GridRun],
    seeds: Sequence[int],
    profile: Profile,
    corpus: Corpus,
    changes: Mapping = {},
) -> dict[tuple[str, int], dict]:
    """What `train` needs for each run of a grid, by name and seed."""
    texts = {share: _text(corpus, share) for share in {run.share for run in runs.values()}}
    jobs = {}
    for name, seed in ((name, seed) for seed in seeds for name in runs):
        label = ",".join([name, *(f"{field}={value}" for field, value in changes.items())])
        job = {"experiment": runs[name].at(profile, **changes), "corpus": texts[runs[name].share]}
        jobs[name, seed] = job | {"seed": seed, "name": label}
    return jobs


def identity_of(job: Mapping) -> tuple[Experiment, str, int]:
    """`Row.identity` of the row that a job makes."""
    return job["experiment"], job["corpus"].fingerprint, job["seed"]


def _text(corpus: Corpus, share: float) -> Corpus:
    """The corpus with a share of its training text, copied: mapped files cannot be pickled."""
    part = corpus.limited(round(share * len(corpus.train)), None)
    return replace(part, **{split: part.split(split).clone() for split in SPLITS})


def _train_all(jobs: list[dict]) -> Iterator[Row]:
    """The rows of trained runs, in the order in which they end. Processes are spawned, because
    a fork of a process with threads may hang."""
    workers = min(os.cpu_count() or 1, len(jobs) // 3)  # starting one takes seconds
    if workers <= 1 or torch.cuda.is_available():
        yield from map(_train_one, jobs)
        return
    others = {*multiprocessing.active_children()}  # of the caller
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin_worker)
    try:
        for ended in as_completed([pool.submit(_train_one, job, True) for job in jobs]):
            yield ended.result()
    except BrokenExecutor:
        hint = "In a script, call it below `if __name__ == '__main__':`."
        raise MusotaError(f"A process was killed: run this again to continue. {hint}") from None
    finally:
        for worker in {*multiprocessing.active_children()} - others:
            worker.terminate()  # a training saves its state first
        pool.shutdown(cancel_futures=True)


def _begin_worker() -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    torch.set_num_threads(1)


def _no_bar(run: Run) -> None:
    """In place of a progress bar: `each` shows the progress of the grid."""


def _train_one(how: dict, in_worker: bool = False) -> Row:
    """The row of a trained run. A stopped training raises KeyboardInterrupt, or ends the worker."""
    handled = (Diverged, KeyboardInterrupt) if in_worker else (Diverged,)
    with suppress(*handled):
        train(**how)
    path = how["run_dir"]
    if (path / "config.json").exists() and (run := Run(path)).ended:
        return Row.of(run)
    if in_worker:
        os._exit(1)  # it would begin the next run otherwise
    raise KeyboardInterrupt
