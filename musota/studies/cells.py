"""Many runs, in as many processes as there are cores."""

from __future__ import annotations

import io
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from musota.data.corpus import Corpus
from musota.data.sources import SPLITS
from musota.errors import MusotaError
from musota.plan.profiles import Profile, changed, scaled
from musota.plan.suspects import Cell
from musota.training.runs import Run
from musota.training.trainer import Diverged, train


class _Job(NamedTuple):
    """A run to train: what `train` is given, and what else to know of it."""

    given: dict
    cell: str
    share: float
    keep: bool
    quiet: bool


def run_cells(
    cells: Mapping[str, Cell],
    seeds: Sequence[int],
    profile: Profile,
    corpus: Corpus,
    folder: str | os.PathLike,
    fresh: bool = False,
    known: Iterable[Run] = (),
    keep: Container[str] = (),
    workers: int | None = None,
    each: Callable[[], object] | None = None,
    quiet: bool = True,
    changes: Mapping = MappingProxyType({}),
) -> dict[str, dict[int, Run]]:
    """Train every cell with every seed, scaled by `profile` and then changed by `changes`; what has
    finished is loaded, from its folder or from among `known` runs.

    Returns runs by cell and seed; some may have diverged. On a CPU one process a core (`workers`)
    trains a run each with one thread: small models gain little from a second. On a GPU runs follow
    each other, and show their progress unless `quiet`. Checkpoints of finished runs are removed,
    but for the cells to `keep`. `each` is called after every run. Raises MusotaError if a process
    dies.
    """
    parts = {
        share: corpus.limited(Profile("part", train_tokens=round(share * len(corpus.train))))
        for share in {cell.share for cell in cells.values()}
    }
    if workers is None and torch.cuda.is_available():
        workers = 1
    recorded = {} if fresh else {run.identity: run for run in known if run.ended}
    runs, left = {name: {} for name in cells}, []
    for seed in seeds:
        for name, cell in cells.items():
            own = scaled(cell.experiment, profile)
            experiment = changed(own, changes)
            label = ",".join([name, *experiment.differences(own)])
            path = Path(folder) / f"{label}-seed{seed}"
            identity = experiment, parts[cell.share].fingerprint, seed
            run = recorded.get(identity)
            if not run and not fresh and (path / "config.json").exists():
                run = Run(path)
            if run and run.identity == identity and run.ended:
                runs[name][seed] = run
                continue
            given = {"experiment": experiment, "run_dir": path, "resume": not fresh, "seed": seed}
            given |= {"name": label, "profile": profile.name}
            left.append(_Job(given, name, cell.share, name in keep, quiet or workers != 1))
    total = len(cells) * len(seeds)
    if len(left) < total:
        print(f"{total - len(left)} of {total} runs are here already.")
    if workers is None:
        # A process takes seconds to start: worth it for many runs, or for long ones.
        worth = len(left) if len(corpus.train) > 50_000 else max(1, len(left) // 4)
        workers = min(worth, os.cpu_count() or 1)
    if workers > 1 and len(left) > 1:  # silent until the first has ended
        print(f"{len(left)} runs to train, {workers} at a time.", flush=True)
    started = time.perf_counter()
    for done, (job, run) in enumerate(_each(left, parts, workers), start=1):
        runs[job.cell][run.seed] = run
        minutes = (time.perf_counter() - started) / done * (len(left) - done) / 60
        said = f"valid PPL {run.summary['ppl']:,.1f}" if run.finished else "diverged"
        count = f"[{total - len(left) + done}/{total}]"
        print(f"{count} {run.name}, seed {run.seed}: {said}, {minutes:.1f} min left", flush=True)
        if each:
            each()
    return {name: dict(sorted(by_seed.items())) for name, by_seed in runs.items()}


_parts: dict[float, Corpus] = {}  # of this process: sent once, not with every job


def _take_parts(parts: Mapping[float, Corpus], threads: int | None = None) -> None:
    _parts.clear()
    _parts.update(parts)
    if threads:
        torch.set_num_threads(threads)


def _run_job(job: _Job) -> Run:
    with ExitStack() as silence:
        if job.quiet:
            silence.enter_context(redirect_stdout(io.StringIO()))
            silence.enter_context(redirect_stderr(io.StringIO()))
        silence.enter_context(suppress(Diverged))
        train(corpus=_parts[job.share], **job.given)
    run = Run(job.given["run_dir"])
    if not job.keep:
        shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
    return run


def _each(jobs: list[_Job], parts, workers: int) -> Iterator[tuple[_Job, Run]]:
    """Every job with its run, in the order in which they end."""
    if workers == 1 or len(jobs) < 2:
        _take_parts(parts)
        yield from ((job, _run_job(job)) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    sent = {  # copies: what is mapped from the disk cannot be handed to another process
        share: replace(part, **{split: part.split(split).clone() for split in SPLITS})
        for share, part in parts.items()
    }
    pool = ProcessPoolExecutor(workers, spawn, initializer=_take_parts, initargs=(sent, 1))
    try:
        waiting = {pool.submit(_run_job, job): job for job in jobs}
        for ended in as_completed(waiting):
            yield waiting[ended], ended.result()
    except KeyboardInterrupt:
        for worker in multiprocessing.active_children():  # a SIGTERM reached this process alone
            worker.terminate()
        raise
    except BrokenProcessPool:
        killed = "A training process was killed, perhaps for want of memory"
        raise MusotaError(f"{killed}: do this again, it goes on from there.") from None
    finally:
        pool.shutdown(cancel_futures=True)
