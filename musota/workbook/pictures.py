"""What a model, a corpus and a machine look like: data -> Figure. Computes and saves nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from musota.plan.layout import BlockLayout
from musota.rules.plan import PLAN_LADDER, REPORTED
from musota.workbook.style import HATCHES, SHADES, THOUSANDS, new_figure

BENCH_NAMES = {"mu": "MU-SOTA", "dense": "dense"}
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


def ledgers(ledgers: Mapping[str, Mapping[str, int]]) -> Figure:
    """Where the parameters are: one stacked bar a model, groups largest first."""
    figure, axis = new_figure(10, 1.6 + 0.75 * len(ledgers))
    groups = sorted(
        {group for ledger in ledgers.values() for group in ledger},
        key=lambda group: -max(ledger.get(group, 0) for ledger in ledgers.values()),
    )
    # A group looks the same in every figure.
    known = [*_GROUPS, *(group for group in groups if group not in _GROUPS)]
    fills = {
        group: {"fc": SHADES[i % 8], "hatch": HATCHES[(i + i // 8) % 8], "ec": "white", "lw": 0.6}
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
    figure, axes = new_figure(4.6 * len(pictures), 5.3, columns=len(pictures))
    for axis, (title, layout) in zip(np.atleast_1d(axes), pictures.items(), strict=True):
        m = layout.matrix_size
        for index, block in enumerate(layout.blocks):
            axis.add_patch(
                Rectangle(
                    (block.column, block.row),
                    block.width,
                    block.height,
                    edgecolor="black",
                    facecolor=SHADES[(index + index // 4) % 8],
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
    figure, axis = new_figure(6.2, 4.8)
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
    figure, axis = new_figure(7, 4.2)
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
    figure, axis = new_figure(9, 3.6)
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
    axis.xaxis.set_major_formatter(THOUSANDS)
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


def bench(result: Mapping) -> Figure:
    """Training throughput and peak memory of ours and of the literal versions."""
    figure, (speed, memory) = new_figure(10, 3.8, columns=2)
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
        axis.xaxis.set_major_formatter(THOUSANDS)
    speed.set(xlabel="tokens/s (more is better)", title="One training step, tokens/s")
    memory.set(xlabel="MiB (less is better)", title="Peak memory of the step")
    figure.legend(fontsize=8, ncols=3, loc="outside lower center")
    return figure


def bench_scaling(result: Mapping) -> Figure:
    """Time per token against each size: measured, and what the arithmetic says."""
    axes_names = list(dict.fromkeys(point["axis"] for point in result["scaling"]))
    figure, axes = new_figure(2.6 * len(axes_names), 3.6, columns=len(axes_names))
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
