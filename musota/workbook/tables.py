"""Tables of results, as pandas DataFrames of text.

`attrs["best"]` of a table lists the labels (row, column) of what is shown in bold.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, geometric_mean

import pandas as pd

from musota.config import DenseConfig, Experiment, ModuleConfig, MuConfig, RedesignedConfig
from musota.lab.curves import health, plateau
from musota.lab.plan_rules import REPORTED
from musota.lab.root_causes import Cause
from musota.lab.stats import seed_interval
from musota.lab.verdicts import HUGE, Verdict, compare, measured, representative
from musota.training.evaluate import exp_nats
from musota.training.run import Run
from musota.workbook.results import Results, by_title, mean_loss, progress

# The texts of a right-aligned column.
NUMBERS = re.compile(r"(?:[\d\s.,%+−–×e/\[\]→-]|of|a seed diverges)*")
MARKUP = re.compile(r"[\\|*$`~]|(?<![^\W_])_|_(?![^\W_])|\](?=\()")  # of Markdown
METRICS = {  # columns of the model table: key in a summary, and where the best value is
    "valid PPL": ("ppl", "idxmin"),
    "accuracy": ("accuracy", "idxmax"),
    "test PPL": ("test_ppl", "idxmin"),
    "test word PPL": ("test_word_ppl", "idxmin"),
    "bits/byte": ("bits_per_byte", "idxmin"),
}
# On the test split of WikiText-2, read as one stream, without dynamic evaluation.
PUBLISHED = (
    ("Tuned LSTM (Melis et al. 2018)", "24 M", 65.9),
    ("AWD-LSTM (Merity et al. 2017)", "33 M", 65.8),
    ("Mogrifier RLSTM (Melis 2022)", "24 M", 55.0),
)
ARCHITECTURES = {MuConfig: "MU-SOTA", DenseConfig: "GPT-2 style", RedesignedConfig: "modern"}
ARCHITECTURES |= {ModuleConfig: "your own"}
COUNTED = {"unigram": "single tokens", "bigram": "pairs of tokens", "trigram": "triples of tokens"}


def number(value: float | None, style: str = ",.1f") -> str:
    """A number as text; "–" where it is missing, not finite or meaningless."""
    known = value is not None and abs(value) < HUGE  # which NaN is not, either
    return format(value, style) if known else "–"


def _mean(group: Sequence[Run], key: str) -> float:
    """The mean of a metric over seeds; of perplexities, exp of the mean loss."""
    values = [math.nan if run.diverged else run.summary.get(key, math.nan) for run in group]
    return geometric_mean(values) if key.endswith("ppl") else fmean(values)


def _ppl(group: Sequence[Run]) -> str:
    """Valid PPL, with Student's 95 % interval over seeds where there are two or more."""
    losses = [run.valid_loss for run in group]
    if len(group) < 2 or not math.isfinite(sum(losses)):
        return number(exp_nats(mean_loss(group)))
    found = seed_interval(losses)
    mean, low, high = (number(exp_nats(loss)) for loss in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]"


def model_table(results: Results, groups: Sequence[Sequence[Run]] | None = None) -> pd.DataFrame:
    """One row a model, means over seeds: the reported result first, where it can be compared, then
    the models (`groups`, by default all), the n-gram baselines and published models."""
    groups = results.measured if groups is None else groups
    rows, values = [], {}  # values: numbers by row and column
    has_words = any(_mean(group, "word_ppl") < HUGE for group in groups)
    last, style = ("test word PPL", ",.1f") if has_words else ("bits/byte", ".3f")
    if results.at_plan_size:
        reported = {"valid PPL": number(REPORTED["ppl"]), "epochs": str(REPORTED["epochs"])}
        accuracy = f"{REPORTED['accuracy']:.2%}"
        rows.append({"model": "MU-SOTA, reported", **reported, "accuracy": accuracy})
    for group in groups:
        model, training = group[0].experiment.model, group[0].experiment.training
        layers = f"{model.n_layer} layer{'s' * (model.n_layer != 1)}"
        size = f"{model.n_parameters / 1e6:.1f} M parameters, {layers}, context "
        values[len(rows)] = mean = {name: _mean(group, key) for name, (key, _) in METRICS.items()}
        row = {
            "model": group[0].title,
            "settings": f"{size}{model.max_seq_len}, learning rate {training.learning_rate:g}",
            "seeds": str(len(group)),
            "epochs": progress(representative(group)),
            "valid PPL": _ppl(group),
            "accuracy": number(mean["accuracy"], ".1%"),
            "test PPL": number(mean["test PPL"]),
            last: number(mean[last], style),
        }
        rows.append(row)
    for name in (name for name in COUNTED if name in results.ngrams):
        row = {"model": f"N-gram baseline: {name}", "settings": f"counts {COUNTED[name]}"}
        rows.append(row | {"valid PPL": number(results.ngrams[name])})
    for name, size, ppl in PUBLISHED if results.at_plan_size else ():
        settings = f"reported: {size} parameters, 100 epochs or more"
        rows.append({"model": name, "settings": settings, last: f"{ppl}"})
    columns = ["model", "settings", "seeds", "epochs", "valid PPL", "accuracy", "test PPL", last]
    table = pd.DataFrame(rows, columns=columns).fillna("–")
    means = pd.DataFrame(values).T.dropna(axis=1, how="all")
    compared = [name for name in columns if name in means and len(means) > 1]
    table.attrs["best"] = [(getattr(means[name], METRICS[name][1])(), name) for name in compared]
    return table


def front_table(results: Results) -> pd.DataFrame:
    """The model table as the front page has it: four columns, without published models and runs
    that have not finished."""
    table = model_table(results, results.ended)
    hidden = {name for name, *_ in PUBLISHED} | {"N-gram baseline: unigram"}
    return table[~table.model.isin(hidden)][["model", "epochs", "valid PPL", "accuracy"]]


def runs_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row a run: what it took, and its best valid epoch; test was scored once."""
    columns = ["model", "seed", "epochs", "minutes", "tokens/s", "valid PPL", "accuracy (%)"]
    rows = []
    for run in runs:
        found = run.summary
        minutes = found["seconds"] / 60 if run.finished else math.nan
        values = [minutes, found.get("tokens_per_second"), found.get("ppl")]
        values += [100 * found.get("accuracy", math.nan), found.get("test_ppl")]
        shown = map(number, values, [",.1f", ",.0f", ",.1f", ".1f", ",.1f"])
        rows.append([run.title, str(run.seed), progress(run), *shown])
    return pd.DataFrame(rows, columns=[*columns, "test PPL"])


def fields_table(columns: Mapping[str, Experiment]) -> pd.DataFrame:
    """The fields of experiments side by side, one row a field, and their parameters."""
    fields = {k: e.fields() | {"parameters": e.model.n_parameters} for k, e in columns.items()}
    return _side_by_side(fields)


def differences_table(runs: Iterable[Run]) -> pd.DataFrame:
    """Where models differ, one column each: fields, corpus, epochs, machine, versions."""
    columns = {}
    for title, (run, *others) in by_title(runs).items():
        corpus = run.config["corpus"]
        columns[title] = {
            "architecture": ARCHITECTURES[type(run.experiment.model)],
            **run.experiment.fields(),
            "parameters": run.experiment.model.n_parameters,
            "corpus": f"{corpus['name']} {run.fingerprint[:8]}",
            "training tokens": corpus["tokens"]["train"],
            "vocabulary in use": corpus["vocabulary_in_use"],
            "profile": run.profile,
            "seeds": ", ".join(str(each.seed) for each in (run, *others)),
            "epochs trained": progress(run),
            "device": run.summary.get("device"),
            "precision": run.config.get("precision"),
            **{f"{name} version": v for name, v in run.summary.get("versions", {}).items()},
        }
    table = _side_by_side(columns)
    return table[table.nunique(axis=1) > 1]


def _side_by_side(columns: Mapping[object, Mapping]) -> pd.DataFrame:
    table = pd.DataFrame([*columns.values()], index=[*columns]).T.astype(object)
    plain = {True: str, False: lambda value: format(value, ",.10g")}
    return table.map(lambda v: "" if pd.isna(v) else plain[isinstance(v, (str, bool))](v))


def causes_table(causes: Iterable[Cause]) -> pd.DataFrame:
    """Root causes, ranked: the plan's confidence, what was changed, and what that did."""
    rows = [
        {
            "suspect": cause.name,
            "confidence (reported)": cause.confidence,
            "changed": cause.changed,
            "nats/token": str(cause.effect or "a seed diverges").replace(" nats/token", ""),
            "valid PPL": " → ".join(map(number, (cause.ppl_before, cause.ppl_after))),
            "decision": cause.decision,
        }
        for cause in causes
    ]
    return pd.DataFrame(rows)


def verdict_table(verdicts: Iterable[Verdict]) -> pd.DataFrame:
    """One row a verdict: question, decision, measured value, reason, next step."""
    columns = ["question", "decision", "measured", "reason", "next step"]
    rows = [(v.question, v.decision, measured(v) or "–", v.reason, v.next_step) for v in verdicts]
    table = pd.DataFrame(rows, columns=columns)
    return table if table["next step"].any() else table.drop(columns="next step")


def plateaus_table(groups: Sequence[Sequence[Run]], window: int, least_gain: float) -> pd.DataFrame:
    """One row a model, given by its seeds: the plateau of the first seed, and how the model
    compares with the first one. Arguments as in `plateau`."""
    first, rows = groups[0], []
    for group in groups:
        flat, against = plateau(group[0], window, least_gain), ""
        if group is not first and group[0].valid_text == first[0].valid_text:
            verdict = compare(group, first)
            against = f"{verdict.decision} {measured(verdict)}"
        rows.append([group[0].title, flat.decision, flat.reason, against])
    columns = ["model", "plateau?", "what was measured", f"against {first[0].title}"]
    return pd.DataFrame(rows, columns=columns)


def health_table(run: Run) -> pd.DataFrame:
    """The health statistics of a run; ⚠ marks what is out of its usual band. Empty where none were
    recorded."""
    table = verdict_table(health(run))
    table["decision"] = table.decision.where(table.decision == "ok", "⚠ " + table.decision)
    return table.rename(columns={"question": "statistic"})


def alignments(table: pd.DataFrame) -> list[str]:
    """For each column right (numbers) or left (text)."""
    columns = (column for _, column in table.astype(str).items())
    return ["right" if all(map(NUMBERS.fullmatch, column)) else "left" for column in columns]


def markdown(table: pd.DataFrame) -> str:
    """A pipe table, with the best values in bold."""
    best = table.attrs.get("best", ())
    rules = ["---:" if side == "right" else ":---" for side in alignments(table)]
    lines = [[escaped(str(name)) for name in table], rules]
    for label, row in table.astype(str).map(escaped).iterrows():
        lines.append([f"**{t}**" if (label, name) in best else t for name, t in row.items()])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Text on one line that Markdown shows as it is."""
    text = MARKUP.sub(r"\\\g<0>", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;")
