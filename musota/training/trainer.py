"""The training loop, its schedule, and evaluation. Knows no architecture.

What happens at a step depends on (seed, step) alone: the windows through `window_starts`, dropout
through a reseeding before each step. So a run resumed at any step equals one never interrupted.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from musota.data.corpus import Corpus, window_starts
from musota.errors import MusotaError, check_seed
from musota.files import read_sealed, sha256, write_sealed
from musota.models.base import CausalLM, build_model, score, weights_sha256
from musota.models.sharing import save_model
from musota.plan.config import Experiment
from musota.rules.curves import oscillation
from musota.training.evaluate import blocks_of, evaluate, exp_nats, metrics_of
from musota.training.machine import (
    Interruption,
    about_machine,
    keep_freed_memory,
    peak_memory,
    precision_for_device,
    progress_bar,
)
from musota.training.runs import Run, RunFolder, read_metrics, steps_table
from musota.training.schedule import learning_rate_at

SAMPLE_PROMPTS, PROMPT_TOKENS, SAMPLE_TOKENS = 3, 8, 32


SAMPLE_SETTINGS = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 0}


COMPILE_STEPS = 2000  # a run of so many steps wins back the minute that compiling takes


HEALTH_WINDOWS = 8  # of valid, looked at closely after each epoch


CLEAN_SHARE = 32  # one training token in so many is scored without dropout after each epoch


CHECKPOINT_SECONDS = 180  # between checkpoints inside an epoch


SHORTER = 160  # tokens a sequence: the plan's remedy for too little memory


EXPLODED_NATS = 2.0  # so far above a uniform guess a training loss counts as exploded


LEAST_RATE_FACTOR = 0.25  # after two remedies that halved it


LOG_LINES = 250  # about so many step records a run


class Diverged(MusotaError):
    """The loss is no longer a number, or far above that of a guess."""


class _TooLong(Exception):
    """Not even one sequence fits the memory."""


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
    watch: Callable[[Run], None] | None = None,
    copy: Callable[[], None] | None = None,
) -> Run:
    """Train an experiment into `run_dir` and return the run, its best epoch chosen on valid.

    A finished run of the same experiment, corpus and seed is returned as it is; an unfinished one
    goes on where its last checkpoint stands; `resume=False` starts over. `micro_batch` sequences
    are computed at a time (a choice of speed and memory; at dropout 0 it changes nothing else), and
    `compile` passes the model's body through torch.compile: both are chosen for the device unless
    given, and kept when a run goes on. Ctrl-C ends after the step at hand, saves it and returns
    what has been measured; `stop_at` ends a run in the same way after that share of its steps.
    `watch` is called with the run at first and whenever something new was recorded, `copy` with
    nothing after each checkpoint and at the end; an OSError of it is treated like one of the disk.

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
    choices = {"micro_batch": micro_batch, "compile": compile}
    config = Path(run_dir) / "config.json"
    if resume and config.exists() and read_sealed(config).get("instead_of") == experiment.to_dict():
        asked, experiment = experiment, experiment.with_(max_seq_len=SHORTER)
    else:
        asked = None
    while True:
        trainer = _Trainer(
            experiment, corpus, run_dir, resume, seed, name, profile, choices, auto_remedy, asked
        )
        try:
            return trainer.run(stop_at, watch, copy)
        except _TooLong:
            asked, experiment = experiment, experiment.with_(max_seq_len=SHORTER)
            resume = False


def _check_arguments(experiment, corpus, seed, micro_batch, stop_at) -> None:
    for value, kind in ((experiment, Experiment), (corpus, Corpus)):
        if not isinstance(value, kind):
            raise MusotaError(f"train needs an Experiment and a Corpus, not {value!r:.80}.")
    check_seed(seed)
    if micro_batch is not None and (
        isinstance(micro_batch, bool) or not isinstance(micro_batch, int) or micro_batch < 1
    ):
        raise MusotaError(f"micro_batch must be a whole number of at least 1, not {micro_batch!r}.")
    if not isinstance(stop_at, (int, float)) or not 0 < stop_at <= 1:
        raise MusotaError(f"stop_at must lie in (0, 1], not {stop_at!r}.")


def anneal(run: Run, corpus: Corpus, share: float = 0.15) -> dict[str, Tensor]:
    """Does a lower learning rate bring out what an unfinished run has learned?

    From the run's last checkpoint `share` as many steps more are trained twice: with the rate
    falling to 0 in a straight line, and held. Returns nats of every valid token (see `score`) at
    the checkpoint (`before`) and after both (`decayed`, `held`). The run itself stays as it is.
    Raises MusotaError for a finished run, whose rate has fallen to 0 already.
    """
    if run.finished:
        raise MusotaError(f"{run.path} is finished, its rate is 0: anneal a run stopped half-way.")
    nats = {}
    for arm, factor in {"decayed": lambda done: 1 - done, "held": lambda done: 1.0}.items():
        with tempfile.TemporaryDirectory() as scratch:
            shutil.copytree(run.path, scratch, dirs_exist_ok=True)
            about = run.seed, run.name, run.config["profile"], {}
            trainer = _Trainer(run.experiment, corpus, scratch, True, *about)
            trainer.restore(trainer.saved)
            nats.setdefault("before", score(trainer.model, corpus.valid)[0])
            trainer.train_on(math.ceil(share * trainer.step), factor)
            nats[arm] = score(trainer.model, corpus.valid)[0]
            trainer.folder.lock.release()
    return nats


class _Trainer:
    """One training run: everything `train` needs at hand."""

    def __init__(
        self, experiment, corpus, run_dir, resume, seed, name, profile, choices,
        auto_remedy=False, instead_of=None,
    ):  # fmt: skip
        self.experiment, self.corpus, self.seed = experiment, corpus, seed
        self.training, length = experiment.training, experiment.model.max_seq_len
        if corpus.tokenizer.size > experiment.model.vocab_size:
            raise MusotaError(
                f"The corpus uses {corpus.tokenizer.size} tokens but the model's vocab_size is "
                f"{experiment.model.vocab_size}: load the corpus with that vocab_size."
            )
        for split in ("valid", "test"):
            if len(corpus.split(split)) < 2:
                raise MusotaError(f"The {split} text has under two tokens: use more text.")
        self.windows = len(window_starts(len(corpus.train), length, seed, 0))
        self.steps_per_epoch = math.ceil(self.windows / self.training.sequences_per_step)
        self.total_steps = self.training.epochs * self.steps_per_epoch
        identity = {
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
        self.instead_of = instead_of
        if instead_of:
            identity["instead_of"] = instead_of.to_dict()
        if auto_remedy and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise MusotaError("auto_remedy works in one process only: leave it out here.")
        self.accelerator = Accelerator(mixed_precision=precision_for_device())
        self.folder = RunFolder(run_dir, identity, self.accelerator.is_main_process)
        self.finished = resume and self.folder.finished
        if self.finished:  # perhaps kept as evidence, and read-only: nothing is written
            return
        self.folder.prepare(fresh=not resume)
        self.accelerator.wait_for_everyone()
        self.saved = self.folder.load_checkpoint()
        self.device = self.accelerator.device
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            keep_freed_memory()
        given = {name: value for name, value in choices.items() if value is not None}
        saved = self.saved[1]["choices"] if self.saved else {}
        self.choices = self._default_choices() | saved | given
        together = {
            "precision": precision_for_device(),
            "processes": self.accelerator.num_processes,
        }
        self.folder.write_config({**self.choices, **together})
        torch.manual_seed(seed)
        model = build_model(experiment.model)
        self.ledger = model.parameter_ledger()
        if self.choices["compile"]:
            model.compile_body()
        # Fused AdamW skips bad fp16 steps inside its kernel, where accelerate cannot see it; the
        # schedule has to know of them.
        fused = self.accelerator.scaler is None
        groups = model.optimizer_groups(self.training.weight_decay)
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=fused)
        self.wrapped, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.model: CausalLM = self.accelerator.unwrap_model(self.wrapped)
        # On the device once; int32 there, int64 only for the windows in use.
        self.tokens = corpus.train.to(self.device)
        self.span = torch.arange(length + 1, device=self.device)
        self.starts = None  # of this epoch's windows
        self.step = self.applied = 0  # steps begun, and those fp16 scaling did not skip
        self.epoch_nats = torch.zeros((), device=self.device)
        self.seconds_before, self.started = 0.0, time.perf_counter()
        self.best_loss, self.summary = math.inf, {}
        self.update_ratio: dict[str, float] = {}  # of this epoch, by group
        self.best_unsaved: dict[str, Tensor] | None = None
        self.auto_remedy, self.remedies = auto_remedy, {"rate_factor": 1.0, "step": 0}
        self.watch: Callable[[Run], None] | None = None
        self.copy: Callable[[], None] | None = None
        self.saved_at = time.monotonic()
        self.schedule: Callable[[int], float] = lambda step: (
            self.remedies["rate_factor"] * learning_rate_at(step, self.training, self.total_steps)
        )

    def _record(self, record: dict) -> None:
        self.folder.append(record)
        if self.watch and self.folder.writes:
            with contextlib.suppress(MusotaError):  # a folder that vanished: `append` tells it
                self.watch(Run(self.folder.path))

    def _event(self, event: str) -> None:
        """Record and tell something out of the ordinary."""
        self._record({"kind": "event", "step": self.step, "event": event})
        self._say(f"\nStep {self.step}: {event}.")

    def _say(self, text: str) -> None:
        if self.folder.writes:
            print(text, flush=True)

    def _default_choices(self) -> dict:
        """A GPU takes a whole step at once, a CPU about 1,500 tokens. Compiling takes a GPU about a
        minute, which only a long run wins back, and brings a CPU nothing."""
        sequences, on_cpu = self.training.sequences_per_step, self.device.type == "cpu"
        few = max(1, min(sequences, 1536 // self.experiment.model.max_seq_len))
        return {
            "micro_batch": few if on_cpu else sequences,
            "compile": not on_cpu and self.total_steps >= COMPILE_STEPS,
        }

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def tokens_seen(self) -> int:
        epochs, steps = divmod(self.step, self.steps_per_epoch)
        sequences = epochs * self.windows + steps * self.training.sequences_per_step
        return sequences * self.experiment.model.max_seq_len

    def run(
        self, stop_at: float, watch: Callable[[Run], None] | None, copy: Callable[[], None] | None
    ) -> Run:
        if self.finished:
            self._say(f"{self.folder.path}: finished before, loaded as it is.")
            return Run(self.folder.path)
        if self.saved:
            self.restore(self.saved)
            self._say(f"{self.folder.path}: going on after step {self.step} of {self.total_steps}.")
        elif self.auto_remedy:
            self._checkpoint()  # to have something to go back to
        if self.instead_of and not self.step:
            longer = self.instead_of.model.max_seq_len
            short = f"{SHORTER} tokens a sequence, not {longer}, which is another experiment"
            self._event(f"out of memory: {short}")
        self.saved = None
        self.watch, self.copy = watch, copy
        stop = math.ceil(stop_at * self.total_steps)
        length = self.experiment.model.max_seq_len
        whole = self.training.epochs * self.windows * length
        if watch and self.folder.writes:
            watch(Run(self.folder.path))  # so that what it shows stands above the bar
        self.progress = progress_bar(whole, self.tokens_seen, self.folder.writes)
        try:
            with Interruption(self.accelerator.num_processes) as interruption, self.progress:
                while self.step < stop and not interruption.asked:
                    self._careful_step()
                if self.step == self.total_steps:
                    self._finish()
                else:
                    self._refuse_bad_loss(float(self.epoch_nats))
                    self._checkpoint()
        finally:
            self.folder.lock.release()
        if self.folder.trouble:
            raise MusotaError(
                f"The end of the run could not be saved in {self.folder.path}: "
                f"{self.folder.trouble}. Make room there and repeat the call: it goes on from the "
                "last checkpoint that could be written."
            )
        if self.step < stop:
            self._say(
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
            self._one_step()
            ends = self.step % self.steps_per_epoch == 0
            if ends or time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
                self._refuse_bad_loss(float(self.epoch_nats))
        except (torch.OutOfMemoryError, torch._dynamo.exc.TorchDynamoException, Diverged) as error:
            trouble = error.with_traceback(None)  # which would hold on to the step's memory
        if isinstance(trouble, torch.OutOfMemoryError):
            self._take_less_memory()
        elif isinstance(trouble, torch._dynamo.exc.TorchDynamoException):
            reason = str(trouble).strip().splitlines()[0]
            self._event(f"torch.compile failed, training goes on without it ({reason})")
            self.choices["compile"], self.model.compiled_body = False, None
        elif trouble:
            self._go_back(trouble)
        elif ends:
            self._end_epoch()
        elif time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
            self._checkpoint()
        if trouble:
            self.optimizer.zero_grad()

    def _take_less_memory(self) -> None:
        """Halve the micro-batch; at 1 the plan's remedy, a shorter sequence."""
        held = self.choices["micro_batch"]
        if self.accelerator.num_processes > 1:
            raise MusotaError("Out of memory: start again with a smaller micro_batch.")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if held > 1:
            self.choices["micro_batch"] = -(-held // 2)
            self._event(f"out of memory: micro-batch {held} → {self.choices['micro_batch']}")
            return
        length = self.experiment.model.max_seq_len
        if self.auto_remedy and length > SHORTER:
            self._say(f"Out of memory with one sequence: starting over with {SHORTER} tokens.")
            raise _TooLong
        raise MusotaError(
            f"Out of memory with a single sequence of {length} tokens. The plan's remedy is "
            f"max_seq_len={SHORTER}, which is another experiment: ask for it, or for auto_remedy."
        )

    def _go_back(self, error: Diverged) -> None:
        """To the last checkpoint at half the rate, if remedies may apply themselves."""
        if not self.auto_remedy or self.remedies["rate_factor"] <= LEAST_RATE_FACTOR:
            raise error
        bad, saved = self.step, self.folder.load_checkpoint()
        if saved is None:  # not even the first could be written
            raise error
        factor = self.remedies["rate_factor"] / 2  # of now: twice back to one checkpoint, a quarter
        self.restore(saved)
        self.remedies = {"rate_factor": factor, "step": self.step}
        self.starts = None
        self._event(f"bad loss at step {bad}: back to step {self.step}, learning rate × {factor}")
        self._checkpoint()

    def _calm_down(self) -> None:
        """Half the rate where the training loss oscillates, if remedies may apply themselves."""
        factor = self.remedies["rate_factor"]
        if not self.auto_remedy or factor <= LEAST_RATE_FACTOR:
            return
        steps = steps_table(read_metrics(self.folder.metrics, self.folder.path))
        since = max(self.training.warmup_steps, self.remedies["step"])
        found = oscillation(steps, since)
        if found.verdict in ("oscillating", "diverging"):
            self.remedies = {"rate_factor": factor / 2, "step": self.step}
            self._event(f"{found.conclusion}: learning rate × {factor / 2}")

    def train_on(self, steps: int, factor: Callable[[float], float]) -> None:
        """So many steps more, at the present rate times factor(share of them done)."""
        start, rate = self.applied, self.schedule(self.applied)
        self.schedule = lambda step: rate * factor((step - start) / steps)
        length = self.experiment.model.max_seq_len
        self.progress = progress_bar(steps * self.training.sequences_per_step * length)
        for _ in range(steps):
            self._one_step()

    def _one_step(self) -> None:
        epoch, place = divmod(self.step, self.steps_per_epoch)
        if place == 0 or self.starts is None:  # a new epoch, or resumed inside one
            length = self.experiment.model.max_seq_len
            self.starts = window_starts(len(self.tokens), length, self.seed, epoch).to(self.device)
        if place == 0:
            self.epoch_nats.zero_()
        rate = self.schedule(self.applied + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(self.seed * 1_000_003 + 1 + self.step)
        self.wrapped.train()
        per_step = self.training.sequences_per_step
        batch = self.starts[place * per_step : (place + 1) * per_step]
        step_loss = torch.zeros((), device=self.device)
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
            step_loss += loss.detach()
        step_loss = self.accelerator.reduce(step_loss)
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.training.grad_clip)
        middle = place == self.steps_per_epoch // 2
        before = [p.detach().clone() for p in self.model.parameters()] if middle else None
        self.optimizer.step()
        if middle:
            self.update_ratio = self._update_ratios(before)
        self.optimizer.zero_grad()
        self.epoch_nats += step_loss * len(batch)
        self.step += 1
        self.applied += not self.optimizer.step_was_skipped
        self.progress.update(len(batch) * self.experiment.model.max_seq_len)
        interval = max(1, self.total_steps // LOG_LINES)
        if self.step % interval == 0 or self.step == 1 or self.step == self.total_steps:
            self._log_step(float(step_loss), float(norm), rate)  # the one place that waits

    def _update_ratios(self, before: list[Tensor]) -> dict[str, float]:
        """‖ΔW‖ / ‖W‖ of the step just made, by group of the ledger."""
        squares: dict[str, Tensor] = {}
        for (name, now), old in zip(self.model.named_parameters(), before, strict=True):
            pair = torch.stack([(now.detach() - old).square().sum(), old.square().sum()]).double()
            group = self.model.ledger_group(name)
            squares[group] = squares.get(group, 0) + pair
        return {group: float((new / old).sqrt()) for group, (new, old) in squares.items()}

    def _health(self) -> dict:
        """Statistics of the epoch that has ended; together about 1 % of its time."""
        length = min(self.experiment.model.max_seq_len, len(self.corpus.valid))
        windows = min(HEALTH_WINDOWS, len(self.corpus.valid) // length)
        ids = self.corpus.valid[: windows * length].view(windows, length).long()
        some = max(2, len(self.tokens) // CLEAN_SHARE)
        return {
            "update_ratio": self.update_ratio,
            "clean_train_loss": float(score(self.model, self.corpus.train[:some])[0].mean()),
            **self.model.health(ids.to(self.device)),
        }

    def _refuse_bad_loss(self, loss: float, limit: float = math.inf) -> None:
        """Stop before a loss that is no number, or far above a guess, reaches a checkpoint."""
        if math.isfinite(loss) and loss <= limit:
            return
        place = (self.step - 1) % self.steps_per_epoch * self.training.sequences_per_step
        batch = self.starts[place : place + self.training.sequences_per_step]
        self._record({"kind": "event", "step": self.step, "event": "diverged"})
        raise Diverged(
            f"The training loss is {loss:.4g} at step {self.step} (batch "
            f"{sha256(batch.cpu().numpy().tobytes())[:12]}): start over with a lower learning_rate "
            f"than {self.training.learning_rate:g}, or with auto_remedy=True. The last good "
            f"checkpoint, if there was one yet, is kept in {self.folder.checkpoints}."
        )

    def _log_step(self, loss: float, norm: float, rate: float) -> None:
        self._refuse_bad_loss(loss, math.log(self.experiment.model.vocab_size) + EXPLODED_NATS)
        record = {
            "step": self.step,
            "loss": loss,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": self.tokens_seen,
            "seconds": round(self.seconds, 3),
        }
        self._record({"kind": "step", **record})
        self._tell_progress(loss)

    def _tell_progress(self, loss: float) -> None:
        epoch = min(self.training.epochs, self.step // self.steps_per_epoch + 1)
        best = f", best valid PPL {exp_nats(self.best_loss):,.0f}" if self.summary else ""
        self.progress.set_postfix_str(
            f"epoch {epoch}/{self.training.epochs}, training PPL {exp_nats(loss):,.0f}{best}",
            refresh=False,
        )

    def _end_epoch(self) -> None:
        if not self.folder.writes:
            return
        epoch = self.step // self.steps_per_epoch
        with self.accelerator.autocast():
            nats, hits = self._score_valid()
            samples, health = self._samples(), self._health()
        words, bytes = self.corpus.words["valid"], self.corpus.bytes["valid"]
        measured = metrics_of(nats, hits, words, bytes)
        record = {
            "epoch": epoch,
            "step": self.step,
            "tokens": self.tokens_seen,
            "seconds": round(self.seconds, 3),
            "train_loss": float(self.epoch_nats) / self.windows,
            "valid_loss": measured.pop("loss"),
            **measured,
        }
        block_nats, block_tokens = blocks_of(nats)
        unshown = {"samples": samples, "valid_block_nats": block_nats, "health": health}
        self._record({"kind": "epoch", **record, **unshown})
        if record["valid_loss"] < self.best_loss:
            self.best_loss = record["valid_loss"]
            weights = self.model.state_dict()
            self.best_unsaved = {name: value.detach().clone() for name, value in weights.items()}
            self.summary |= {
                "best_epoch": epoch,
                "valid_loss": record["valid_loss"],
                **measured,
                "valid_block_tokens": block_tokens,
                "valid_block_nats": block_nats,
            }
        self.summary |= {"finished": False, "epochs_done": epoch}
        self._tell_progress(record["train_loss"])
        self._calm_down()
        self._checkpoint()
        self._write_summary()

    def _score_valid(self) -> tuple[Tensor, Tensor]:
        """`score` of valid; where its batches do not fit the memory, one window at a time."""
        with contextlib.suppress(torch.OutOfMemoryError):
            return score(self.model, self.corpus.valid)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._event("out of memory in validation: one window at a time")
        return score(self.model, self.corpus.valid, batch_size=1)

    def _samples(self) -> list[dict]:
        """Continuations of the first lines of valid that are long enough for a prompt."""
        ends = (self.corpus.valid == self.corpus.tokenizer.line_end).nonzero().flatten().tolist()
        lines = [(start + 1, end) for start, end in zip([-1, *ends], ends, strict=False)]
        long_enough = [start for start, end in lines if end - start >= PROMPT_TOKENS]
        prompts = [
            self.corpus.valid[start : start + PROMPT_TOKENS].long()
            for start in long_enough[:SAMPLE_PROMPTS]
        ]
        if not prompts:
            return []
        prompts = torch.stack(prompts)
        texts = self.model.generate(prompts, SAMPLE_TOKENS, **SAMPLE_SETTINGS)
        decode = self.corpus.tokenizer.decode
        return [
            {"prompt": decode(prompt), "text": decode(text[PROMPT_TOKENS:])}
            for prompt, text in zip(prompts.tolist(), texts.tolist(), strict=True)
        ]

    def _checkpoint(self) -> None:
        """Save what to resume from, and the best weights if that is still to be done."""
        folder, scaler, best = self.folder, self.accelerator.scaler, self.best_unsaved
        if not folder.writes:
            return
        folder.trouble, self.saved_at = "", time.monotonic()
        if best is not None and folder.attempt(lambda: self._save_best(best)):
            self.best_unsaved = None
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors["epoch_nats"] = self.epoch_nats
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in state.items()}
        state = {
            "scaler": scaler.state_dict() if scaler else None,
            "step": self.step,
            "applied": self.applied,
            "update_ratio": self.update_ratio,
            "seconds": self.seconds,
            "best_loss": self.best_loss,
            "choices": self.choices,
            "remedies": self.remedies,
            "summary": self.summary,
        }
        folder.save_checkpoint(tensors, state)
        if self.copy:
            folder.attempt(self.copy)

    def _save_best(self, weights: dict[str, Tensor]) -> None:
        best = self.folder.checkpoints / "best"
        best.mkdir(exist_ok=True)  # fails, as it should, where the run's folder has vanished
        save_model(best, self.experiment.model, weights, self.corpus.tokenizer)
        files = sorted(path for path in best.iterdir() if not path.name.startswith("."))
        self.summary["best_files"] = {path.name: sha256(path.read_bytes()) for path in files}

    def restore(self, saved: tuple[dict[str, Tensor], dict]) -> None:
        """Go on from what `_checkpoint` saved."""
        tensors, state = saved
        self.model.load_state_dict(
            {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        )
        moments: dict[int, dict[str, Tensor]] = defaultdict(dict)
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, what = name.split(".")
                moments[int(index)][what] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": dict(moments), "param_groups": groups})
        if state["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.applied = state["step"], state["applied"]
        self.epoch_nats.copy_(tensors["epoch_nats"])
        self.update_ratio, self.remedies = state["update_ratio"], state["remedies"]
        self.seconds_before, self.started = state["seconds"], time.perf_counter()
        self.best_loss = math.inf if state["best_loss"] is None else state["best_loss"]
        self.summary = state["summary"]
        if self.summary:  # of that moment again, should a later one stand there
            self._write_summary()
        else:
            self.folder.forget_summary()

    def _finish(self) -> None:
        """The test split, once, with the best epoch's weights; then the summary is complete."""
        if not self.folder.writes:
            return
        if self.best_unsaved is not None:
            self._checkpoint()
        if self.best_unsaved is not None:  # the disk is still full: it is not finished
            return
        if not (self.folder.path / "config.json").exists():
            self.folder.trouble = self.folder.trouble or "the folder has vanished"
            return
        final_weights = weights_sha256(self.model)
        seconds = self.seconds
        best = Run(self.folder.path).load_model().to(self.device)
        words, bytes = self.corpus.words["test"], self.corpus.bytes["test"]
        with self.accelerator.autocast():
            measured = evaluate(best, self.corpus.test, words, bytes)
        self.summary |= {f"test_{key}": value for key, value in measured.items()}
        self.summary |= {
            "finished": True,
            "weights_sha256": final_weights,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(self.tokens_seen / seconds, 1),
        }
        self._write_summary()

    def _write_summary(self) -> None:
        about = {
            "parameters": sum(self.ledger.values()),
            "parameter_ledger": self.ledger,
            "flops_per_token": self.experiment.model.flops_per_token,
            "peak_memory_bytes": peak_memory(self.device),
            **about_machine(),
        }
        if self.instead_of:
            about["instead_of"] = self.instead_of.to_dict()
        about["metrics_sha256"] = sha256(self.folder.metrics)
        about["metrics_bytes"] = len(self.folder.metrics)
        path, summary = self.folder.path / "summary.json", {**self.summary, **about}
        if self.folder.attempt(self.folder.write_metrics):  # which the summary vouches for
            self.folder.attempt(lambda: write_sealed(path, summary))
        if self.copy and self.summary["finished"]:
            self.folder.attempt(self.copy)
