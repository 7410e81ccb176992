"""How a model behaves, in numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(vectors: Tensor) -> float:
    """exp of the entropy of the normalised singular values of centred (n, d) vectors: how many
    directions they use evenly (Roy and Vetterli 2007); between 1 and d."""
    centred = (vectors - vectors.mean(0)).double()
    singular = torch.linalg.eigvalsh(centred.mT @ centred).clamp_min(0).sqrt()
    share = singular / singular.sum().clamp_min(1e-30)
    return float(torch.special.entr(share).sum().exp())
