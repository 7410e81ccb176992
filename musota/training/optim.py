"""Optimizers and learning-rate schedules by name, and how far a step moves the weights."""

import math

import torch
from torch import Tensor

from musota.config import TrainConfig
from musota.models.base import CausalLM


def _adamw(groups: list[dict], loss_scaling: bool) -> torch.optim.Optimizer:
    """AdamW, fused where possible. The fused kernel knows no complex parameters, and skips fp16
    steps that overflow where the schedule cannot see it."""
    has_complex = any(p.is_complex() for group in groups for p in group["params"])
    # fused=False would switch the `foreach` implementation off as well.
    fused = None if loss_scaling or has_complex else True
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=fused)


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


# (parameter groups with weight decay, whether fp16 scales the loss) -> optimizer. The learning rate
# is set before every step.
OPTIMIZERS = {"adamw": _adamw}
# Share of the steps after warm-up -> share of the full learning rate.
SCHEDULES = {"cosine": _cosine}


def learning_rate_at(step: int, training: TrainConfig, total_steps: int) -> float:
    """The learning rate of step 1 … total_steps: linear up to `warmup_steps`, then the schedule."""
    if step < training.warmup_steps:
        return training.learning_rate * step / training.warmup_steps
    after = max(1, total_steps - training.warmup_steps)
    progress = min(1.0, (step - training.warmup_steps) / after)
    return training.learning_rate * SCHEDULES[training.schedule](progress)


def update_ratios(model: CausalLM, before: list[Tensor]) -> dict[str, float]:
    """‖ΔW‖ / ‖W‖ since the parameters were `before`, by group of the parameter ledger."""
    squares: dict[str, Tensor] = {}
    for (name, now), old in zip(model.named_parameters(), before, strict=True):
        if not now.requires_grad:
            continue
        norms = [t.abs().square().sum() for t in (now.detach() - old, old)]
        group = model.ledger_group(name)
        squares[group] = squares.get(group, 0) + torch.stack(norms).cpu().double()
    return {group: float((new / old).sqrt()) for group, (new, old) in squares.items()}
