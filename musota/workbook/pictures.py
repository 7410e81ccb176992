"""What a model, a corpus and a machine look like: data -> Figure. Computes and saves nothing."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from musota.plan.layout import BlockLayout
from musota.rules.audit import GUILTY
from musota.rules.plan import PLAN_LADDER, REPORTED
from musota.rules.stats import Interval
from musota.studies.audit import Audit
from musota.workbook import style
from musota.workbook.style import BLUE, GREY, HATCHES, ORANGE, PLAIN, RED, SHADES, new_figure
from musota.workbook.tables import BENCH_NAMES

# In this order a group looks the same in every figure; others come after, in theirs.
GROUPS = (
    "affinity tables", "output", "embedding", "embedding (also output)", "feed-forward",
    "cross attention", "block attention", "gate", "positions", "norms", "attention",
)  # fmt: skip


def ledgers(ledgers: Mapping[str, Mapping[str, int]]) -> Figure:
    """Where the parameters are: one stacked bar a model, groups largest first."""
    figure, axis = new_figure(10, 1.6 + 0.75 * len(ledgers))
    table = pd.DataFrame(ledgers).fillna(0).T  # a model a row, a group a column
    table = table[table.max().sort_values(ascending=False).index]
    looks = list(dict.fromkeys([*GROUPS, *table]))
    names, totals, left = table.index.map(style.wrapped), table.sum(axis=1), 0
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    for group, sizes in table.items():
        i = looks.index(group)
        look = {"color": SHADES[i % 8], "hatch": HATCHES[(i + i // 8) % 8], "edgecolor": "white"}
        bars = axis.barh(names, sizes, left=left, label=group, linewidth=0.6, **look)
        shares = (sizes / totals).map("{:.0%}".format).where(sizes > 0.07 * totals.max(), "")
        axis.bar_label(bars, shares, label_type="center", bbox=white)
        left = left + sizes
    axis.bar_label(bars, totals.map("  {:,.0f}".format), fontsize=9)
    axis.invert_yaxis()
    axis.set(xlabel="parameters (millions)", title="Parameter ledger")
    axis.set_xlim(0, 1.18 * totals.max())
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}")
    figure.legend(fontsize=8, loc="outside right upper")
    return figure


def _outline(axis, layout: BlockLayout, edge: str, offset: float = 0) -> None:
    """The blocks as rectangles on the matrix."""
    for block in layout.blocks:
        corner = block.column + offset, block.row + offset
        look = {"fill": False, "edgecolor": edge, "linewidth": 0.8}
        axis.add_patch(Rectangle(corner, block.width, block.height, **look))


def layouts(shown: Mapping[str, BlockLayout]) -> Figure:
    """The semantic blocks on the token's matrix, with the order in which cells are stored."""
    figure, axes = new_figure(4.6 * len(shown), 5.3, columns=len(shown))
    for axis, (title, layout) in zip(np.atleast_1d(axes), shown.items(), strict=True):
        _outline(axis, layout, "black")
        for index, block in enumerate(layout.blocks):
            corner, shade = (block.column, block.row), SHADES[(index + index // 4) % 8]
            axis.add_patch(Rectangle(corner, block.width, block.height, fc=shade, alpha=0.45))
            x, bottom = block.column + block.width / 2, block.row + block.height - 0.08
            bold = {"ha": "center", "fontsize": 13, "weight": "bold"}
            if block.width > 3 * block.height:  # flat: beside each other
                name = f"{block.name}   {block.title}"
                axis.text(x, bottom - block.height / 2, name, va="center", **bold | {"fontsize": 9})
                continue
            axis.text(x, block.row + 0.7, block.name, **bold)
            axis.text(x, bottom, block.title.replace(" ", "\n"), ha="center", fontsize=7.5)
        ends = np.cumsum((0, *layout.sizes))  # in a large matrix only these are told
        for (row, column), place in np.ndenumerate(layout.to_matrix(np.arange(ends[-1]))):
            if len(ends) > ends[-1] / 8 or {place, place + 1} & {*ends}:
                axis.text(column + 0.04, row + 0.04, place, fontsize=5.5, color="0.35", va="top")
        axis.set(xlim=(0, layout.width), ylim=(layout.height, 0), aspect="equal", title=title)
        axis.set_xticks(range(layout.width + 1), [])
        axis.set_yticks(range(layout.height + 1), [])
        axis.set_xlabel("columns (small numbers: place in the stored vector)", fontsize=8)
        axis.set_ylabel("rows", fontsize=8)
    return figure


def causality(change: np.ndarray) -> Figure:
    """Whether any logit at each position (column) changes when one token (row) is replaced."""
    figure, axis = new_figure(6.2, 5.2)
    _draw_moves(axis, change)
    return figure


def _draw_moves(axis, change: np.ndarray) -> None:
    ahead = np.tril(change > 0, -1)
    axis.imshow((change > 0) + 1 * ahead, cmap=ListedColormap(["white", BLUE, RED]), vmin=0, vmax=2)
    axis.set(xlabel="… does the guess made at this position move?", ylabel="replace this token …")
    axis.set_title("Does it see what comes?" + ("" if ahead.any() else " (nothing red: no)"))
    keys = {"it moves, and may: the token was known": BLUE, "it moves: IT SAW WHAT COMES": RED}
    handles = [Patch(color=colour, label=text) for text, colour in keys.items()]
    axis.legend(handles=handles, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13))


def audited(audit: Audit) -> Figure:
    """Which guess moves with which token, and the loss on random tokens, for whoever never heard
    of either."""
    figure, (left, right) = new_figure(11.5, 5.2, columns=2)
    _draw_moves(left, audit.change.numpy())
    floor, losses = np.log(audit.symbols), pd.Series(audit.losses, dtype=float)
    right.plot(losses, color="0.75", linewidth=0.8, label="each step, on fresh random tokens")
    right.plot(losses.rolling(15, min_periods=1).mean(), color=BLUE, label="mean of 15")
    text = f"ln {audit.symbols} = {floor:.2f}: nobody can do better honestly"
    right.axhline(floor, color="black", linestyle="--", label=text)
    right.axhspan(0, floor, color=RED, alpha=0.08)
    right.set(ylim=(0, None), xlabel="training step", ylabel="its loss (nats a token)")
    right.set_title("Can it foretell what is random?")
    right.legend(fontsize=8, loc="upper right")
    guilty = [finding.verdict for finding in audit.findings if finding.verdict in GUILTY]
    said = f"NOT honest: {', '.join(guilty)}" if guilty else "Honest, in all that was asked"
    figure.suptitle(said, color=RED if guilty else "black")
    return figure


def zipf(counts: np.ndarray) -> Figure:
    """Token frequency against rank, with Zipf's 1/rank for comparison."""
    figure, axis = new_figure(7, 4.2, grid="both")
    ordered = np.sort(counts[counts > 0])[::-1]
    ranks = np.arange(1, len(ordered) + 1)
    axis.loglog(ranks, ordered, color=BLUE, label=f"{len(ordered):,} token types in train")
    axis.loglog(ranks, ordered[0] / ranks, "k:", label="Zipf: most frequent ÷ rank")
    axis.set(xlabel="rank of the token type", ylabel="occurrences in train")
    axis.set_title("Token frequencies")
    axis.legend()
    return figure


def ladder(rungs: Mapping[str, float], comparable: bool) -> Figure:
    """The measured rungs beside the plan's guesses and the reported result.

    `comparable` is False where the plan's numbers speak of another corpus or vocabulary.
    """
    figure, axis = new_figure(9, 3.6)
    scale = "" if comparable else ", WikiText-2 at V 50,000"
    bars = [(ppl, f"{name} (measured)", BLUE, "") for name, ppl in rungs.items()]
    guesses = PLAN_LADDER.items()
    bars += [(ppl, f"{name} (the plan's guess{scale})", ORANGE, "//") for name, ppl in guesses]
    bars.append((REPORTED["ppl"], f"MU-SOTA, 10 epochs (reported{scale})", GREY, ".."))
    ppls, names, colours, hatches = zip(*sorted(bars, reverse=True), strict=True)
    drawn = axis.barh(names, ppls, color=colours, hatch=hatches, edgecolor="white")
    axis.bar_label(drawn, fmt=" {:,.0f}", fontsize=9)
    axis.set(xscale="log", xlabel="valid perplexity per token (log)", title="The ladder")
    axis.set_xlim(min(ppls) / 2, max(ppls) * 4)
    axis.xaxis.set_major_formatter(PLAIN)
    return figure


def block_view(
    cells: np.ndarray, gate: np.ndarray, tokens: Sequence[str], layout: BlockLayout, layer: int
) -> Figure:
    """The tokens' matrices after a layer (0: as embedded), and every layer's gates.

    cells (L + 1, T, d) in cell order, gate (L, T, N), as `probes.look_inside` gives them.
    """
    T, L = len(tokens), len(gate)
    heights = 0.5 + 1.4 * -(-(T + 1) // 7), 0.9 + (0.5 + 0.14 * len(layout.blocks)) * -(-L // 4)
    figure = Figure(figsize=(10, sum(heights)), dpi=110, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    above.suptitle(f"The tokens' matrices after layer {layer}" if layer else "The embeddings")
    below.suptitle("How far each block moves, by token and layer (gate)")
    axes = above.subplots(-(-(T + 1) // 7), 7, squeeze=False).ravel()
    matrices, bound = layout.to_matrix(cells[layer]), float(np.abs(cells[layer]).max())
    key = np.zeros_like(matrices[0])  # the first names the blocks
    shown = zip(axes, [key, *matrices], ["the blocks", *tokens], strict=False)
    for axis, matrix, token in shown:
        image = axis.imshow(matrix, cmap="cividis", vmin=-bound, vmax=bound)
        axis.set_title(token, fontsize=8)
        _outline(axis, layout, "white", offset=-0.5)
    for block in layout.blocks:
        middle = block.column + (block.width - 1) / 2, block.row + (block.height - 1) / 2
        axes[0].text(*middle, block.name, ha="center", va="center", fontsize=7, color="white")
    for index, axis in enumerate(axes):
        axis.set(xticks=[], yticks=[], visible=index <= T)
    above.colorbar(image, ax=list(axes), label="cell", shrink=0.8)
    grids = below.subplots(-(-L // 4), min(4, L), sharex=True, sharey=True, squeeze=False).ravel()
    look = {"cmap": "cividis", "vmin": gate.min(), "vmax": gate.max(), "aspect": "auto"}
    for index, axis in enumerate(grids):
        axis.set_visible(index < L)
        if index < L:
            moved = axis.imshow(gate[index].T, **look)
            axis.set_title(f"layer {index + 1}", fontsize=8)
            axis.set_yticks(range(len(layout.blocks)), layout.names, fontsize=6.5)
            axis.set_xticks(range(T), tokens, fontsize=7, rotation=90)
    below.colorbar(moved, ax=list(grids), label="sensitivity", shrink=0.8)
    return figure


def surprises(scored: pd.DataFrame, most: int = 600, width: int = 90) -> Figure:
    """The text, its first `most` tokens, each on a ground as dark as it was surprising."""
    lines, held = [[]], 0
    for piece, bits in scored[["token", "bits"]][:most].itertuples(index=False):
        shown = piece.replace("\n", "⏎").replace("\t", "→")
        if held + len(shown) > width:
            lines, held = [*lines, []], 0
        lines[-1].append((held, shown, bits))
        held += len(shown)
        if "\n" in piece:
            lines, held = [*lines, []], 0
    figure, axis = new_figure(10.5, max(2.6, 1.1 + 0.24 * len(lines)))
    shades, scale = colormaps["Blues"], Normalize(0, 16)
    for row, line in enumerate(lines):
        for start, shown, bits in line:
            dark = scale(min(bits, 16))
            axis.add_patch(Rectangle((start, row - 0.45), len(shown), 0.9, color=shades(dark)))
            colour = "white" if dark > 0.6 else "black"
            for place, character in enumerate(shown):  # one by one: any font becomes monospaced
                look = {"ha": "center", "va": "center", "fontsize": 8, "color": colour}
                axis.text(start + place + 0.5, row, character, **look)
    axis.set(xlim=(0, width), ylim=(len(lines) - 0.4, -0.6), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    many = len(scored)
    cut = f", the first {most:,} of {many:,} tokens" if most < many else ""
    told = "PPL {ppl:,.1f}, {bits_per_byte:.3f} bits per byte".format(**scored.attrs)
    axis.set_title(told + cut)
    label = "bits a token cost"
    figure.colorbar(ScalarMappable(scale, shades), ax=axis, label=label, shrink=0.9, pad=0.01)
    return figure


def bench(result: Mapping) -> Figure:
    """Training throughput and peak memory of ours and of the literal versions."""
    bars = {}
    for row in result["rows"]:
        name, faster = BENCH_NAMES[row["model"]], f"  ours {row['tokens_per_s_ratio']:.1f}×"
        ours = row["tokens_per_s"], row["memory_bytes"], "", BLUE, ""
        theirs = row["against_tokens_per_s"], row["against_memory_bytes"], faster, ORANGE, "//"
        bars.setdefault(f"{name}, ours", ours)  # once a model, as it was measured first
        bars[f"{name}, {row['against']}"] = theirs
    names = list(bars)
    speeds, memory, faster, colours, hatches = zip(*bars.values(), strict=True)
    figure, axes = new_figure(11, 1.2 + 0.4 * len(bars), columns=2)
    look = {"color": colours, "hatch": hatches, "edgecolor": "white"}
    labels = [f" {speed:,.0f}{note}" for speed, note in zip(speeds, faster, strict=True)]
    axes[0].bar_label(axes[0].barh(names, speeds, **look), labels, fontsize=8)
    axes[0].set(xlabel="tokens/s (more is better)", title="One training step, tokens/s")
    mebibytes = [size / 2**20 for size in memory]
    axes[1].bar_label(axes[1].barh(names, mebibytes, **look), fmt=" {:,.0f}", fontsize=8)
    axes[1].set(xlabel="MiB (less is better)", title="Peak memory of the step", yticklabels=[])
    for axis in axes:
        axis.margins(x=0.25)
        axis.invert_yaxis()
        axis.xaxis.set_major_locator(MaxNLocator(6))
        axis.xaxis.set_major_formatter(PLAIN)
    return figure


def names(found: Mapping) -> Figure:
    """What each block tells (see `studies.names`): alike which others, what a linear probe reads
    from it alone, and how much of a word's place in it depends on the word before."""
    blocks, reads, moves = found["blocks"], found["reads"], found["moves"]
    figure = Figure(figsize=(12.5, 5), layout="constrained", dpi=110)
    alike, read, move = figure.subplots(1, 3, width_ratios=(1, 1.1, 0.75))
    values = [[of[block][0] for block in blocks] for of in reads.values()]
    for axis, table, look in ((alike, found["similarity"], "Blues"), (read, values, "Oranges")):
        axis.imshow(table, cmap=look, vmin=0, vmax=1 if axis is alike else None, aspect="auto")
        for (row, column), value in np.ndenumerate(np.array(table)):
            dark = value > (0.6 if axis is alike else 0.6 * np.max(values))
            colour = "white" if dark else "0.25"
            size = 8 if len(blocks) <= 8 else 5.5
            text = f"{value:.2f}".replace("0.", ".")
            axis.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
        axis.set_xticks(range(len(blocks)), blocks, fontsize=8)
    alike.set_yticks(range(len(blocks)), blocks, fontsize=8)
    alike.set_title(
        "How alike two blocks are\n(linear CKA: 0 nothing shared, 1 the same)", fontsize=10
    )
    read.set_yticks(range(len(reads)), list(reads), fontsize=8)
    read.set_title(
        "What is read from one block alone\n(accuracy beyond shuffled labels)", fontsize=10
    )
    style.draw_intervals(move, {block: Interval(*found) for block, found in moves.items()})
    move.tick_params(axis="y", labelsize=8)
    move.spines[["top", "right"]].set_visible(False)
    move.set_title("How far the word before\nmoves a word", fontsize=10)
    move.set_xlabel(f"share of variance, {found['words']} words", fontsize=9)
    return figure
