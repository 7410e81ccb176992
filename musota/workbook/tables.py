"""Records -> tables, ready to print.

A row is a dict of what is known of a run, of the runs that differ in seed alone, of a suspect; a
column is a heading and how it prints what it finds there.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from string import Formatter

import pandas as pd

from musota.plan.config import Experiment
from musota.plan.path import steps
from musota.plan.registry import title_of
from musota.rules.stats import seed_interval
from musota.rules.verdicts import Cause
from musota.studies.path import Judged
from musota.training.evaluate import exp_nats
from musota.training.runs import Run
from musota.workbook.answers import health_of
from musota.workbook.evidence import Evidence
from musota.workbook.naming import brief_titles, models_of, progress_of

MEANINGLESS = 1e12  # a perplexity over so many words, where a "word" is a paragraph


class _Cells(Formatter):
    """Leaves empty what a row does not know, and shows "–" where a number has no meaning."""

    def get_value(self, key, args, kwargs):
        return kwargs.get(key, "")

    def format_field(self, value, spec):
        if isinstance(value, str) or not spec:
            return str(value)
        known = value is not None and abs(value) < MEANINGLESS  # which NaN is not, either
        return format(value, spec) if known else "–"


def table(rows: Iterable[Mapping], columns: Mapping[str, str]) -> pd.DataFrame:
    cells = [[_Cells().vformat(form, (), row) for form in columns.values()] for row in rows]
    shown = pd.DataFrame(cells, columns=[*columns])
    if len(shown) and "valid word PPL" in shown and (shown["valid word PPL"] == "–").all():
        bits = shown.pop("valid bits/byte")  # leads where the text has no words
        place = next(i for i, name in enumerate(shown) if name.startswith("valid PPL"))
        shown.insert(place, bits.name, bits)
    return shown


SIZE = {"parameters": "{parameters:,}", "MFLOP/token": "{mflop:.1f}"}
SCORES = {
    "valid word PPL": "{word_ppl:,.1f}",
    "valid bits/byte": "{bits_per_byte:.3f}",
    "valid accuracy": "{accuracy:.1%}",
    "test PPL": "{test_ppl:,.1f}",
    "test word PPL": "{test_word_ppl:,.1f}",
}
RUN = {
    "model": "{title}",
    "seed": "{run.seed}",
    **SIZE,
    "minutes": "{minutes:.1f}",
    "tokens/s": "{tokens_per_second:,.0f}",
    "peak memory (MB)": "{megabytes:,.0f}",
    "best epoch": "{best_epoch} of {run.experiment.training.epochs}",
    "valid PPL": "{ppl:,.1f}",
    **SCORES,
}
MODEL = {
    "model (measured)": "{title}",
    "seeds": "{seeds}",
    "learning rate": "{rate:.3g}",
    **SIZE,
    "valid PPL [95 % over seeds]": "{ppl:,.1f}{interval}",
    **SCORES,
}
TRY = {
    "model": "{title}",
    "learning rate": "{training.learning_rate:g}",
    "warm-up steps": "{training.warmup_steps}",
    "epochs": "{training.epochs}",
    "training tokens": "{run.config[corpus][tokens][train]:,}",
    "valid PPL": "{run.summary[ppl]:,.1f}",
}
FRONT = {
    "model": "{title}",
    "valid PPL [95 %]": "{ppl:,.1f}{interval}",
    "accuracy": "{accuracy:.1%}",
    "against its dense twin, nats/token [95 %]": "{against}",
}
CAUSE = {
    "suspect": "{cause.suspect.name}",
    "the plan's confidence (reported)": "{cause.suspect.confidence}",
    "changed here": "{cause.here}",
    "effect of mending it": "{gain}",
    "PPL": "{cause.ppl_before:,.1f} → {after:,.1f}",
    "verdict": "{cause.verdict}",
}
PATH_ROW = {
    "change": "{row.step.title}",
    "parameters": "{run.experiment.model.n_parameters:,}",
    "best rate": "{row.rate:g} of {row.tried}",
    "seeds": "{seeds}",
    "valid PPL": "{row.ppl:,.1f}",
    "compared with": "{before}",
    "nats": "{against}",
    "verdict": "{row.verdict}",
}
HEALTH = {"statistic": "{rule}", "value": "{saw}", "band": "{threshold}", "meaning": "{conclusion}"}
BENCH_NAMES = {"mu": "MU-SOTA", "dense": "dense"}
BENCH = {
    "model": "{name}",
    "against": "{against}",
    "tokens/s": "{tokens_per_s:,.0f}",
    "theirs": "{against_tokens_per_s:,.0f}",
    "ratio (all rounds)": "{tokens_per_s_ratio:.2f}× ({range[0]:.2f}–{range[1]:.2f})",
    "ms/step": "{ms_per_step:,.1f}",
    "peak memory": "{mebibytes:,.0f} MiB",
    "of theirs": "{memory_ratio:.0%}",
    "of the matmul rate": "{share_of_matmul_rate:.0%}",
}
# On the whole of WikiText-2, test split, without dynamic evaluation; hundreds of epochs each.
PUBLISHED = (
    ("tuned LSTM (Melis et al. 2018)", "10 M", 69.1),
    ("AWD-LSTM (Merity et al. 2017)", "33 M", 65.8),
    ("Mogrifier RLSTM (Melis 2022)", "24 M", 55.0),
)


def comparison_table(runs: Iterable[Run], title: Callable[[str], str] = title_of) -> pd.DataFrame:
    """One row a run, every number measured; best valid epoch, test once with its weights."""
    return table([_of_run(run) | {"title": title(run.name)} for run in runs], RUN)


def _of_run(run: Run) -> dict:
    return run.summary | {
        "run": run,
        "mflop": run.summary["flops_per_token"] / 1e6,
        "minutes": run.summary["seconds"] / 60 if run.finished else "unfinished",
        "megabytes": run.summary["peak_memory_bytes"] / 1e6,
    }


def mean_ppl(runs: Sequence[Run], key: str = "ppl") -> float:
    """exp of the mean loss; NaN where a run has none."""
    ppls = [run.summary.get(key) for run in runs]
    return exp_nats(sum(math.nan if p is None else math.log(p) for p in ppls) / len(ppls))


def interval_of(runs: Sequence[Run]) -> str:
    """Student's 95 % interval of the valid PPL over seeds; nothing from one."""
    if len(runs) < 2:
        return ""
    found = seed_interval([run.summary["valid_loss"] for run in runs])
    return f" [{exp_nats(found.low):,.1f}, {exp_nats(found.high):,.1f}]"


def _of_seeds(evidence: Evidence, group: Sequence[Run], title: str) -> dict:
    """Means over seeds, Student's interval where there are two or more, and the dense twin's."""
    first, against = group[0], ""
    if compared := evidence.compared.get(first.name):
        difference = str(list(compared[1].values())[-1]).replace(" nats/token", "")
        against = f"{difference}, {compared[0].verdict}"
        against += " (one seed)" if "provisional" in compared[0].conclusion else ""
    unfinished = "" if first.finished else f" ({progress_of(first)}, unfinished)"
    ppls = ("ppl", "word_ppl", "test_ppl", "test_word_ppl")
    return {
        **_of_run(first),
        **{key: mean_ppl(group, key) for key in ppls},
        **pd.DataFrame([r.summary for r in group])[["bits_per_byte", "accuracy"]].mean(),
        "title": title + unfinished,
        "seeds": len(group),
        "rate": first.experiment.training.learning_rate,
        "against": against,
        "interval": interval_of(group),
    }


def _of_rung(evidence: Evidence, name: str) -> dict:
    """Word PPL and bits/byte of a rung follow from the same tokens, words and bytes."""
    ppl, corpus = evidence.rungs[name], evidence.runs[0].config["corpus"]
    nats = math.log(ppl) * (corpus["tokens"]["valid"] - 1)  # all but the first are scored
    word_ppl = exp_nats(nats / corpus["words"]["valid"])
    bits = nats / math.log(2) / corpus["bytes"]["valid"]
    return {"title": f"rung: {name}", "ppl": ppl, "word_ppl": word_ppl, "bits_per_byte": bits}


def model_table(evidence: Evidence) -> pd.DataFrame:
    """One row a model, means over its seeds; then the measured rungs, then published models, whose
    PPLs are reported, on the test split of the whole corpus."""
    groups = models_of(run for run in evidence.runs if run.finished).values()
    rows = [_of_seeds(evidence, group, evidence.title(group[0].name)) for group in groups]
    rows += [_of_rung(evidence, name) for name in evidence.rungs]
    for name, size, ppl in PUBLISHED:
        rows.append({"title": f"reported: {name}", "parameters": size, "test_word_ppl": ppl})
    return table(rows, MODEL)


def tries_table(runs: Iterable[Run]) -> pd.DataFrame:
    """Short runs from which the rate of longer ones was chosen."""
    rows = [(title_of(run.name.split(",")[0]), run) for run in runs]
    tried = [{"title": t, "run": run, "training": run.experiment.training} for t, run in rows]
    return table(tried, TRY)


def front_table(evidence: Evidence, names: Iterable[str]) -> pd.DataFrame:
    """The rows of `names` that were trained, and what counting reaches, in four columns."""
    groups = {name: runs for name, runs in models_of(evidence.runs).items() if name in names}
    titles = brief_titles(groups)
    rows = [_of_seeds(evidence, groups[name], titles[name]) for name in groups]
    rungs = [name for name in ("bigram", "trigram") if name in evidence.rungs]
    return table([*rows, *(_of_rung(evidence, name) for name in rungs)], FRONT)


def ledger_table(runs: Iterable[Run]) -> pd.DataFrame:
    """Parameters by group, one column a model."""
    counts = pd.DataFrame({title_of(run.name): run.summary["parameter_ledger"] for run in runs})
    counts.loc["total"] = counts.sum()
    return counts.map(lambda count: f"{count:,.0f}" if count > 0 else "–")


def fields_table(columns: Mapping[tuple[str, str], Experiment]) -> pd.DataFrame:
    """The fields of experiments side by side, one row a field, and their parameters."""
    return _side_by_side(
        {k: e.fields() | {"parameters": e.model.n_parameters} for k, e in columns.items()}
    )


def differences_table(runs: Iterable[Run]) -> pd.DataFrame:
    """Where models differ, one column each: fields, corpus, budget, machine, code."""
    columns = {}
    for name, group in models_of(runs).items():
        run, corpus = group[0], group[0].config["corpus"]
        columns[title_of(name)] = {
            "architecture": type(run.experiment.model).__name__.removesuffix("Config"),
            **run.experiment.fields(),
            "parameters": run.experiment.model.n_parameters,
            "corpus": f"{corpus['name']} {run.fingerprint[:8]}",
            "training tokens": corpus["tokens"]["train"],
            "vocabulary in use": corpus["vocabulary_in_use"],
            "profile": run.config["profile"],
            "seeds": ", ".join(str(run.seed) for run in group),
            "unfinished after epoch": None if run.finished else run.summary["epochs_done"],
            "device": run.summary["device"],
            **{f"{package} version": v for package, v in run.summary["versions"].items()},
        }
    table = _side_by_side(columns)
    return table[table.nunique(axis=1) > 1]


def _side_by_side(columns: Mapping[object, Mapping]) -> pd.DataFrame:
    cells, known = _Cells(), pd.DataFrame([*columns.values()], index=[*columns]).T.astype(object)
    return known.map(lambda v: "" if pd.isna(v) else cells.format_field(v, ",.10g"))


def causes_table(causes: Iterable[Cause]) -> pd.DataFrame:
    """Root causes in ranked order: suspect, the plan's confidence, effect, PPL, verdict."""
    rows = []
    for cause in causes:
        after = cause.ppl_after if cause.effect else "diverges"
        rows.append({"cause": cause, "gain": cause.effect or "diverges", "after": after})
    return table(rows, CAUSE)


def path_table(judged: Mapping[str, Judged]) -> pd.DataFrame:
    """The path to the redesign, a change a row, and each change taken back alone."""
    rows = steps()
    rows = [
        {"row": row, "run": row.runs[0], "seeds": len(row.runs), "against": row.effect or ""}
        | {"before": rows[row.step.before].title if row.step.before else ""}
        for row in judged.values()
    ]
    return table(rows, PATH_ROW)


def health_table(run: Run) -> pd.DataFrame:
    """The health statistics of a run: value, band, meaning; empty where none were kept."""
    return table(map(vars, health_of(run)), HEALTH)


def bench_table(result: Mapping) -> pd.DataFrame:
    """Ours against each literal version, a row each."""
    rows = []
    for row in result["rows"]:
        about = {"name": BENCH_NAMES[row["model"]], "mebibytes": row["memory_bytes"] / 2**20}
        rows.append({**row, **about, "range": row["tokens_per_s_ratio_range"]})
    return table(rows, BENCH)


def markdown(table: pd.DataFrame) -> str:
    """A pipe table; pandas' own would need one more dependency."""
    rows = [table.columns.astype(str), ["---"] * len(table.columns), *table.astype(str).values]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
