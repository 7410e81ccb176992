"""Differences in loss and how sure they are: numbers in, intervals out."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

MIN_BLOCKS = 10  # of text: fewer say too little about other text


def slope_weights(x: np.ndarray) -> np.ndarray:
    """Weights w such that w · y is the least-squares slope of y on x."""
    centred = x - x.mean()
    return centred / (centred**2).sum()


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A difference in nats per token with its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def side(self) -> int:
        """−1 or 1 where the whole interval lies below or above 0, else 0."""
        return -1 if self.high < 0 else 1 if self.low > 0 else 0

    def __str__(self) -> str:
        if math.isinf(self.low):
            return f"{self.mean:+.3f} nats/token [no interval]"
        return f"{self.mean:+.3f} nats/token [{self.low:+.3f}, {self.high:+.3f}]"


def paired_bootstrap(
    nats_a: Sequence[float],
    nats_b: Sequence[float],
    tokens: Sequence[int],
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Loss of a minus loss of b, per token, by resampling whole blocks of text (Koehn 2004).

    Arguments: total nats of both models and the number of tokens, by block of the same text. Says
    how sure the difference is for *this pair of trained models*, nothing about other seeds. Fewer
    than ten blocks say too little about other text: there is no interval.
    """
    difference = np.asarray(nats_a, float) - np.asarray(nats_b, float)
    tokens = np.asarray(tokens, float)
    if difference.shape != tokens.shape or not len(tokens):
        raise ValueError("paired_bootstrap needs the same blocks for both models.")
    mean = float(difference.sum() / tokens.sum())
    if len(tokens) < MIN_BLOCKS:
        return Interval(mean, -math.inf, math.inf)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 1000):  # by thousands: memory stays small on long texts
        picked = generator.integers(len(tokens), size=(min(1000, resamples - start), len(tokens)))
        means[start : start + len(picked)] = difference[picked].sum(1) / tokens[picked].sum(1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(mean, float(low), float(high))


def seed_interval(differences: Sequence[float]) -> Interval:
    """Student's t interval of the mean of paired differences, one per seed; at least two."""
    n = len(differences)
    if n < 2:
        raise ValueError("An interval over seeds needs at least two of them.")
    mean = float(np.mean(differences))
    half = _quantile(n - 1) * float(np.std(differences, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def pooled_contrasts(
    losses: Mapping[Hashable, Mapping[int, float]], contrasts: Sequence[Mapping[Hashable, float]]
) -> list[Interval]:
    """Weighted sums of cells' mean losses, paired by seed; the weights of a contrast sum to 0.

    `losses` by cell and seed, the same seeds everywhere. All cells share one spread: what a table
    of cells and seeds leaves unexplained by its rows and columns, with (cells − 1)(seeds − 1)
    degrees of freedom; from one seed there is no interval.
    """
    table = np.array([list(dict(sorted(by_seed.items())).values()) for by_seed in losses.values()])
    rows, columns = table.mean(1, keepdims=True), table.mean(0, keepdims=True)
    freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
    means = dict(zip(losses, rows[:, 0].tolist(), strict=True))
    found = []
    for weights in contrasts:
        effect, half = sum(w * means[cell] for cell, w in weights.items()), math.inf
        if freedom:
            variance = ((table - rows - columns + table.mean()) ** 2).sum() / freedom
            squares = sum(w**2 for w in weights.values())
            half = _quantile(freedom) * math.sqrt(squares * variance / table.shape[1])
        found.append(Interval(effect, effect - half, effect + half))
    return found


def _quantile(freedom: int) -> float:
    """Two-sided 95 % quantile of Student's t."""
    return float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom))
