"""N-gram baselines of a perplexity: uniform, unigram, Kneser–Ney bigram and trigram.

Counted on the train split and scored on the same tokens as the models (all but the first).
Vectorised: n-grams are whole numbers, counted by sorting and looked up by bisection.
"""

import math
from dataclasses import dataclass

import numpy as np

from musota.data.corpus import Corpus
from musota.errors import MusotaError


@dataclass(frozen=True)
class _Counts:
    """Counts of n-grams; a context is the number of the (n−1)-gram that an n-gram begins with."""

    keys: np.ndarray  # context · vocabulary + last token, ascending
    counts: np.ndarray
    vocabulary: int

    def find(self, contexts: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """Index of each n-gram, −1 where it, or its context, was never seen."""
        wanted = contexts * self.vocabulary + tokens
        rows = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where((self.keys[rows] == wanted) & (contexts >= 0), rows, -1)

    def smoothed(self, counts, contexts, tokens, lower) -> np.ndarray:
        """Interpolated absolute discounting of `counts` (one per key) over the `lower` order:
        p(w|c) = max(count(cw) − D, 0)/count(c·) + D·kinds(c)/count(c·) · lower(w), with
        D = n₁/(n₁ + 2n₂) and kinds(c) the number of different tokens after c (Ney et al. 1994).
        Where n₁ or n₂ is 0, D would be 0 or 1 and is 0.5 instead.
        """
        once, twice = (counts == 1).sum(), (counts == 2).sum()
        discount = once / (once + 2 * twice) if once and twice else 0.5
        owner, size = self.keys // self.vocabulary, contexts.max(initial=0) + 1
        total = np.bincount(owner, counts, size)[contexts]
        kinds = np.bincount(owner[counts > 0], minlength=size)[contexts]
        rows = self.find(contexts, tokens)
        own = np.where(rows >= 0, np.maximum(counts[rows] - discount, 0), 0.0)
        seen = (contexts >= 0) & (total > 0)
        return np.where(seen, (own + discount * kinds * lower) / np.where(seen, total, 1), lower)


def ngram_nats(train: np.ndarray, tokens: np.ndarray, vocabulary: int) -> dict[str, np.ndarray]:
    """Nats of tokens 1 … n−1 under each baseline, (n−1,) each. Unigram: one count added to every
    token of the vocabulary (Laplace). Bigram and trigram: interpolated Kneser–Ney (Chen & Goodman
    1999, section 4.1.6), one discount an order."""
    V = vocabulary
    train, tokens = np.asarray(train, np.int64), np.asarray(tokens, np.int64)
    first, second, third, following = tokens[:-2], tokens[1:-1], tokens[2:], tokens[1:]
    unigram = (np.bincount(train, minlength=V) + 1) / (len(train) + V)

    pairs = _Counts(*np.unique(train[:-1] * V + train[1:], return_counts=True), V)
    contexts = pairs.find(train[:-2], train[1:-1])
    triples = _Counts(*np.unique(contexts * V + train[2:], return_counts=True), V)
    # How many different tokens come before w, and before the pair (v, w).
    before_one = np.bincount(pairs.keys % V, minlength=V)
    last_pairs = pairs.find(pairs.keys[triples.keys // V] % V, triples.keys % V)
    before_pair = np.bincount(last_pairs, minlength=len(pairs.keys))

    singles = _Counts(np.arange(V), before_one, V)  # without context: all have number 0
    base = singles.smoothed(before_one, np.zeros_like(following), following, 1 / V)
    bigram = pairs.smoothed(pairs.counts, tokens[:-1], following, base)
    # Trigram: pairs weigh by what precedes them, triples by how often they occur. The very first
    # prediction has one token of context, so it is the bigram's.
    middle = pairs.smoothed(before_pair, second, third, base[1:])
    top = triples.smoothed(triples.counts, pairs.find(first, second), third, middle)
    trigram = np.concatenate([bigram[:1], top])
    chances = {"uniform": np.full(len(following), 1 / V), "unigram": unigram[following]}
    chances |= {"bigram": bigram, "trigram": trigram}
    return {name: -np.log(chance) for name, chance in chances.items()}


def measure_ngrams(corpus: Corpus) -> dict[str, float]:
    """Perplexity of each baseline on valid, over the tokens its tokenizer has. Raises
    MusotaError for too short a text."""
    if len(corpus.train) < 3 or len(corpus.valid) < 2:
        raise MusotaError("The text has too few tokens to count n-grams: use more text.")
    nats = ngram_nats(corpus.train.numpy(), corpus.valid.numpy(), corpus.tokenizer.size)
    return {name: math.exp(float(values.mean())) for name, values in nats.items()}
