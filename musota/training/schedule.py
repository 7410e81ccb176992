"""The learning rate of each step."""

from __future__ import annotations

import math

from musota.plan.config import TrainConfig


def learning_rate_at(step: int, training: TrainConfig, total_steps: int) -> float:
    """The rate of optimizer step `step` of 1 … total_steps; 0 before the first and at the last.

    Linear warm-up reaches the full rate at `warmup_steps`, a cosine then falls to 0 at the end.
    """
    if step < training.warmup_steps:
        return training.learning_rate * step / training.warmup_steps
    after = max(1, total_steps - training.warmup_steps)
    progress = min(1.0, (step - training.warmup_steps) / after)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
