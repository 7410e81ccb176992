"""Figures of runs and of what was measured on them: data -> Figure. Nothing is saved here."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from musota.lab.plan_rules import REPORTED
from musota.lab.root_causes import MISSED, Cause
from musota.lab.stats import Interval
from musota.lab.sweep import RELEVANT
from musota.lab.verdicts import Verdict
from musota.training.run import Run
from musota.workbook import style
from musota.workbook.results import group_runs, label, progress, titles_of
from musota.workbook.style import PLAIN, draw_intervals, new_figure, note, styles_of, wrapped

DECISIONS = {  # of a root cause: colour, marker, fill
    "cause": (style.RED, "o", "full"),
    "undecided": (style.BLUE, "D", "left"),
    "not a cause": ("#666666", "s", "none"),
}
STEPS = {  # kinds of rows in path.csv: colour, marker, what a row is compared with
    "added on the way": (style.BLUE, "o", "change on the way, against the row above"),
    "added": (style.GREEN, "D", "change added to a finished model"),
    "removed": (style.RED, "s", "change removed from the redesign"),
    "matched transformer": ("#666666", "^", "parameter-matched transformer"),
    "longer": ("#000080", "P", "trained longer"),
}
SIDES = "← the first is better · worse →"
SWEEP_NATS = 2.5  # losses worse than the best by more are drawn at the upper edge
Sweeps = Mapping[str, Mapping[float, Sequence[float]]]  # valid losses by model and learning rate


def _series(runs: Iterable[Run]) -> Iterable[tuple[str, list[Run], tuple[str, str, str]]]:
    """Title, seeds and style of each model among the runs that have ended an epoch."""
    groups = group_runs(run for run in runs if run.summary)
    styles = styles_of([group[0].name for group in groups.values()])
    return zip(titles_of(groups).values(), groups.values(), styles, strict=True)


def curves(runs: Sequence[Run], ngrams: Mapping[str, float], reported: bool = False) -> Figure:
    """Valid PPL (log) and accuracy by epoch, with the n-gram baselines and, if `reported`, the
    plan's reported result. Seeds are thin, their mean (of the losses) is thick. Runs validated on
    different texts are shown in bits per byte, without baselines."""
    measured, shown, unit = "valid_loss", np.exp, "perplexity per token"
    if len({run.valid_text for run in runs}) > 1:
        measured, shown, unit = "bits_per_byte", np.asarray, "bits per byte"
        ngrams, reported = {}, False
    series = list(_series(runs))
    figure, (left, right) = new_figure(10, 4.4 + 0.12 * len(series), columns=2, grid="y")
    sizes, last = np.linspace(8, 5, len(series)), 1  # an equal curve drawn later hides nothing
    for (title, group, (colour, line, marker)), size in zip(series, sizes, strict=True):
        tables = [run.history.set_index("epoch")[[measured, "accuracy"]] for run in group]
        mean = (sum(tables) / len(tables)).dropna()  # epochs that every seed has reached
        seeds = f"{len(group)} seeds" if len(group) > 1 else f"seed {group[0].seed}"
        look = {"color": colour, "linestyle": line, "marker": marker}
        look |= {"markersize": size, "linewidth": size / 3.5}
        for table in tables if len(group) > 1 else []:
            left.plot(table.index, shown(table[measured]), color=colour, linewidth=0.7, alpha=0.5)
            right.plot(100 * table.accuracy, color=colour, linewidth=0.7, alpha=0.5)
        left.plot(mean.index, shown(mean[measured]), label=wrapped(f"{title}, {seeds}", 76), **look)
        right.plot(100 * mean.accuracy, **look)
        last = max(last, *(table.index.max() for table in tables))
    if reported:
        ppl, epochs = REPORTED["ppl"], REPORTED["epochs"]
        star = {"marker": "*", "color": "black", "markersize": 11, "linestyle": "none"}
        left.plot(epochs, ppl, label=f"reported: {ppl:.0f} after {epochs} epochs", **star)
        right.plot(epochs, 100 * REPORTED["accuracy"], **star)
        last = max(last, epochs)
    style.logarithmic(left, *left.dataLim.intervaly)
    left.set(ylabel=f"valid {unit} (log)", title=unit.split(" per ")[0].capitalize())
    right.set(ylabel="valid top-1 accuracy (%)", title="Accuracy")
    for axis in (left, right):
        axis.set(xlabel="epoch", xlim=(0.8, last + 0.3))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    key = left.get_legend_handles_labels()
    figure.legend(*key, fontsize=8, ncols=2, loc="outside upper center")
    style.draw_ngrams(left, ngrams, "\n")
    return figure


def training_curve(run: Run) -> Figure:
    """Training loss by optimizer step, and the learning rate."""
    figure, (left, right) = new_figure(10, 3.6, columns=2, grid="y")
    steps, history = run.steps, run.history
    left.plot(steps.step, steps.loss, color="0.7", linewidth=0.8, label="each logged step")
    smooth = steps.loss.ewm(halflife=max(1, len(steps) / 25)).mean()
    left.plot(steps.step, smooth, color=style.BLUE, label="smoothed")
    if len(history):
        left.plot(history.step, history.valid_loss, "s--", color=style.RED, label="valid")
    for step, event in run.events:
        left.axvline(step, color="black", linewidth=1, linestyle=":", label=wrapped(event, 50))
    right.plot(steps.step, steps.learning_rate, color=style.BLUE)
    warmup = run.experiment.training.warmup_steps
    right.axvline(warmup, color="0.4", linestyle=":", label=f"warm-up ends: step {warmup:,}")
    left.set(ylabel="loss (nats/token)", title=f"Loss: {wrapped(label(run), 50)}")
    right.set(ylabel="learning rate", title="Learning rate", ylim=(0, None))
    for axis in (left, right):
        axis.set_xlabel("optimizer step")
        axis.xaxis.set_major_formatter(PLAIN)
        axis.legend(fontsize=8)
    return figure


def difference(verdicts: Mapping[str, Verdict], title: str, sides: str = SIDES) -> Figure:
    """Differences in loss with their intervals around 0, numbers and decisions on the right;
    `sides` says which side of 0 is better. Verdicts without a value are left out."""
    shown = {name: v for name, v in verdicts.items() if v.value is not None}
    figure, axis = new_figure(10, 1.9 + 0.5 * len(shown), grid="x")
    rows, notes = {}, []
    for name, verdict in shown.items():
        ends = () if verdict.low is None else (verdict.low, verdict.high)
        rows[wrapped(name, 44)] = Interval(verdict.value, *ends)
        interval = "".join(f" [{low:+.3f}, {high:+.3f}]" for low, high in [ends] if ends)
        notes.append(f"{verdict.value:+.3f}{interval}\n{verdict.decision}")
    draw_intervals(axis, rows, notes)
    ends = [abs(end) for i in rows.values() for end in (i.mean, i.low, i.high)]
    edge = 1.15 * max(0.001, *filter(np.isfinite, ends))
    axis.set(xlim=(-edge, edge), xlabel=f"difference in valid loss, nats per token ({sides})")
    axis.set_title(wrapped(title, 80))
    return figure


def root_causes(causes: Sequence[Cause]) -> Figure:
    """The change of the valid loss when each suspect is removed, the largest gain on top."""
    figure, axis = new_figure(10.5, 1.9 + 0.36 * len(causes), grid="x")
    rows, notes = {}, []
    for cause in causes:
        plan = "" if cause.confidence == MISSED else "plan: "
        rows[f"{cause.name}\n{plan}{cause.confidence} · {cause.changed}"] = cause.effect
        after = f"{cause.ppl_after:,.0f}" if cause.effect else "diverges"
        notes.append(f"{cause.ppl_before:,.0f} → {after}")
    draw_intervals(axis, rows, notes, [DECISIONS[cause.decision] for cause in causes])
    axis.text(1.01, -0.8, "valid PPL", transform=axis.get_yaxis_transform(), fontsize=8)
    axis.tick_params(axis="y", labelsize=7.5)
    axis.axvspan(-RELEVANT, RELEVANT, color="0.93", zorder=0)
    axis.set_xlabel("change of the valid loss, nats per token (← removing it helps · hurts →)")
    axis.set_title("Which suspect holds the model back?")
    key = {"linestyle": "none", "markerfacecoloralt": "white", "markeredgewidth": 1.5}
    handles = [
        Line2D([], [], color=colour, marker=marker, fillstyle=fill, label=decision, **key)
        for decision, (colour, marker, fill) in DECISIONS.items()
    ]
    handles.append(Patch(color="0.93", label=f"under {RELEVANT} nats"))
    figure.legend(handles=handles, fontsize=8, ncols=4, loc="outside lower right")
    return figure


def rate_sweep(sweeps: Sweeps) -> Figure:
    """Valid loss by learning rate, a line a model; dots are seeds, rings mark the best rates."""
    figure, axis = new_figure(8.5, 4.2, grid="both")
    means = {
        title: pd.Series({rate: np.mean(losses[rate]) for rate in sorted(losses)})
        for title, losses in sweeps.items()
    }
    ceiling = min(mean.min() for mean in means.values()) + SWEEP_NATS
    styles = styles_of(["optimized", "baseline", *sweeps])  # those two are the usual ones
    for place, (title, mean) in enumerate(means.items()):
        colour, line, marker = styles[place]
        look = {"color": colour, "linestyle": line, "marker": marker}
        axis.plot(mean.clip(upper=ceiling), label=wrapped(title, 60), **look)
        for rate, losses in sweeps[title].items():
            dots = np.minimum(losses, ceiling)
            axis.plot([rate] * len(dots), dots, ".", color=colour, markersize=4)
        best = mean.idxmin()
        axis.plot(best, mean[best], "o", color=colour, markersize=15, fillstyle="none")
        side = {mean.index[0]: "left", mean.index[-1]: "right"}.get(best, "center")
        below = (0, -17 - 11 * place)  # the other model's best may be close by
        text = f"PPL {np.exp(mean[best]):,.0f} at {best:.2g}"
        note(axis, text, (best, mean[best]), below, ha=side, color=colour)
    for rate in {rate for mean in means.values() for rate in mean.index[mean > ceiling]}:
        note(axis, "off the scale ↑", (rate, ceiling), (0, 6), ha="center")
    axis.set(xscale="log", xlabel="learning rate (log)", ylabel="valid loss (nats/token)")
    axis.set_title("Valid loss by learning rate (ring: the best)")
    axis.margins(y=0.2)
    axis.legend(fontsize=9)
    return figure


def ablations(run: Run, effects: Mapping[str, Interval]) -> Figure:
    """The growth of a run's perplexity when a mechanism, or a block's channels, are disabled."""
    ppl, layout = run.summary["ppl"], run.experiment.model.layout
    blocks = {block.name: f"{block.name} {block.title}" for block in layout.blocks}
    mechanisms = {name: name for name in effects if name not in blocks}
    figure, axes = new_figure(10, 1.6 + 0.3 * len(blocks), columns=2, grid="x")
    titles = "A mechanism disabled", "The channels of one block set to 0"
    for axis, titled, title in zip(axes, (mechanisms, blocks), titles, strict=True):
        nats = {shown: effects[name] for name, shown in titled.items()}
        grown = {
            shown: Interval(*(ppl * np.expm1([effect.mean, effect.low, effect.high])))
            for shown, effect in nats.items()
        }
        draw_intervals(axis, grown, [f"{interval.mean:+,.1f}" for interval in grown.values()])
        axis.tick_params(axis="y", labelsize=8)
        axis.set(xlabel=f"change of valid PPL (whole model: {ppl:,.1f})", title=title)
    figure.suptitle(wrapped(label(run), 90))
    return figure


def ends(runs: Sequence[Run], ngrams: Mapping[str, float], reported: bool = False) -> Figure:
    """The best valid perplexity of each model (hollow: seeds), with the n-gram baselines and, if
    `reported`, the plan's reported result."""
    ends, styles = {}, []
    if reported:
        title = f"MU-SOTA, reported:\n{REPORTED['epochs']} epochs"
        ends[title], styles = [REPORTED["ppl"]], [("black", "*")]
    for title, group, (colour, _, marker) in _series(runs):
        unfinished = "" if group[0].finished else f"\n({progress(group[0])})"
        ends[wrapped(title) + unfinished] = [run.summary["ppl"] for run in group]
        styles.append((colour, marker))
    figure, axis = new_figure(9, max(3, 1.4 + 0.5 * len(ends)))
    _draw_ends(axis, ends, styles, ngrams)
    return figure


def _draw_ends(axis, ends: Mapping[str, Sequence[float]], styles: Sequence, ngrams) -> None:
    """Draws the PPLs of the seeds of each row, and their mean."""
    for row, (ppls, (colour, marker)) in enumerate(zip(ends.values(), styles, strict=True)):
        mean = float(np.exp(np.mean(np.log(ppls))))
        look = {"color": colour, "marker": marker, "linestyle": "none"}
        axis.plot(mean, row, markersize=9, **look)
        if len(ppls) > 1:
            axis.plot(ppls, [row + 0.22] * len(ppls), fillstyle="none", markersize=5, **look)
        note(axis, f"{mean:,.0f}", (mean, row), (0, 7), ha="center", fontsize=9)
    furthest = max(map(max, ends.values()))
    for place, (name, ppl) in enumerate(sorted(ngrams.items(), key=lambda found: found[1])):
        if ppl < 1.5 * furthest:
            axis.axvline(ppl, **style.DOTTED)
            above = {"xycoords": ("data", "axes fraction"), "color": "0.3"}
            side = "left" if place else "right"  # they may be close
            note(axis, f"{name} {ppl:,.0f}", (ppl, 1.01), ha=side, **above)
    axis.set_yticks(range(len(ends)), list(ends), fontsize=9)
    axis.set_ylim(len(ends) - 0.4, -0.6)
    axis.set_xlabel("best valid perplexity per token (less is better)")
    axis.xaxis.set_major_formatter(PLAIN)
    axis.margins(x=0.12)
    axis.grid(axis="x", color="0.9")
    seeds = " (hollow: each seed)" if any(len(ppls) > 1 for ppls in ends.values()) else ""
    axis.set_title(f"Best valid perplexity{seeds}", pad=18)


def path(table: pd.DataFrame) -> Figure:
    """The rows of path.csv: best valid PPL of each step from MU-SOTA to the redesign, and its
    difference to the row it is compared with. Rows that diverged are left out."""
    table = table[np.isfinite(table.ppl)]
    figure, (left, right) = new_figure(12, 1.9 + 0.36 * len(table), columns=2, grid="x")
    losses = [json.loads(text).values() for text in table.valid_loss_by_seed]
    titles = [wrapped(title, 60) for title in table.title]
    ends = {title: np.exp([*by_seed]) for title, by_seed in zip(titles, losses, strict=True)}
    looks = [STEPS[kind][:2] for kind in table.kind]
    _draw_ends(left, ends, looks, {})
    effects = {i: Interval(row.nats, row.low, row.high) for i, row in enumerate(table.itertuples())}
    draw_intervals(right, effects, table.verdict.fillna(""), [(*look, "full") for look in looks])
    right.set_yticks(range(len(effects)), [])
    right.xaxis.set_major_locator(MaxNLocator(6))
    left.set_xlabel("best valid perplexity per token")
    right.set_xlabel("nats per token (← better · worse →)")
    right.set_title("Against the row it is compared with", pad=18)
    key = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=text)
        for colour, marker, text in STEPS.values()
    ]
    figure.legend(handles=key, fontsize=8, ncols=5, loc="outside upper center")
    return figure


@dataclass(frozen=True)
class Curve:
    """A line of the explorer: its points, and what is drawn behind and across it."""

    name: str  # of the experiment, for its style
    label: str
    y: pd.Series  # its index is x
    faint: pd.Series | None = None  # before smoothing
    plateau: tuple[float, float] | None = None
    marks: Sequence[tuple[float, str]] = ()


def explored(
    curves: Sequence[Curve], ngrams: Mapping[str, float], labels: tuple[str, str], log: str = ""
) -> Figure:
    """Curves with shaded plateaus, marked events and n-gram baselines; `log` names the logarithmic
    axes: x, y or xy."""
    figure, axis = new_figure(9, 4.4, grid="both")
    names = [*dict.fromkeys(curve.name for curve in curves)]
    styles = dict(zip(names, styles_of(names), strict=True))
    for place, curve in enumerate(curves):
        seeds_before = [other.name for other in curves[:place]].count(curve.name)
        _draw_curve(axis, curve, styles[curve.name], seeds_before, (place, len(curves)))
    axis.set(xlabel=labels[0], ylabel=labels[1], xscale="log" if "x" in log else "linear")
    if labels[0] == "epoch":
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if "x" in log:
        axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 3, 5)), minor_locator=NullLocator())
    axis.xaxis.set_major_formatter(PLAIN)
    axis.yaxis.set_major_formatter(PLAIN)
    if curves:
        if "y" in log:
            ys = pd.concat([curve.y for curve in curves])
            style.logarithmic(axis, ys.min(), ys.max())
        figure.legend(fontsize=8, ncols=2, loc="outside upper center")
    style.draw_ngrams(axis, ngrams)
    return figure


def _draw_curve(axis, curve: Curve, look: tuple, seeds_before: int, strip: tuple[int, int]) -> None:
    """Draws one curve; later seeds of a name are thinner, and `strip` is where its plateau goes."""
    (colour, line, marker), (place, count) = look, strip
    text = style.literal(curve.label)
    if curve.faint is not None:
        axis.plot(curve.faint, color=colour, alpha=0.3, linewidth=0.8)
    look = {"color": colour, "linestyle": line, "linewidth": 1.6 / (1 + seeds_before)}
    look |= {"fillstyle": ("full", "none", "left")[seeds_before % 3], "label": text}
    axis.plot(curve.y, marker=marker if len(curve.y) <= 60 else None, **look)
    if curve.plateau:
        band = {"ymin": place / count, "ymax": (place + 1) / count, "alpha": 0.15}
        band |= {"hatch": style.HATCHES[1 + place % 7], "label": f"plateau: {text}"}
        axis.axvspan(*curve.plateau, facecolor=colour, edgecolor=colour, **band)
    for x, event in curve.marks:
        axis.axvline(x, color=colour, linewidth=1, linestyle=":")
        above = {"xycoords": ("data", "axes fraction"), "va": "top", "ha": "right"}
        note(axis, style.literal(event), (x, 0.98), (-2, 0), rotation=90, **above)
