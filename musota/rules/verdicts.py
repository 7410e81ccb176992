"""What several runs say together."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from musota.rules import stats
from musota.rules.findings import Finding, judged
from musota.rules.stats import Interval, paired_bootstrap

RELEVANT = 0.05  # nats/token, 5 % of the PPL: what less brings is not worth a search
DECIDED = "decided by 95 % intervals that exclude 0"
DATA_STARVED = 0.1  # nats gained per doubling of the text
OPEN = (True, "undecided", "undecided, the interval reaches over the threshold")


HELPS = ("helps", "the architecture helps"), ("hurts", "the architecture hurts")


def compared(
    one: Mapping[int, Mapping],
    other: Mapping[int, Mapping],
    title: str,
    difference: str = "its loss minus the other's",
    words: tuple[tuple[str, str], tuple[str, str]] = HELPS,
    rule: str = DECIDED,
) -> tuple[Finding, dict[str, Interval]]:
    """Is a model better than another? Summaries by seed; seeds in both are paired.

    Returns the finding, with `words` (verdict, conclusion) for better and for worse, and its
    intervals, negative where the first is better: over blocks of text (losses averaged over seeds)
    and, from two seeds on, over seeds. Raises ValueError without a common seed or common text.
    """
    pairs = [(one[seed], other[seed]) for seed in sorted(one.keys() & other.keys())]
    if not pairs:
        raise ValueError(f"{title}: they have no seed in common, so train both with one.")
    tokens = pairs[0][0]["valid_block_tokens"]
    if any(summary["valid_block_tokens"] != tokens for pair in pairs for summary in pair):
        raise ValueError("The runs were validated on different texts and cannot be compared.")
    nats = np.mean([[run["valid_block_nats"] for run in pair] for pair in pairs], axis=0)
    text = paired_bootstrap(*nats, tokens)
    intervals = {"over blocks of text\n(these trained models)": text}
    saw, side = f"{difference} {text} over blocks of text", text.side
    doubt, provisional = "the interval includes 0", "provisional, seeds not measured: "
    next_step = "train both with more seeds (-p seed 1, -p seed 2)"
    if len(pairs) > 1:
        over_seeds = stats.seed_interval([a["valid_loss"] - b["valid_loss"] for a, b in pairs])
        intervals["over seeds\n(training again)"] = over_seeds
        saw += f"; {over_seeds} over {len(pairs)} seeds"
        side = text.side if over_seeds.side == text.side else 0
        doubt, provisional = "the intervals do not both exclude 0 on one side", ""
        next_step = ""
        if all("test_loss" in summary for pair in pairs for summary in pair):
            on_test = stats.seed_interval([a["test_loss"] - b["test_loss"] for a, b in pairs])
            saw += f"; on test, scored once and not decided by, {on_test}"
    if len(tokens) < stats.MIN_BLOCKS:
        doubt = f"{len(tokens)} blocks are too little text"
    undecided = "undecided", f"undecided, {doubt}"
    verdict, conclusion = {-1: words[0], 0: undecided, 1: words[1]}[side]
    found = Finding(title, verdict, saw, rule, provisional + conclusion, next_step)
    return found, intervals


@dataclass(frozen=True)
class Cause:
    """What mending a suspect does: the effect in nats (None: it diverges), and the verdict."""

    suspect: Any  # of musota.plan.suspects: name, confidence, before, after, advice
    effect: Interval | None
    ppl_before: float
    ppl_after: float
    verdict: str  # cause | not a cause | undecided
    here: str = ""  # what was changed at the size that was measured


def _lowers(effect: Interval) -> int:
    """1 where a change lowers the loss (by 0.05 nats or more, with an interval below 0), −1 where
    it certainly does not by as much, else 0."""
    if effect.low > -RELEVANT:
        return -1
    return int(effect.high < 0 and effect.mean <= -RELEVANT)


def root_causes(
    suspects: Sequence, losses: Mapping[str, Mapping[int, float]], vocab_size: int
) -> list[Cause]:
    """Each suspect judged, the largest gain first.

    `losses`: valid nats/token by cell and seed, the same seeds everywhere. A cell that ends above
    the uniform guess (ln V) with any seed has diverged: it gets no interval (see
    `pooled_contrast`), and its suspect is no cause.
    """
    guess = math.log(vocab_size)
    usable = {cell: row for cell, row in losses.items() if max(row.values()) <= guess}
    ppls = {cell: float(np.exp(np.mean([*row.values()]))) for cell, row in losses.items()}
    causes = []
    for suspect in suspects:
        effect, verdict = None, "not a cause"
        if suspect.before in usable and suspect.after in usable:
            effect = stats.pooled_contrast(usable, {suspect.before: -1, suspect.after: 1})
            verdict = {1: "cause", 0: "undecided", -1: "not a cause"}[_lowers(effect)]
        causes.append(Cause(suspect, effect, ppls[suspect.before], ppls[suspect.after], verdict))
    return sorted(causes, key=lambda cause: cause.effect.mean if cause.effect else math.inf)


def guilty_of(causes: Iterable[Cause]) -> list[Cause]:
    """The causes about which something is left to be done."""
    return [cause for cause in causes if cause.verdict == "cause" and cause.suspect.advice]


def root_cause_advice(causes: Sequence[Cause]) -> str:
    """One line: the largest certain gain, and what to change, in the order of what it brings."""
    if not (guilty := guilty_of(causes)):
        return "No suspect was found guilty."
    steps = list(dict.fromkeys(cause.suspect.advice for cause in guilty))[:3]
    return (
        f"Largest certain gain: {guilty[0].suspect.name}, −{-guilty[0].effect.mean:.2f} nats. "
        f"In this order: {', then '.join(steps)}; measure again after each."
    )


def best_rate(losses: Mapping[float, Sequence[float]], own: float, model: str) -> Finding:
    """Where a learning-rate sweep has its best, and whether it must be widened. `losses`: valid
    nats/token of each seed by learning rate; `own` is the `model`'s usual rate."""
    means = {rate: float(np.mean(values)) for rate, values in sorted(losses.items())}
    best = min(means, key=means.get)
    saw = f"best at {best:g}: PPL {math.exp(means[best]):,.1f}"
    if own in means:
        saw += f", {means[best] - means[own]:+.2f} nats against {own:g}"
    low, high = min(means), max(means)
    far = own in means and means[own] - means[best] >= RELEVANT
    change = f"{'raise' if best > own else 'lower'} the learning rate to {best:g}" if far else ""
    return judged(
        (f"Learning-rate sweep, {model}", saw, f"{len(means)} rates from {low:g} to {high:g}"),
        (best in (low, high), "edge", "the best is at the edge", "widen the sweep on that side"),
        (True, "bracketed", "the best is bracketed", change),
    )


def annealing(
    before: Sequence[float], decayed: Sequence[float], held: Sequence[float], tokens: Sequence[int]
) -> tuple[Finding, dict[str, Interval]]:
    """Is learning-rate noise hiding what the model has learned? It is what a rate falling to 0
    brings beyond the held one, 0.05 nats or more.

    Nats by block of valid text at a checkpoint, after steps at either; the blocks' tokens.
    """
    intervals = {
        "rate falling to 0": paired_bootstrap(decayed, before, tokens),
        "rate held": paired_bootstrap(held, before, tokens),
        "falling − held": paired_bootstrap(decayed, held, tokens),
    }
    falling, _, noise = intervals.values()
    side, advice = _lowers(noise), "decay the rate to 0, or lower it, before judging the model"
    saw = f"falling to 0 {falling}, beyond the held rate {noise}"
    found = judged(
        ("Anneal probe", saw, f"a gain of {RELEVANT} nats beyond the held rate is noise"),
        (side > 0, "noise", "learning-rate noise hides what was learned", advice),
        (side < 0, "not the rate", "the learning rate's noise is not what holds it back"),
        OPEN,
    )
    return found, intervals


def data_halving(losses: Mapping[int, Mapping[int, float]]) -> tuple[Finding, Interval]:
    """Nats gained per doubling of the training text, at equal numbers of steps; `losses`: valid
    nats/token by number of training tokens and seed. Interval: `pooled_contrast`."""
    weights = stats.weights_per_doubling(np.array([*losses], float))
    slope = stats.pooled_contrast(losses, dict(zip(losses, weights, strict=True)))
    side = slope.beyond(-DATA_STARVED)
    saw = f"per doubling of the text {slope}"
    found = judged(
        ("Data halving", saw, f"more than {DATA_STARVED} nats gained per doubling"),
        (side < 0, "data-starved", "data-starved", "get more text"),
        (side > 0, "not data-starved", "data is not what holds it back"),
        OPEN,
    )
    return found, slope


def ablation_effects(
    nats: Mapping[str, Sequence[float]], tokens: Sequence[int]
) -> dict[str, Interval]:
    """What disabling each part costs: nats by part and block of text, `none` among the parts."""
    parts = [part for part in nats if part != "none"]
    return {part: paired_bootstrap(nats[part], nats["none"], tokens) for part in parts}


CONTEXT = {"attention", "both attentions"}  # without it no token sees another
_REDESIGN = {  # what to do with a mechanism that is hardly used
    "block attention": "give the blocks more cells, or let the cross attention do its work",
    "cross attention": "drop it, or widen it until it helps",
    "gate": "drop it: a fixed number per block does as well",
    "affinity tables": "drop them and spend their parameters on width",
}
_HARDLY_USED = f"under {RELEVANT} nats a part is hardly used"


def weak_spots(
    effects: Mapping[str, Interval], ledger: Mapping[str, int], blocks: Sequence[str]
) -> list[Finding]:
    """Which parts of a trained model with blocks earn their parameters: `ablation_effects`, the
    parameters by group, the names of the blocks."""
    found, whole = [], sum(ledger.values())
    if part := next(iter(CONTEXT & effects.keys()), None):  # the first thing to know
        held = sum(count for group, count in ledger.items() if "attention" in group) / whole
        whom = "it holds" if part == "attention" else "they hold"
        idle = (
            "the text before the current token is hardly used: this is a table of which token "
            "follows which, and cannot be much better than the bigram rung"
        )
        saw = f"disabling {part} costs {effects[part]}, {whom} {held:.1%} of the parameters"
        said = idle, "the text before the current token is used"
        advice = "give attention a residual path that the gate does not scale, and width"
        found.append(_part("Context", effects[part], saw, said, advice))
    for part, advice in _REDESIGN.items():
        if cost := effects.get(part):
            held = ledger.get(part, 0) / whole  # a gate without a map has none
            saw = f"disabling it costs {cost}, it holds {held:.1%} of the parameters"
            found.append(_part(part.capitalize(), cost, saw, ("hardly used", "used"), advice))
    idle = [block for block in blocks if effects[block].beyond(RELEVANT) < 0]
    most = max(blocks, key=lambda block: effects[block].mean)
    saw = f"zeroing a block's cells costs at most {effects[most]} ({most})"
    said, many = f"{len(idle)} of {len(blocks)} hardly used", len(idle) > len(blocks) / 2
    cases = (many, "idle", said, "fewer blocks of more cells"), (True, "used", said)
    return [*found, judged(("Semantic blocks", saw, _HARDLY_USED), *cases)]


def _part(title: str, cost: Interval, saw: str, said: tuple[str, str], advice: str) -> Finding:
    side, (idle, used) = cost.beyond(RELEVANT), said
    cases = (side < 0, "idle", idle, advice), (side > 0, "used", used)
    return judged((title, saw, _HARDLY_USED), *cases, (True, "undecided", "undecided"))


def names_mean(found: Mapping, expected: Mapping[str, str]) -> Finding:
    """Do the blocks' names mean anything? `found` as `studies.names` measures it; `expected`: the
    block that one would read a property from by its name."""
    reads = {name: of for name, of in found["reads"].items() if expected.get(name) in of}
    best = {name: max(of, key=lambda block: of[block][0]) for name, of in reads.items()}
    lows = {name: Interval(*of[expected[name]]).low for name, of in reads.items()}
    right = [  # even the low end of a block's interval lies above what any other block tells
        name
        for name, of in reads.items()
        if all(lows[name] > mean for b, (mean, *_) in of.items() if b != expected[name])
    ]
    others = [row[:n] + row[n + 1 :] for n, row in enumerate(found["similarity"])]
    moves, moved = found["moves"], ""
    if moves:  # short texts have no word twice in two contexts
        still = min(moves, key=lambda block: moves[block][0])
        moved = f" a word moves least with its context in {still};"
    saw = (
        f"{len(right)} of {len(reads)} properties are certainly read best from the block named for "
        f"them ({', '.join(f'{name}: {best[name]}' for name in reads)});{moved} "
        f"similarity of two blocks {np.mean(others):.2f} on average"
    )
    labels = "the names are labels: training does not fill a block with what it is called"
    return judged(
        ("The blocks' names", saw, f"chance: 1 in {len(found['blocks'])}"),
        (not reads, "undecided", "no block is named for a property that was read"),
        (all(map(math.isinf, lows.values())), "undecided", "too little text for an interval"),
        (len(right) > len(reads) / 2, "names", "the names say where to look"),
        (True, "labels", labels),
    )
