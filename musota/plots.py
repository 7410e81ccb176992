"""Data -> Figure. Computes nothing and saves nothing.

Colours are Okabe and Ito's, told apart by people who see no red or no green; line styles, markers
and hatches repeat the distinction for black-and-white prints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from musota.diagnose import PLAN_LADDER, REPORTED, Interval
from musota.layout import BlockLayout
from musota.runs import Run

LABELS = {
    "original": "MU-SOTA original",
    "optimized": "MU-SOTA optimized",
    "baseline": "dense baseline",
    "simplified": "MU-SOTA simplified",
    "simplified_twin": "dense twin of simplified",
}
BENCH_NAMES = {"mu": "MU-SOTA", "dense": "dense"}
_STYLES = {  # colour, line style, marker
    "original": ("#E69F00", "-.", "v"),
    "optimized": ("#0072B2", "-", "o"),
    "baseline": ("#D55E00", "--", "s"),
    "simplified": ("#56B4E9", "-", "^"),
    "simplified_twin": ("#CC79A7", "--", "D"),
}
_OTHER = ("#000000", ":", "x")
_SHADES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_HATCHES = ("", "//", "..", "\\\\", "xx", "--", "++", "oo")
_SIZES = {
    "batch": "sequences a step",
    "max_seq_len": "tokens a sequence",
    "vocab_size": "vocabulary",
    "n_layer": "layers",
    "n_block": "semantic blocks",
}
_THOUSANDS = FuncFormatter(lambda value, _: f"{value:,.0f}")


def _figure(width: float = 9.0, height: float = 4.0, columns: int = 1, **gridspec):
    figure = Figure(figsize=(width, height), layout="constrained", dpi=110)
    axes = figure.subplots(1, columns, gridspec_kw=gridspec or None)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def label_of(run: Run) -> str:
    return f"{LABELS.get(run.name, run.name)}, seed {run.seed}"


def curves(runs: Sequence[Run], rungs: Mapping[str, float], reported: bool) -> Figure:
    """Valid PPL (log) and accuracy by epoch, with the rungs and, if asked, the reported 402."""
    figure, (left, right) = _figure(10, 4.4, columns=2)
    for run in runs:
        colour, line, marker = _STYLES.get(run.name, _OTHER)
        history = run.history
        style = {"color": colour, "linestyle": line, "marker": marker, "label": label_of(run)}
        left.plot(history.epoch, history.ppl, **style)
        right.plot(history.epoch, 100 * history.accuracy, **style)
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
    for name, ppl in rungs.items():
        if name == "uniform":
            continue  # far above everything: it would flatten the curves
        left.axhline(ppl, color="0.45", linewidth=0.9, linestyle=(0, (1, 2)))
        label = {"xycoords": ("axes fraction", "data"), "fontsize": 8, "color": "0.3"}
        left.annotate(f"{name}\n{ppl:,.0f}", (1.01, ppl), va="center", **label)
    left.set(yscale="log", ylabel="valid perplexity per token (log)", title="Perplexity")
    left.yaxis.set_major_formatter(_THOUSANDS)
    left.yaxis.set_minor_formatter(FuncFormatter(_sparse_thousands))
    left.tick_params(axis="y", which="minor", labelsize=7)
    right.set(ylabel="valid top-1 accuracy (%)", title="Accuracy", ylim=(0, None))
    for axis in (left, right):
        axis.set_xlabel("epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlim(0.8, max(rightmost, REPORTED["epochs"] if reported else 0) + 0.3)
        axis.grid(axis="y", color="0.9")
    left.legend(fontsize=8)
    return figure


def _sparse_thousands(value: float, _) -> str:
    return f"{value:,.0f}" if str(value)[0] in "235" else ""


def training_curve(run: Run) -> Figure:
    """Training loss by optimizer step, and beside it the learning rate that was used."""
    figure, (left, right) = _figure(10, 3.6, columns=2)
    steps = run.steps
    left.plot(steps.step, steps.loss, color="0.7", linewidth=0.8, label="each logged step")
    smooth = steps.loss.ewm(halflife=max(1, len(steps) / 25)).mean()
    left.plot(steps.step, smooth, color=_STYLES["optimized"][0], label="smoothed")
    history = run.history
    left.plot(history.step, history.valid_loss, "s--", color="#D55E00", label="valid")
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
    fills = {
        group: {"fc": _SHADES[i % 8], "hatch": _HATCHES[(i + i // 8) % 8], "ec": "white", "lw": 0.6}
        for i, group in enumerate(groups)
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


def difference(intervals: Mapping[str, Interval], conclusion: str) -> Figure:
    """Differences in loss with their 95 % intervals around 0; left favours MU-SOTA."""
    figure, axis = _figure(8.5, 1.8 + 0.6 * len(intervals))
    for row, interval in enumerate(intervals.values()):
        axis.plot([interval.low, interval.high], [row, row], color="#0072B2", linewidth=3)
        axis.plot(interval.mean, row, "o", color="#0072B2", markersize=8)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(range(len(intervals)), list(intervals))
    axis.set_ylim(len(intervals) - 0.5, -0.5)
    edge = 1.25 * max(max(abs(i.low), abs(i.high)) for i in intervals.values())
    axis.set_xlim(-edge, edge)
    axis.set(
        xlabel="MU-SOTA − dense twin, nats per token (← MU-SOTA better · dense better →)",
        title=conclusion.replace(": ", "\n", 1),
    )
    axis.grid(axis="x", color="0.9")
    return figure


def ppl_against_parameters(runs: Sequence[Run]) -> Figure:
    """Best valid PPL against parameter count."""
    figure, axis = _figure(8, 4.6)
    drawn = set()
    for run in runs:
        colour, _, marker = _STYLES.get(run.name, _OTHER)
        label = None if run.name in drawn else LABELS.get(run.name, run.name)
        drawn.add(run.name)
        axis.plot(
            run.summary["parameters"],
            run.summary["ppl"],
            marker=marker,
            color=colour,
            markersize=10,
            linestyle="none",
            label=label,
        )
        axis.annotate(
            f"{run.summary['ppl']:.0f}",
            (run.summary["parameters"], run.summary["ppl"]),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
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
