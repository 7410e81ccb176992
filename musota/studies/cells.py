"""Many runs, in as many processes as there are cores."""

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
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
from musota.training.remedies import Diverged
from musota.training.runs import Run
from musota.training.trainer import train


class _Job(NamedTuple):
    """A run to train: its cell, its share of the text, and what else `train` is given."""

    cell: str
    share: float
    given: dict


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
    changes: Mapping = MappingProxyType({}),
) -> dict[str, dict[int, Run]]:
    """Train every cell with every seed, scaled by `profile` and then changed by `changes`; what has
    finished is loaded, from its folder or from among `known` runs.

    Returns runs by cell and seed; some may have diverged. On a CPU one process a core (`workers`)
    trains a run each with one thread: small models gain little from a second. On a GPU runs follow
    each other, and show their progress. Checkpoints of finished runs are removed, but for the cells
    to `keep`. `each` is called after every run. Raises MusotaError if a process dies.
    """
    parts = {
        share: corpus.limited(Profile("part", train_tokens=round(share * len(corpus.train))))
        for share in {cell.share for cell in cells.values()}
    }
    recorded = {} if fresh else {run.identity: run for run in known if run.ended}
    runs, jobs = {name: {} for name in cells}, []
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
            jobs.append(_Job(name, cell.share, given))
    total, left = len(cells) * len(seeds), len(jobs)
    if left < total:
        print(f"{total - left} of {total} runs are here already.")
    if workers is None and torch.cuda.is_available():
        workers = 1
    elif workers is None:  # a process takes seconds to start: for many runs, or for long ones
        worth = left if len(corpus.train) > 50_000 else left // 4
        workers = min(max(1, worth), os.cpu_count() or 1)
    if workers > 1 and left > 1:  # silent until the first has ended
        print(f"{left} runs to train, {workers} at a time.", flush=True)
    started = time.perf_counter()
    for done, (job, run) in enumerate(_each(jobs, parts, workers), start=1):
        if not run.ended:  # Ctrl-C or SIGTERM: its checkpoint is what it goes on from
            raise KeyboardInterrupt
        runs[job.cell][run.seed] = run
        if job.cell not in keep:
            shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
        minutes = (time.perf_counter() - started) / done * (left - done) / 60
        said = f"valid PPL {run.summary['ppl']:,.1f}" if run.finished else "diverged"
        count = f"[{total - left + done}/{total}]"
        print(f"{count} {run.name}, seed {run.seed}: {said}, {minutes:.1f} min left", flush=True)
        if each:
            each()
    return {name: dict(sorted(by_seed.items())) for name, by_seed in runs.items()}


_parts: dict[float, Corpus] = {}  # of this process: sent once, not with every job


def _begin_worker(parts: Mapping[float, Corpus]) -> None:
    nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stdout = sys.stderr = nowhere
    torch.set_num_threads(1)
    _parts.update(parts)


def _run_job(job: _Job, part: Corpus | None = None) -> Run:
    with suppress(Diverged):
        train(corpus=part or _parts[job.share], **job.given)
    return Run(job.given["run_dir"])


def _each(jobs: list[_Job], parts, workers: int) -> Iterator[tuple[_Job, Run]]:
    """Every job with its run, in the order in which they end."""
    if workers == 1 or len(jobs) < 2:
        yield from ((job, _run_job(job, parts[job.share])) for job in jobs)
        return
    spawn = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    sent = {  # copies: what is mapped from the disk cannot be handed to another process
        share: replace(part, **{split: part.split(split).clone() for split in SPLITS})
        for share, part in parts.items()
    }
    pool = ProcessPoolExecutor(workers, spawn, initializer=_begin_worker, initargs=(sent,))
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
