"""One optimizer step: the windows of its batch, their gradients, the update."""

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from musota.config import Experiment
from musota.data.corpus import window_starts
from musota.errors import MusotaError
from musota.training.device import is_out_of_memory
from musota.training.optim import learning_rate_at, update_ratios
from musota.training.state import TrainState

COMPILE_ERRORS = (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit)


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
        """Inputs and targets, (B, T) each. They share no memory, as a module may write into its
        input."""
        places = starts[:, None] + self.span  # (B, T)
        return self.tokens[places].long(), self.tokens[places + 1].long()

    def tokens_seen(self, step: int) -> int:
        """Training tokens in the first `step` steps."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        return (epochs * self.n_windows + steps * self.sequences) * self.length


def train_step(state: TrainState, batches: Batches) -> tuple[Tensor, Tensor]:
    """One step; gives its mean loss and the norm of its gradient, still on the device."""
    training, place = batches.training, state.step % batches.steps_per_epoch
    if place == 0:
        state.epoch_nats.zero_()
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate_at(state.applied + 1, training, batches.total_steps)
    torch.manual_seed(batches.seed * 1_000_003 + 1 + state.step)
    starts = batches.starts_at(state.step)
    loss = _backward(state, batches, starts)
    norm = state.accelerator.clip_grad_norm_(state.model.parameters(), training.grad_clip)
    middle = place == batches.steps_per_epoch // 2
    before = [p.detach().clone() for p in state.model.parameters()] if middle else None
    state.optimizer.step()
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
    return accelerator.reduce(total)


def can_recover(error: Exception) -> bool:
    return isinstance(error, COMPILE_ERRORS) or is_out_of_memory(error)


def recover(state: TrainState, error: Exception) -> str:
    """After a failed step: halve the micro-batch, or stop compiling; gives the event to record.
    Raises MusotaError if memory ran out with one sequence, or in one of several processes."""
    state.optimizer.zero_grad()
    if isinstance(error, COMPILE_ERRORS):
        state.compile = False
        state.model.compile_layers(False)
        reason = str(error).strip().splitlines()[0]
        return f"torch.compile failed, training goes on without it ({reason})"
    before, scaler = state.micro_batch, state.accelerator.scaler
    if state.accelerator.num_processes > 1:
        raise MusotaError("Out of memory: start again with a smaller micro_batch.")
    if before == 1:
        other = "the plan's remedy is max_seq_len=160, which is another experiment"
        raise MusotaError(f"Out of memory with a single sequence: {other}.")
    if scaler:  # memory may have run out between unscaling and the step
        scaler._per_optimizer_states.clear()
    if state.device.type == "cuda":
        torch.cuda.empty_cache()
    state.micro_batch = -(-before // 2)
    return f"out of memory: micro-batch {before} → {state.micro_batch}"
