import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from musota.errors import MusotaError
from musota.lab.ngrams import measure_ngrams, ngram_nats

V = 20
NAMES = ("uniform", "unigram", "bigram", "trigram")


@pytest.fixture(scope="module")
def train():
    return np.random.default_rng(0).integers(0, V, 500) ** 2 // V


def _literal(train, history, word):
    """Interpolated Kneser–Ney as in the textbook, with dictionaries; a Laplace unigram."""
    train = train.tolist()
    unigram = (train.count(word) + 1) / (len(train) + V)
    pairs, triples = Counter(zip(train, train[1:])), Counter(zip(train, train[1:], train[2:]))  # noqa: B905, RUF007
    pair_left = Counter(w for _, w in pairs)
    triple_left = Counter((v, w) for _, v, w in triples)

    def discounted(counts, context, lower):
        once, twice = (sum(c == k for c in counts.values()) for k in (1, 2))
        d = once / (once + 2 * twice) if once and twice else 0.5
        inside = {key: c for key, c in counts.items() if key[:-1] == context}
        total = sum(inside.values())
        if not total:
            return lower
        own = max(counts.get((*context, word), 0) - d, 0)
        return own / total + d * len(inside) / total * lower

    base = discounted({(w,): c for w, c in pair_left.items()}, (), 1 / V)
    bigram = discounted(pairs, history[-1:], base)
    if len(history) < 2:
        return 1 / V, unigram, bigram, bigram
    middle = discounted(triple_left, history[-1:], base)
    return 1 / V, unigram, bigram, discounted(triples, history[-2:], middle)


@pytest.mark.parametrize("copies", [1, 2])  # twice the text: no n-gram occurs exactly once
def test_equals_the_textbook_token_by_token(train, copies):
    train, tokens = np.tile(train, copies), np.random.default_rng(1).integers(0, V, 60)
    nats = ngram_nats(train, tokens, V)
    for place in range(1, 60):
        history = tuple(tokens[max(0, place - 2) : place].tolist())
        found = [math.exp(-nats[name][place - 1]) for name in NAMES]
        assert found == pytest.approx(_literal(train, history, int(tokens[place])), rel=1e-9)


def test_baselines_of_real_text_are_in_order(corpus):
    ppl = measure_ngrams(corpus)
    assert tuple(ppl) == NAMES and ppl["uniform"] == pytest.approx(corpus.tokenizer.size)
    assert ppl["trigram"] < ppl["bigram"] < ppl["unigram"] < ppl["uniform"]
    for short in ({"train": corpus.train[:2]}, {"valid": corpus.valid[:1]}):
        with pytest.raises(MusotaError, match="too few tokens"):
            measure_ngrams(replace(corpus, **short))
