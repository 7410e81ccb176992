"""Figures of a model and a corpus: data -> Figure. Nothing is computed or saved here."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from musota.lab.audit import draw_changes
from musota.lab.plan_rules import REPORTED
from musota.models.layout import SEMANTIC_NAMES, BlockLayout
from musota.workbook.style import BLUE, HATCHES, PLAIN, SHADES, literal, new_figure, wrapped

# Groups of parameters, in the order of their colours.
GROUPS = ("embedding", "affinity tables", "feed-forward", "attention", "block attention")
GROUPS += ("cross attention", "output", "embedding (also output)", "norms", "gate", "positions")


def ledgers(ledgers: Mapping[str, Mapping[str, int]]) -> Figure:
    """Shares of the parameters by group: one stacked bar a model, the largest groups first."""
    figure, axis = new_figure(10, 1.6 + 0.75 * len(ledgers))
    table = pd.DataFrame(ledgers).fillna(0).T  # rows: models, columns: groups
    table = table[table.max().sort_values(ascending=False).index]
    names, totals, left = table.index.map(wrapped), table.sum(axis=1), 0
    places = {group: place for place, group in enumerate(dict.fromkeys((*GROUPS, *table)))}
    white = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    for group, sizes in table.items():
        i, shares = places[group], 100 * sizes / totals
        look = {"color": SHADES[i % 8], "hatch": HATCHES[(i + i // 8) % 8], "edgecolor": "white"}
        bars = axis.barh(names, shares, left=left, label=literal(group), linewidth=0.6, **look)
        texts = shares.map("{:.0f}%".format).where(shares > 5, "")
        axis.bar_label(bars, texts, label_type="center", bbox=white)
        left = left + shares
    axis.bar_label(bars, totals.map("  {:,.0f}".format), fontsize=9)
    axis.invert_yaxis()
    axis.set(xlabel="share of the parameters (%); their number on the right", xlim=(0, 118))
    axis.set_title("Parameters by group")
    figure.legend(fontsize=8, loc="outside right upper")
    return figure


def _outline(axis, layout: BlockLayout, edge: str, offset: float = 0) -> None:
    """Draws the blocks as rectangles on the matrix."""
    for block in layout.blocks:
        corner = block.column + offset, block.row + offset
        look = {"fill": False, "edgecolor": edge, "linewidth": 0.8}
        axis.add_patch(Rectangle(corner, block.width, block.height, **look))


def layouts(shown: Mapping[str, BlockLayout]) -> Figure:
    """The semantic blocks on the token's matrix, with the places of channels in the vector."""
    figure, axes = new_figure(4.6 * len(shown), 5.3, columns=len(shown))
    for axis, (title, layout) in zip(np.atleast_1d(axes), shown.items(), strict=True):
        _outline(axis, layout, "black")
        for index, block in enumerate(layout.blocks):
            place = [*SEMANTIC_NAMES].index(block.name) if block.name in SEMANTIC_NAMES else index
            corner, shade = (block.column, block.row), SHADES[(place + place // 4) % 8]
            axis.add_patch(Rectangle(corner, block.width, block.height, fc=shade, alpha=0.45))
            x, bottom = block.column + block.width / 2, block.row + block.height - 0.08
            bold = {"ha": "center", "fontsize": 13, "weight": "bold"}
            if block.width > 3 * block.height:  # flat: title beside the name
                name = f"{block.name}   {block.title}"
                axis.text(x, bottom - block.height / 2, name, va="center", **bold | {"fontsize": 9})
                continue
            axis.text(x, block.row + 0.7, block.name, **bold)
            axis.text(x, bottom, block.title.replace(" ", "\n"), ha="center", fontsize=7.5)
        ends = np.cumsum((0, *layout.sizes))  # a large matrix shows the ends of blocks only
        for (row, column), place in np.ndenumerate(layout.to_matrix(np.arange(ends[-1]))):
            if len(ends) > ends[-1] / 8 or {place, place + 1} & {*ends}:
                axis.text(column + 0.04, row + 0.04, place, fontsize=5.5, color="0.35", va="top")
        axis.set(xlim=(0, layout.width), ylim=(layout.height, 0), aspect="equal")
        axis.set_title(wrapped(title))
        axis.set_xticks(range(layout.width + 1), [])
        axis.set_yticks(range(layout.height + 1), [])
        axis.set_xlabel("columns (small numbers: place in the token's vector)", fontsize=8)
        axis.set_ylabel("rows", fontsize=8)
    return figure


def causality(change: np.ndarray) -> Figure:
    """Which predictions (columns) change when one token (row) is replaced; `change` is the matrix
    of `causality_matrix`."""
    figure, axis = new_figure(6.2, 5.2)
    draw_changes(axis, change)
    return figure


def ngrams(measured: Mapping[str, float], at_plan_size: bool) -> Figure:
    """Perplexities of the n-gram baselines, and of the reported run if `at_plan_size`: on the same
    corpus with the same vocabulary."""
    figure, axis = new_figure(9, 2.9)
    bars = [(ppl, f"{name} (measured)", BLUE, "") for name, ppl in measured.items()]
    if at_plan_size:
        bars.append((REPORTED["ppl"], "MU-SOTA, 10 epochs (reported)", SHADES[-1], ".."))
    ppls, names, colours, hatches = zip(*sorted(bars, reverse=True), strict=True)
    drawn = axis.barh(names, ppls, color=colours, hatch=hatches, edgecolor="white")
    axis.bar_label(drawn, fmt=" {:,.0f}", fontsize=9)
    axis.set(xscale="log", xlabel="valid perplexity per token (log)", title="N-gram baselines")
    axis.set_xlim(min(ppls) / 2, max(ppls) * 4)
    axis.xaxis.set_major_formatter(PLAIN)
    return figure


def block_view(
    channels: np.ndarray, gate: np.ndarray, tokens: Sequence[str], layout: BlockLayout, layer: int
) -> Figure:
    """The tokens' matrices after a layer (0: embeddings), and the gates of every layer.

    Arguments: channels (L + 1, T, d) and gate (L, T, N), as `lab.ablate.look_inside` returns them.
    """
    T, L = len(tokens), len(gate)
    heights = 0.5 + 1.4 * -(-(T + 1) // 7), 0.9 + (0.5 + 0.14 * len(layout.blocks)) * -(-L // 4)
    figure = Figure(figsize=(10, sum(heights)), dpi=110, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    tokens = [literal(token) for token in tokens]
    above.suptitle(f"The tokens' matrices after layer {layer}" if layer else "The embeddings")
    _draw_matrices(above, channels[layer], tokens, layout)
    below.suptitle("Gate of each block, by token and layer")
    axes = below.subplots(-(-L // 4), min(4, L), sharex=True, sharey=True, squeeze=False).ravel()
    look = {"cmap": "cividis", "vmin": gate.min(), "vmax": gate.max(), "aspect": "auto"}
    for index, axis in enumerate(axes):
        axis.set_visible(index < L)
        if index < L:
            image = axis.imshow(gate[index].T, **look)
            axis.set_title(f"layer {index + 1}", fontsize=8)
            axis.set_yticks(range(len(layout.blocks)), layout.names, fontsize=6.5)
            axis.set_xticks(range(T), tokens, fontsize=7, rotation=90)
    below.colorbar(image, ax=list(axes), label="gate", shrink=0.8)
    return figure


def _draw_matrices(figure, channels: np.ndarray, tokens: list[str], layout: BlockLayout) -> None:
    """Draws a matrix a token, seven in a row; the first names the blocks."""
    axes = figure.subplots(-(-(len(tokens) + 1) // 7), 7, squeeze=False).ravel()
    matrices, bound = layout.to_matrix(channels), float(np.abs(channels).max())
    shown = zip(axes, [np.zeros_like(matrices[0]), *matrices], ["blocks", *tokens], strict=False)
    for axis, matrix, token in shown:
        image = axis.imshow(matrix, cmap="cividis", vmin=-bound, vmax=bound)
        axis.set_title(token, fontsize=8)
        _outline(axis, layout, "white", offset=-0.5)
    for block in layout.blocks:
        middle = block.column + (block.width - 1) / 2, block.row + (block.height - 1) / 2
        axes[0].text(*middle, block.name, ha="center", va="center", fontsize=7, color="white")
    for index, axis in enumerate(axes):
        axis.set(xticks=[], yticks=[], visible=index <= len(tokens))
    figure.colorbar(image, ax=list(axes), label="channel", shrink=0.8)
