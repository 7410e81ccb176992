"""Data -> Figure. Computes nothing and saves nothing.

Colours are Okabe and Ito's, told apart by people who see no red or no green; line styles, markers
and hatches repeat the distinction for black-and-white prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from musota.plan.layout import BlockLayout
from musota.plan.registry import LABELS, OTHER_STYLE, STYLES
from musota.plan.suspects import MISSED
from musota.rules.plan import PLAN_LADDER, REPORTED
from musota.rules.stats import Interval
from musota.rules.verdicts import Cause
from musota.training.runs import Run

BENCH_NAMES = {"mu": "MU-SOTA", "dense": "dense"}


_SHADES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")


_HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++", "oo")


_GROUPS = (
    "affinity tables", "output", "embedding", "embedding (also output)", "feed-forward",
    "cross attention", "block attention", "gate", "positions", "norms", "attention",
)  # fmt: skip


_SIZES = {
    "batch": "sequences a step",
    "max_seq_len": "tokens a sequence",
    "vocab_size": "vocabulary",
    "n_layer": "layers",
    "n_block": "semantic blocks",
}


_VERDICTS = {  # colour, marker, fill
    "cause": ("#D55E00", "o", "full"),
    "undecided": ("#0072B2", "D", "left"),
    "not a cause": ("#666666", "s", "none"),
}


SWEEP_NATS = 2.5  # what is worse than the best by more is drawn at the upper edge


_ABLATED = ("A mechanism disabled", "One semantic block's cells zeroed")


_THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")


def _figure(width: float = 9.0, height: float = 4.0, columns: int = 1, **gridspec):
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    axes = figure.subplots(1, columns, gridspec_kw=gridspec or None)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def label_of(run: Run) -> str:
    return f"{LABELS.get(run.name, run.name.replace('_', ' '))}, seed {run.seed}"


def by_name(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of every name, in the order given."""
    return {
        name: [r for r in runs if r.name == name] for name in dict.fromkeys(r.name for r in runs)
    }


def curves(runs: Sequence[Run], rungs: Mapping[str, float], reported: bool) -> Figure:
    """Valid PPL (log) and accuracy by epoch, with the rungs and, if asked, the reported 402.

    Runs of one name are seeds: each thin, their mean (of the losses) thick.
    """
    figure, (left, right) = _figure(10, 4.4, columns=2)
    for name, group in by_name(runs).items():
        colour, line, marker = STYLES.get(name, OTHER_STYLE)
        label = label_of(group[0])
        if len(group) > 1:
            label = f"{LABELS.get(name, name)}, mean of {len(group)} seeds"
            for run in group:
                faint = {"color": colour, "linewidth": 0.7, "alpha": 0.5}
                left.plot(run.history.epoch, run.history.ppl, **faint)
                right.plot(run.history.epoch, 100 * run.history.accuracy, **faint)
        both = [run.history.set_index("epoch")[["valid_loss", "accuracy"]] for run in group]
        mean = (sum(both) / len(both)).dropna()  # epochs that every seed has reached
        style = {"color": colour, "linestyle": line, "marker": marker, "label": label}
        left.plot(mean.index, np.exp(mean.valid_loss), **style)
        right.plot(mean.index, 100 * mean.accuracy, **style)
    rightmost = max(run.history.epoch.max() for run in runs)
    if reported:
        left.plot(
            REPORTED["epochs"],
            REPORTED["ppl"],
            "k*",
            markersize=11,
            label=f"reported: {REPORTED['ppl']:.0f} after {REPORTED['epochs']} epochs",
        )
        right.plot(REPORTED["epochs"], 100 * REPORTED["accuracy"], "k*", markersize=11)
    left.set(yscale="log", ylabel="valid perplexity per token (log)", title="Perplexity")
    left.yaxis.set_major_formatter(_THOUSANDS)
    left.yaxis.set_major_locator(MaxNLocator(8))  # few decades: round numbers, not powers of ten
    left.minorticks_off()
    right.set(ylabel="valid top-1 accuracy (%)", title="Accuracy")
    for axis in (left, right):
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlim(0.8, max(rightmost, REPORTED["epochs"] if reported else 0) + 0.3)
        axis.grid(axis="y", color="0.9")
    left.legend(fontsize=8)
    # The uniform rung is far above everything: it would flatten the curves.
    _draw_rungs(left, {name: ppl for name, ppl in rungs.items() if name != "uniform"}, "\n")
    return figure


def _draw_rungs(axis, rungs: Mapping[str, float], between: str = " ") -> None:
    """Lines across at the rungs, their names on the right, pushed apart where they are close."""
    for level in rungs.values():
        axis.axhline(level, color="0.45", linewidth=0.9, linestyle=(0, (1, 2)))
    axis.figure.draw_without_rendering()  # for where the levels come to stand
    points, last = 72 / axis.figure.dpi, -np.inf
    for name, level in sorted(rungs.items(), key=lambda rung: rung[1]):
        text = f"{name}{between}{level:,.4g}"
        height = axis.transData.transform((0, level))[1] * points
        last = max(height, last + 10 * (1 + text.count("\n")))
        axis.annotate(text, (1.01, level), (0, last - height), xycoords=("axes fraction", "data"),
                      textcoords="offset points", va="center", fontsize=8, color="0.3")  # fmt: skip


def training_curve(run: Run) -> Figure:
    """Training loss by optimizer step, and beside it the learning rate that was used."""
    figure, (left, right) = _figure(10, 3.6, columns=2)
    steps = run.steps
    left.plot(steps.step, steps.loss, color="0.7", linewidth=0.8, label="each logged step")
    smooth = steps.loss.ewm(halflife=max(1, len(steps) / 25)).mean()
    left.plot(steps.step, smooth, color=STYLES["optimized"][0], label="smoothed")
    history = run.history
    if len(history):
        left.plot(history.step, history.valid_loss, "s--", color="#D55E00", label="valid")
    for step, event in run.events:
        left.axvline(step, color="black", linewidth=1, linestyle=":", label=event)
    left.set(ylabel="loss (nats/token)", title=f"Loss: {label_of(run)}")
    left.legend(fontsize=8)
    right.plot(steps.step, steps.learning_rate, color="#0072B2")
    warmup = run.experiment.training.warmup_steps
    right.axvline(warmup, color="0.4", linestyle=":", label=f"warm-up ends: step {warmup:,}")
    right.set(ylabel="learning rate", title="Learning rate", ylim=(0, None))
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    right.legend(fontsize=8)
    for axis in (left, right):
        axis.set_xlabel("optimizer step")
        axis.xaxis.set_major_formatter(_THOUSANDS)
        axis.grid(axis="y", color="0.9")
    return figure


def ledgers(ledgers: Mapping[str, Mapping[str, int]]) -> Figure:
    """Where the parameters are: one stacked bar a model, groups largest first."""
    figure, axis = _figure(10, 1.6 + 0.75 * len(ledgers))
    groups = sorted(
        {group for ledger in ledgers.values() for group in ledger},
        key=lambda group: -max(ledger.get(group, 0) for ledger in ledgers.values()),
    )
    # A group looks the same in every figure.
    known = [*_GROUPS, *(group for group in groups if group not in _GROUPS)]
    fills = {
        group: {"fc": _SHADES[i % 8], "hatch": _HATCHES[(i + i // 8) % 8], "ec": "white", "lw": 0.6}
        for i, group in enumerate(known)
    }
    largest = max(sum(ledger.values()) for ledger in ledgers.values())
    for row, ledger in enumerate(ledgers.values()):
        total, left = sum(ledger.values()), 0
        for group in groups:
            size = ledger.get(group, 0)
            axis.barh(row, size, left=left, **fills[group])
            if size > 0.07 * largest:
                share = axis.text(
                    left + size / 2, row, f"{size / total:.0%}", ha="center", va="center"
                )
                share.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1.5})
            left += size
        axis.text(left, row, f"  {total:,}", va="center", fontsize=9)
    handles = [Rectangle((0, 0), 1, 1, **fills[group]) for group in groups]
    axis.set_yticks(range(len(ledgers)), list(ledgers))
    axis.invert_yaxis()
    axis.set(xlabel="parameters (millions)", title="Parameter ledger", xlim=(0, 1.18 * largest))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}")
    figure.legend(handles, groups, fontsize=8, loc="outside right upper")
    return figure


def layouts(pictures: Mapping[str, BlockLayout]) -> Figure:
    """The semantic blocks on the token's matrix, with the order in which cells are stored."""
    figure, axes = _figure(4.6 * len(pictures), 5.3, columns=len(pictures))
    for axis, (title, layout) in zip(np.atleast_1d(axes), pictures.items(), strict=True):
        m = layout.matrix_size
        for index, block in enumerate(layout.blocks):
            axis.add_patch(
                Rectangle(
                    (block.column, block.row),
                    block.width,
                    block.height,
                    edgecolor="black",
                    facecolor=_SHADES[(index + index // 4) % 8],
                    alpha=0.45,
                    linewidth=1.5,
                )
            )
            x = block.column + block.width / 2
            label = {"ha": "center", "va": "center", "fontsize": 13, "fontweight": "bold"}
            axis.text(x, block.row + 0.6, block.name, **label)
            meaning = block.title.replace(" ", "\n")
            axis.text(x, block.row + block.height - 0.08, meaning, ha="center", fontsize=7.5)
        order = layout.to_matrix(np.arange(m * m))
        for row in range(m):
            for column in range(m):
                axis.text(
                    column + 0.04,
                    row + 0.04,
                    order[row, column],
                    fontsize=5.5,
                    color="0.35",
                    va="top",
                )
        axis.set(xlim=(0, m), ylim=(m, 0), aspect="equal", title=title)
        axis.set_xticks(range(m + 1), [])
        axis.set_yticks(range(m + 1), [])
        axis.set_xlabel("columns (small numbers: place in the stored vector)", fontsize=8)
        axis.set_ylabel("rows", fontsize=8)
    return figure


def causality(change: np.ndarray) -> Figure:
    """Largest change of any logit at each position (column) when one token (row) is replaced."""
    figure, axis = _figure(6.2, 4.8)
    shown = np.ma.masked_where(change == 0, np.log10(np.where(change > 0, change, 1)))
    image = axis.imshow(shown, cmap="viridis", interpolation="nearest")
    axis.set_facecolor("white")
    axis.set(
        xlabel="position whose logits are compared",
        ylabel="position of the replaced token",
        title="White: not one logit changed",
    )
    figure.colorbar(image, label="log₁₀ of the largest change of a logit")
    return figure


def zipf(counts: np.ndarray) -> Figure:
    """Token frequency against rank, with Zipf's 1/rank for comparison."""
    figure, axis = _figure(7, 4.2)
    ordered = np.sort(counts[counts > 0])[::-1]
    ranks = np.arange(1, len(ordered) + 1)
    axis.loglog(ranks, ordered, color="#0072B2", label=f"{len(ordered):,} token types in train")
    axis.loglog(ranks, ordered[0] / ranks, "k:", label="Zipf: most frequent ÷ rank")
    axis.set(
        xlabel="rank of the token type", ylabel="occurrences in train", title="Token frequencies"
    )
    axis.grid(color="0.9")
    axis.legend()
    return figure


def ladder(rungs: Mapping[str, float], comparable: bool) -> Figure:
    """The measured rungs beside the plan's guesses and the reported result.

    `comparable` is False where the plan's numbers speak of another corpus or vocabulary.
    """
    figure, axis = _figure(9, 3.6)
    bars = [(f"{name} (measured)", ppl, "#0072B2", "") for name, ppl in rungs.items()]
    scale = "" if comparable else ", WikiText-2 at V 50,000"
    for name, ppl in PLAN_LADDER.items():
        bars.append((f"{name} (the plan's guess{scale})", ppl, "#E69F00", "//"))
    bars.append((f"MU-SOTA, 10 epochs (reported{scale})", REPORTED["ppl"], "#999999", ".."))
    bars.sort(key=lambda bar: -bar[1])
    for row, (_, ppl, colour, hatch) in enumerate(bars):
        axis.barh(row, ppl, color=colour, hatch=hatch, edgecolor="white")
        axis.text(ppl, row, f" {ppl:,.0f}", va="center", fontsize=9)
    axis.set_yticks(range(len(bars)), [name for name, *_ in bars])
    axis.set(xscale="log", xlabel="valid perplexity per token (log)", title="The ladder")
    axis.set_xlim(min(bar[1] for bar in bars) / 2, max(bar[1] for bar in bars) * 4)
    axis.xaxis.set_major_formatter(_THOUSANDS)
    return figure


def difference(
    intervals: Mapping[str, Interval], title: str, sides: str = "← MU-SOTA better · dense better →"
) -> Figure:
    """Differences in loss with their 95 % intervals around 0; `sides` names left and right."""
    figure, axis = _figure(8.5, 1.8 + 0.6 * len(intervals))
    _intervals(axis, list(intervals.values()), list(intervals))
    ends = [abs(end) for i in intervals.values() for end in (i.low, i.high) if np.isfinite(end)]
    edge = 1.25 * max([*ends, *(abs(i.mean) for i in intervals.values()), 0.001])
    axis.set_xlim(-edge, edge)
    axis.set(xlabel=f"difference, nats per token ({sides})", title=title.replace(": ", "\n", 1))
    return figure


def _intervals(axis, intervals: Sequence[Interval | None], labels, styles=()) -> None:
    """A row for each interval, from the top, around a line at 0; None leaves its row empty."""
    for row, interval in enumerate(intervals):
        colour, marker, fill = styles[row] if styles else ("#0072B2", "o", "full")
        if interval is None:
            axis.text(0, row, "diverges ", ha="right", va="center", fontsize=8)
            continue
        if np.isfinite(interval.high - interval.low):
            axis.plot([interval.low, interval.high], [row, row], color=colour, linewidth=2.5)
        style = {"fillstyle": fill, "markersize": 8, "markeredgewidth": 1.5}
        axis.plot(interval.mean, row, marker, color=colour, markerfacecoloralt="white", **style)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(intervals)), labels)
    axis.set_ylim(len(intervals) - 0.5, -0.5)
    axis.grid(axis="x", color="0.9")


def root_causes(causes: Sequence[Cause], relevant: float) -> Figure:
    """What mending each suspect does to the valid loss, the largest gain on top."""
    figure, axis = _figure(10.5, 1.9 + 0.36 * len(causes))
    sure = {c: c.suspect.confidence for c in causes}
    labels = [
        f"{c.suspect.name}\n{sure[c] if sure[c] == MISSED else f'plan: {sure[c]}'} · {c.here}"
        for c in causes
    ]
    styles = [_VERDICTS[cause.verdict] for cause in causes]
    _intervals(axis, [cause.effect for cause in causes], labels, styles)
    axis.tick_params(axis="y", labelsize=7.5)
    axis.axvspan(-relevant, relevant, color="0.93", zorder=0)
    for row, cause in enumerate(causes):
        text = f"{cause.ppl_before:,.0f} → {cause.ppl_after:,.0f}"
        if cause.effect is None:
            text = f"{cause.ppl_before:,.0f} → diverges"
        axis.text(1.01, row, text, transform=axis.get_yaxis_transform(), va="center", fontsize=8)
    axis.text(1.01, -0.8, "valid PPL", transform=axis.get_yaxis_transform(), fontsize=8)
    axis.set(
        xlabel="change of the valid loss, nats per token (← mending it helps · it hurts →)",
        title="Which suspect holds the model back?",
    )
    handles = [
        axis.plot([], [], marker, color=colour, fillstyle=fill, markerfacecoloralt="white",
                  markeredgewidth=1.5, label=verdict)[0]
        for verdict, (colour, marker, fill) in _VERDICTS.items()
    ]  # fmt: skip
    handles.append(Rectangle((0, 0), 1, 1, color="0.93", label=f"under {relevant} nats"))
    figure.legend(handles=handles, fontsize=8, ncols=4, loc="outside lower right")
    return figure


def rate_sweep(sweeps: Mapping[str, Mapping[float, Sequence[float]]]) -> Figure:
    """Valid loss against the learning rate, a line a model; dots are seeds, rings the best."""
    figure, axis = _figure(8.5, 4.2)
    _draw_sweep(axis, sweeps)
    return figure


def _draw_sweep(axis, sweeps: Mapping[str, Mapping[float, Sequence[float]]]) -> None:
    styles = [STYLES["optimized"], STYLES["baseline"], OTHER_STYLE]
    lowest = min(np.mean(values) for losses in sweeps.values() for values in losses.values())
    ceiling, beyond = lowest + SWEEP_NATS, set()
    named = zip(sweeps.items(), styles, strict=False)
    for place, ((label, losses), (colour, line, marker)) in enumerate(named):
        rates = sorted(losses)
        means = [float(np.mean(losses[rate])) for rate in rates]
        style = {"color": colour, "linestyle": line, "marker": marker}
        axis.plot(rates, np.minimum(means, ceiling), label=label, **style)
        for rate in rates:
            dots = [rate] * len(losses[rate])
            axis.plot(dots, np.minimum(losses[rate], ceiling), ".", color=colour, markersize=4)
            if np.mean(losses[rate]) > ceiling and rate not in beyond:
                beyond.add(rate)
                axis.annotate("off the scale ↑", (rate, ceiling), (0, 6), fontsize=8, ha="center",
                              textcoords="offset points")  # fmt: skip
        best = int(np.argmin(means))
        axis.plot(rates[best], means[best], "o", color=colour, markersize=15, fillstyle="none")
        text = f"PPL {np.exp(means[best]):,.0f} at {rates[best]:.2g}"
        side = "left" if best == 0 else "right" if best == len(rates) - 1 else "center"
        below = (0, -17 - 11 * place)  # the other model's best may be close by
        axis.annotate(text, (rates[best], means[best]), below, textcoords="offset points",
                      ha=side, fontsize=8, color=colour)  # fmt: skip
    axis.set(
        xscale="log",
        xlabel="learning rate (log)",
        ylabel="valid loss (nats/token)",
        title="Each model at each rate (ring: its best)",
    )
    axis.margins(y=0.2)
    axis.grid(color="0.9")
    axis.legend(fontsize=9)


def data_halving(losses: Mapping[int, Mapping[int, float]]) -> Figure:
    """Valid loss against the amount of training text, at equal numbers of steps; dots are seeds."""
    figure, axis = _figure(7, 3.8)
    amounts = sorted(losses)
    axis.plot(amounts, [np.mean(list(losses[n].values())) for n in amounts], "o-", color="#0072B2",
              label="mean over seeds")  # fmt: skip
    for n in amounts:
        axis.plot([n] * len(losses[n]), list(losses[n].values()), "x", color="#D55E00",
                  label="one seed" if n == amounts[0] else None)  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xticks(amounts, [f"{n:,}" for n in amounts])
    axis.set(
        xlabel="training tokens (log), read in as many steps",
        ylabel="valid loss (nats/token)",
        title="What more text brings",
    )
    axis.grid(color="0.9")
    axis.legend(fontsize=8)
    return figure


def clean_gap(runs: Sequence[Run]) -> Figure:
    """Loss by epoch on training text without dropout, and on valid; the gap is shaded."""
    figure, axis = _figure(8, 4)
    for run in runs:
        colour, line, marker = STYLES.get(run.name, OTHER_STYLE)
        epochs = [record["epoch"] for record in run.health]
        valid = [record["valid_loss"] for record in run.health]
        clean = [record["clean_train_loss"] for record in run.health]
        style = {"color": colour, "linestyle": line}
        axis.plot(epochs, valid, marker=marker, label=f"{label_of(run)}: valid", **style)
        axis.plot(epochs, clean, marker=marker, fillstyle="none",
                  label=f"{label_of(run)}: training text", **style)  # fmt: skip
        axis.fill_between(epochs, clean, valid, color=colour, alpha=0.12)
    axis.set(
        xlabel="epoch", ylabel="loss without dropout (nats/token)", title="Training against valid"
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(axis="y", color="0.9")
    axis.legend(fontsize=8)
    return figure


def ablations(effects: Mapping[str, Interval], ppl: float, layout: BlockLayout) -> Figure:
    """How the perplexity grows when a mechanism, or one semantic block's cells, are disabled."""
    meanings = {block.name: f"{block.name} {block.title}" for block in layout.blocks}
    figure, axes = _figure(10, 1.4 + 0.3 * len(meanings), columns=2)
    parts = [name for name in effects if name not in meanings]
    for axis, names, title in zip(axes, (parts, list(meanings)), _ABLATED, strict=True):
        grown = np.array(
            [np.expm1([effects[n].mean, effects[n].low, effects[n].high]) * ppl for n in names]
        )
        rows = range(len(names))
        spread = np.abs(grown[:, 1:] - grown[:, :1]).T
        axis.barh(rows, grown[:, 0], color="#56B4E9", edgecolor="black", linewidth=0.6)
        axis.errorbar(grown[:, 0], rows, xerr=spread, fmt="none", ecolor="black", capsize=3)
        for row, (mean, _, high) in zip(rows, grown, strict=True):
            axis.text(max(mean, high), row, f"  {mean:+,.1f}", va="center", fontsize=8)
        axis.axvline(0, color="black", linewidth=1)
        axis.set_yticks(rows, [meanings.get(name, name) for name in names], fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.2)
        axis.set(xlabel=f"change of valid PPL (whole model: {ppl:,.1f})", title=title)
    return figure


def block_view(
    cells: np.ndarray, gate: np.ndarray, tokens: Sequence[str], layout: BlockLayout, layer: int
) -> Figure:
    """The tokens' matrices after a layer (0: as embedded), and every layer's gates.

    cells (L + 1, T, d) in cell order, gate (L, T, N), as `probes.look_inside` gives them.
    """
    count, L = len(tokens), len(gate)
    rows, gate_rows, columns = -(-(count + 1) // 7), -(-L // 4), 7
    heights = 0.5 + 1.4 * rows, 0.9 + (0.5 + 0.14 * len(layout.blocks)) * gate_rows
    figure = Figure(figsize=(10, sum(heights)), dpi=110, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    above.suptitle(f"The tokens' matrices after layer {layer}" if layer else "The embeddings",
                   fontsize=10)  # fmt: skip
    axes = list(above.subplots(rows, columns).flat)
    bound = float(np.abs(cells[layer]).max())
    key = np.full((layout.matrix_size,) * 2, np.nan)
    matrices = [key, *layout.to_matrix(cells[layer])]
    for index, axis in enumerate(axes):
        axis.set_visible(index <= count)
        if index > count:
            continue
        image = axis.imshow(matrices[index], cmap="cividis", vmin=-bound, vmax=bound)
        axis.set_title(tokens[index - 1] if index else "the blocks", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
        for block in layout.blocks:
            x, y = block.column - 0.5, block.row - 0.5
            edge = {"fill": False, "ec": "white" if index else "black", "lw": 0.8}
            axis.add_patch(Rectangle((x, y), block.width, block.height, **edge))
            if not index:
                middle = x + block.width / 2, y + block.height / 2
                axis.text(*middle, block.name, ha="center", va="center", fontsize=7)
    above.colorbar(image, ax=axes, label="cell", shrink=0.8)
    below.suptitle("How far each block moves, by token and layer (gate)", fontsize=10)
    grids = below.subplots(gate_rows, min(4, L), sharex=True, sharey=True, squeeze=False)
    for index, axis in enumerate(grids.flat):
        if index >= L:
            axis.set_visible(False)
            continue
        shown = axis.imshow(gate[index].T, cmap="cividis", vmin=gate.min(), vmax=gate.max(),
                            aspect="auto", interpolation="nearest")  # fmt: skip
        axis.set_title(f"layer {index + 1}", fontsize=8)
        axis.set_yticks(range(len(layout.blocks)), layout.names, fontsize=6.5)
        axis.set_xticks(range(count), tokens, fontsize=7, rotation=90)
    below.colorbar(shown, ax=list(grids.flat), label="sensitivity", shrink=0.8)
    return figure


@dataclass(frozen=True)
class Curve:
    """One run's curve as the explorer shows it, ready to draw."""

    name: str  # of the experiment, for its style
    label: str
    x: np.ndarray
    y: np.ndarray
    faint: np.ndarray | None = None  # before smoothing
    plateau: tuple[float, float] | None = None
    marks: tuple[tuple[float, str], ...] = ()


def explored(
    curves: Sequence[Curve],
    rungs: Mapping[str, float],
    labels: tuple[str, str],
    log_x: bool = False,
    log_y: bool = False,
) -> Figure:
    """Curves with their plateaus shaded, their marks (events, flags), and rungs across."""
    figure, axis = _figure(9, 4.4)
    unknown = [name for name in dict.fromkeys(c.name for c in curves) if name not in STYLES]
    seen: dict[str, int] = {}
    for place, curve in enumerate(curves):
        nth_seed = seen[curve.name] = seen.get(curve.name, -1) + 1
        colour, line, marker = STYLES.get(curve.name, OTHER_STYLE)
        if curve.name in unknown:
            nth = unknown.index(curve.name)
            colour, marker = _SHADES[nth % 8], "xP*dph<>"[nth % 8]
        if curve.faint is not None:
            axis.plot(curve.x, curve.faint, color=colour, alpha=0.3, linewidth=0.8)
        few = marker if len(curve.x) <= 60 else None
        seed = {"fillstyle": ("full", "none", "left")[nth_seed % 3], "lw": 1.6 / (1 + nth_seed)}
        axis.plot(curve.x, curve.y, color=colour, linestyle=line, marker=few, label=curve.label,
                  **seed)  # fmt: skip
        if curve.plateau:  # a strip for each curve
            strip = {"ymin": place / len(curves), "ymax": (place + 1) / len(curves)}
            hatch = _HATCHES[1 + place % 7]
            axis.axvspan(*curve.plateau, facecolor=colour, alpha=0.15, hatch=hatch, ec=colour,
                         label=f"plateau: {curve.label}", **strip)  # fmt: skip
        for x, text in curve.marks:
            axis.axvline(x, color=colour, linewidth=1, linestyle=":")
            above = {"xycoords": ("data", "axes fraction"), "rotation": 90, "va": "top"}
            axis.annotate(text, (x, 0.98), (-2, 0), textcoords="offset points", ha="right",
                          fontsize=7.5, **above)  # fmt: skip
    axis.set(xlabel=labels[0], ylabel=labels[1])
    if log_x:
        axis.set_xscale("log")
    form = FuncFormatter(lambda value, _: f"{value:,.10g}")
    if log_y:
        values = np.concatenate([curve.y for curve in curves]) if curves else np.ones(1)
        most = float(values.max())
        axis.set_yscale("log")
        if values.min() < most / 1e4:  # a rate that ends at 0
            axis.set_ylim(bottom=most / 1e4)
        elif most < 100 * values.min():  # few decades: round numbers, not powers of ten
            axis.yaxis.set_major_locator(MaxNLocator(7))
            axis.minorticks_off()
    if log_x:
        axis.xaxis.set_minor_formatter(form)
    axis.xaxis.set_major_formatter(form)
    axis.yaxis.set_major_formatter(form)
    if labels[0] == "epoch" and not log_x:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlim(left=0)
    axis.grid(color="0.9")
    if curves:
        figure.legend(fontsize=8, ncols=2, loc="outside upper center")
    _draw_rungs(axis, rungs)
    return figure


def answer(
    runs: Sequence[Run],
    rungs: Mapping[str, float],
    sweeps: Mapping[str, Mapping[float, Sequence[float]]],
) -> Figure:
    """Where every model ends (hollow: seeds), beside the rungs; and, if measured, the sweeps."""
    figure, axes = _figure(11, 4.6, columns=2 if sweeps else 1)
    axis = np.atleast_1d(axes)[0]
    groups = by_name(runs)
    for row, (name, group) in enumerate(groups.items()):
        colour, _, marker = STYLES.get(name, OTHER_STYLE)
        ppls = [run.summary["ppl"] for run in group]
        mean = float(np.exp(np.mean(np.log(ppls))))
        style = {"color": colour, "marker": marker, "linestyle": "none"}
        axis.plot(ppls, [row + 0.22] * len(ppls), fillstyle="none", markersize=5, **style)
        axis.plot(mean, row, markersize=9, **style)
        axis.annotate(f"{mean:,.0f}", (mean, row), (0, 7), textcoords="offset points",
                      ha="center", fontsize=9)  # fmt: skip
    furthest = max(run.summary["ppl"] for run in runs)
    for name, ppl in rungs.items():
        if ppl < 1.5 * furthest:
            axis.axvline(ppl, color="0.45", linewidth=0.9, linestyle=(0, (1, 2)))
            above = {"xycoords": ("data", "axes fraction"), "fontsize": 8, "color": "0.3"}
            axis.annotate(f"{name} {ppl:,.0f}", (ppl, 1.01), ha="center", **above)
    axis.set_yticks(range(len(groups)), [LABELS.get(name, name) for name in groups], fontsize=9)
    axis.set_ylim(len(groups) - 0.4, -0.6)
    axis.set_xlabel("best valid perplexity per token (less is better)")
    axis.xaxis.set_major_formatter(_THOUSANDS)
    axis.margins(x=0.12)
    axis.grid(axis="x", color="0.9")
    axis.set_title("Where the models end (hollow: each seed)", pad=18)
    if sweeps:
        _draw_sweep(axes[1], sweeps)
    return figure


def ppl_against_parameters(runs: Sequence[Run]) -> Figure:
    """Best valid PPL against parameter count; small markers are seeds."""
    figure, axis = _figure(8, 4.6)
    for name, group in by_name(runs).items():
        colour, _, marker = STYLES.get(name, OTHER_STYLE)
        style = {"color": colour, "linestyle": "none", "marker": marker}
        size, ppls = group[0].summary["parameters"], [run.summary["ppl"] for run in group]
        mean = float(np.exp(np.mean(np.log(ppls))))
        axis.plot([size] * len(ppls), ppls, fillstyle="none", markersize=6, **style)
        axis.plot(size, mean, markersize=10, label=LABELS.get(name, name), **style)
        axis.annotate(f"{mean:.0f}", (size, mean), (9, 0), textcoords="offset points", va="center",
                      fontsize=9)  # fmt: skip
    axis.set(
        xlabel="parameters", ylabel="best valid perplexity per token", title="PPL against size"
    )
    axis.xaxis.set_major_formatter(_THOUSANDS)
    axis.margins(0.15)
    axis.grid(color="0.9")
    axis.legend(fontsize=9)
    return figure


def bench(result: Mapping) -> Figure:
    """Training throughput and peak memory of ours and of the literal versions."""
    figure, (speed, memory) = _figure(10, 3.8, columns=2)
    fills = {
        "ours": {"color": "#0072B2"},
        "literal": {"color": "#E69F00", "hatch": "//"},
        "literal, attention-weight dropout": {"color": "#999999", "hatch": ".."},
    }
    kinds = list(dict.fromkeys(row["model"] for row in result["rows"]))
    for place, kind in enumerate(kinds):
        rows = [row for row in result["rows"] if row["model"] == kind]
        bars = [("ours", rows[0]["tokens_per_s"], rows[0]["memory_bytes"], "")]
        for row in rows:
            note = f"  ours {row['tokens_per_s_ratio']:.1f}×"
            held = row["against_memory_bytes"]
            bars.append((row["against"], row["against_tokens_per_s"], held, note))
        for offset, (who, rate, held, note) in enumerate(bars):
            y = place * 4 + offset
            for axis, value in ((speed, rate), (memory, held / 2**20)):
                label = who if place == 0 and axis is speed else None
                axis.barh(y, value, edgecolor="white", label=label, **fills[who])
                ratio = note if axis is speed else ""
                axis.text(value, y, f" {value:,.0f}{ratio}", va="center", fontsize=8)
    names = [BENCH_NAMES[kind] for kind in kinds]
    for axis in (speed, memory):
        axis.set_yticks([4 * place + 1 for place in range(len(kinds))], names)
        axis.invert_yaxis()
        axis.margins(x=0.25)
        axis.xaxis.set_major_formatter(_THOUSANDS)
    speed.set(xlabel="tokens/s (more is better)", title="One training step, tokens/s")
    memory.set(xlabel="MiB (less is better)", title="Peak memory of the step")
    figure.legend(fontsize=8, ncols=3, loc="outside lower center")
    return figure


def bench_scaling(result: Mapping) -> Figure:
    """Time per token against each size: measured, and what the arithmetic says."""
    axes_names = list(dict.fromkeys(point["axis"] for point in result["scaling"]))
    figure, axes = _figure(2.6 * len(axes_names), 3.6, columns=len(axes_names))
    styles = {"mu": ("#0072B2", "o"), "dense": ("#D55E00", "s")}
    for axis, name in zip(np.atleast_1d(axes), axes_names, strict=True):
        for kind, (colour, marker) in styles.items():
            label = BENCH_NAMES[kind]
            points = [p for p in result["scaling"] if (p["axis"], p["model"]) == (name, kind)]
            if not points:
                continue
            x = [point["value"] for point in points]
            measured = [point["time_per_token"] for point in points]
            expected = [point["arithmetic"] for point in points]
            axis.plot(x, measured, marker=marker, color=colour, label=f"{label}, measured")
            axis.plot(x, expected, "--", color=colour, alpha=0.6, label=f"{label}, arithmetic")
        axis.set_xscale("log", base=2)
        axis.set_xticks(x, [f"{value:,}" for value in x], rotation=45, fontsize=8)
        axis.minorticks_off()
        axis.set_xlabel(_SIZES.get(name, name))
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.grid(axis="y", color="0.9")
    np.atleast_1d(axes)[0].set_ylabel("time per token (reference shape = 1)")
    handles, labels = np.atleast_1d(axes)[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, ncols=4, loc="outside lower center")
    return figure
