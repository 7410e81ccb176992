"""Does a model look ahead?"""

from __future__ import annotations

import torch
from torch import Tensor

from musota.models.base import CausalLM


def causality_matrix(model: CausalLM, tokens: Tensor, positions: int = 32) -> Tensor:
    """(positions, positions): largest change of a logit in column u after replacing token t (row).

    A causal model has exact zeros wherever u < t.
    """
    was_training = model.training
    model.eval()
    positions = min(positions, model.config.max_seq_len)
    ids = tokens[:positions].long().to(model.device)
    replaced = ids.repeat(positions, 1)
    replaced[range(positions), range(positions)] = (ids + 1) % model.config.vocab_size
    with torch.no_grad():
        # In one batch, so that both go through the same kernels and equal means equal.
        logits = model(torch.cat([ids[None], replaced]))[0]
    change = (logits[1:] - logits[:1]).abs().amax(-1).cpu()
    model.train(was_training)
    return change
