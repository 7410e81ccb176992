"""Optimizers and learning-rate schedules by name, and optimizer state as tensors."""

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from musota.config import TrainConfig
from musota.models.base import CausalLM


def _adamw(groups: list[dict], loss_scaling: bool) -> torch.optim.Optimizer:
    """Fused where possible. Fused AdamW knows no complex parameters, and skips overflowing fp16
    steps inside its kernel, where the schedule cannot see it."""
    has_complex = any(p.is_complex() for group in groups for p in group["params"])
    # fused=False would switch the `foreach` implementation off as well.
    fused = None if loss_scaling or has_complex else True
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=fused)


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


# Parameter groups with their weight decay -> optimizer. The learning rate is set before every step.
OPTIMIZERS = {"adamw": _adamw}
# Share of the steps after warm-up -> share of the full learning rate.
SCHEDULES = {"cosine": _cosine}


def learning_rate_at(step: int, training: TrainConfig, total_steps: int) -> float:
    """The learning rate of optimizer step `step` of 1 … total_steps. Linear warm-up reaches the
    full rate at `warmup_steps`; then the schedule takes over. A cosine ends at 0."""
    if step < training.warmup_steps:
        return training.learning_rate * step / training.warmup_steps
    after = max(1, total_steps - training.warmup_steps)
    progress = min(1.0, (step - training.warmup_steps) / after)
    return training.learning_rate * SCHEDULES[training.schedule](progress)


def update_ratios(model: CausalLM, before: list[Tensor]) -> dict[str, float]:
    """‖ΔW‖ / ‖W‖ since the parameters were `before`, by group of the parameter ledger."""
    squares: dict[str, Tensor] = {}
    for (name, now), old in zip(model.named_parameters(), before, strict=True):
        norms = [t.abs().square().sum() for t in (now.detach() - old, old)]
        group = model.ledger_group(name)
        squares[group] = squares.get(group, 0) + torch.stack(norms).cpu().double()
    return {group: float((new / old).sqrt()) for group, (new, old) in squares.items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer as named tensors for a checkpoint."""
    states = optimizer.state_dict()["state"].items()
    return {
        f"optimizer.{i}.{name}": value.contiguous()
        for i, state in states
        for name, value in state.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; tensors of other names are ignored."""
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, what = name.split(".")
            state[int(index)][what] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": dict(state), "param_groups": groups})
