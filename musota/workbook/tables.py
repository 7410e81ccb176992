"""Records -> tables, ready to print.

A row is a dict of what is known of a run, of the runs that differ in seed alone, of a suspect; a
column is a heading and how it prints what it finds there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from string import Formatter

import pandas as pd

from musota.plan.config import Experiment
from musota.plan.profiles import PLAN_TRAIN_TOKENS
from musota.plan.registry import experiments, title_of
from musota.rules.stats import seed_interval
from musota.rules.verdicts import Cause
from musota.studies.path import Judged
from musota.training.evaluate import exp_nats
from musota.training.runs import Run
from musota.training.schedule import learning_rate_at
from musota.workbook import figures, pictures
from musota.workbook.answers import health_of
from musota.workbook.evidence import Evidence

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
    return pd.DataFrame(cells, columns=[*columns])


RUN = {
    "model": "{title}",
    "seed": "{run.seed}",
    "parameters": "{parameters:,}",
    "MFLOP/token": "{mflop:.1f}",
    "minutes": "{minutes:.1f}",
    "tokens/s": "{tokens_per_second:,.0f}",
    "peak memory (MB)": "{megabytes:,.0f}",
    "best epoch": "{best_epoch} of {run.experiment.training.epochs}",
    "valid PPL": "{ppl:.1f}",
    "valid word PPL": "{word_ppl:.1f}",
    "valid bits/byte": "{bits_per_byte:.3f}",
    "valid accuracy": "{accuracy:.1%}",
    "test PPL": "{test_ppl:.1f}",
    "test word PPL": "{test_word_ppl:.1f}",
}
MODEL = {
    "model (measured)": "{title}",
    "seeds": "{seeds}",
    "learning rate": "{rate:.3g}",
    "parameters": "{parameters:,}",
    "MFLOP/token": "{mflop:.1f}",
    "valid PPL [95 % over seeds]": "{ppl:,.1f}{interval}",
    "valid word PPL": "{word_ppl:,.1f}",
    "valid bits/byte": "{bits_per_byte:.3f}",
    "valid accuracy": "{accuracy:.1%}",
    "test PPL": "{test_ppl:,.1f}",
    "test word PPL": "{test_word_ppl:,.1f}",
}
FRONT = {
    "model": "{title}",
    "valid PPL [95 %]": "{ppl:,.1f}{interval}",
    "accuracy": "{accuracy:.1%}",
    "against its dense twin, nats/token [95 %]": "{against}",
}
CAUSE = {
    "suspect": "{suspect.name}",
    "the plan's confidence (reported)": "{suspect.confidence}",
    "changed here": "{here}",
    "effect of mending it": "{gain}",
    "PPL": "{ppl_before:,.1f} → {after:,.1f}",
    "verdict": "{verdict}",
}
PATH_ROW = {
    "change": "{step.title}",
    "parameters": "{parameters:,}",
    "best rate": "{rate:g} of {tried}",
    "seeds": "{seeds}",
    "valid PPL": "{ppl:,.1f}",
    "nats against the row it is one change away from": "{against}",
    "verdict": "{verdict}",
}
HEALTH = {"statistic": "{rule}", "value": "{saw}", "band": "{threshold}", "meaning": "{conclusion}"}
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
SCALING = {
    "model": "{name}",
    "changed": "{axis} {value:,}",
    "batch": "{batch}",
    "tokens/s": "{tokens_per_s:,.0f}",
    "time per token": "{time_per_token:.2f}",
    "arithmetic": "{arithmetic:.2f}",
    "measured": "{measured}",
}
# On the whole of WikiText-2, test split, without dynamic evaluation; hundreds of epochs each.
PUBLISHED = (
    ("tuned LSTM (Melis et al. 2018)", "10 M", 69.1),
    ("AWD-LSTM (Merity et al. 2017)", "33 M", 65.8),
    ("Mogrifier RLSTM (Melis 2022)", "24 M", 55.0),
)
PPLS = ("ppl", "word_ppl", "test_ppl", "test_word_ppl")
REASONS = {  # the plan's, for what it changes
    "max_seq_len": "better context, still memory-safe",
    "batch_size": "compensate for longer sequences",
    "epochs": "break through the plateau",
    "learning_rate": "smoother convergence",
    "warmup_steps": "better stability",
    "accumulation_steps": "“maintain effective batch = 32”",
}


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


def _mean(runs: Iterable[Run], key: str, of: Callable[[float], float] = float) -> float:
    values = [run.summary.get(key) for run in runs]
    return sum(math.nan if v is None else of(v) for v in values) / len(values)


def mean_ppl(runs: Iterable[Run], key: str = "ppl") -> float:
    """exp of the mean loss."""
    return exp_nats(_mean(runs, key, of=math.log))


def interval_of(runs: Sequence[Run]) -> str:
    """Student's 95 % interval of the valid PPL over seeds; nothing from one."""
    if len(runs) < 2:
        return ""
    found = seed_interval([run.summary["valid_loss"] for run in runs])
    return f" [{exp_nats(found.low):,.1f}, {exp_nats(found.high):,.1f}]"


def _of_seeds(evidence: Evidence, group: Sequence[Run]) -> dict:
    """Means over seeds, Student's interval where there are two or more, and the dense twin's."""

    name, against = group[0].name, ""
    rate = group[0].experiment.training.learning_rate
    if compared := evidence.compared.get(name):
        difference = str(list(compared[1].values())[-1]).replace(" nats/token", "")
        against = f"{difference}, {compared[0].verdict}"
    title = evidence.title(name)
    if not group[0].finished:
        planned = group[0].experiment.training.epochs
        title += f" ({group[0].summary['epochs_done']} of {planned} epochs, unfinished)"
    about = {"title": title, "seeds": len(group), "rate": rate, "against": against}
    means = {key: mean_ppl(group, key) for key in PPLS}
    means |= {key: _mean(group, key) for key in ("bits_per_byte", "accuracy")}
    return _of_run(group[0]) | about | means | {"interval": interval_of(group)}


def _of_rungs(evidence: Evidence) -> list[dict]:
    """Word PPL and bits/byte of the rungs follow from the same tokens, words and bytes."""
    rows = []
    for name, ppl in evidence.rungs.items():
        corpus = evidence.runs[0].config["corpus"]
        nats = math.log(ppl) * (corpus["tokens"]["valid"] - 1)  # all but the first are scored
        word_ppl = exp_nats(nats / corpus["words"]["valid"])
        bits = nats / math.log(2) / corpus["bytes"]["valid"]
        about = {"title": f"rung: {name}", "ppl": ppl, "word_ppl": word_ppl}
        rows.append(about | {"bits_per_byte": bits})
    return rows


def model_table(evidence: Evidence) -> pd.DataFrame:
    """One row a model, means over its seeds; then the measured rungs, then published models, whose
    PPLs are reported, on the test split of the whole corpus."""
    groups = figures.by_name([run for run in evidence.runs if run.finished]).values()
    rows = [_of_seeds(evidence, group) for group in groups] + _of_rungs(evidence)
    for name, size, ppl in PUBLISHED:
        rows.append({"title": f"reported: {name}", "parameters": size, "test_word_ppl": ppl})
    return table(rows, MODEL)


def front_table(evidence: Evidence, names: Iterable[str]) -> pd.DataFrame:
    """The rows of `names` that were trained, and what counting reaches, in four columns."""
    groups = [[run for run in evidence.runs if run.name == name] for name in names]
    wanted = ("rung: bigram", "rung: trigram")
    rungs = [rung for rung in _of_rungs(evidence) if rung["title"] in wanted]
    return table([_of_seeds(evidence, group) for group in groups if group] + rungs, FRONT)


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
    for name, group in figures.by_name([*runs]).items():
        run, corpus = group[0], group[0].config["corpus"]
        model, parameters = run.experiment.model, run.experiment.model.n_parameters
        columns[title_of(name)] = {
            "architecture": type(model).__name__.removesuffix("Config"),
            **run.experiment.fields(),
            "parameters": parameters,
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
        rows.append({**vars(cause), "gain": cause.effect or "diverges", "after": after})
    return table(rows, CAUSE)


def path_table(judged: Mapping[str, Judged]) -> pd.DataFrame:
    """The path to the redesign, a change a row, and each change taken back alone."""
    rows = []
    for row in judged.values():
        about = {"ppl": row.ppl, "seeds": len(row.runs), "against": row.effect or ""}
        rows.append({**vars(row), **about, "parameters": row.runs[0].experiment.model.n_parameters})
    return table(rows, PATH_ROW)


def health_table(run: Run) -> pd.DataFrame:
    """The health statistics of a run: value, band, meaning; empty where none were kept."""
    return table(map(vars, health_of(run)), HEALTH)


def bench_table(result: Mapping) -> pd.DataFrame:
    """Ours against each literal version, a row each."""
    rows = []
    for row in result["rows"]:
        about = {
            "name": pictures.BENCH_NAMES[row["model"]],
            "mebibytes": row["memory_bytes"] / 2**20,
        }
        rows.append({**row, **about, "range": row["tokens_per_s_ratio_range"]})
    return table(rows, BENCH)


def scaling_table(result: Mapping, tolerance: float = 1.25) -> pd.DataFrame:
    """How the time a token takes grows; within `tolerance` it counts as what arithmetic says."""
    rows = []
    for point in result["scaling"]:
        off = point["time_per_token"] / point["arithmetic"]
        measured = "as it says" if 1 / tolerance < off < tolerance else f"{off:.2f} × it"
        name = pictures.BENCH_NAMES[point["model"]]
        rows.append({**point, "name": name, "measured": measured})
    return table(rows, SCALING)


def plan_changes() -> pd.DataFrame:
    """The plan's changes from `original` to `optimized`, with the reasons it gives (reported)."""
    old, new = (experiments[name].fields() for name in ("original", "optimized"))
    rows = [{"old": old[name], "new": new[name], "why": why} for name, why in REASONS.items()]
    columns = {"original": "{old:g}", "optimized": "{new:g}", "reason (reported)": "{why}"}
    return table(rows, columns).set_axis([*REASONS])


def overlooked_facts() -> list[str]:
    """What follows from the plan's table though the plan does not say it; computed from it."""

    def both(measure: Callable[[Experiment], float], form: str) -> str:
        old, new = (format(measure(experiments[n]), form) for n in ("original", "optimized"))
        return f"from {old} to {new}"

    def per_step(e: Experiment) -> int:
        return e.training.sequences_per_step * e.model.max_seq_len

    def steps(e: Experiment) -> int:
        return e.training.epochs * PLAN_TRAIN_TOKENS // per_step(e)

    def moved(e: Experiment) -> float:
        return sum(learning_rate_at(n, e.training, steps(e)) for n in range(1, steps(e) + 1))

    sequences = both(lambda e: e.training.sequences_per_step, "d")
    warmup = both(lambda e: e.training.warmup_steps / steps(e), ".0%")
    micro_batch = both(lambda e: e.training.batch_size * e.model.max_seq_len, "d")
    return [
        f"The effective batch was not kept at 32: it goes {sequences} sequences.",
        f"Tokens per optimizer step go {both(per_step, ',d')}.",
        f"The sum of the learning rate over all steps goes {both(moved, '.2f')}: three times the "
        "epochs, yet half the total movement.",
        f"Warm-up goes {warmup} of all steps.",
        f"“Same memory” rests on the tokens of a micro-batch ({micro_batch}); attention grows with "
        "the square of the length, so it has to be measured.",
        "The plan gives two times for the first ten epochs: 1.8 hours and 73 minutes (reported).",
        "The first epochs cannot “match the previous run”: the learning rate is another.",
    ]


def markdown(table: pd.DataFrame) -> str:
    """A pipe table; pandas' own would need one more dependency."""
    rows = [table.columns.astype(str), ["---"] * len(table.columns), *table.astype(str).values]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
