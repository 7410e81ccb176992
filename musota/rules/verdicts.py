"""What several runs say together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from musota.rules.findings import Finding
from musota.rules.stats import (
    MIN_BLOCKS,
    Interval,
    paired_bootstrap,
    pooled_contrasts,
    seed_interval,
    slope_weights,
)

RELEVANT = 0.05  # nats/token, 5 % of the PPL: what less brings is not worth a search
DATA_STARVED = 0.1  # nats gained per doubling of the text


def helps_or_hurts(
    mu: Mapping[int, Mapping],
    dense: Mapping[int, Mapping],
    name: str = "MU-SOTA",
    rates: str = "at the one learning rate both were given",
) -> tuple[Finding, Interval, Interval | None]:
    """Does MU-SOTA help against its dense twin? Summaries by seed; seeds in both are paired.

    Returns the finding, the bootstrap interval over blocks of text (losses averaged over seeds) and
    the interval over seeds (None from one seed, when the verdict is only provisional). Negative
    differences favour MU-SOTA. With fewer than ten blocks the verdict stays open. Raises
    ValueError without a common seed or common text.
    """
    seeds = sorted(mu.keys() & dense.keys())
    if not seeds:
        raise ValueError("MU-SOTA and the dense twin have no seed in common: train both with one.")
    pairs = [(mu[seed], dense[seed]) for seed in seeds]
    tokens = pairs[0][0]["valid_block_tokens"]
    if any(summary["valid_block_tokens"] != tokens for pair in pairs for summary in pair):
        raise ValueError("The runs were validated on different texts and cannot be compared.")
    nats_mu, nats_dense = (
        np.mean([pair[side]["valid_block_nats"] for pair in pairs], axis=0) for side in (0, 1)
    )
    text = paired_bootstrap(nats_mu, nats_dense, tokens)
    over_seeds = on_test = None
    if len(seeds) > 1:
        over_seeds = seed_interval([a["valid_loss"] - b["valid_loss"] for a, b in pairs])
        if all("test_loss" in summary for pair in pairs for summary in pair):
            on_test = seed_interval([a["test_loss"] - b["test_loss"] for a, b in pairs])
    sides = {text.side, over_seeds.side if over_seeds else text.side}
    verdict = {-1: "helps", 0: "undecided", 1: "hurts"}[sides.pop() if len(sides) == 1 else 0]
    doubt = "the interval includes 0"
    if over_seeds:
        doubt = "the intervals do not both exclude 0 on one side"
    if len(tokens) < MIN_BLOCKS:
        doubt = f"{len(tokens)} blocks are too little text"
    conclusion = {
        "helps": "the architecture helps",
        "hurts": "the architecture hurts",
        "undecided": f"undecided, {doubt}",
    }[verdict]
    saw = f"MU-SOTA minus dense twin {text} over blocks of text"
    if over_seeds:
        saw += f"; {over_seeds} over {len(seeds)} seeds"
        saw += f"; on test, scored once and not decided by, {on_test}" if on_test else ""
    else:
        conclusion = f"provisional, seeds not measured: {conclusion}"
    next_step = "" if over_seeds else "train both with more seeds (-p seed 1, -p seed 2)"
    finding = Finding(
        f"{name} against its dense twin",
        verdict,
        saw,
        f"decided by 95 % intervals that exclude 0, {rates}",
        conclusion,
        next_step,
    )
    return finding, text, over_seeds


@dataclass(frozen=True)
class Cause:
    """What mending a suspect does: the effect in nats (None: it diverges), and the verdict."""

    suspect: Any  # of musota.plan.suspects: name, confidence, before, after, advice
    effect: Interval | None
    ppl_before: float
    ppl_after: float
    verdict: str  # cause | not a cause | undecided
    here: str = ""  # what was changed at the size that was measured


def root_causes(
    suspects: Sequence, losses: Mapping[str, Mapping[int, float]], vocab_size: int
) -> list[Cause]:
    """Each suspect judged, the largest gain first.

    `losses`: valid nats/token by cell and seed, the same seeds everywhere. A cause is what lowers
    the loss by 0.05 nats or more, with an interval (see `pooled_contrasts`) below 0; what certainly
    brings less is none; the rest is undecided. A cell that ends above the uniform guess (ln V) with
    any seed has diverged: it gets no interval, and its suspect is no cause.
    """
    usable = {
        cell: by_seed
        for cell, by_seed in losses.items()
        if max(by_seed.values()) <= math.log(vocab_size)
    }
    measured = [s for s in suspects if s.before in usable and s.after in usable]
    pairs = [{suspect.before: -1, suspect.after: 1} for suspect in measured]
    effects = dict(zip(measured, pooled_contrasts(usable, pairs) if pairs else (), strict=True))
    causes = []
    for suspect in suspects:
        effect = effects.get(suspect)
        ppls = [
            float(np.exp(np.mean(list(losses[cell].values()))))
            for cell in (suspect.before, suspect.after)
        ]
        verdict = "undecided"
        if effect is None or effect.low > -RELEVANT:
            verdict = "not a cause"
        elif effect.high < 0 and effect.mean <= -RELEVANT:
            verdict = "cause"
        causes.append(Cause(suspect, effect, *ppls, verdict))
    return sorted(causes, key=lambda cause: cause.effect.mean if cause.effect else math.inf)


def root_cause_advice(causes: Sequence[Cause]) -> str:
    """One line: the largest certain gain, and what to change, in the order of what it brings."""
    guilty = [cause for cause in causes if cause.verdict == "cause"]
    if not guilty:
        return "No suspect was found guilty."
    first = guilty[0]
    advice = list(dict.fromkeys(cause.suspect.advice for cause in guilty))
    return (
        f"Largest certain gain: {first.suspect.name}, {first.effect}. In this order: "
        f"{', then '.join(advice)}; measure again after each."
    )


def best_rate(losses: Mapping[float, Sequence[float]], own: float, model: str) -> Finding:
    """Where a learning-rate sweep has its best, and whether it must be widened.

    `losses`: valid nats/token of each seed by learning rate; `own` is the `model`'s usual rate.
    """
    means = {rate: float(np.mean(values)) for rate, values in sorted(losses.items())}
    best = min(means, key=means.get)
    at_edge = best in (min(means), max(means))
    saw = f"best at {best:g}: PPL {math.exp(means[best]):,.1f}"
    if own in means:
        saw += f", {means[best] - means[own]:+.2f} nats against {own:g}"
    conclusion = "the best is at the edge" if at_edge else "the best is bracketed"
    next_step = "widen the sweep on that side" if at_edge else ""
    if not at_edge and own in means and means[own] - means[best] >= RELEVANT:
        next_step = f"{'raise' if best > own else 'lower'} the learning rate to {best:g}"
    rule = f"{len(means)} rates from {min(means):g} to {max(means):g}"
    verdict = "edge" if at_edge else "bracketed"
    return Finding(f"Learning-rate sweep, {model}", verdict, saw, rule, conclusion, next_step)


def annealing(
    before: Sequence[float], decayed: Sequence[float], held: Sequence[float], tokens: Sequence[int]
) -> tuple[Finding, dict[str, Interval]]:
    """Is learning-rate noise hiding what the model has learned?

    Nats by block of valid text at a checkpoint, after steps whose rate falls to 0, and after as
    many at the held rate; the blocks' tokens. The held steps show what mere training brings: noise
    is what the falling rate brings beyond that, 0.05 nats or more.
    """
    intervals = {
        "rate falling to 0": paired_bootstrap(decayed, before, tokens),
        "rate held": paired_bootstrap(held, before, tokens),
        "falling − held": paired_bootstrap(decayed, held, tokens),
    }
    noise = intervals["falling − held"]
    verdict, next_step = "undecided", ""
    conclusion = "undecided, the interval reaches over the threshold"
    if noise.high < 0 and noise.mean <= -RELEVANT:
        verdict, conclusion = "noise", "learning-rate noise hides what was learned"
        next_step = "decay the rate to 0, or lower it, before judging the model"
    elif noise.low > -RELEVANT:
        verdict, conclusion = "not the rate", "the learning rate's noise is not what holds it back"
    saw = f"falling to 0 {intervals['rate falling to 0']}, beyond the held rate {noise}"
    rule = f"a gain of {RELEVANT} nats beyond the held rate is noise"
    return Finding("Anneal probe", verdict, saw, rule, conclusion, next_step), intervals


def data_halving(losses: Mapping[int, Mapping[int, float]]) -> tuple[Finding, Interval]:
    """Nats gained per doubling of the training text, at equal numbers of steps.

    `losses`: valid nats/token by number of training tokens and seed. Interval: `pooled_contrasts`.
    """
    weights = slope_weights(np.log2(np.array([*losses], float)))
    (slope,) = pooled_contrasts(losses, [dict(zip(losses, weights, strict=True))])
    verdict, conclusion = "undecided", "undecided, the interval reaches over the threshold"
    next_step = ""
    if slope.high < -DATA_STARVED:
        verdict, conclusion, next_step = "data-starved", "data-starved", "get more text"
    elif slope.low > -DATA_STARVED:
        verdict, conclusion = "not data-starved", "data is not what holds it back"
    saw = f"per doubling of the text {slope}"
    rule = f"more than {DATA_STARVED} nats gained per doubling"
    return Finding("Data halving", verdict, saw, rule, conclusion, next_step), slope


def ablation_effects(
    nats: Mapping[str, Sequence[float]], tokens: Sequence[int]
) -> dict[str, Interval]:
    """What disabling each part costs: nats by part and block of text, `none` among the parts."""
    return {
        part: paired_bootstrap(blocks, nats["none"], tokens)
        for part, blocks in nats.items()
        if part != "none"
    }


_REDESIGN = {  # what to do with a mechanism that is hardly used
    "block attention": "give the blocks more cells, or let the cross attention do its work",
    "cross attention": "drop it, or widen it until it helps",
    "gate": "drop it: a fixed number per block does as well",
    "affinity tables": "drop them and spend their parameters on width",
}


def weak_spots(
    effects: Mapping[str, Interval], ledger: Mapping[str, int], blocks: Sequence[str]
) -> list[Finding]:
    """Which parts of a trained MU-SOTA earn their parameters, from what disabling each one costs.

    `effects` as `ablation_effects` gives them, `ledger` the parameters by group, `blocks` the
    names of the semantic blocks.
    """
    total, rule = sum(ledger.values()), f"under {RELEVANT} nats a part is hardly used"
    found = []
    for part, advice in _REDESIGN.items():
        cost = effects[part]
        share = f"{ledger[part] / total:.1%} of the parameters"
        idle = cost.high < RELEVANT
        verdict = "idle" if idle else "used" if cost.low >= RELEVANT else "undecided"
        conclusion = {"idle": "hardly used", "used": "used", "undecided": "undecided"}[verdict]
        saw = f"disabling it costs {cost}, it holds {share}"
        name = part.capitalize()
        found.append(Finding(name, verdict, saw, rule, conclusion, advice if idle else ""))
    if "both attentions" in effects:
        cost = effects["both attentions"]
        idle = cost.high < RELEVANT
        share = (ledger["block attention"] + ledger["cross attention"]) / total
        conclusion = "the text before the current token is used"
        next_step = ""
        if idle:
            conclusion = (
                "the text before the current token is hardly used: this is a table of which token "
                "follows which, and cannot be much better than the bigram rung"
            )
            next_step = "give attention a residual path that the gate does not scale, and width"
        saw = f"disabling both attentions costs {cost}, they hold {share:.1%} of the parameters"
        context = Finding("Context", "idle" if idle else "used", saw, rule, conclusion, next_step)
        found.insert(0, context)  # the first thing to know
    costs = {block: effects[block] for block in blocks}
    idle = [block for block, cost in costs.items() if cost.high < RELEVANT]
    most = max(costs, key=lambda block: costs[block].mean)
    saw = f"zeroing a block's cells costs at most {costs[most]} ({most})"
    conclusion = f"{len(idle)} of {len(blocks)} hardly used"
    verdict = "idle" if len(idle) > len(blocks) / 2 else "used"
    next_step = "fewer blocks of more cells" if verdict == "idle" else ""
    return [*found, Finding("Semantic blocks", verdict, saw, rule, conclusion, next_step)]
