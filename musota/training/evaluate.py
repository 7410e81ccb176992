"""Evaluation: every token but the first, once."""

from __future__ import annotations

import math

from torch import Tensor

from musota.models.base import CausalLM, score

BLOCK_TOKENS = 1024  # valid losses are kept by blocks of so many tokens, for the paired bootstrap


def blocks_of(nats: Tensor) -> tuple[list[float], list[int]]:
    """Nats by token to totals and tokens of each block of BLOCK_TOKENS, the last one shorter."""
    blocks = nats.double().split(BLOCK_TOKENS)
    return [round(float(block.sum()), 4) for block in blocks], [len(block) for block in blocks]


def evaluate(
    model: CausalLM,
    tokens: Tensor,
    words: int | None = None,
    bytes: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
) -> dict[str, float]:
    """`loss` (nats/token), `ppl` and `accuracy` over every token but the first (see `score`).

    Given the counts of the same text also `word_ppl` = exp(total nats / words), line ends counted
    as words, and `bits_per_byte` = total bits / UTF-8 bytes; both survive a change of tokenizer.
    """
    return metrics_of(*score(model, tokens, stride, batch_size), words, bytes)


def metrics_of(
    nats: Tensor, hits: Tensor, words: int | None, bytes: int | None
) -> dict[str, float]:
    total = float(nats.double().sum())
    loss = total / len(nats)
    measured = {"loss": loss, "ppl": exp_nats(loss), "accuracy": float(hits.double().mean())}
    if words:
        measured["word_ppl"] = exp_nats(total / words)
    if bytes:
        measured["bits_per_byte"] = total / math.log(2) / bytes
    return measured


def exp_nats(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
