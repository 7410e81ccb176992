"""What runs and rules say, as pictures: data -> Figure. Computes and saves nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from musota.plan.layout import BlockLayout
from musota.plan.registry import registry, style_of, title_of
from musota.plan.suspects import MISSED
from musota.rules.plan import REPORTED
from musota.rules.stats import Interval
from musota.rules.verdicts import Cause
from musota.training.runs import Run
from musota.workbook.style import HATCHES, SHADES, THOUSANDS, draw_intervals, draw_rungs, new_figure

_VERDICTS = {  # colour, marker, fill
    "cause": ("#D55E00", "o", "full"),
    "undecided": ("#0072B2", "D", "left"),
    "not a cause": ("#666666", "s", "none"),
}
SWEEP_NATS = 2.5  # what is worse than the best by more is drawn at the upper edge
_ABLATED = ("A mechanism disabled", "One semantic block's cells zeroed")


def label_of(run: Run) -> str:
    return f"{title_of(run.name)}, seed {run.seed}"


def by_name(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs of every name, in the order given."""
    return {
        name: [r for r in runs if r.name == name] for name in dict.fromkeys(r.name for r in runs)
    }


def curves(runs: Sequence[Run], rungs: Mapping[str, float], reported: bool) -> Figure:
    """Valid PPL (log) and accuracy by epoch, with the rungs and, if asked, the reported 402.

    Runs of one name are seeds: each thin, their mean (of the losses) thick.
    """
    figure, (left, right) = new_figure(10, 4.4, columns=2)
    for name, group in by_name(runs).items():
        colour, line, marker = style_of(name)
        label = label_of(group[0])
        if len(group) > 1:
            label = f"{title_of(name)}, mean of {len(group)} seeds"
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
    left.yaxis.set_major_formatter(THOUSANDS)
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
    draw_rungs(left, {name: ppl for name, ppl in rungs.items() if name != "uniform"}, "\n")
    return figure


def training_curve(run: Run) -> Figure:
    """Training loss by optimizer step, and beside it the learning rate that was used."""
    figure, (left, right) = new_figure(10, 3.6, columns=2)
    steps = run.steps
    left.plot(steps.step, steps.loss, color="0.7", linewidth=0.8, label="each logged step")
    smooth = steps.loss.ewm(halflife=max(1, len(steps) / 25)).mean()
    left.plot(steps.step, smooth, color=style_of("optimized")[0], label="smoothed")
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
        axis.xaxis.set_major_formatter(THOUSANDS)
        axis.grid(axis="y", color="0.9")
    return figure


def difference(
    intervals: Mapping[str, Interval], title: str, sides: str = "← MU-SOTA better · dense better →"
) -> Figure:
    """Differences in loss with their 95 % intervals around 0; `sides` names left and right."""
    figure, axis = new_figure(8.5, 1.8 + 0.6 * len(intervals))
    draw_intervals(axis, list(intervals.values()), list(intervals))
    ends = [abs(end) for i in intervals.values() for end in (i.low, i.high) if np.isfinite(end)]
    edge = 1.25 * max([*ends, *(abs(i.mean) for i in intervals.values()), 0.001])
    axis.set_xlim(-edge, edge)
    axis.set(xlabel=f"difference, nats per token ({sides})", title=title.replace(": ", "\n", 1))
    return figure


def root_causes(causes: Sequence[Cause], relevant: float) -> Figure:
    """What mending each suspect does to the valid loss, the largest gain on top."""
    figure, axis = new_figure(10.5, 1.9 + 0.36 * len(causes))
    sure = {c: c.suspect.confidence for c in causes}
    labels = [
        f"{c.suspect.name}\n{sure[c] if sure[c] == MISSED else f'plan: {sure[c]}'} · {c.here}"
        for c in causes
    ]
    styles = [_VERDICTS[cause.verdict] for cause in causes]
    draw_intervals(axis, [cause.effect for cause in causes], labels, styles)
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
    figure, axis = new_figure(8.5, 4.2)
    _draw_sweep(axis, sweeps)
    return figure


def _draw_sweep(axis, sweeps: Mapping[str, Mapping[float, Sequence[float]]]) -> None:
    styles = [style_of(name) for name in ("optimized", "baseline", "")]
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
    figure, axis = new_figure(7, 3.8)
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
    figure, axis = new_figure(8, 4)
    for run in runs:
        colour, line, marker = style_of(run.name)
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
    figure, axes = new_figure(10, 1.4 + 0.3 * len(meanings), columns=2)
    parts = [name for name in effects if name not in meanings]
    for axis, names, title in zip(axes, (parts, list(meanings)), _ABLATED, strict=True):
        nats = np.array([[effects[n].mean, effects[n].low, effects[n].high] for n in names])
        nats = np.where(np.isfinite(nats), nats, nats[:, :1])  # no interval: no whiskers
        grown, rows = np.expm1(nats) * ppl, range(len(names))
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
    figure, axis = new_figure(9, 4.4)
    unknown = [name for name in dict.fromkeys(c.name for c in curves) if name not in registry]
    seen: dict[str, int] = {}
    for place, curve in enumerate(curves):
        nth_seed = seen[curve.name] = seen.get(curve.name, -1) + 1
        colour, line, marker = style_of(curve.name)
        if curve.name in unknown:
            nth = unknown.index(curve.name)
            colour, marker = SHADES[nth % 8], "xP*dph<>"[nth % 8]
        if curve.faint is not None:
            axis.plot(curve.x, curve.faint, color=colour, alpha=0.3, linewidth=0.8)
        few = marker if len(curve.x) <= 60 else None
        seed = {"fillstyle": ("full", "none", "left")[nth_seed % 3], "lw": 1.6 / (1 + nth_seed)}
        axis.plot(curve.x, curve.y, color=colour, linestyle=line, marker=few, label=curve.label,
                  **seed)  # fmt: skip
        if curve.plateau:  # a strip for each curve
            strip = {"ymin": place / len(curves), "ymax": (place + 1) / len(curves)}
            hatch = HATCHES[1 + place % 7]
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
    draw_rungs(axis, rungs)
    return figure


def answer(
    runs: Sequence[Run],
    rungs: Mapping[str, float],
    sweeps: Mapping[str, Mapping[float, Sequence[float]]],
) -> Figure:
    """Where every model ends (hollow: seeds), beside the rungs; and, if measured, the sweeps."""
    figure, axes = new_figure(11, 4.6, columns=2 if sweeps else 1)
    axis = np.atleast_1d(axes)[0]
    groups = by_name(runs)
    for row, (name, group) in enumerate(groups.items()):
        colour, _, marker = style_of(name)
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
    axis.set_yticks(range(len(groups)), [title_of(name) for name in groups], fontsize=9)
    axis.set_ylim(len(groups) - 0.4, -0.6)
    axis.set_xlabel("best valid perplexity per token (less is better)")
    axis.xaxis.set_major_formatter(THOUSANDS)
    axis.margins(x=0.12)
    axis.grid(axis="x", color="0.9")
    axis.set_title("Where the models end (hollow: each seed)", pad=18)
    if sweeps:
        _draw_sweep(axes[1], sweeps)
    return figure
