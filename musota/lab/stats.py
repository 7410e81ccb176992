"""Differences in loss with 95 % intervals: over blocks of text, over seeds, over grid runs."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

SEED_SPREAD = 0.013  # nats/token: standard deviation of a run over seeds, measured at `study`
RELEVANT = 0.05  # nats/token, 5 % of the perplexity: a smaller effect decides nothing
MIN_BLOCKS = 10  # fewer blocks say too little about other text
TAILS = (0.025, 0.975)  # quantiles of a 95 % interval


@dataclass(frozen=True)
class Interval:
    """A difference in nats per token with its 95 % interval; infinite ends mean no interval."""

    mean: float
    low: float = -math.inf
    high: float = math.inf

    def beyond(self, threshold: float) -> int:
        """−1 or 1 where the whole interval lies below or above the threshold, else 0."""
        return -1 if self.high < threshold else 1 if self.low > threshold else 0

    def __str__(self) -> str:
        ends = "no interval" if math.isinf(self.low) else f"{self.low:+.3f}, {self.high:+.3f}"
        return f"{self.mean:+.3f} nats/token [{ends}]"


def block_bootstrap(nats: Sequence[float], tokens: Sequence[int]) -> Interval:
    """Nats per token, with a 95 % interval from resampling whole blocks of text (Koehn 2004).

    Arguments: the total nats (or the difference of two models' nats) and the number of tokens of
    each block. The interval says nothing about other seeds. Fewer than ten blocks give none.
    """
    nats, tokens = np.asarray(nats, float), np.asarray(tokens, float)
    mean = float(nats.sum() / tokens.sum())
    if len(tokens) < MIN_BLOCKS:
        return Interval(mean)
    generator, means = np.random.default_rng(0), []
    for _ in range(10):  # in thousands, to save memory on long texts
        picked = generator.integers(len(tokens), size=(1000, len(tokens)))
        means.append(nats[picked].sum(1) / tokens[picked].sum(1))
    return Interval(mean, *np.quantile(np.concatenate(means), TAILS).tolist())


def seed_interval(differences: Sequence[float]) -> Interval:
    """Student's t interval of the mean of paired differences, one for each of two or more seeds."""
    error = float(np.std(differences, ddof=1)) / math.sqrt(len(differences))
    return _student(float(np.mean(differences)), error, len(differences) - 1)


def pooled_contrast(
    losses: Mapping[Hashable, Mapping[int, float]], before: Hashable, after: Hashable
) -> Interval:
    """The mean loss of the grid run `after` minus that of `before`.

    `losses`: by grid run and seed, the same seeds everywhere. All runs share the spread of the
    residuals of this table, with (runs − 1)(seeds − 1) degrees of freedom. One seed gives no
    interval.
    """
    table = np.array([[row[seed] for seed in sorted(row)] for row in losses.values()])
    means, freedom = table.mean(1, keepdims=True), (table.shape[0] - 1) * (table.shape[1] - 1)
    spread = ((table - means - table.mean(0) + table.mean()) ** 2).sum() / max(freedom, 1)
    old, new = (float(np.mean([*losses[run].values()])) for run in (before, after))
    return _student(new - old, math.sqrt(2 * spread / table.shape[1]), freedom)


def _student(mean: float, error: float, freedom: int) -> Interval:
    half = float(stdtrit(freedom, TAILS[1])) * error if freedom else math.inf
    return Interval(mean, mean - half, mean + half)
