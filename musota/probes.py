"""Experiments that explain a plateau, on one model or a grid of runs: numbers out, no figures."""

from __future__ import annotations

import io
import math
import multiprocessing
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from musota.config import Experiment, MusotaError, Profile, experiments, scaled, twin
from musota.data import SPLITS, Corpus
from musota.diagnose import MISSED, Cause, Suspect, root_causes
from musota.lm import CausalLM
from musota.mu import MuSota
from musota.runs import Run
from musota.training import Diverged, anneal, blocks_of, score, train

# --- on one model ---


def causality_matrix(model: CausalLM, tokens: Tensor, positions: int = 32) -> Tensor:
    """(positions, positions): largest change of a logit in column u after replacing token t (row).

    A causal model has exact zeros wherever u < t.
    """
    was_training = model.training
    model.eval()
    positions = min(positions, model.config.max_seq_len)
    ids = tokens[:positions].long().to(model.device)
    replaced = ids.repeat(positions, 1)
    replaced[range(positions), range(positions)] = (ids + 1) % model.config.vocab_size
    with torch.no_grad():
        # In one batch, so that both go through the same kernels and equal means equal.
        logits = model(torch.cat([ids[None], replaced]))[0]
    change = (logits[1:] - logits[:1]).abs().amax(-1).cpu()
    model.train(was_training)
    return change


@torch.no_grad()
def look_inside(model: MuSota, ids: Tensor) -> dict[str, Tensor]:
    """What MU-SOTA makes of (T,) tokens: `cells` (L + 1, T, d), embeddings first, in cell order,
    and `gate` (L, T, N), each block's sensitivity. Raises MusotaError for another model."""
    require_blocks(model)
    cells, seen = [], defaultdict(list)
    hooks = model.watch(seen)
    hooks += [
        layer.register_forward_pre_hook(lambda _, inputs: cells.append(inputs[0][0]))
        for layer in model.layers
    ]
    hooks.append(model.norm.register_forward_pre_hook(lambda _, inputs: cells.append(inputs[0][0])))
    was_training = model.training
    model.eval()
    with _removed_after(hooks):
        model.hidden_states(ids[None].long().to(model.device))
    model.train(was_training)
    return {"cells": torch.stack(cells).cpu(), "gate": torch.stack(seen["gate"])[:, 0].cpu()}


def ablations(model: MuSota, tokens: Tensor) -> dict[str, Tensor]:
    """Nats of every token (see `score`) with nothing changed (`none`), and with a part disabled.

    `block attention`: a token attends to itself alone inside the blocks · `cross attention`: its
    contribution is left out · `both attentions`: no token sees another · `gate`: held at its mean
    over tokens, for each layer and block · `affinity tables`: zeros · and the name of each semantic
    block: its cells are zero throughout.
    Raises MusotaError for a model without blocks.
    """
    require_blocks(model)
    nats = {"none": score(model, tokens)[0]}
    for name, hooks in _disabled_parts(model, tokens).items():
        with _removed_after(hooks()):
            nats[name] = score(model, tokens)[0]
    return nats


def measure_ablations(run: Run, corpus: Corpus) -> dict:
    """`ablations` of a run's best model on valid, by blocks of text: `tokens` and, by part, `nats`.

    Raises MusotaError for a run without blocks or without its checkpoint.
    """
    return _by_blocks(ablations(run.load_model(), corpus.valid))


def measure_annealing(experiment: Experiment, corpus: Corpus, seed: int = 0) -> dict:
    """Train `experiment` half-way, then `anneal` it; `tokens` and, by arm, `nats` by block."""
    with TemporaryDirectory() as folder:
        run = train(experiment, corpus, folder, seed=seed, stop_at=0.5)
        return _by_blocks(anneal(run, corpus))


def _by_blocks(nats: Mapping[str, Tensor]) -> dict:
    blocks = {name: blocks_of(values) for name, values in nats.items()}
    tokens = next(iter(blocks.values()))[1]
    return {"tokens": tokens, "nats": {name: sums for name, (sums, _) in blocks.items()}}


def _disabled_parts(model: MuSota, tokens: Tensor) -> dict:
    """By name, functions that disable a part through hooks and return those."""

    def replace(modules, new) -> list:
        return [module.register_forward_hook(new) for module in modules]

    def own_value(attention, inputs, _):
        B, T, C = inputs[0].shape
        alone = inputs[0].reshape(B * T, 1, C)  # every token a sequence of its own
        return type(attention).forward(attention, alone).view(B, T, C)

    def mean_gate() -> list:
        sums = {}

        def add(gate, _, out):
            total, count = sums.get(gate, (0, 0))
            sums[gate] = total + out.sum((0, 1)), count + out.shape[0] * out.shape[1]

        gates = [layer.gate for layer in model.layers]
        with _removed_after(replace(gates, add)):
            score(model, tokens)
        return replace(gates, lambda gate, _, out: (sums[gate][0] / sums[gate][1]).expand_as(out))

    def without(block: int) -> list:
        kept = 1 - model.layers[0].spread[block]  # 0 at the block's cells
        places = [model.dropout, *model.layers, model.norm]  # whatever hands cells on
        return replace(places, lambda _, __, out: out * kept)

    block_attentions = [one for layer in model.layers for one in layer.block_attention]
    cross_attentions = [layer.cross_attention for layer in model.layers]

    def alone() -> list:
        return replace(block_attentions, own_value)

    def no_cross() -> list:
        return replace(cross_attentions, lambda _, __, out: (torch.zeros_like(out[0]), out[1]))

    parts = {
        "block attention": alone,
        "cross attention": no_cross,
        "both attentions": lambda: [*alone(), *no_cross()],
        "gate": mean_gate,
        "affinity tables": lambda: replace([model.affinity], lambda _, __, out: out * 0),
    }
    names = model.config.layout.names
    return parts | {name: lambda n=n: without(n) for n, name in enumerate(names)}


def require_blocks(model: CausalLM) -> None:
    """Raises MusotaError for a dense model."""
    if not isinstance(model, MuSota):
        raise MusotaError("Only MU-SOTA has semantic blocks and gates: choose a run of it.")


@contextmanager
def _removed_after(hooks: list) -> Iterator[None]:
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- on a grid of runs ---


@dataclass(frozen=True)
class Cell:
    """One point of the grid: an experiment at full size, and its share of the training text."""

    experiment: Experiment
    share: float = 1.0


SWEEP = (1 / 10, 1 / 3, 1, 3, 10, 30, 100)  # wide enough for MU-SOTA and for the dense twin
# What the plan changes from `original` to `optimized`: fields, suspicion, its confidence, advice.
_PLAN = {
    "epochs": (("epochs",), "too few epochs (10 → 30)", "70 %", "train longer"),
    "learning_rate": (
        ("learning_rate",),
        "learning rate too high (3e-4 → 1e-4)",
        "60 %",
        "lower the learning rate",
    ),
    "warmup": (
        ("warmup_steps",),
        "warm-up too short (500 → 2,000 steps)",
        "50 %",
        "lengthen warm-up",
    ),
    "sequence": (
        ("max_seq_len", "batch_size", "accumulation_steps"),
        "sequences too short (128 → 192, batch 24 → 32)",
        "40 %",
        "train on longer sequences",
    ),
}
_DATA = ("too little data (half → all, same steps)", "30 %", "get more text")
_TWIN = ("architecture (→ dense twin)", "unknown", "compare with the twin at its own best rate")


def rate_sweep(
    name: str, experiment: Experiment, factors: Sequence[float] = SWEEP
) -> dict[str, Cell]:
    """Cells of `experiment` at its learning rate times factors about 3 apart."""
    own = experiment.training.learning_rate
    return {
        name if factor == 1 else f"{name}_rate_x{factor:.3g}": Cell(
            experiment.with_(learning_rate=factor * own)
        )
        for factor in factors
    }


def data_shares(name: str, experiment: Experiment) -> dict[str, Cell]:
    """Cells of `experiment` on a quarter, a half and all of the text, with equally many steps."""
    epochs = experiment.training.epochs
    return {
        f"{name}_quarter": Cell(experiment.with_(epochs=4 * epochs), 1 / 4),
        f"{name}_half": Cell(experiment.with_(epochs=2 * epochs), 1 / 2),
        name: Cell(experiment),
    }


def grid(profile: str) -> tuple[dict[str, Cell], list[Suspect], range]:
    """Cells by name, the suspects they decide on, and the seeds, as a profile has them.

    From `original` one suspect at a time takes its `optimized` value, or one that the plan did not
    think of; `study` and `full` also put one back at a time from `optimized`. `tiny` has two cells.
    """
    original, optimized = experiments["original"], experiments["optimized"]
    cells, suspects = {"original": Cell(original)}, []
    for key, (fields, name, confidence, advice) in _PLAN.items():
        cells[key] = Cell(original.with_(**{f: optimized.fields()[f] for f in fields}))
        suspects.append(Suspect(name, confidence, "original", key, advice))
    if profile == "tiny":
        only = suspects[1]
        return {name: cells[name] for name in (only.before, only.after)}, [only], range(2)
    rates = [factor for factor in SWEEP if factor != 1 / 3]  # which is the plan's own 1e-4
    cells |= rate_sweep("original", original, rates)
    cells |= rate_sweep("dense", twin(original)) | data_shares("original", original)
    steps = {"batch_size": 2, "warmup_steps": 3 * original.training.warmup_steps}
    others = {
        "blocks_8": ({"n_block": 8}, "16 blocks (→ 8 of 2×4)", "unknown", "use fewer blocks"),
        "layers_8": ({"n_layer": 8}, "12 layers (→ 8)", "unknown", "use fewer layers"),
        "matrix_6": (
            {"matrix_size": 6, "n_block": 8, "n_head": 6},
            "8×8 matrix (→ 6×6, 8 blocks)",
            "unknown",
            "use the smaller matrix",
        ),
        "small_steps": (steps, "too many tokens a step (÷ 3)", MISSED, "take smaller steps"),
    }
    for key, (changes, *about, advice) in others.items():
        cells[key] = Cell(original.with_(**changes))
        suspects.append(Suspect(*about, "original", key, advice))
    suspects += [
        Suspect(*_DATA[:2], "original_half", "original", _DATA[2]),
        Suspect(*_TWIN[:2], "original", "dense", _TWIN[2]),
        *(
            Suspect(
                f"learning rate too low (× {factor})", MISSED, "original",
                f"original_rate_x{factor}", "raise the learning rate",
            )
            for factor in SWEEP[3:]
        ),
    ]  # fmt: skip
    if profile == "quick":
        return cells, suspects, range(2)
    cells |= {
        "optimized": Cell(optimized),
        "optimized_half": data_shares("optimized", optimized)["optimized_half"],
        "optimized_dense": Cell(twin(optimized)),
    }
    back = "from optimized: "
    for key, (fields, name, confidence, advice) in _PLAN.items():
        cells[f"without_{key}"] = Cell(optimized.with_(**{f: original.fields()[f] for f in fields}))
        suspects.append(Suspect(back + name, confidence, f"without_{key}", "optimized", advice))
    suspects += [
        Suspect(back + _DATA[0], _DATA[1], "optimized_half", "optimized", _DATA[2]),
        Suspect(back + _TWIN[0], _TWIN[1], "optimized", "optimized_dense", _TWIN[2]),
    ]
    return cells, suspects, range(3)


def run_cells(
    cells: Mapping[str, Cell],
    seeds: Sequence[int],
    profile: Profile,
    corpus: Corpus,
    folder: str | os.PathLike,
    fresh: bool = False,
    keep: Container[str] = (),
    workers: int | None = None,
    each: Callable[[], object] | None = None,
    quiet: bool = True,
) -> dict[str, dict[int, Run]]:
    """Train every cell with every seed, scaled by `profile`; what has finished is loaded.

    Returns runs by cell and seed; some may have diverged. On a CPU one process a
    core (`workers`) trains a run each with one thread: small models gain little from a second. On
    a GPU runs follow each other, and show their progress unless `quiet`. Checkpoints of finished
    runs are removed, but for the cells to `keep`: a grid of full-size ones would fill the disk.
    `each` is called after every run. Raises MusotaError if a process dies.
    """
    parts = {
        share: corpus.limited(Profile("part", train_tokens=round(share * len(corpus.train))))
        for share in {cell.share for cell in cells.values()}
    }
    if workers is None and torch.cuda.is_available():
        workers = 1
    jobs = {
        (name, seed): _Job(
            scaled(cell.experiment, profile), cell.share,
            Path(folder) / f"{name}-seed{seed}", seed, name, profile.name, fresh,
            keep=name in keep, quiet=quiet or workers != 1,
        )
        for seed in seeds
        for name, cell in cells.items()
    }  # fmt: skip
    left = {key: job for key, job in jobs.items() if not job.settled}
    _take_parts(parts)
    runs = {name: dict.fromkeys(seeds) for name in cells}
    for name, seed in jobs.keys() - left.keys():  # `train` makes sure that they are the same
        runs[name][seed] = _run_job(jobs[name, seed])
    if len(left) < len(jobs):
        print(f"{len(jobs) - len(left)} of {len(jobs)} runs are here already.")
    if workers is None:
        # A process takes seconds to start: worth it for many runs, or for long ones.
        worth = len(left) if len(corpus.train) > 50_000 else max(1, len(left) // 4)
        workers = min(worth, os.cpu_count() or 1)
    if workers > 1 and len(left) > 1:  # silent until the first has ended
        print(f"{len(left)} runs to train, {workers} at a time.", flush=True)
    started = time.perf_counter()
    for done, (job, run) in enumerate(_each(list(left.values()), parts, workers), start=1):
        runs[job.name][job.seed] = run
        minutes = (time.perf_counter() - started) / done * (len(left) - done) / 60
        said = "diverged"
        if run.finished:
            rate = f"{run.summary['tokens_per_second']:,.0f} tokens/s"
            said = f"valid PPL {run.summary['ppl']:,.1f}, {rate}"
        count = f"[{len(jobs) - len(left) + done}/{len(jobs)}]"
        print(f"{count} {job.name}, seed {job.seed}: {said}, {minutes:.1f} min left", flush=True)
        if each:
            each()
    return runs


def valid_losses(runs: Mapping[str, Mapping[int, Run]]) -> dict[str, dict[int, float]]:
    """Best valid nats/token by cell and seed, inf where it diverged; whole cells only."""
    seeds = {seed for by_seed in runs.values() for seed in by_seed}
    return {
        cell: {
            seed: math.inf if run.diverged else run.summary["valid_loss"]
            for seed, run in by_seed.items()
        }
        for cell, by_seed in runs.items()
        if by_seed.keys() == seeds and all(r.finished or r.diverged for r in by_seed.values())
    }


def _sweep(runs: Mapping[str, Mapping[int, Run]], name: str) -> dict[float, str]:
    """By learning rate, the cells that differ from the cell `name` in nothing else."""
    ones = {cell: next(iter(runs[cell].values())) for cell in valid_losses(runs)}
    if name not in ones:
        return {}
    base, text = ones[name].experiment, ones[name].config["corpus"]
    found = {run.experiment.training.learning_rate: cell for cell, run in ones.items()
             if run.experiment.with_(learning_rate=base.training.learning_rate) == base
             and run.config["corpus"] == text}  # fmt: skip
    return dict(sorted(found.items()))


def sweep_losses(runs: Mapping[str, Mapping[int, Run]], name: str) -> dict[float, list[float]]:
    """Valid losses of every seed by learning rate, all else as in the cell `name`."""
    losses = valid_losses(runs)
    return {rate: list(losses[cell].values()) for rate, cell in _sweep(runs, name).items()}


def data_losses(runs: Mapping[str, Mapping[int, Run]], name: str) -> dict[int, dict[int, float]]:
    """Valid losses by number of training tokens, of the cells that `data_shares(name, …)` made."""
    return {
        next(iter(runs[cell].values())).config["corpus"]["tokens"]["train"]: losses
        for cell, losses in valid_losses(runs).items()
        if cell in (name, f"{name}_half", f"{name}_quarter")
    }


def judge(runs: Mapping[str, Mapping[int, Run]], suspects: Sequence[Suspect]) -> list[Cause]:
    """`diagnose.root_causes` of a grid, as far as it has been trained.

    Where both rates were swept, the architecture is judged once more with each model at its own
    best rate: the plan's rates were made for neither. With a best rate at the edge of its sweep
    that stays undecided.
    """
    losses = valid_losses(runs)
    best, at_edge = [], False
    for name in ("original", "dense"):
        swept = _sweep(runs, name)
        if len(swept) > 1:
            rate = min(swept, key=lambda rate: sum(losses[swept[rate]].values()))
            best.append(swept[rate])
            at_edge |= rate in (min(swept), max(swept))
    fair = Suspect("", _TWIN[1], *best, "prefer the dense transformer") if len(best) == 2 else None
    if fair:
        name = f"{_TWIN[0]}, each at its best rate" + (" (at an edge)" if at_edge else "")
        fair = replace(fair, name=name)
        suspects = [*suspects, fair]
    known = [s for s in suspects if s.before in losses and s.after in losses]
    vocab_size = next(iter(runs["original"].values())).experiment.model.vocab_size
    causes = root_causes(known, losses, vocab_size)
    return [
        replace(
            cause,
            here=_changes(runs, cause.suspect),
            verdict="undecided" if at_edge and cause.suspect == fair else cause.verdict,
        )
        for cause in causes
    ]


def _changes(runs: Mapping[str, Mapping[int, Run]], suspect: Suspect) -> str:
    """What the cells of a suspect really differ in: names, values before and after."""
    pair = [next(iter(runs[cell].values())) for cell in (suspect.before, suspect.after)]
    before, after = (
        run.experiment.fields() | {"training tokens": run.config["corpus"]["tokens"]["train"]}
        for run in pair
    )
    if before.keys() != after.keys():
        before = {"d_model": pair[0].experiment.model.d_model, **before}
    return ", ".join(
        f"{name} {before[name]:,.9g} → {after[name]:,.9g}"
        for name in before
        if name in after and before[name] != after[name]
    )


@dataclass(frozen=True)
class _Job:
    experiment: Experiment
    share: float
    path: Path
    seed: int
    name: str
    profile: str
    fresh: bool
    keep: bool
    quiet: bool

    @property
    def settled(self) -> bool:
        if self.fresh or not (self.path / "config.json").exists():
            return False
        return Run(self.path).finished or Run(self.path).diverged


_parts: dict[float, Corpus] = {}  # of this process: sent once, not with every job


def _take_parts(parts: Mapping[float, Corpus], threads: int | None = None) -> None:
    _parts.clear()
    _parts.update(parts)
    if threads:
        torch.set_num_threads(threads)


def _run_job(job: _Job) -> Run:
    if job.settled and Run(job.path).diverged:
        return Run(job.path)
    with _silence() if job.quiet else nullcontext(), suppress(Diverged):
        train(
            job.experiment, _parts[job.share], job.path, not job.fresh, job.seed,
            name=job.name, profile=job.profile,
        )  # fmt: skip
    if not job.keep:
        shutil.rmtree(job.path / "checkpoints", ignore_errors=True)
    return Run(job.path)


@contextmanager
def _silence() -> Iterator[None]:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def _each(jobs: list[_Job], parts, workers: int) -> Iterator[tuple[_Job, Run]]:
    """Every job with its run, in the order in which they end."""
    if workers == 1 or len(jobs) < 2:
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
    except BrokenProcessPool:
        raise MusotaError(
            "A training process was killed, perhaps for want of memory: run the cell again, it "
            "goes on from there, with workers=1 if it happens again."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
