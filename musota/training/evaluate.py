"""Evaluation: metrics over every token but the first, and what is measured when an epoch ends."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from musota.data.corpus import Corpus
from musota.errors import MusotaError
from musota.models.base import CausalLM, score

BLOCK_TOKENS = 1024  # valid losses are kept by blocks of so many tokens, for the paired bootstrap
HEALTH_WINDOWS = 8  # of valid, for the health statistics
CLEAN_SHARE = 32  # this share of the training text, its start, is scored without dropout
SAMPLE_PROMPTS, PROMPT_TOKENS, SAMPLE_TOKENS = 3, 8, 32
SAMPLE_SETTINGS = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "seed": 0}


def evaluate(
    model: CausalLM,
    tokens: str | Sequence[int] | Tensor,
    words: int | None = None,
    bytes: int | None = None,
    stride: int | None = None,
) -> dict[str, float]:
    """`loss` (nats/token), `ppl` and `accuracy` of a model of this package on a text or token ids.

    Every token but the first is scored. Windows do not overlap, unless `stride` is smaller than
    max_seq_len. Given the counts of the same text also `word_ppl` = exp(total nats / words), line
    ends counted as words, and `bits_per_byte` = total bits / UTF-8 bytes. Both can be compared
    between tokenizers. Raises MusotaError for another model, and as `score` does."""
    if not isinstance(getattr(model, "_orig_mod", model), CausalLM):
        needed = "a model of musota, as Run.load_model() returns"
        raise MusotaError(f"evaluate needs {needed}, not {type(model).__name__}.")
    return metrics_of(*score(model, model.as_ids(tokens), stride), words, bytes)


def metrics_of(nats: Tensor, hits: Tensor, words: int | None, bytes: int | None) -> dict:
    """The metrics of `evaluate` from nats and hits by token."""
    total = float(nats.double().sum())
    loss = total / len(nats)
    metrics = {"loss": loss, "ppl": exp_nats(loss), "accuracy": float(hits.double().mean())}
    if words:
        metrics["word_ppl"] = exp_nats(total / words)
    if bytes:
        metrics["bits_per_byte"] = total / math.log(2) / bytes
    return metrics


def exp_nats(nats: float) -> float:
    """exp, or inf where that overflows."""
    return math.exp(nats) if nats < 700 else math.inf


def blocks_of(nats: Tensor) -> tuple[list[float], list[int]]:
    """Total nats and tokens of each block of BLOCK_TOKENS, the last one shorter."""
    blocks = nats.double().split(BLOCK_TOKENS)
    return [round(float(block.sum()), 4) for block in blocks], [len(block) for block in blocks]


def health_of(model: CausalLM, corpus: Corpus, batch_size: int) -> dict:
    """Health statistics on some of valid, and the loss of some training text without dropout."""
    length = min(model.config.max_seq_len, len(corpus.valid))
    windows = min(HEALTH_WINDOWS, len(corpus.valid) // length)
    ids = corpus.valid[: windows * length].view(windows, length).long()
    some = corpus.train[: max(2, len(corpus.train) // CLEAN_SHARE)]
    clean = float(score(model, some, batch_size=batch_size)[0].mean())
    return {"clean_train_loss": clean, **model.health(ids.to(model.device))}


def samples_of(model: CausalLM, corpus: Corpus) -> list[dict]:
    """Continuations of the first lines of valid that are long enough for a prompt."""
    ends = (corpus.valid == corpus.tokenizer.line_end).nonzero().flatten().tolist()
    lines = zip([-1, *ends], ends, strict=False)  # each from after one line end to the next
    starts = [start + 1 for start, end in lines if end - start > PROMPT_TOKENS][:SAMPLE_PROMPTS]
    if not starts:
        return []
    prompts = torch.stack([corpus.valid[start : start + PROMPT_TOKENS].long() for start in starts])
    texts = model.generate(prompts, SAMPLE_TOKENS, **SAMPLE_SETTINGS)
    decode, at = corpus.tokenizer.decode, PROMPT_TOKENS
    return [{"prompt": decode(t[:at]), "text": decode(t[at:])} for t in texts.tolist()]
