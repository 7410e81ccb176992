"""The state of a training run, and one optimizer step on it."""

import math
import re
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from musota.config import Experiment, TrainConfig
from musota.data.corpus import window_starts
from musota.errors import MusotaError
from musota.models.base import CausalLM
from musota.training.optim import OPTIMIZERS, learning_rate_at, update_ratios

OUT_OF_MEMORY = "out of memory|not enough memory|can't allocate memory|ALLOC_FAILED"  # in messages
# Fields kept as JSON, besides tensors.
RESTORED = ("step", "applied", "first_loss", "update_ratio", "summary")
CHOSEN = ("micro_batch", "compile")  # kept too, but a resumed run may choose anew


@dataclass
class TrainState:
    """Everything that changes while a run trains. A checkpoint is its `state_dict`."""

    accelerator: Accelerator  # holds the scaler of fp16
    model: CausalLM
    wrapped: nn.Module  # `model`, within DistributedDataParallel where there are several processes
    optimizer: torch.optim.Optimizer
    micro_batch: int  # sequences computed at a time
    compile: bool  # torch.compile for the layers
    epoch_nats: Tensor  # training loss of this epoch, summed over its windows
    step: int = 0  # steps done
    applied: int = 0  # of these, steps that fp16 loss scaling did not skip
    first_loss: float = 0.0  # training loss of the first step, in nats/token
    update_ratio: dict[str, float] = field(default_factory=dict)  # of this epoch, by group
    summary: dict = field(default_factory=dict)  # of the best epoch so far
    unsaved_best: dict[str, Tensor] | None = None  # weights of the best epoch, not yet in best/
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def new(cls, model: CausalLM, training: TrainConfig, accelerator, **chosen) -> "TrainState":
        """The state before the first step; `chosen` are `micro_batch` and `compile`."""
        groups = model.optimizer_groups(training.weight_decay)
        optimizer = OPTIMIZERS[training.optimizer](groups, accelerator.scaler is not None)
        if chosen["compile"]:
            model.compile_layers()
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        model, nats = accelerator.unwrap_model(wrapped), torch.zeros((), device=accelerator.device)
        return cls(accelerator, model, wrapped, optimizer, epoch_nats=nats, **chosen)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def seconds(self) -> float:
        """Training time so far, that of earlier processes included."""
        return time.perf_counter() - self.started

    def state_dict(self) -> tuple[dict[str, Tensor], dict]:
        """Tensors by name, and everything else for JSON."""
        parts = {"model": self.model.state_dict(), "best": self.unsaved_best or {}}
        for index, moments in self.optimizer.state_dict()["state"].items():
            parts[f"optimizer.{index}"] = {name: t.contiguous() for name, t in moments.items()}
        tensors = {"epoch_nats": self.epoch_nats}
        for part, named in parts.items():
            tensors |= {f"{part}.{name}": value for name, value in named.items()}
        scaler = self.accelerator.scaler
        about = {"seconds": self.seconds, "device": self.device.type}
        about["scaler"] = scaler.state_dict() if scaler else {}
        return tensors, {name: getattr(self, name) for name in RESTORED + CHOSEN} | about

    def load_state_dict(self, tensors: dict[str, Tensor], saved: dict) -> None:
        """Restores what `state_dict` gave, but for `micro_batch` and `compile`."""

        def part(prefix: str) -> dict[str, Tensor]:
            found = (name for name in tensors if name.startswith(prefix))
            return {name.removeprefix(prefix): tensors[name] for name in found}

        self.epoch_nats.copy_(tensors["epoch_nats"])
        self.model.load_state_dict(part("model."))
        groups = self.optimizer.state_dict()["param_groups"]
        moments = {i: part(f"optimizer.{i}.") for group in groups for i in group["params"]}
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if saved["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        for name in RESTORED:
            setattr(self, name, saved[name])
        self.unsaved_best = part("best.") or None
        if self.unsaved_best:  # best/ may hold half of them
            self.summary.pop("best_files", None)
        self.started = time.perf_counter() - saved["seconds"]


class Batches:
    """The training windows of each step, as a function of (seed, step)."""

    def __init__(self, tokens: Tensor, experiment: Experiment, seed: int, device: torch.device):
        self.training, self.length = experiment.training, experiment.model.max_seq_len
        self.seed, self.sequences = seed, self.training.sequences_per_step
        self.n_windows = len(window_starts(len(tokens), self.length, seed, 0))
        self.steps_per_epoch = math.ceil(self.n_windows / self.sequences)
        self.total_steps = self.training.epochs * self.steps_per_epoch
        # On the device once, as int32; int64 only for the windows in use.
        self.tokens = tokens.to(device)
        self.span = torch.arange(self.length, device=device)
        self.epoch, self.starts = -1, tokens[:0]  # windows of one epoch

    def starts_at(self, step: int) -> Tensor:
        """Where the windows of a step (counted from 0) begin, (B,)."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            starts = window_starts(len(self.tokens), self.length, self.seed, epoch)
            self.epoch, self.starts = epoch, starts.to(self.tokens.device)
        return self.starts[place * self.sequences : (place + 1) * self.sequences]

    def windows(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (B, T) each."""
        places = starts[:, None] + self.span  # (B, T)
        return self.tokens[places].long(), self.tokens[places + 1].long()

    def tokens_seen(self, step: int) -> int:
        """Training tokens in the first `step` steps."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return (epochs * self.n_windows + steps * self.sequences) * self.length


def train_step(state: TrainState, batches: Batches) -> tuple[Tensor, Tensor] | None:
    """One step. Returns its mean loss and the norm of its gradient, still on the device; None where
    memory ran out and no step was done. Raises MusotaError if torch.compile fails."""
    training, place = batches.training, state.step % batches.steps_per_epoch
    if place == 0:
        state.epoch_nats.zero_()
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate_at(state.applied + 1, training, batches.total_steps)
    own = 10_000_019 * state.accelerator.process_index  # every process draws its own dropout
    torch.manual_seed(batches.seed * 1_000_003 + 1 + state.step + own)
    starts = batches.starts_at(state.step)
    middle = place == batches.steps_per_epoch // 2
    try:
        loss = _backward(state, batches, starts)
        norm = state.accelerator.clip_grad_norm_(state.model.parameters(), training.grad_clip)
        before = [p.detach().clone() for p in state.model.parameters()] if middle else None
        state.optimizer.step()
    except (  # looked up when something was raised: torch._dynamo takes seconds to import
        torch._dynamo.exc.TorchDynamoException,
        torch._dynamo.exc.FailOnRecompileLimitHit,
    ) as error:
        failed = f"torch.compile failed ({str(error).strip().splitlines()[0]})"
        raise MusotaError(f"{failed}: train with compile=False (--no-compile).") from error
    except RuntimeError as error:
        if not re.search(OUT_OF_MEMORY, str(error)):
            raise
        return None  # the error, which holds on to the memory, ends here
    if middle:
        state.update_ratio = update_ratios(state.model, before)
    state.optimizer.zero_grad()
    state.epoch_nats += loss * len(starts)
    state.step += 1
    state.applied += not state.optimizer.step_was_skipped
    return loss, norm


def _backward(state: TrainState, batches: Batches, starts: Tensor) -> Tensor:
    """Gradients of the mean loss over a batch, and that loss. Each process computes a share."""
    accelerator, processes = state.accelerator, state.accelerator.num_processes
    state.wrapped.train()
    total = torch.zeros((), device=state.device)
    mine = starts[accelerator.process_index :: processes]
    # A process without a sequence takes part with weight 0: gradients are averaged in its backward.
    micro_batches = mine.split(state.micro_batch) if len(mine) else [starts[:1]]
    for number, micro in enumerate(micro_batches, start=1):
        last = number == len(micro_batches)
        with nullcontext() if last else accelerator.no_sync(state.wrapped):
            with accelerator.autocast():
                loss = state.wrapped(*batches.windows(micro))[1]
            loss = loss * (len(micro) * bool(len(mine)) / len(starts))
            accelerator.backward(loss * processes)  # gradients are averaged over processes
        total += loss.detach()
    for parameter in state.model.parameters():  # the optimizers take no sparse gradients
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()
    return accelerator.reduce(total)


def halve_micro_batch(state: TrainState) -> str:
    """After a step without enough memory; gives the event to record. Raises MusotaError for a
    single sequence, and for one of several processes."""
    before, scaler = state.micro_batch, state.accelerator.scaler
    state.optimizer.zero_grad()
    if state.accelerator.num_processes > 1:
        raise MusotaError("Out of memory: start more processes or lower RunOptions.micro_batch.")
    if before == 1:
        length = state.model.config.max_seq_len
        shorter = "train a shorter one (the plan's remedy is max_seq_len=160)"
        raise MusotaError(f"Out of memory with a single sequence of {length} tokens: {shorter}.")
    if scaler:  # memory may have run out between unscaling and the step
        scaler._per_optimizer_states.clear()
    torch.cuda.empty_cache()  # does nothing on a CPU
    state.micro_batch = -(-before // 2)
    return f"out of memory: micro-batch {before} → {state.micro_batch}"
