"""Learning-rate schedules by name, counted in optimizer steps."""

import math

from musota.plan.config import TrainConfig


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


# Adding a schedule is a row here: the share of the full rate after so large a share of the steps
# that follow warm-up.
SCHEDULES = {"cosine": _cosine}


def learning_rate_at(step: int, training: TrainConfig, total_steps: int) -> float:
    """The rate of optimizer step `step` of 1 … total_steps: linear warm-up reaches the full one at
    `warmup_steps`, then the schedule takes over; a cosine ends at 0."""
    if step < training.warmup_steps:
        return training.learning_rate * step / training.warmup_steps
    after = max(1, total_steps - training.warmup_steps)
    progress = min(1.0, (step - training.warmup_steps) / after)
    return training.learning_rate * SCHEDULES[training.schedule](progress)
