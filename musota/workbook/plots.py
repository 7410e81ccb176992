"""Figures of runs and of what was measured on them: data -> Figure. Nothing is saved here."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from musota.lab.curves import PLATEAU_EPOCHS, PLATEAU_GAIN, plateau_start
from musota.lab.plan_rules import REPORTED
from musota.lab.root_causes import MISSED, Cause
from musota.lab.stats import RELEVANT, Interval
from musota.lab.verdicts import Verdict, measured, representative
from musota.training.run import Run
from musota.workbook import style
from musota.workbook.results import by_title, label, mean_loss, progress
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
    "matched transformer": ("#666666", "^", "parameter-matched transformer, against the redesign"),
    "longer": ("#000080", "P", "trained longer, against MU-SOTA"),
}
PATH_RUNS = "profile study, four epochs (trained longer: six), three seeds; drawn from path.csv"
METRICS = {  # of the explorer: records, column, label, place of an n-gram baseline, if any
    "valid perplexity": ("history", "ppl", "valid perplexity per token", float),
    "valid loss": ("history", "valid_loss", "valid loss (nats/token)", math.log),
    "valid accuracy": ("history", "accuracy", "valid top-1 accuracy", None),
    "training loss": ("steps", "loss", "training loss (nats/token)", None),
    "learning rate": ("steps", "learning_rate", "learning rate", None),
    "gradient norm": ("steps", "grad_norm", "gradient norm before clipping", None),
}
SWEEP_NATS = 2.5  # losses worse than the best by more are drawn at the upper edge


def _series(runs: Iterable[Run]) -> Iterable[tuple[str, list[Run], tuple[str, str, str]]]:
    """Title, seeds and style of each model among the runs that have ended an epoch."""
    groups = by_title(run for run in runs if run.summary)
    return zip(groups.keys(), groups.values(), _styles([*groups.values()]), strict=True)


def _styles(groups: Sequence[Sequence[Run]]) -> list[tuple[str, str, str]]:
    """A style for each model, given by its seeds. A run with changes has the style of its model,
    unless the model without changes is drawn, too."""
    runs = [group[0] for group in groups]
    names = {run.name for run in runs}
    return styles_of([r.name if r.model_name in names else r.model_name or r.name for r in runs])


def _look(run: Run, colour: str, line: str, marker: str) -> dict:
    """The look of a model's curve; the markers of models without blocks are hollow."""
    fill = "full" if getattr(run.experiment.model, "layout", None) else "none"
    return {"color": colour, "linestyle": line, "marker": marker, "fillstyle": fill}


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
    for (title, group, looks), size in zip(series, sizes, strict=True):
        tables = [run.history.set_index("epoch")[[measured, "accuracy"]] for run in group]
        mean = (sum(tables) / len(tables)).dropna()  # epochs that every seed has reached
        seeds = f"{len(group)} seeds" if len(group) > 1 else f"seed {group[0].seed}"
        stands_for = representative(group)
        seeds += "" if stands_for.finished else f", {progress(stands_for)}"
        seeds += " epochs" * (not stands_for.ended)
        look = _look(group[0], *looks) | {"markersize": size, "linewidth": size / 3.5}
        thin = {"color": look["color"], "linewidth": 0.7, "alpha": 0.5}
        for table in tables if len(group) > 1 else []:
            left.plot(table.index, shown(table[measured]), **thin)
            right.plot(100 * table.accuracy, **thin)
        left.plot(mean.index, shown(mean[measured]), label=wrapped(f"{title}, {seeds}", 76), **look)
        right.plot(100 * mean.accuracy, **look)
        last = max(last, *(table.index.max() for table in tables))
    if reported:
        ppl, epochs = REPORTED["ppl"], REPORTED["epochs"]
        star = {"marker": "*", "color": "black", "markersize": 11, "linestyle": "none"}
        left.plot(epochs, ppl, label=f"reported: {ppl:.0f} after {epochs} epochs", **star)
        right.plot(epochs, 100 * REPORTED["accuracy"], **star)
        last = max(last, epochs)
    lowest, highest = left.dataLim.intervaly
    top = 1.3 * ngrams.get("unigram", math.inf)  # above it a model has learned next to nothing
    style.logarithmic(left, lowest, min(highest, top) if lowest < top else highest)
    if lowest < top < highest:
        left.set_ylim(0.95 * min(lowest, *ngrams.values()), top)
    left.set(ylabel=f"valid {unit} (log)", title=unit.removesuffix(" per token").capitalize())
    right.set(ylabel="valid top-1 accuracy (%)", title="Accuracy")
    for axis in (left, right):
        axis.set(xlabel="epoch", xlim=(0.8, last + 0.3))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    key = left.get_legend_handles_labels()
    figure.legend(*key, fontsize=8, ncols=2, loc="outside upper center")
    style.draw_ngrams(left, ngrams, "\n")
    return figure


def training_curve(run: Run, ngrams: Mapping[str, float] = {}, reported: bool = False) -> Figure:
    """Training and valid perplexity by optimizer step, up to the last of the run, with the n-gram
    baselines and, if `reported`, the plan's reported result; and the learning rate."""
    figure, (left, right) = new_figure(10, 3.6, columns=2, grid="y")
    steps, history = run.steps, run.history
    left.plot(steps.step, np.exp(steps.loss), color="0.75", linewidth=0.8, label="training batch")
    smooth = steps.loss.rolling(1 + len(steps) // 25, center=True, min_periods=1).mean()
    left.plot(steps.step, np.exp(smooth), color=style.BLUE, label="training, smoothed")
    if len(history):
        left.plot(history.step, history.ppl, "s--", color=style.RED, label="valid")
    for step, event in run.events:
        left.axvline(step, color="black", linewidth=1, linestyle=":", label=wrapped(event, 50))
    if reported:
        text = f"reported: {REPORTED['ppl']:.0f}"
        left.axhline(REPORTED["ppl"], color="black", linewidth=1, linestyle="-.", label=text)
    right.plot(steps.step, steps.learning_rate, color=style.BLUE)
    warmup = run.experiment.training.warmup_steps
    right.axvline(warmup, color="0.4", linestyle=":", label=f"warm-up ends: step {warmup:,}")
    left.set_title(wrapped(label(run), 60), fontsize=10)
    left.set(ylabel="perplexity per token (log)")
    right.set(ylabel="learning rate", ylim=(0, None))
    right.set_title("Learning rate", fontsize=10)
    style.logarithmic(left, *left.dataLim.intervaly)
    for axis in (left, right):
        axis.set(xlabel="optimizer step", xlim=(0, 1.02 * run.total_steps))
        axis.xaxis.set_major_formatter(PLAIN)
        axis.legend(fontsize=8)
    style.draw_ngrams(left, ngrams, "\n")
    return figure


def sizes(runs: Iterable[Run]) -> Figure:
    """Valid PPL by parameters, and by operations a token: a point each model, the mean of its
    seeds."""
    figure, axes = new_figure(10, 4.2, columns=2, grid="both")
    for index, (title, group, looks) in enumerate(_series(runs)):
        model, ppl = group[0].experiment.model, float(np.exp(mean_loss(group)))
        for axis, amount in zip(axes, (model.n_parameters, model.flops_per_token), strict=True):
            look = _look(group[0], *looks) | {"markersize": 9, "linestyle": "none"}
            axis.plot(amount / 1e6, ppl, label=wrapped(title, 60), **look)
            note(axis, f"{ppl:,.0f}", (amount / 1e6, ppl), (7, 4 - 12 * (index % 2)))
    axes[0].set(xlabel="parameters (millions)", title="Perplexity against size")
    axes[1].set(xlabel="operations per token (MFLOP)", title="Perplexity against compute")
    for axis in axes:
        axis.set(ylabel="valid perplexity per token (log)")
        style.logarithmic(axis, *axis.dataLim.intervaly)
        axis.margins(x=0.15, y=0.2)
        axis.locator_params("x", nbins=5)
    key = axes[0].get_legend_handles_labels()
    figure.legend(*key, fontsize=8, ncols=2, loc="outside upper center")
    return figure


def difference(verdicts: Mapping[str, Verdict], title: str) -> Figure:
    """Differences in loss with their intervals around 0, numbers and decisions on the right.
    Verdicts without a value are left out."""
    rows, notes = {}, []
    for name, verdict in verdicts.items():
        if verdict.value is not None:
            ends = () if verdict.low is None else (verdict.low, verdict.high)
            rows[wrapped(name, 44)] = Interval(verdict.value, *ends)
            notes.append(f"{measured(verdict)}\n{verdict.decision}")
    rows = rows or {"unfinished or diverged": Interval(math.nan)}
    figure, axis = new_figure(10, 1.9 + 0.5 * len(rows), grid="x")
    draw_intervals(axis, rows, notes)
    axis.margins(x=0.15)
    axis.set_xlabel("difference in valid loss, nats per token (← better · worse →)")
    axis.set_title(wrapped(title, 80))
    return figure


def root_causes(causes: Sequence[Cause]) -> Figure:
    """The change of the valid loss when each suspect is removed, the largest gain on top."""
    figure, axis = new_figure(10.5, 1.9 + 0.36 * len(causes), grid="x")
    rows, notes = {}, []
    for cause in causes:
        plan = "" if cause.confidence == MISSED else "plan's confidence: "
        rows[f"{cause.name}\n{plan}{cause.confidence} · {cause.changed}"] = cause.effect
        after = f"{cause.ppl_after:,.0f}" if cause.effect else "diverges"
        notes.append(f"{cause.ppl_before:,.0f} → {after}")
    draw_intervals(axis, rows, notes, [DECISIONS[cause.decision] for cause in causes])
    note(axis, "valid PPL", (1.01, 1), (0, 4), xycoords="axes fraction")
    axis.tick_params(axis="y", labelsize=7.5)
    axis.axvspan(-RELEVANT, RELEVANT, color="0.93", zorder=0)
    axis.set_xlabel("change of the valid loss, nats per token (← removing it helps · hurts →)")
    axis.set_title("Which suspect holds the model back?")
    handles = [_marker(decision, *look) for decision, look in DECISIONS.items()]
    handles.append(Patch(color="0.93", label=f"under {RELEVANT} nats"))
    figure.legend(handles=handles, fontsize=8, ncols=4, loc="outside lower right")
    return figure


def _marker(label: str, colour: str, marker: str, fill: str = "full") -> Line2D:
    """A marker for a legend."""
    look = {"linestyle": "none", "markerfacecoloralt": "white", "markeredgewidth": 1.5}
    return Line2D([], [], color=colour, marker=marker, fillstyle=fill, label=label, **look)


def rate_sweep(sweeps: Mapping[str, Mapping[float, Sequence[float]]]) -> Figure:
    """Valid losses of seeds by model and learning rate: a line a model, through the means; dots are
    seeds, rings mark the best rates."""
    figure, axis = new_figure(8.5, 4.2, grid="both")
    means = {
        title: pd.Series({rate: np.mean(losses[rate]) for rate in sorted(losses)})
        for title, losses in sweeps.items()
    }
    ceiling = min(mean.min() for mean in means.values()) + SWEEP_NATS
    styles = styles_of(["optimized", "baseline", *sweeps])  # those two are the usual ones
    for (title, mean), (colour, line, marker) in zip(means.items(), styles, strict=False):
        best = mean.idxmin()
        text = f"{wrapped(title, 60)}: best PPL {np.exp(mean[best]):,.0f} at {best:.2g}"
        look = {"color": colour, "linestyle": line, "marker": marker}
        axis.plot(mean.clip(upper=ceiling), label=text, **look)
        for rate, losses in sweeps[title].items():
            dots = np.minimum(losses, ceiling)
            axis.plot([rate] * len(dots), dots, ".", color=colour, markersize=4)
        axis.plot(best, mean[best], "o", color=colour, markersize=15, fillstyle="none")
    for rate in {rate for mean in means.values() for rate in mean.index[mean > ceiling]}:
        note(axis, "off the scale ↑", (rate, ceiling), (0, 6), ha="center")
    axis.set(xscale="log", xlabel="learning rate (log)", ylabel="valid loss (nats/token)")
    axis.set_title("Valid loss by learning rate (dots: seeds, ring: the best mean)")
    axis.margins(y=0.2)
    axis.legend(fontsize=9)
    return figure


def ablations(run: Run, effects: Mapping[str, Interval]) -> Figure:
    """The growth of a run's perplexity when a part, or a block's channels, are disabled."""
    ppl, layout = run.summary["ppl"], run.experiment.model.layout
    blocks = {block.name: f"{block.name} {block.title}" for block in layout.blocks}
    parts = {name: name for name in effects if name not in blocks}
    figure, axes = new_figure(10, 1.6 + 0.3 * len(blocks), columns=2, grid="x")
    titles = "One part disabled", "The channels of one block set to 0"
    for axis, titled, title in zip(axes, (parts, blocks), titles, strict=True):
        grown = {}
        for name, shown in titled.items():
            nats = effects[name].mean, effects[name].low, effects[name].high
            grown[shown] = Interval(*(ppl * np.expm1(nats)))
        draw_intervals(axis, grown, [f"{interval.mean:+,.1f}" for interval in grown.values()])
        axis.tick_params(axis="y", labelsize=8)
        axis.set(xlabel=f"change of valid PPL (whole model: {ppl:,.1f})", title=title)
    figure.suptitle(wrapped(label(run), 90))
    return figure


def path(table: pd.DataFrame) -> Figure:
    """The rows of path.csv, from MU-SOTA to the redesign: the difference of each to the row it is
    compared with, and its valid PPL. Rows that diverged are left out."""
    table = table[np.isfinite(table.ppl)]
    figure, axis = new_figure(11, 1.9 + 0.3 * len(table), grid="x")
    rows, notes = {}, []
    for row in table.fillna({"verdict": ""}).itertuples():
        rows[wrapped(row.title, 70)] = Interval(row.nats, row.low, row.high)
        notes.append(f"{row.ppl:,.1f}  {row.verdict}")
    draw_intervals(axis, rows, notes, [(*STEPS[kind][:2], "full") for kind in table.kind])
    note(axis, "valid PPL", (1.01, 1), (0, 4), xycoords="axes fraction")
    axis.tick_params(axis="y", labelsize=8)
    difference = "difference to the row it is compared with, nats per token (← better · worse →)"
    axis.set(xlabel=difference, title="From MU-SOTA to the redesign")
    handles = [_marker(text, colour, marker) for colour, marker, text in STEPS.values()]
    figure.legend(handles=handles, fontsize=8, ncols=3, loc="outside upper center")
    return figure


def explored(
    groups: Sequence[Sequence[Run]],
    ngrams: Mapping[str, float],
    metric: str = "valid perplexity",
    smoothing: int = 0,
    rule: tuple[int, float] = (PLATEAU_EPOCHS, PLATEAU_GAIN),
    log: str = "y",
) -> Figure:
    """A key of METRICS by epoch for models, given by their seeds: the mean (of PPL: of the losses),
    and a band from the lowest to the highest seed; with n-gram baselines, shaded plateaus and
    marked events.

    `smoothing` is the number of points on either side that are averaged; `rule` is the window and
    the least gain of `plateau_start`; `log` names the logarithmic axes: x, y or xy.
    """
    records, column, name, baseline = METRICS[metric]
    figure, axis = new_figure(9, 4.4, grid="both")
    for place, (group, looks) in enumerate(zip(groups, _styles(groups), strict=True)):
        run, text, colour = group[0], group[0].title, looks[0]
        per_epoch = run.history.step[0] / run.history.epoch[0]
        seeds = pd.DataFrame({r.seed: getattr(r, records).set_index("step")[column] for r in group})
        seeds = seeds.set_axis(seeds.index / per_epoch)
        if smoothing:  # centred, so that a falling curve does not lag
            seeds = seeds.rolling(1 + 2 * smoothing, center=True, min_periods=1).mean()
        if len(group) > 1:
            text += f", {len(group)} seeds"
            ends = seeds.min(axis=1), seeds.max(axis=1)
            axis.fill_between(seeds.index, *ends, color=colour, alpha=0.25, linewidth=0)
        look = _look(run, *looks) | {"label": wrapped(text, 60)}
        mean = np.exp(np.log(seeds).mean(axis=1)) if column == "ppl" else seeds.mean(axis=1)
        axis.plot(mean, **look | {"marker": ""} if len(seeds) > 60 else look)
        if start := plateau_start(run, *rule):
            band = {"ymin": place / len(groups), "ymax": (place + 1) / len(groups), "alpha": 0.15}
            band["label"] = wrapped(f"plateau: {text}", 60)
            band |= {"facecolor": colour, "edgecolor": colour}
            axis.axvspan(start, len(run.history), hatch=style.HATCHES[1 + place % 7], **band)
        for step, event in run.events:
            axis.axvline(step / per_epoch, color=colour, linewidth=1, linestyle=":")
            above = {"xycoords": ("data", "axes fraction"), "va": "top", "ha": "right"}
            place_of_text = step / per_epoch, 0.98
            note(axis, style.literal(event), place_of_text, (-2, 0), rotation=90, **above)
    name += " (log)" * ("y" in log)
    if len({group[0].valid_text for group in groups}) > 1:
        name += "\n(different texts: not comparable)"
    axis.set(xlabel="epoch" + " (log)" * ("x" in log), ylabel=name)
    if "x" in log:
        axis.set_xscale("log")
        axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 3, 5)), minor_locator=NullLocator())
    else:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.xaxis.set_major_formatter(PLAIN)
    axis.yaxis.set_major_formatter(PLAIN)
    if "y" in log:  # of metrics without a baseline the largest values matter
        style.logarithmic(axis, *axis.dataLim.intervaly, "top" if baseline else "bottom")
    figure.legend(fontsize=8, ncols=2, loc="outside upper center")
    style.draw_ngrams(axis, {n: baseline(ppl) for n, ppl in ngrams.items()} if baseline else {})
    return figure
