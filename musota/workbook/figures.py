"""What runs and rules say, as pictures: data -> Figure. Computes and saves nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from musota.plan.suspects import MISSED
from musota.rules.plan import REPORTED
from musota.rules.stats import Interval
from musota.rules.verdicts import Cause
from musota.studies.path import Judged
from musota.training.runs import Run
from musota.workbook import style
from musota.workbook.naming import brief_titles, by_name, label_of, models_of, progress_of
from musota.workbook.style import (
    BLUE,
    GREEN,
    PLAIN,
    RED,
    draw_intervals,
    new_figure,
    note,
    styles_of,
)

VERDICTS = {  # colour, marker, fill
    "cause": (RED, "o", "full"),
    "undecided": (BLUE, "D", "left"),
    "not a cause": ("#666666", "s", "none"),
}
STEPS = {  # rows of the path by kind: colour, marker, what they are set against
    "made": (BLUE, "o", "a change on the way, against the row before"),
    "added": (GREEN, "D", "added to what it names first"),
    "taken back": (RED, "s", "taken back from the redesign"),
    "twin": ("#666666", "^", "a twin, against it"),
    "longer": ("#000080", "P", "trained longer"),
}
FIRST = "← better than the first · worse →"  # which side of 0 is which
SWEEP_NATS = 2.5  # what is worse than the best by more is drawn at the upper edge
Sweeps = Mapping[str, Mapping[float, Sequence[float]]]  # valid losses by model and learning rate


def curves(runs: Sequence[Run], rungs: Mapping[str, float], reported: bool) -> Figure:
    """Valid PPL (log) and accuracy by epoch, with the rungs and, if asked, the reported 402.

    Runs of one name are seeds: each thin, their mean (of the losses) thick. Where the runs were
    validated on unlike tokens it is bits per byte, without rungs.
    """
    measured, shown, unit = "valid_loss", np.exp, "perplexity per token"
    if len({run.valid_text for run in runs}) > 1:
        measured, shown, unit = "bits_per_byte", np.asarray, "bits per byte"
        rungs, reported = {}, False
    groups = by_name(runs)
    figure, (left, right) = new_figure(10, 4.4 + 0.16 * len(groups), columns=2, grid="y")
    titles, last = brief_titles(groups), max(run.history.epoch.max() for run in runs)
    styles = styles_of(groups)
    for name, group in groups.items():
        colour, line, marker = styles[name]
        tables = [run.history.set_index("epoch")[[measured, "accuracy"]] for run in group]
        mean = (sum(tables) / len(tables)).dropna()  # epochs that every seed has reached
        seeds = f"mean of {len(group)} seeds" if len(group) > 1 else f"seed {group[0].seed}"
        look = {"color": colour, "linestyle": line, "marker": marker}
        look["label"] = style.wrapped(f"{titles[name]}, {seeds}", 60)
        for table in tables if len(group) > 1 else []:
            left.plot(table.index, shown(table[measured]), color=colour, linewidth=0.7, alpha=0.5)
            right.plot(100 * table.accuracy, color=colour, linewidth=0.7, alpha=0.5)
        left.plot(mean.index, shown(mean[measured]), **look)
        right.plot(100 * mean.accuracy, **look)
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
    # The uniform rung is far above everything: it would flatten the curves.
    style.draw_rungs(left, {name: ppl for name, ppl in rungs.items() if name != "uniform"}, "\n")
    return figure


def training_curve(run: Run) -> Figure:
    """Training loss by optimizer step, and beside it the learning rate that was used."""
    figure, (left, right) = new_figure(10, 3.6, columns=2, grid="y")
    steps, history = run.steps, run.history
    left.plot(steps.step, steps.loss, color="0.7", linewidth=0.8, label="each logged step")
    smooth = steps.loss.ewm(halflife=max(1, len(steps) / 25)).mean()
    left.plot(steps.step, smooth, color=BLUE, label="smoothed")
    if len(history):
        left.plot(history.step, history.valid_loss, "s--", color=RED, label="valid")
    for step, event in run.events:
        left.axvline(step, color="black", linewidth=1, linestyle=":", label=event)
    right.plot(steps.step, steps.learning_rate, color=BLUE)
    warmup = run.experiment.training.warmup_steps
    right.axvline(warmup, color="0.4", linestyle=":", label=f"warm-up ends: step {warmup:,}")
    left.set(ylabel="loss (nats/token)", title=f"Loss: {label_of(run)}")
    right.set(ylabel="learning rate", title="Learning rate", ylim=(0, None))
    for axis in (left, right):
        axis.set_xlabel("optimizer step")
        axis.xaxis.set_major_formatter(PLAIN)
        axis.legend(fontsize=8)
    return figure


def difference(
    intervals: Mapping[str, Interval], title: str, sides: str = "← better than its twin · worse →"
) -> Figure:
    """Differences in loss with their 95 % intervals around 0; `sides` names left and right."""
    figure, axis = new_figure(9.5, 1.9 + 0.5 * len(intervals), grid="x")
    rows = {}
    for name, interval in intervals.items():
        lines = name.replace(" against ", "\nagainst ").split("\n")
        rows["\n".join(map(style.wrapped, lines))] = interval
    draw_intervals(axis, rows)
    ends = [abs(end) for i in intervals.values() for end in (i.mean, i.low, i.high)]
    edge = 1.25 * max(0.001, *filter(np.isfinite, ends))
    axis.set(xlim=(-edge, edge), xlabel=f"difference, nats per token ({sides})")
    axis.set_title(title.replace(": ", "\n", 1))
    return figure


def root_causes(causes: Sequence[Cause], relevant: float) -> Figure:
    """What mending each suspect does to the valid loss, the largest gain on top."""
    figure, axis = new_figure(10.5, 1.9 + 0.36 * len(causes), grid="x")
    rows, notes = {}, []
    for cause in causes:
        sure = cause.suspect.confidence
        plan = sure if sure == MISSED else f"plan: {sure}"
        rows[f"{cause.suspect.name}\n{plan} · {cause.here}"] = cause.effect
        after = f"{cause.ppl_after:,.0f}" if cause.effect else "diverges"
        notes.append(f"{cause.ppl_before:,.0f} → {after}")
    draw_intervals(axis, rows, notes, [VERDICTS[cause.verdict] for cause in causes])
    axis.text(1.01, -0.8, "valid PPL", transform=axis.get_yaxis_transform(), fontsize=8)
    axis.tick_params(axis="y", labelsize=7.5)
    axis.axvspan(-relevant, relevant, color="0.93", zorder=0)
    axis.set_xlabel("change of the valid loss, nats per token (← mending it helps · it hurts →)")
    axis.set_title("Which suspect holds the model back?")
    key = {"linestyle": "none", "markerfacecoloralt": "white", "markeredgewidth": 1.5}
    handles = [
        Line2D([], [], color=colour, marker=marker, fillstyle=fill, label=verdict, **key)
        for verdict, (colour, marker, fill) in VERDICTS.items()
    ]
    handles.append(Patch(color="0.93", label=f"under {relevant} nats"))
    figure.legend(handles=handles, fontsize=8, ncols=4, loc="outside lower right")
    return figure


def rate_sweep(sweeps: Sweeps) -> Figure:
    """Valid loss against the learning rate, a line a model; dots are seeds, rings the best."""
    figure, axis = new_figure(8.5, 4.2, grid="both")
    _draw_sweep(axis, sweeps)
    return figure


def _draw_sweep(axis, sweeps: Sweeps) -> None:
    means = {
        label: pd.Series({rate: np.mean(losses[rate]) for rate in sorted(losses)})
        for label, losses in sweeps.items()
    }
    ceiling = min(mean.min() for mean in means.values()) + SWEEP_NATS
    styles = [*styles_of(["optimized", "baseline", *sweeps]).values()]  # what it is measured for
    for place, (label, mean) in enumerate(means.items()):
        colour, line, marker = styles[place]
        look = {"color": colour, "linestyle": line, "marker": marker}
        axis.plot(mean.clip(upper=ceiling), label=label, **look)
        for rate, losses in sweeps[label].items():
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
    axis.set_title("Each model at each rate (ring: its best)")
    axis.margins(y=0.2)
    axis.legend(fontsize=9)


def ablations(run: Run, effects: Mapping[str, Interval]) -> Figure:
    """How a run's perplexity grows when a mechanism, or a block's cells, are disabled."""
    ppl, layout = run.summary["ppl"], run.experiment.model.layout
    blocks = {block.name: f"{block.name} {block.title}" for block in layout.blocks}
    mechanisms = {name: name for name in effects if name not in blocks}
    figure, axes = new_figure(10, 1.4 + 0.3 * len(blocks), columns=2, grid="x")
    titles = "A mechanism disabled", "One semantic block's cells zeroed"
    for axis, titled, title in zip(axes, (mechanisms, blocks), titles, strict=True):
        nats = {shown: effects[name] for name, shown in titled.items()}
        grown = {
            shown: Interval(*(ppl * np.expm1([effect.mean, effect.low, effect.high])))
            for shown, effect in nats.items()
        }
        draw_intervals(axis, grown, [f"{interval.mean:+,.1f}" for interval in grown.values()])
        axis.tick_params(axis="y", labelsize=8)
        axis.set(xlabel=f"change of valid PPL (whole model: {ppl:,.1f})", title=title)
    figure.suptitle(style.wrapped(label_of(run), 90))
    return figure


def answer(
    runs: Sequence[Run], rungs: Mapping[str, float], sweeps: Sweeps, reported: bool = False
) -> Figure:
    """Where every model ends (hollow: seeds), beside the rungs; with what the plan reported of its
    first run, if asked, and with the sweeps, if measured."""
    groups = models_of(runs)
    figure, axes = new_figure(11, max(4.6, 0.62 * len(groups)), columns=2 if sweeps else 1)
    styles = list(styles_of(groups).values())
    ends, titles = {}, brief_titles(groups, "\n")
    for name, group in groups.items():
        label = "\n".join(map(style.wrapped, titles[name].split("\n")))
        label += "" if group[0].finished else f"\nunfinished: {progress_of(group[0])}"
        ends[label] = [run.summary["ppl"] for run in group]
    if reported:
        told = f"reported by the plan:\nMU-SOTA original, {REPORTED['epochs']} epochs"
        ends, styles = {told: [REPORTED["ppl"]]} | ends, [("black", "", "*"), *styles]
    _draw_ends(np.atleast_1d(axes)[0], ends, styles, rungs)
    if sweeps:
        _draw_sweep(axes[1], sweeps)
        axes[1].grid(color="0.9")
    return figure


def _draw_ends(axis, ends: Mapping[str, Sequence[float]], styles: Sequence, rungs) -> None:
    """PPLs of the seeds of each row, and their mean."""
    for row, (ppls, (colour, _, marker)) in enumerate(zip(ends.values(), styles, strict=True)):
        mean = float(np.exp(np.mean(np.log(ppls))))
        look = {"color": colour, "marker": marker, "linestyle": "none"}
        axis.plot(mean, row, markersize=9, **look)
        if len(ppls) > 1:
            axis.plot(ppls, [row + 0.22] * len(ppls), fillstyle="none", markersize=5, **look)
        note(axis, f"{mean:,.0f}", (mean, row), (0, 7), ha="center", fontsize=9)
    furthest = max(map(max, ends.values()))
    for place, (name, ppl) in enumerate(sorted(rungs.items(), key=lambda rung: rung[1])):
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
    axis.set_title(f"Where the models end{seeds}", pad=18)


def path(judged: Mapping[str, Judged], rungs: Mapping[str, float]) -> Figure:
    """Where each row of the path to the redesign ends, and its nats over the row it is set against;
    without those that diverge."""
    judged = {name: row for name, row in judged.items() if row.verdict != "diverges"}
    figure, (left, right) = new_figure(12, 1.9 + 0.36 * len(judged), columns=2, grid="x")
    ends = {r.step.title: [run.summary["ppl"] for run in r.runs] for r in judged.values()}
    looks = [STEPS[row.step.kind][:2] for row in judged.values()]
    _draw_ends(left, ends, [(colour, "", marker) for colour, marker in looks], rungs)
    effects = {place: row.effect or Interval(np.nan) for place, row in enumerate(judged.values())}
    verdicts = [row.verdict for row in judged.values()]
    draw_intervals(right, effects, verdicts, [(*look, "full") for look in looks])
    right.set_yticks(range(len(effects)), [])
    right.xaxis.set_major_locator(MaxNLocator(6))
    right.set_xlabel("nats per token (← better · worse →)")
    right.set_title("What it brings", pad=18)
    key = [
        Line2D([], [], color=colour, marker=marker, linestyle="none", label=label)
        for colour, marker, label in STEPS.values()
    ]
    figure.legend(handles=key, fontsize=8, ncols=5, loc="outside upper center")
    return figure


@dataclass(frozen=True)
class Curve:
    """A line as the explorer draws it: its points, and what stands behind and across them."""

    name: str  # of the experiment, for its style
    label: str
    y: pd.Series  # its index is x
    faint: pd.Series | None = None  # before smoothing
    plateau: tuple[float, float] | None = None
    marks: Sequence[tuple[float, str]] = ()


def explored(
    curves: Sequence[Curve], rungs: Mapping[str, float], labels: tuple[str, str], log: str = ""
) -> Figure:
    """Curves with their plateaus shaded, their marks (events, flags), and rungs across; `log`
    names the axes that are logarithmic: x, y or xy."""
    figure, axis = new_figure(9, 4.4, grid="both")
    styles = styles_of(curve.name for curve in curves)
    for place, curve in enumerate(curves):
        colour, line, marker = styles[curve.name]
        seeds_before = [other.name for other in curves[:place]].count(curve.name)
        if curve.faint is not None:
            axis.plot(curve.faint, color=colour, alpha=0.3, linewidth=0.8)
        look = {"color": colour, "linestyle": line, "linewidth": 1.6 / (1 + seeds_before)}
        look |= {"fillstyle": ("full", "none", "left")[seeds_before % 3], "label": curve.label}
        axis.plot(curve.y, marker=marker if len(curve.y) <= 60 else None, **look)
        if curve.plateau:  # a strip for each curve
            strip = {"ymin": place / len(curves), "ymax": (place + 1) / len(curves)}
            strip |= {"hatch": style.HATCHES[1 + place % 7], "label": f"plateau: {curve.label}"}
            axis.axvspan(*curve.plateau, facecolor=colour, edgecolor=colour, alpha=0.15, **strip)
        for x, text in curve.marks:
            axis.axvline(x, color=colour, linewidth=1, linestyle=":")
            above = {"xycoords": ("data", "axes fraction"), "va": "top", "ha": "right"}
            note(axis, text, (x, 0.98), (-2, 0), rotation=90, **above)
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
    style.draw_rungs(axis, rungs)
    return figure


def data_halving(losses: Mapping[int, Mapping[int, float]]) -> Figure:
    """Valid loss by amount of training text and seed, at equal numbers of steps."""
    by_seed = pd.DataFrame(losses).T.sort_index()
    lines = [Curve("mean", "mean over seeds", by_seed.mean(axis=1))]
    lines += [Curve("seed", f"seed {seed}", column) for seed, column in by_seed.items()]
    labels = "training tokens (log), read in as many steps", "valid loss (nats/token)"
    return explored(lines, {}, labels, log="x")


def clean_gap(runs: Sequence[Run]) -> Figure:
    """Loss by epoch without dropout: on valid (filled marks) and on training text (hollow)."""
    kinds = {"valid_loss": "valid", "clean_train_loss": "training text"}
    lines = []
    for run in runs:
        health = pd.DataFrame(run.health).set_index("epoch")
        lines += [Curve(run.name, f"{label_of(run)}: {kinds[key]}", health[key]) for key in kinds]
    return explored(lines, {}, ("epoch", "loss without dropout (nats/token)"))
