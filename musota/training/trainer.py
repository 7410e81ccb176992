"""The training loop, for any architecture.

A step depends on (seed, step) alone: its windows come from `window_starts`, and the random state is
seeded before each step. So a resumed run ends with the same weights as an uninterrupted one.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from accelerate.tracking import GeneralTracker
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from musota.config import Experiment, ModuleConfig, TrainConfig, check_value
from musota.data.corpus import Corpus
from musota.errors import MusotaError, find_named
from musota.models.base import score
from musota.models.diagnostics import evaluating
from musota.models.hub import build_model, weights_sha256
from musota.models.module import WrappedModule, call_once, copy_module, module_config
from musota.training import device as machine
from musota.training.checkpoint import RunDir
from musota.training.evaluate import blocks_of, exp_nats, health_of, metrics_of, samples_of
from musota.training.optim import OPTIMIZERS, SCHEDULES
from musota.training.run import Run
from musota.training.state import Batches, TrainState, halve_micro_batch, train_step
from musota.training.trackers import Trackers, check_trackers

COMPILE_STEPS = 2000  # GPU runs of at least this many steps regain the compile time
CPU_TOKENS = 1536  # tokens of a micro-batch on a CPU
COPY_SECONDS = 600  # between copies; a run ends with one, however it ends
LOG_LINES = 250  # about this many step records per run
# A training loss has exploded if it is above a uniform guess, and above the first loss, by more
# than these nats and by more than this factor.
EXPLODED_NATS, EXPLODED = 2.0, 1.2


class Diverged(MusotaError):
    """A loss that is not finite, or far above that of a uniform guess and of the first step."""


@dataclass(frozen=True)
class RunOptions:
    """How a run is executed, which is not part of its identity. `stop_at`: the share of the steps
    after which to stop. `watch`: called with the run after each record, in place of the progress
    bar. `copy`: called every ten minutes and at the end. `about`: recorded in config.json."""

    device: str | torch.device | None = None  # cpu or cuda; default: the best one here
    precision: str | None = None  # no, bf16 or fp16; default: the fastest that is safe here
    micro_batch: int | None = None  # sequences computed at a time; halved where memory runs out
    compile: bool | None = None  # torch.compile for the layers; default: in long runs on a GPU
    stop_at: float = 1.0
    watch: Callable[[Run], None] | None = None
    copy: Callable[[], None] | None = None
    about: Mapping = field(default_factory=dict)
    log_with: str | GeneralTracker | Sequence = ()  # accelerate's trackers: "tensorboard", "wandb"

    def __post_init__(self):
        if self.micro_batch is not None:
            size = check_value("micro_batch", self.micro_batch, int)
            object.__setattr__(self, "micro_batch", size)
        check_value("stop_at", self.stop_at, float, 1e-15, 1)
        object.__setattr__(self, "log_with", check_trackers(self.log_with))


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
    options: RunOptions = RunOptions(),
) -> Run:
    """Train an experiment, or a copy of a module, into `run_dir` and return the run.

    A finished run of the same experiment, corpus and seed is loaded; an unfinished one continues
    from its last checkpoint; `resume=False` starts over. After Ctrl-C or SIGTERM the run finishes
    the step, saves it and returns the unfinished run; before the end of the first epoch, and after
    the last step, it raises KeyboardInterrupt. The best epoch is chosen on valid. With `accelerate
    launch` or torchrun, every process computes a share of each step.
    `training`, `max_seq_len`: only for a module (default: the plan's training).
    Raises MusotaError for what cannot be trained or saved; Diverged for a loss that is not finite
    or explodes.
    """
    seed = check_value("seed", seed, int)
    experiment, module = _checked(experiment, corpus, training, max_seq_len)
    accelerator = machine.make_accelerator(options.device, options.precision, module is not None)
    identity = {"name": name, **options.about, "experiment": experiment.to_dict(), "seed": seed}
    folder = RunDir(run_dir, identity, corpus, accelerator.is_main_process, options.copy)
    if resume and folder.finished:  # the folder may be read-only: nothing is written
        accelerator.print(f"{folder.path.name}: already finished, loaded.")
        folder.copy_out()
        folder.refuse_unsaved()
        return Run(folder.path)
    batches = Batches(corpus.train, experiment, seed, accelerator.device)
    with folder.locked(fresh=not resume):
        accelerator.wait_for_everyone()
        saved = folder.restore()
        if len({*gather_object([folder.last])}) > 1:
            different = f"The processes see different checkpoints in {folder.path}"
            raise MusotaError(f"{different}: use a folder that all machines share.")
        machine.prepare_memory(accelerator.device)
        torch.manual_seed(seed)
        if module is None:
            model = build_model(experiment.model)
        else:
            model = WrappedModule(module, experiment.model)
        chosen = choose(options, batches, accelerator.device, saved)
        state = TrainState.new(model, experiment.training, accelerator, **chosen)
        if saved:
            state.load_state_dict(*saved)
        how = {"precision": accelerator.mixed_precision, "processes": accelerator.num_processes}
        folder.write_config(chosen | how)
        settings = {"name": name, "seed": seed, "corpus": corpus.name, **experiment.fields()}
        logged = options.log_with, folder, settings | chosen | how, state.step
        with closing(Trackers(*logged)) as trackers:
            return Trainer(state, batches, experiment, corpus, folder, options, trackers).run()


def _checked(experiment, corpus, training, max_seq_len) -> tuple[Experiment, nn.Module | None]:
    """The experiment, and a copy of the module it trains, if it is one."""
    if not (isinstance(experiment, Experiment | nn.Module) and isinstance(corpus, Corpus)):
        given = f"{experiment!r:.60} and {corpus!r:.60}"
        raise MusotaError(f"train needs an Experiment or a module, and a Corpus, not {given}.")
    if not isinstance(training, TrainConfig | None):
        raise MusotaError(f"training must be a TrainConfig, not {training!r:.60}.")
    module = None
    if isinstance(experiment, nn.Module):
        module, model = _prepare_module(experiment, corpus, max_seq_len)
        experiment = Experiment(model, training or TrainConfig())
    elif training or max_seq_len:
        raise MusotaError("training and max_seq_len are for modules: use experiment.with_(…).")
    for kind, table in (("optimizer", OPTIMIZERS), ("schedule", SCHEDULES)):
        find_named(kind, getattr(experiment.training, kind), table)
    size = experiment.model.vocab_size
    if corpus.tokenizer.size > size:
        large = f"The corpus uses {corpus.tokenizer.size} tokens but the model's vocab_size is"
        raise MusotaError(f"{large} {size}: load the corpus with that vocab_size.")
    for split in ("valid", "test"):
        if len(corpus.split(split)) < 2:
            raise MusotaError(f"The {split} text has fewer than two tokens: use more text.")
    return experiment, module


def _prepare_module(module, corpus, max_seq_len) -> tuple[nn.Module, ModuleConfig]:
    """A copy of a module, and its description with the vocabulary that its output has."""
    if not max_seq_len:
        raise MusotaError("A module needs max_seq_len, the tokens of a training sequence.")
    logits = call_once(module := copy_module(module), max_seq_len)  # creates lazy parameters
    if not any(parameter.requires_grad for parameter in module.parameters()):
        kind = type(module).__name__
        raise MusotaError(f"{kind} has no parameters to train: set requires_grad of some to True.")
    shape = getattr(logits, "shape", None) or (corpus.tokenizer.size,)
    return module, module_config(module, shape[-1], max_seq_len)


def choose(options: RunOptions, batches: Batches, device: torch.device, saved) -> dict:
    """`micro_batch` and `compile`: as given, else as saved on such a device, else the default."""
    chosen = {"micro_batch": batches.sequences, "compile": batches.total_steps >= COMPILE_STEPS}
    if device.type == "cpu":
        few = max(1, CPU_TOKENS // batches.length)
        chosen = {"micro_batch": min(few, batches.sequences), "compile": False}
    if saved and saved[1]["device"] == device.type:
        chosen = {name: saved[1][name] for name in chosen}
    if device.type == "cuda" and find_spec("triton") is None:  # there is none for Windows
        chosen["compile"] = False
    given = {name: getattr(options, name) for name in chosen}
    return chosen | {name: value for name, value in given.items() if value is not None}


@dataclass
class Trainer:
    """The training loop of one run: steps, checkpoints, evaluation."""

    state: TrainState
    batches: Batches
    experiment: Experiment
    corpus: Corpus
    folder: RunDir
    options: RunOptions
    trackers: Trackers
    progress: tqdm | None = None

    def run(self) -> Run:
        """Train from the state at hand to the end, or to `stop_at`."""
        state, folder, batches = self.state, self.folder, self.batches
        total, processes = batches.total_steps, state.accelerator.num_processes
        stop = math.ceil(self.options.stop_at * total)
        folder.discard_later()
        if (warmup := self.experiment.training.warmup_steps) > total:
            short = f"The run has {total:,} steps, its warm-up {warmup:,}"
            state.accelerator.print(f"{short}: the learning rate will not reach its setting.")
        if total == 1 and not warmup:
            state.accelerator.print("The run's only step has learning rate 0: it learns nothing.")
        if state.step:
            done = f"continues after step {state.step} of {total}"
            state.accelerator.print(f"{folder.path.name}: {done}.")
            folder.write_summary(state.summary)
        self.watch()  # first, so that what it shows stands above the progress bar
        tokens, done = batches.tokens_seen(total), batches.tokens_seen(state.step)
        shown = folder.writes and not self.options.watch  # `watch` shows the progress itself
        self.progress = machine.progress_bar(tokens, done, shown)
        try:
            with machine.stop_on_signal(processes) as stopped, self.progress:
                goes_on = state.step < stop
                while goes_on:
                    self.step()
                    ends_epoch = state.step % batches.steps_per_epoch == 0
                    goes_on = state.step < stop and not stopped
                    if ends_epoch or not goes_on or folder.checkpoint_due():
                        self.check_weights()
                        if ends_epoch and folder.writes:
                            self.end_epoch()
                        folder.save(state)
                        if goes_on:  # else it is copied below
                            folder.copy_out(every=COPY_SECONDS)
                if state.step == total and folder.writes:
                    self.finish()
        finally:
            folder.copy_out()
        folder.refuse_unsaved()
        if state.step < stop:
            if not self.options.watch:
                print(f"\nInterrupted after step {state.step} of {total}: repeat to continue.")
            if not state.summary:  # nothing was measured that could be returned
                raise KeyboardInterrupt
        elif stopped:  # the run is complete, but its caller should not begin another
            raise KeyboardInterrupt
        state.accelerator.wait_for_everyone()
        return Run(folder.path)

    def step(self) -> None:
        """One optimizer step, and its record where one is due."""
        state, batches = self.state, self.batches
        while not (done := train_step(state, batches)):
            event = halve_micro_batch(state)
            self.record("event", event=event)
            state.accelerator.print(f"\nStep {state.step}: {event}.")
        self.progress.update(batches.tokens_seen(state.step) - self.progress.n)
        interval = max(1, batches.total_steps // LOG_LINES)
        if state.step % interval == 0 or state.step in (1, batches.total_steps):
            loss, norm = map(float, done)  # the only wait for the device, but for fp16's scaler
            if state.step == 1:
                state.first_loss = loss
            self.check_loss(loss)
            rate = state.optimizer.param_groups[0]["lr"]
            self.record("step", loss=loss, learning_rate=rate, grad_norm=norm)
            self.show_progress(loss)

    @torch.no_grad()
    def check_weights(self) -> None:
        """Raises Diverged if the last step broke the weights: by the loss of its batch, now."""
        starts = self.batches.starts_at(self.state.step - 1)[: self.state.micro_batch]
        with evaluating(self.state.model), self.state.accelerator.autocast():
            self.check_loss(float(self.state.model(*self.batches.windows(starts))[1]))

    def check_loss(self, loss: float) -> None:
        """Raises Diverged for a training loss that is not finite or has exploded."""
        start = max(math.log(self.experiment.model.vocab_size), self.state.first_loss)
        if not math.isfinite(loss) or loss > max(start + EXPLODED_NATS, EXPLODED * start):
            half = self.experiment.training.learning_rate / 2
            found = f"The training loss is {loss:.4g} at step {self.state.step}"
            self.diverge(f"{found}: start over with half the learning_rate, {half:g}.")

    def diverge(self, message: str) -> None:
        self.record("event", event="diverged")
        kept = f" The last good checkpoint is kept in {self.folder.checkpoints}."
        raise Diverged(message + kept * bool(self.folder.last))

    def score(self, split: str) -> tuple[Tensor, dict]:
        """The nats of each token of a split, and its metrics."""
        state, corpus = self.state, self.corpus
        nats, hits = score(state.model, corpus.split(split), batch_size=state.micro_batch)
        return nats, metrics_of(nats, hits, corpus.words[split], corpus.bytes[split])

    def end_epoch(self) -> None:
        """Measure on valid, record it, and keep the weights if they are the best yet."""
        state, batches, corpus = self.state, self.batches, self.corpus
        epoch = state.step // batches.steps_per_epoch
        with machine.autocast_on(state.device, state.accelerator.mixed_precision):
            nats, metrics = self.score("valid")
            if bad := (~nats.isfinite()).nonzero().flatten().tolist():
                found = f"{len(bad):,} tokens of valid have no finite loss after epoch {epoch}"
                self.diverge(f"{found}: inspect the first, token {bad[0] + 1}.")
            about = {"samples": samples_of(state.model, corpus)}
            about["health"] = health_of(state.model, corpus, state.micro_batch)
        about["health"] |= {"update_ratio": state.update_ratio}
        block_nats, block_tokens = blocks_of(nats)
        loss = metrics.pop("loss")
        metrics = {"valid_loss": loss, **metrics, "valid_block_nats": block_nats}
        train_loss = float(state.epoch_nats) / batches.n_windows
        self.record("epoch", epoch=epoch, train_loss=train_loss, **metrics, **about)
        if loss < state.summary.get("valid_loss", math.inf):
            weights = state.model.state_dict()
            state.unsaved_best = {name: w.detach().clone() for name, w in weights.items()}
            state.summary |= {"best_epoch": epoch, **metrics, "valid_block_tokens": block_tokens}
        ledger, memory = state.model.parameter_ledger(), machine.peak_memory(state.device)
        state.summary |= {"parameters": sum(ledger.values()), "parameter_ledger": ledger}
        state.summary |= {"flops_per_token": self.experiment.model.flops_per_token}
        state.summary |= {"peak_memory_bytes": memory, **machine.about_machine(state.device)}
        state.summary |= {"finished": False, "epochs_done": epoch}
        self.show_progress(train_loss)

    def finish(self) -> None:
        """Score test once, with the weights of the best epoch, and complete the summary."""
        state, folder = self.state, self.folder
        if folder.trouble or state.unsaved_best:
            folder.save(state)
        if folder.trouble:
            return  # not finished
        final_weights, seconds = weights_sha256(state.model), state.seconds
        Run(folder.path).load_weights(state.model)
        with machine.autocast_on(state.device, state.accelerator.mixed_precision):
            nats, metrics = self.score("test")
        if bad := int((~nats.isfinite()).sum()):
            self.record("event", event=f"{bad:,} tokens of test have no finite loss")
        speed = self.batches.tokens_seen(state.step) / seconds
        state.summary |= {f"test_{key}": value for key, value in metrics.items()}
        state.summary |= {"finished": True, "weights_sha256": final_weights}
        state.summary |= {"seconds": round(seconds, 1), "tokens_per_second": round(speed, 1)}
        folder.write_summary(state.summary)

    def record(self, kind: str, **values) -> None:
        """Add a record of this step to metrics.jsonl."""
        about = {"kind": kind, "step": self.state.step, "seconds": round(self.state.seconds, 3)}
        record = about | {"tokens": self.batches.tokens_seen(self.state.step)} | values
        self.folder.log(record)
        self.trackers.log(record)
        self.watch()

    def watch(self) -> None:
        if self.options.watch and self.folder.writes:
            with suppress(MusotaError):  # the folder vanished, which `log` reports
                self.options.watch(Run(self.folder.path))

    def show_progress(self, loss: float) -> None:
        epochs, summary = self.experiment.training.epochs, self.state.summary
        epoch = min(epochs, self.state.step // self.batches.steps_per_epoch + 1)
        best = f", best valid PPL {summary['ppl']:,.0f}" if summary else ""
        shown = f"epoch {epoch}/{epochs}, training PPL {exp_nats(loss):,.0f}{best}"
        self.progress.set_postfix_str(shown, refresh=False)
