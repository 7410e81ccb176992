"""The state of a training run."""

import time
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from musota.config import TrainConfig
from musota.models.base import CausalLM
from musota.training.optim import OPTIMIZERS, load_optimizer_tensors, optimizer_tensors

RESTORED = ("step", "applied", "update_ratio", "summary")  # fields kept as JSON, besides tensors
CHOSEN = ("micro_batch", "compile")  # likewise, but a resumed run may choose them anew


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
    update_ratio: dict[str, float] = field(default_factory=dict)  # of this epoch, by group
    summary: dict = field(default_factory=dict)  # of the best epoch so far
    unsaved_best: dict[str, Tensor] | None = None  # weights of the best epoch, not yet in best/
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def new(
        cls, model: CausalLM, training: TrainConfig, accelerator: Accelerator, **chosen
    ) -> "TrainState":
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
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"best.{name}": value for name, value in (self.unsaved_best or {}).items()}
        tensors |= {"epoch_nats": self.epoch_nats, **optimizer_tensors(self.optimizer)}
        scaler = self.accelerator.scaler
        about = {"seconds": self.seconds, "device": self.device.type}
        about["scaler"] = scaler.state_dict() if scaler else {}
        return tensors, {name: getattr(self, name) for name in RESTORED + CHOSEN} | about

    def load_state_dict(self, tensors: dict[str, Tensor], saved: dict) -> None:
        """Restores what `state_dict` gave."""
        weights, best = (
            {name.removeprefix(part): t for name, t in tensors.items() if name.startswith(part)}
            for part in ("model.", "best.")
        )
        self.model.load_state_dict(weights)
        load_optimizer_tensors(self.optimizer, tensors)
        self.epoch_nats.copy_(tensors["epoch_nats"])
        if saved["scaler"] and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        for name in RESTORED:
            setattr(self, name, saved[name])
        self.unsaved_best = best or None
        if best:  # best/ may hold half of them
            self.summary.pop("best_files", None)
        self.started = time.perf_counter() - saved["seconds"]
