"""The training loop. Knows no architecture.

What happens at a step depends on (seed, step) alone: the windows through `window_starts`, dropout
through a reseeding before each step. So a run resumed at any step equals one never interrupted.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import MappingProxyType

import torch
from accelerate import Accelerator
from torch import Tensor

from musota.data.corpus import Corpus, window_starts
from musota.errors import MusotaError, check_seed, nearest_name
from musota.models.base import CausalLM
from musota.models.sharing import build_model
from musota.plan.config import Experiment
from musota.rules import curves
from musota.training import keeping, machine, remedies
from musota.training.evaluate import exp_nats
from musota.training.folder import RunFolder
from musota.training.optimizer import OPTIMIZERS, update_ratios
from musota.training.runs import Run, started_from
from musota.training.schedule import SCHEDULES, learning_rate_at

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
    goes on from its last checkpoint; `resume=False` starts over. Ctrl-C or SIGTERM ends after the
    step at hand, saves it and returns what has been measured; so does `stop_at` after that share of
    the steps. Started by `accelerate launch` or torchrun, every process computes a share of a step.

    `name`, `profile`: recorded for people, they decide nothing.
    `micro_batch`, `compile`: sequences computed at a time (halved where memory runs out),
        torch.compile for the layers; chosen for the device unless given, kept when a run goes on.
    `auto_remedy`: after a loss that is not finite or explodes, back to the last checkpoint at half
        the rate; half the rate where it oscillates (twice at most in all, each an event).
    `continue_from`: another run, or its folder, whose best weights to start from; their hash is
        part of what the run is (`started_from`).
    `device`, `precision`: cpu, cuda or mps; no, bf16 or fp16. By default what pays here.
    `watch`: called with the run at first and whenever something new was recorded.
    `copy`: called every ten minutes and at the end; its OSErrors are treated like the disk's.

    Raises MusotaError for a folder that belongs to another run, is in use or cannot be written,
    damaged checkpoints, a corpus that does not fit the model, too little memory or a final state
    that could not be saved; Diverged for a loss that is not finite or explodes.
    """
    _check_arguments(experiment, corpus, seed, micro_batch, stop_at)
    if auto_remedy and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise MusotaError("auto_remedy works in one process only: leave it out here.")
    start = None
    if continue_from:
        experiment, start = started_from(continue_from, experiment, corpus)
    accelerator = machine.make_accelerator(device, precision)
    identity = _described(experiment, corpus, seed, name, profile)
    folder = RunFolder(run_dir, identity, accelerator.is_main_process)
    if resume and folder.finished:  # perhaps kept as evidence, and read-only: nothing is written
        folder.say(f"{folder.path}: finished before, loaded as it is.")
        folder.attempt_copy(copy)
        folder.refuse_unsaved()
        return Run(folder.path)
    choices = {"micro_batch": micro_batch, "compile": compile}
    with folder.held(fresh=not resume):
        trainer = Trainer(experiment, corpus, seed, folder, accelerator, start, choices)
        trainer.auto_remedy, trainer.watch, trainer.copy = auto_remedy, watch, copy
        return trainer.run(stop_at)


def _check_arguments(experiment, corpus, seed, micro_batch, stop_at) -> None:
    for value, kind in ((experiment, Experiment), (corpus, Corpus)):
        if not isinstance(value, kind):
            raise MusotaError(f"train needs an Experiment and a Corpus, not {value!r:.80}.")
    check_seed(seed)
    for kind, table in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        name = getattr(experiment.training, kind)
        if name not in table:
            raise nearest_name(kind, name, table)
    if micro_batch is not None and not (type(micro_batch) is int and micro_batch >= 1):
        raise MusotaError(f"micro_batch must be a whole number of at least 1, not {micro_batch!r}.")
    if not isinstance(stop_at, (int, float)) or not 0 < stop_at <= 1:
        raise MusotaError(f"stop_at must lie in (0, 1], not {stop_at!r}.")
    if corpus.tokenizer.size > experiment.model.vocab_size:
        large = f"The corpus uses {corpus.tokenizer.size} tokens but the model's vocab_size is"
        size = experiment.model.vocab_size
        raise MusotaError(f"{large} {size}: load the corpus with that vocab_size.")
    for split in ("valid", "test"):
        if len(corpus.split(split)) < 2:
            raise MusotaError(f"The {split} text has under two tokens: use more text.")


class Trainer:
    """One training run: its state, one step, and what is due after it."""

    auto_remedy = False
    watch: Callable[[Run], None] | None = None
    copy: Callable[[], None] | None = None

    def __init__(
        self,
        experiment: Experiment,
        corpus: Corpus,
        seed: int,
        folder: RunFolder,
        accelerator: Accelerator,
        start: dict[str, Tensor] | None = None,
        choices: Mapping = MappingProxyType({}),
    ):
        self.experiment, self.corpus, self.seed = experiment, corpus, seed
        self.training, self.length = experiment.training, experiment.model.max_seq_len
        self.windows = len(window_starts(len(corpus.train), self.length, seed, 0))
        self.steps_per_epoch = math.ceil(self.windows / self.training.sequences_per_step)
        self.total_steps = self.training.epochs * self.steps_per_epoch
        self.log_interval = max(1, self.total_steps // LOG_LINES)
        self.folder, self.accelerator, self.device = folder, accelerator, accelerator.device
        accelerator.wait_for_everyone()
        self.saved = folder.load_checkpoint()
        if self.training.started_from and not (self.saved or start):
            wanted = f"This experiment starts from the weights {self.training.started_from}"
            raise MusotaError(f"{wanted}: name their run with continue_from= (--continue-from).")
        machine.prepare_memory(self.device)
        self.choices = machine.default_choices(experiment, self.device, self.total_steps)
        if self.saved and self.saved[1].get("device", self.device.type) == self.device.type:
            self.choices |= self.saved[1]["choices"]
        self.choices |= {key: value for key, value in choices.items() if value is not None}
        torch.manual_seed(seed)
        model = build_model(experiment.model)
        if start:
            model.load_state_dict(start)
        self.ledger = model.parameter_ledger()
        if self.choices["compile"]:
            model.compile_layers()
        groups = model.optimizer_groups(self.training.weight_decay)
        optimizer = OPTIMIZERS[self.training.optimizer](groups, accelerator.scaler is not None)
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        self.model: CausalLM = accelerator.unwrap_model(self.wrapped)
        self.average = {}  # of the weights, by name: see `keeping.kept_model`
        if self.training.averaging:
            ours = self.model.named_parameters()
            self.average = {n: p.detach().float().clone() for n, p in ours if p.requires_grad}
        # On the device once; int32 there, int64 only for the windows in use.
        self.tokens = corpus.train.to(self.device)
        self.span = torch.arange(self.length + 1, device=self.device)
        self.starts = None  # of this epoch's windows
        self.step = self.applied = 0  # steps begun, and those fp16 scaling did not skip
        self.epoch_nats = torch.zeros((), device=self.device)
        self.started = time.perf_counter()
        self.summary: dict = {}  # of the best epoch
        self.update_ratio: dict[str, float] = {}  # of this epoch, by group
        self.best_unsaved: dict[str, Tensor] | None = None
        self.remedies = {"rate_factor": 1.0, "step": 0}
        self.saved_at, self.copied_at = time.monotonic(), -math.inf
        self.progress = machine.progress_bar(0, shown=False)
        together = {"precision": accelerator.mixed_precision}
        folder.write_config({**self.choices, **together, "processes": accelerator.num_processes})

    def schedule(self, step: int) -> float:
        """The learning rate of a step; `anneal` puts another in its place."""
        rate = learning_rate_at(step, self.training, self.total_steps)
        return self.remedies["rate_factor"] * rate

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

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
        self.folder.say(f"\nStep {self.step}: {event}.")

    def run(self, stop_at: float) -> Run:
        """Go on from the last checkpoint, if there is one, until that share of the steps."""
        folder, stop = self.folder, math.ceil(stop_at * self.total_steps)
        if self.saved:
            keeping.restore(self, self.saved)
            self.saved = None
            folder.say(f"{folder.path}: going on after step {self.step} of {self.total_steps}.")
        elif self.auto_remedy:
            keeping.checkpoint(self)  # to have something to go back to
        if slow := curves.warmup(self.training.warmup_steps, self.total_steps):
            folder.say(slow.sentence)
        if self.watch and folder.writes:
            self.watch(Run(folder.path))  # so that what it shows stands above the bar
        whole = self.training.epochs * self.windows * self.length
        self.progress = machine.progress_bar(whole, self.tokens_seen, folder.writes)
        try:
            with machine.interruptible(self.accelerator.num_processes) as asked, self.progress:
                while self.step < stop and not asked:
                    self._careful_step()
                if self.step == self.total_steps:
                    keeping.finish(self)
                else:
                    remedies.refuse_bad_loss(self, float(self.epoch_nats))
                    if trouble := remedies.bad_weights(self):
                        raise trouble
                    keeping.checkpoint(self)
                    keeping.write_summary(self)
        finally:
            folder.attempt_copy(self.copy)
        folder.refuse_unsaved()
        if self.step < stop:
            place = f"step {self.step} of {self.total_steps}"
            folder.say(f"\nInterrupted after {place}; it is saved. The same call goes on.")
            if not self.summary:  # nothing measured that could be returned
                raise KeyboardInterrupt
        self.accelerator.wait_for_everyone()
        return Run(folder.path)

    def _careful_step(self) -> None:
        """One step and what is due after it; with remedies for what may go wrong."""
        trouble = None
        try:
            self.one_step()
            ends = self.step % self.steps_per_epoch == 0
            due = time.monotonic() - self.saved_at > CHECKPOINT_SECONDS
            if ends or due:
                remedies.refuse_bad_loss(self, float(self.epoch_nats))
        except Exception as error:
            trouble = remedies.known(error)
        if not trouble and (ends or due):  # before they are measured, or kept
            trouble = remedies.bad_weights(self)
        if trouble:
            remedies.mend(self, trouble)
        elif ends:
            keeping.end_epoch(self)
            self._tell_progress(float(self.epoch_nats) / self.windows)
            remedies.calm_down(self)
            keeping.checkpoint(self)
            keeping.write_summary(self)
        elif due:
            keeping.checkpoint(self)

    def last_batch(self) -> Tensor:
        """Where the windows of the step before began."""
        per_step = self.training.sequences_per_step
        place = (self.step - 1) % self.steps_per_epoch * per_step
        return self.starts[place : place + per_step]

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
        if not self.optimizer.step_was_skipped:
            self._move_average()
            self.applied += 1
        self.progress.update(len(batch) * self.length)
        if self.step % self.log_interval == 0 or self.step in (1, self.total_steps):
            # The one place that waits for the device, but for fp16's scaler, which reads a number.
            self._log_step(float(loss), float(norm), rate)

    @torch.no_grad()
    def _move_average(self) -> None:
        """Towards the weights, so that the average spans a share of the steps so far."""
        if self.average:
            now = dict(self.model.named_parameters())
            weights, share = [now[n].float() for n in self.average], self.training.averaging
            torch._foreach_lerp_([*self.average.values()], weights, 1 / (1 + share * self.applied))

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
        remedies.refuse_bad_loss(self, loss, remedies.limit_of(self))
        record = {"kind": "step", "step": self.step, "loss": loss, "learning_rate": rate}
        record |= {"grad_norm": norm, "tokens": self.tokens_seen, "seconds": round(self.seconds, 3)}
        self.record(record)
        self._tell_progress(loss)

    def _tell_progress(self, loss: float) -> None:
        epochs = self.training.epochs
        epoch = min(epochs, self.step // self.steps_per_epoch + 1)
        best = f", best valid PPL {self.summary['ppl']:,.0f}" if self.summary else ""
        shown = f"epoch {epoch}/{epochs}, training PPL {exp_nats(loss):,.0f}{best}"
        self.progress.set_postfix_str(shown, refresh=False)


def _described(experiment, corpus, seed, name, profile) -> dict:
    """For config.json: what the run is, and what it is called."""
    return {
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
