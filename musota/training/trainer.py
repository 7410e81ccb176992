"""The training loop, for any architecture.

What a step computes depends on (seed, step) alone: its windows come from `window_starts`, and the
random state is seeded before each step. So a run that was resumed at any step ends with the same
weights as one that was never interrupted.
"""

import contextlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real

import torch
from torch import Tensor, nn
from tqdm import tqdm

from musota.config import Experiment, TrainConfig
from musota.data.corpus import Corpus
from musota.errors import MusotaError, check_seed
from musota.files import sha256
from musota.models.base import weights_sha256
from musota.models.diagnostics import evaluating
from musota.models.hub import build_model
from musota.models.module import WrappedModule
from musota.training import device as machine
from musota.training.checkpoint import RunDir
from musota.training.evaluate import (
    blocks_of,
    exp_nats,
    health_of,
    metrics_of,
    samples_of,
    score_in_memory,
)
from musota.training.prepare import checked, start_from
from musota.training.run import Run
from musota.training.state import TrainState
from musota.training.step import Batches, can_recover, recover, train_step

LOG_LINES = 250  # about so many step records a run
EXPLODED_NATS = 2.0  # a training loss so far above that of a uniform guess has exploded


class Diverged(MusotaError):
    """A loss that is not finite, or far above that of a uniform guess."""


@dataclass(frozen=True)
class RunOptions:
    """How a run is executed. None of it is part of what the run is.

    `device`, `precision`: cpu or cuda; no, bf16 or fp16. Default: what pays here.
    `micro_batch`, `compile`: sequences computed at a time (halved where memory runs out), and
        torch.compile for the layers. Default: chosen for the device, kept when a run is resumed.
    `stop_at`: stop after this share of the steps.
    `watch`: called with the run at the start and after each new record.
    `copy`: called after a checkpoint, at most every ten minutes, and at the end. Its OSErrors are
        reported; a run whose last copy failed raises MusotaError.
    `about`: recorded in config.json as it is (title, profile, changes, command).
    """

    device: str | torch.device | None = None
    precision: str | None = None
    micro_batch: int | None = None
    compile: bool | None = None
    stop_at: float = 1.0
    watch: Callable[[Run], None] | None = None
    copy: Callable[[], None] | None = None
    about: Mapping = field(default_factory=dict)

    def __post_init__(self):
        size, share = self.micro_batch, self.stop_at
        if size is not None and not (isinstance(size, Integral) and size >= 1):
            raise MusotaError(f"micro_batch must be a whole number of at least 1, not {size!r}.")
        if not isinstance(share, Real) or not 0 < share <= 1:
            raise MusotaError(f"stop_at must lie in (0, 1], not {share!r}.")


def train(
    experiment: Experiment | nn.Module,
    corpus: Corpus,
    run_dir: str | os.PathLike,
    *,
    training: TrainConfig | None = None,
    max_seq_len: int | None = None,
    seed: int = 0,
    resume: bool = True,
    name: str = "run",
    continue_from: Run | str | os.PathLike | None = None,
    options: RunOptions = RunOptions(),
) -> Run:
    """Train an experiment, or a copy of a module, into `run_dir` and return the run.

    A finished run of the same experiment, corpus and seed is returned as it is; an unfinished one
    goes on from its last checkpoint; `resume=False` starts over. Ctrl-C or SIGTERM finishes the
    step, saves it and returns what has been measured. The best epoch is chosen on valid. Started
    by `accelerate launch` or torchrun, every process computes a share of a step.

    `training`, `max_seq_len`: of a module (default: the plan's training); an Experiment has both.
    `continue_from`: a run, or the folder of a run or a saved model, whose weights to start from.
        Their hash becomes part of the experiment (`started_from`).

    Raises MusotaError for a folder that belongs to another run, is in use or cannot be written,
    damaged checkpoints, a corpus that does not fit the model, too little memory or a final state
    that could not be saved; Diverged for a loss that is not finite or explodes.
    """
    seed = int(seed) if isinstance(seed, Integral) and not isinstance(seed, bool) else seed
    check_seed(seed)
    experiment, module = checked(experiment, corpus, training, max_seq_len)
    start = None
    if continue_from:
        experiment, start = start_from(continue_from, experiment, corpus)
    accelerator = machine.make_accelerator(options.device, options.precision, module is not None)
    identity = {"name": name, **options.about, "experiment": experiment.to_dict(), "seed": seed}
    folder = RunDir(run_dir, identity, corpus, accelerator.is_main_process, options.copy)
    if resume and folder.finished:  # the folder may be read-only: nothing is written
        folder.say(f"{folder.path}: finished before, loaded as it is.")
        folder.copy_out()
        folder.refuse_unsaved()
        return Run(folder.path)
    batches = Batches(corpus.train, experiment, seed, accelerator.device)
    with folder.locked(fresh=not resume):
        accelerator.wait_for_everyone()
        saved = folder.restore()
        if experiment.training.started_from and not (saved or start):
            raise MusotaError("This experiment starts from other weights: give continue_from.")
        machine.prepare_memory(accelerator.device)
        torch.manual_seed(seed)
        model = WrappedModule(module, experiment.model) if module else build_model(experiment.model)
        if start:
            model.load_state_dict(start)
        chosen = _choose(options, batches, accelerator.device, saved)
        state = TrainState.new(model, experiment.training, accelerator, **chosen)
        if saved:
            state.load_state_dict(*saved)
        how = {"precision": accelerator.mixed_precision, "processes": accelerator.num_processes}
        folder.write_config(chosen | how)
        return Trainer(state, batches, experiment, corpus, folder, options).run()


def _choose(options: RunOptions, batches: Batches, device: torch.device, saved) -> dict:
    """`micro_batch` and `compile`: as given, else as saved on such a device, else the default."""
    chosen = {
        "micro_batch": machine.default_micro_batch(device, batches.sequences, batches.length),
        "compile": machine.default_compile(device, batches.total_steps),
    }
    if saved and saved[1]["device"] == device.type:
        chosen = {name: saved[1][name] for name in chosen}
    if options.micro_batch is not None:
        chosen["micro_batch"] = int(options.micro_batch)
    if options.compile is not None:
        chosen["compile"] = bool(options.compile)
    return chosen


@dataclass
class Trainer:
    """The loop of one run, and what is due after a step. `state` is what changes."""

    state: TrainState
    batches: Batches
    experiment: Experiment
    corpus: Corpus
    folder: RunDir
    options: RunOptions
    progress: tqdm | None = None

    def run(self) -> Run:
        """Train from the state at hand to the end, or to `stop_at`."""
        state, folder, batches = self.state, self.folder, self.batches
        total, processes = batches.total_steps, state.accelerator.num_processes
        stop = math.ceil(self.options.stop_at * total)
        if state.step:
            self.write_summary()  # as of this step, should that of a later one stand there
            folder.say(f"{folder.path}: going on after step {state.step} of {total}.")
        self.watch()  # first, so that what it shows stands above the progress bar
        tokens, done = batches.tokens_seen(total), batches.tokens_seen(state.step)
        self.progress = machine.progress_bar(tokens, done, folder.writes)
        try:
            with machine.stop_on_signal(processes) as stopped, self.progress:
                while state.step < stop and not stopped():
                    self.step()
                    ends_epoch = state.step % batches.steps_per_epoch == 0
                    if ends_epoch or folder.checkpoint_due():
                        self.check_weights()
                        if ends_epoch:
                            self.end_epoch()
                        self.save()
                if state.step == total:
                    self.finish()
                elif state.step:
                    self.check_weights()
                    self.save()
        finally:
            folder.copy_out()
        folder.refuse_unsaved()
        if state.step < stop:
            place = f"step {state.step} of {total}"
            folder.say(f"\nInterrupted after {place}; it is saved. The same call goes on.")
            if not state.summary:  # nothing was measured that could be returned
                raise KeyboardInterrupt
        state.accelerator.wait_for_everyone()
        return Run(folder.path)

    def step(self) -> None:
        """One optimizer step, and its record where one is due."""
        state, batches = self.state, self.batches
        before, done = batches.tokens_seen(state.step), None
        while not done:
            failed = None
            try:
                done = train_step(state, batches)
            except Exception as error:
                if not can_recover(error):
                    raise
                failed = error.with_traceback(None)  # which would hold on to the memory
            if failed:
                self.event(recover(state, failed))
        self.progress.update(batches.tokens_seen(state.step) - before)
        interval = max(1, batches.total_steps // LOG_LINES)
        if state.step % interval == 0 or state.step in (1, batches.total_steps):
            self.log_step(*map(float, done))  # the only wait for the device, but for fp16's scaler

    def log_step(self, loss: float, norm: float) -> None:
        state, rate = self.state, self.state.optimizer.param_groups[0]["lr"]
        self.check_loss(loss)
        record = {"kind": "step", "step": state.step, "loss": loss, "learning_rate": rate}
        record |= {"grad_norm": norm, "tokens": self.batches.tokens_seen(state.step)}
        self.record({**record, "seconds": round(state.seconds, 3)})
        self.show_progress(loss)

    @torch.no_grad()
    def check_weights(self) -> None:
        """Raises Diverged if the last step broke the weights: by the loss of its batch, now."""
        self.check_loss(float(self.state.epoch_nats), math.inf)
        starts = self.batches.starts_at(self.state.step - 1)[: self.state.micro_batch]
        with evaluating(self.state.model), self.state.accelerator.autocast():
            loss = self.state.model(*self.batches.windows(starts))[1]
        self.check_loss(float(loss))

    def check_loss(self, loss: float, limit: float | None = None) -> None:
        """Raises Diverged for a training loss that is not finite or above `limit`, by default that
        of a model that has exploded."""
        limit = limit or math.log(self.experiment.model.vocab_size) + EXPLODED_NATS
        if math.isfinite(loss) and loss <= limit:
            return
        step, rate = self.state.step, self.experiment.training.learning_rate
        batch = sha256(self.batches.starts_at(step - 1).cpu().numpy().tobytes())[:12]
        found = f"The training loss is {loss:.4g} at step {step} (batch {batch})"
        self.diverge(found, f"start over with half the learning_rate, {rate / 2:g}")

    def check_valid(self, nats: Tensor) -> None:
        """Raises Diverged if tokens of valid have no finite loss, naming the first."""
        if bad := (~nats.isfinite()).nonzero().flatten().tolist():
            epoch, place = self.state.step // self.batches.steps_per_epoch, bad[0]
            around = self.corpus.valid[place : place + 2].tolist()
            before, token = (self.corpus.tokenizer.decode([t]) for t in around)
            first = f"the first is token {place + 1}, {token!r} after {before!r}"
            found = f"{len(bad):,} tokens of valid have no finite loss after epoch {epoch}, {first}"
            self.diverge(found, "look at what the model computes for these tokens")

    def diverge(self, found: str, advice: str) -> None:
        """Records that the run diverged and raises Diverged."""
        self.record({"kind": "event", "step": self.state.step, "event": "diverged"})
        kept = f"The last good checkpoint stays in {self.folder.checkpoints}"
        raise Diverged(f"{found}: {advice}. {kept}.")

    def end_epoch(self) -> None:
        """Measure on valid, record it, and keep the weights if they are the best yet."""
        state, batches, corpus = self.state, self.batches, self.corpus
        if not self.folder.writes:
            return
        with machine.autocast_on(state.device, state.accelerator.mixed_precision):
            nats, hits = score_in_memory(state.model, corpus.valid, self.event)
            self.check_valid(nats)
            details = {"samples": samples_of(state.model, corpus)}
            health = health_of(state.model, corpus, self.event)
        metrics = metrics_of(nats, hits, corpus.words["valid"], corpus.bytes["valid"])
        metrics = {"valid_loss": metrics.pop("loss"), **metrics}
        details["valid_block_nats"], block_tokens = blocks_of(nats)
        details["health"] = {"update_ratio": state.update_ratio, **health}
        train_loss = float(state.epoch_nats) / batches.n_windows
        epoch = state.step // batches.steps_per_epoch
        record = {"kind": "epoch", "epoch": epoch, "step": state.step}
        record |= {"tokens": batches.tokens_seen(state.step), "seconds": round(state.seconds, 3)}
        self.record({**record, "train_loss": train_loss, **metrics, **details})
        if metrics["valid_loss"] < state.summary.get("valid_loss", math.inf):
            weights = state.model.state_dict()
            state.unsaved_best = {name: w.detach().clone() for name, w in weights.items()}
            state.summary |= {"best_epoch": epoch, **metrics, "valid_block_tokens": block_tokens}
            state.summary["valid_block_nats"] = details["valid_block_nats"]
        state.summary |= {"finished": False, "epochs_done": epoch}
        self.show_progress(train_loss)

    def save(self) -> None:
        """Write a checkpoint, the best weights if they are new, and the summary."""
        self.folder.save(self.state)
        self.write_summary()

    def finish(self) -> None:
        """Score test once, with the weights of the best epoch, and complete the summary."""
        state, folder, corpus = self.state, self.folder, self.corpus
        if not folder.writes:
            return
        if folder.trouble or state.unsaved_best:
            self.save()
        if folder.trouble:
            return  # not finished
        final_weights, seconds = weights_sha256(state.model), state.seconds
        Run(folder.path).load_weights(state.model)
        with machine.autocast_on(state.device, state.accelerator.mixed_precision):
            nats, hits = score_in_memory(state.model, corpus.test, self.event)
        metrics = metrics_of(nats, hits, corpus.words["test"], corpus.bytes["test"])
        speed = self.batches.tokens_seen(state.step) / seconds
        state.summary |= {f"test_{key}": value for key, value in metrics.items()}
        state.summary |= {"finished": True, "weights_sha256": final_weights}
        state.summary |= {"seconds": round(seconds, 1), "tokens_per_second": round(speed, 1)}
        self.write_summary()

    def write_summary(self) -> None:
        """What has been measured, and on what; nothing before the first epoch has ended."""
        ledger, memory = self.state.model.parameter_ledger(), machine.peak_memory(self.state.device)
        about = {"parameters": sum(ledger.values()), "parameter_ledger": ledger}
        about |= {"flops_per_token": self.experiment.model.flops_per_token}
        about |= {"peak_memory_bytes": memory, **machine.about_machine(self.state.device)}
        self.folder.write_summary({**self.state.summary, **about} if self.state.summary else {})

    def record(self, record: dict) -> None:
        self.folder.log(record)
        self.watch()

    def event(self, event: str) -> None:
        """Record and print something unusual."""
        self.record({"kind": "event", "step": self.state.step, "event": event})
        self.folder.say(f"\nStep {self.state.step}: {event}.")

    def watch(self) -> None:
        if self.options.watch and self.folder.writes:
            with contextlib.suppress(MusotaError):  # the folder vanished, which `log` reports
                self.options.watch(Run(self.folder.path))

    def show_progress(self, loss: float) -> None:
        epochs, summary = self.experiment.training.epochs, self.state.summary
        epoch = min(epochs, self.state.step // self.batches.steps_per_epoch + 1)
        best = f", best valid PPL {summary['ppl']:,.0f}" if summary else ""
        shown = f"epoch {epoch}/{epochs}, training PPL {exp_nats(loss):,.0f}{best}"
        self.progress.set_postfix_str(shown, refresh=False)
