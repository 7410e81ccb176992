"""The training loop. Knows no architecture.

What happens at a step depends on (seed, step) alone: the windows through `window_starts`, dropout
through a reseeding before each step. So a run resumed at any step equals one never interrupted.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor

from musota.data.corpus import Corpus, window_starts
from musota.errors import MusotaError, check_seed, nearest_name
from musota.files import as_path, read_sealed
from musota.models.base import CausalLM
from musota.plan.config import Experiment
from musota.training import keeping, remedies
from musota.training.evaluate import exp_nats
from musota.training.folder import RunFolder
from musota.training.machine import (
    Interruption,
    default_choices,
    make_accelerator,
    prepare_memory,
    progress_bar,
)
from musota.training.optimizer import OPTIMIZERS, build_optimizer, update_ratios
from musota.training.remedies import SHORTER, Diverged, TooLong
from musota.training.runs import Run
from musota.training.schedule import SCHEDULES, learning_rate_at
from musota.training.start import begin, first_model, started_from

__all__ = ["Diverged", "Trainer", "train"]
CHECKPOINT_SECONDS = 180  # between checkpoints inside an epoch
LOG_LINES = 250  # about so many step records a run


def train(
    experiment: Experiment,
    corpus: Corpus,
    run_dir: str | os.PathLike,
    resume: bool = True,
    seed: int = 0,
    *,
    name: str = "run",
    profile: str | None = None,
    micro_batch: int | None = None,
    compile: bool | None = None,
    stop_at: float = 1.0,
    auto_remedy: bool = False,
    continue_from: Run | str | os.PathLike | None = None,
    device: str | None = None,
    precision: str | None = None,
    watch: Callable[[Run], None] | None = None,
    copy: Callable[[], None] | None = None,
) -> Run:
    """Train an experiment into `run_dir` and return the run, its best epoch chosen on valid.

    A finished run of the same experiment, corpus and seed is returned as it is; an unfinished one
    goes on where its last checkpoint stands; `resume=False` starts over. `name` and `profile` are
    recorded for people and decide nothing. `micro_batch` sequences are computed at a time (a choice
    of speed and memory; at dropout 0 it changes nothing else), and `compile` passes the model's
    layers through torch.compile: both are chosen for the device (cpu, cuda or mps, by default the
    best one here) unless given, and kept when a run goes on. `precision` (no, bf16 or fp16, as
    accelerate names them) is what maps are multiplied in while training, by default what pays on
    the device. A CPU with instructions for bf16 trains a large vocabulary nearly twice as fast in
    it, and still scores in float32. Ctrl-C or SIGTERM ends after the step at hand, saves it and
    returns what has been measured; `stop_at` ends a run in the same way after that share of its
    steps. `continue_from` (a run or its folder) gives the weights to start from:
    another run's best, with a fresh schedule; their hash is part of what the run is
    (`started_from`). `watch` is called with the run at first and whenever something new was
    recorded, `copy` with nothing every ten minutes and at the end, whichever way that comes; an
    OSError of it is treated like one of the disk.

    Where memory runs out the micro-batch is halved, which changes nothing else. With `auto_remedy`
    the plan's remedies apply themselves, each recorded as an event: after a loss that is not finite
    or explodes, back to the last checkpoint at half the learning rate, and half the rate where the
    loss oscillates (twice at most in all); and sequences of 160 tokens where even one sequence of
    more does not fit the memory. That last one is another experiment, and the summary says so.

    Started by `accelerate launch` or torchrun, every process computes its share of each step.

    Raises MusotaError for a folder that belongs to another run, is in use or cannot be written,
    damaged checkpoints, a corpus that does not fit the model, too little memory or a final state
    that could not be saved; Diverged for a loss that is not finite or explodes.
    """
    _check_arguments(experiment, corpus, seed, micro_batch, stop_at)
    if auto_remedy and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise MusotaError("auto_remedy works in one process only: leave it out here.")
    about = {"name": name, "profile": profile, "auto_remedy": auto_remedy, "device": device}
    about["precision"] = precision
    about["choices"] = {"micro_batch": micro_batch, "compile": compile}
    if continue_from:
        experiment, about["start"] = started_from(continue_from, experiment, corpus)
    config, asked = as_path(run_dir) / "config.json", None
    longer = read_sealed(config).get("instead_of") if resume and config.exists() else None
    if longer and Experiment.from_dict(longer) == experiment:  # it was shortened when it began
        asked, experiment = experiment, experiment.with_(max_seq_len=SHORTER)
    while True:
        trainer = Trainer(experiment, corpus, run_dir, resume, seed, instead_of=asked, **about)
        try:
            return trainer.run(stop_at, watch, copy)
        except TooLong:
            pass  # outside of the handler, which would hold on to the memory
        del trainer
        asked, experiment = experiment, experiment.with_(max_seq_len=SHORTER)
        resume = False


def _check_arguments(experiment, corpus, seed, micro_batch, stop_at) -> None:
    for value, kind in ((experiment, Experiment), (corpus, Corpus)):
        if not isinstance(value, kind):
            raise MusotaError(f"train needs an Experiment and a Corpus, not {value!r:.80}.")
    check_seed(seed)
    for kind, table in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        if (name := getattr(experiment.training, kind)) not in table:
            raise nearest_name(kind, name, table)
    whole = isinstance(micro_batch, int) and not isinstance(micro_batch, bool)
    if micro_batch is not None and not (whole and micro_batch >= 1):
        raise MusotaError(f"micro_batch must be a whole number of at least 1, not {micro_batch!r}.")
    if not isinstance(stop_at, (int, float)) or not 0 < stop_at <= 1:
        raise MusotaError(f"stop_at must lie in (0, 1], not {stop_at!r}.")
    if corpus.tokenizer.size > experiment.model.vocab_size:
        raise MusotaError(
            f"The corpus uses {corpus.tokenizer.size} tokens but the model's vocab_size is "
            f"{experiment.model.vocab_size}: load the corpus with that vocab_size."
        )
    for split in ("valid", "test"):
        if len(corpus.split(split)) < 2:
            raise MusotaError(f"The {split} text has under two tokens: use more text.")


class Trainer:
    """One training run: its state, one step, one epoch's end, one checkpoint."""

    def __init__(
        self, experiment, corpus, run_dir, resume=True, seed=0, name="run", profile=None,
        choices=(), auto_remedy=False, instead_of=None, start=None, device=None,
        precision=None,
    ):  # fmt: skip
        self.experiment, self.corpus, self.seed = experiment, corpus, seed
        self.training, self.length = experiment.training, experiment.model.max_seq_len
        self.auto_remedy, self.instead_of, self.start = auto_remedy, instead_of, start
        self.windows = len(window_starts(len(corpus.train), self.length, seed, 0))
        self.steps_per_epoch = math.ceil(self.windows / self.training.sequences_per_step)
        self.total_steps = self.training.epochs * self.steps_per_epoch
        self.log_interval = max(1, self.total_steps // LOG_LINES)
        self.accelerator = make_accelerator(device, precision)
        self.device = self.accelerator.device
        identity = _described(experiment, corpus, seed, name, profile, instead_of)
        self.folder = RunFolder(run_dir, identity, self.accelerator.is_main_process)
        self.finished = resume and self.folder.finished
        if self.finished:  # perhaps kept as evidence, and read-only: nothing is written
            return
        self.folder.prepare(fresh=not resume)
        try:
            self._open(choices)
        except BaseException:  # whoever keeps the error, as a notebook does, would keep the lock
            self.folder.lock.release()
            raise

    def _open(self, choices) -> None:
        """What the folder holds, and the choices that follow from it and from the device."""
        self.accelerator.wait_for_everyone()
        self.saved = self.folder.load_checkpoint()
        prepare_memory(self.device)
        given = {key: value for key, value in dict(choices).items() if value is not None}
        saved = self.saved[1]["choices"] if self.saved else {}
        usual = default_choices(self.experiment, self.device, self.total_steps)
        self.choices = usual | saved | given
        processes = self.accelerator.num_processes
        together = {"precision": self.accelerator.mixed_precision, "processes": processes}
        self._build()
        self.folder.write_config({**self.choices, **together})

    def _build(self) -> None:
        torch.manual_seed(self.seed)
        model = first_model(self)
        self.ledger = model.parameter_ledger()
        if self.choices["compile"]:
            model.compile_layers()
        loss_scaling = self.accelerator.scaler is not None
        optimizer = build_optimizer(model, self.training, loss_scaling)
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.model: CausalLM = self.accelerator.unwrap_model(self.wrapped)
        # On the device once; int32 there, int64 only for the windows in use.
        self.tokens = self.corpus.train.to(self.device)
        self.span = torch.arange(self.length + 1, device=self.device)
        self.starts = None  # of this epoch's windows
        self.step = self.applied = 0  # steps begun, and those fp16 scaling did not skip
        self.epoch_nats = torch.zeros((), device=self.device)
        self.seconds_before, self.started = 0.0, time.perf_counter()
        self.best_loss, self.summary = math.inf, {}
        self.update_ratio: dict[str, float] = {}  # of this epoch, by group
        self.best_unsaved: dict[str, Tensor] | None = None
        self.remedies = {"rate_factor": 1.0, "step": 0}
        self.watch: Callable[[Run], None] | None = None
        self.copy: Callable[[], None] | None = None
        self.saved_at, self.copied_at = time.monotonic(), -math.inf
        self.progress = progress_bar(0, shown=False)

    def schedule(self, step: int) -> float:
        """The learning rate of a step; `anneal` puts another in its place."""
        rate = learning_rate_at(step, self.training, self.total_steps)
        return self.remedies["rate_factor"] * rate

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def tokens_seen(self) -> int:
        epochs, steps = divmod(self.step, self.steps_per_epoch)
        return (epochs * self.windows + steps * self.training.sequences_per_step) * self.length

    def record(self, record: dict) -> None:
        self.folder.append(record)
        if self.watch and self.folder.writes:
            with contextlib.suppress(MusotaError):  # a folder that vanished: `append` tells it
                self.watch(Run(self.folder.path))

    def tell(self, event: str) -> None:
        """Record and say something out of the ordinary."""
        self.record({"kind": "event", "step": self.step, "event": event})
        self.say(f"\nStep {self.step}: {event}.")

    def say(self, text: str) -> None:
        if self.folder.writes:
            print(text, flush=True)

    def run(self, stop_at: float, watch, copy) -> Run:
        if self.finished:
            self.say(f"{self.folder.path}: finished before, loaded as it is.")
            self.folder.attempt(copy)
            self.folder.refuse_unsaved()
            return Run(self.folder.path)
        begin(self)
        self.watch, self.copy = watch, copy
        stop = math.ceil(stop_at * self.total_steps)
        if watch and self.folder.writes:
            watch(Run(self.folder.path))  # so that what it shows stands above the bar
        whole = self.training.epochs * self.windows * self.length
        self.progress = progress_bar(whole, self.tokens_seen, self.folder.writes)
        try:
            with Interruption(self.accelerator.num_processes) as interruption, self.progress:
                while self.step < stop and not interruption.asked:
                    self._careful_step()
                if self.step == self.total_steps:
                    keeping.finish(self)
                else:
                    remedies.refuse_bad_loss(self, float(self.epoch_nats))
                    keeping.checkpoint(self)
        finally:
            self.folder.lock.release()
            self.folder.attempt(copy)
        self.folder.refuse_unsaved()
        if self.step < stop:
            self.say(
                f"\nInterrupted after step {self.step} of {self.total_steps}; it is saved. The "
                "same call goes on from there."
            )
            if not self.summary:  # nothing measured that could be returned
                raise KeyboardInterrupt
        self.accelerator.wait_for_everyone()
        return Run(self.folder.path)

    def _careful_step(self) -> None:
        """One step and what is due after it; with remedies for what may go wrong."""
        trouble = None
        try:
            self.one_step()
            ends = self.step % self.steps_per_epoch == 0
            due = time.monotonic() - self.saved_at > CHECKPOINT_SECONDS
            if ends or due:
                remedies.refuse_bad_loss(self, float(self.epoch_nats))
        except remedies.SURPRISES as error:
            trouble = remedies.known(error)
        if trouble:
            remedies.mend(self, trouble)
        elif ends:
            keeping.end_epoch(self)
            self._tell_progress(float(self.epoch_nats) / self.windows)
            remedies.calm_down(self)
            keeping.checkpoint(self)
            if self.summary:
                keeping.write_summary(self)
        elif due:
            keeping.checkpoint(self)

    def one_step(self) -> None:
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if place == 0 or self.starts is None:  # a new epoch, or resumed inside one
            starts = window_starts(len(self.tokens), self.length, self.seed, epoch)
            self.starts = starts.to(self.device)
        if place == 0:
            self.epoch_nats.zero_()
        rate = self.schedule(self.applied + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(self.seed * 1_000_003 + 1 + self.step)
        per_step = self.training.sequences_per_step
        batch = self.starts[place * per_step : (place + 1) * per_step]
        loss = self._backward(batch)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.training.grad_clip)
        middle = place == self.steps_per_epoch // 2
        before = [p.detach().clone() for p in self.model.parameters()] if middle else None
        self.optimizer.step()
        if middle:
            self.update_ratio = update_ratios(self.model, before)
        self.optimizer.zero_grad()
        self.epoch_nats += loss * len(batch)
        self.step += 1
        self.applied += not self.optimizer.step_was_skipped
        self.progress.update(len(batch) * self.length)
        if self.step % self.log_interval == 0 or self.step in (1, self.total_steps):
            # The one place that waits for the device, but for fp16's scaler, which reads a number.
            self._log_step(float(loss), float(norm), rate)

    def _backward(self, batch: Tensor) -> Tensor:
        """Gradients of the mean loss over a batch of window starts, and that loss."""
        self.wrapped.train()
        total = torch.zeros((), device=self.device)
        processes = self.accelerator.num_processes
        mine = batch[self.accelerator.process_index :: processes]
        # A process without a sequence takes part with weight 0: gradients meet in its backward.
        micros = mine.split(self.choices["micro_batch"]) if len(mine) else [batch[:1]]
        for number, micro in enumerate(micros, start=1):
            window = self.tokens[micro[:, None] + self.span].long()  # (micro, T + 1)
            last = number == len(micros)
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                with self.accelerator.autocast():
                    loss = self.wrapped(window[:, :-1], window[:, 1:])[1]
                loss = loss * (len(micro) * bool(len(mine)) / len(batch))
                self.accelerator.backward(loss * processes)  # gradients are averaged over them
            total += loss.detach()
        return self.accelerator.reduce(total)

    def _log_step(self, loss: float, norm: float, rate: float) -> None:
        guess = math.log(self.experiment.model.vocab_size)
        remedies.refuse_bad_loss(self, loss, guess + remedies.EXPLODED_NATS)
        record = {"kind": "step", "step": self.step, "loss": loss, "learning_rate": rate}
        record |= {"grad_norm": norm, "tokens": self.tokens_seen, "seconds": round(self.seconds, 3)}
        self.record(record)
        self._tell_progress(loss)

    def _tell_progress(self, loss: float) -> None:
        epochs = self.training.epochs
        epoch = min(epochs, self.step // self.steps_per_epoch + 1)
        best = f", best valid PPL {exp_nats(self.best_loss):,.0f}" if self.summary else ""
        shown = f"epoch {epoch}/{epochs}, training PPL {exp_nats(loss):,.0f}{best}"
        self.progress.set_postfix_str(shown, refresh=False)


def _described(experiment, corpus, seed, name, profile, instead_of) -> dict:
    """For config.json: what the run is, and what it is called."""
    described = {
        "name": name,
        "profile": profile,
        "experiment": experiment.to_dict(),
        "seed": seed,
        "corpus": {
            "name": corpus.name,
            "fingerprint": corpus.fingerprint,
            "source": corpus.source,
            "vocabulary_in_use": corpus.tokenizer.size,
            "tokens": {split: len(corpus.split(split)) for split in corpus.words},
            "words": corpus.words,
            "bytes": corpus.bytes,
        },
    }
    return described | ({"instead_of": instead_of.to_dict()} if instead_of else {})
