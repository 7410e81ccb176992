"""Optimizers by name, how far a step moved the weights, and an optimizer's state as tensors."""

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from musota.models.base import CausalLM


def _adamw(groups: list[dict], loss_scaling: bool) -> torch.optim.Optimizer:
    # Fused AdamW skips bad fp16 steps inside its kernel, where accelerate cannot see it; the
    # schedule has to know of them. (fused=False would switch `foreach` off, too.)
    return torch.optim.AdamW(groups, betas=(0.9, 0.999), fused=None if loss_scaling else True)


# Adding an optimizer is a row here: parameter groups with their weight decay -> optimizer. Its
# learning rate is set before every step.
OPTIMIZERS = {"adamw": _adamw}


def update_ratios(model: CausalLM, before: list[Tensor]) -> dict[str, float]:
    """‖ΔW‖ / ‖W‖ since the parameters were `before`, by group of the ledger."""
    squares: dict[str, Tensor] = {}
    for (name, now), old in zip(model.named_parameters(), before, strict=True):
        pair = torch.stack([(now.detach() - old).square().sum(), old.square().sum()]).cpu().double()
        group = model.ledger_group(name)
        squares[group] = squares.get(group, 0) + pair
    return {group: float((new / old).sqrt()) for group, (new, old) in squares.items()}


def state_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state under names for a checkpoint."""
    states = optimizer.state_dict()["state"].items()
    return {f"optimizer.{i}.{name}": v for i, state in states for name, v in state.items()}


def load_state_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `state_tensors`; other tensors are passed over."""
    state: dict[int, dict[str, Tensor]] = defaultdict(dict)
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, what = name.split(".")
            state[int(index)][what] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": dict(state), "param_groups": groups})
