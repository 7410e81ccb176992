"""Records -> tables, ready to print. A table is a list of columns: heading, value, format."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from musota.plan.config import Experiment
from musota.plan.profiles import PLAN_TRAIN_TOKENS
from musota.plan.registry import experiments, title_of
from musota.rules.stats import seed_interval
from musota.rules.verdicts import Cause
from musota.training.runs import Run
from musota.training.schedule import learning_rate_at
from musota.workbook import figures, pictures
from musota.workbook.evidence import Evidence, health_of

NONE = "–"  # where a figure has no meaning
LARGEST = 1e9  # of a perplexity that says anything
# On the whole of WikiText-2, test split, without dynamic evaluation; hundreds of epochs each.
PUBLISHED = (
    ("tuned LSTM (Melis et al. 2018)", "10 M", 69.1),
    ("AWD-LSTM (Merity et al. 2017)", "33 M", 65.8),
    ("Mogrifier RLSTM (Melis 2022)", "24 M", 55.0),
)
BENCH_TOLERANCE = 1.25  # nearer to the arithmetic than this counts as following it


def plan_changes() -> pd.DataFrame:
    """The plan's changes from `original` to `optimized`, with the reasons it gives (reported)."""
    reasons = {
        "max_seq_len": "better context, still memory-safe",
        "batch_size": "compensate for longer sequences",
        "epochs": "break through the plateau",
        "learning_rate": "smoother convergence",
        "warmup_steps": "better stability",
        "accumulation_steps": "“maintain effective batch = 32”",
    }
    old, new = (experiments[name].fields() for name in ("original", "optimized"))
    rows = {
        name: {
            "original": f"{old[name]:g}",
            "optimized": f"{new[name]:g}",
            "reason (reported)": why,
        }
        for name, why in reasons.items()
    }
    return pd.DataFrame(rows).T


def overlooked_facts() -> list[str]:
    """What follows from the plan's table though the plan does not say it; computed from it."""
    old, new = experiments["original"], experiments["optimized"]
    sequences = [e.training.sequences_per_step for e in (old, new)]
    per_step = [e.training.sequences_per_step * e.model.max_seq_len for e in (old, new)]
    micro = [e.training.batch_size * e.model.max_seq_len for e in (old, new)]
    steps = [
        e.training.epochs * PLAN_TRAIN_TOKENS // n
        for e, n in zip((old, new), per_step, strict=True)
    ]
    rates = [
        sum(learning_rate_at(step, e.training, total) for step in range(1, total + 1))
        for e, total in zip((old, new), steps, strict=True)
    ]
    shares = [e.training.warmup_steps / total for e, total in zip((old, new), steps, strict=True)]
    return [
        f"The effective batch was not kept at 32: it goes from {sequences[0]} sequences to "
        f"{sequences[1]}.",
        f"Tokens per optimizer step go from {per_step[0]:,} to {per_step[1]:,}.",
        f"The sum of the learning rate over all steps goes from {rates[0]:.2f} to {rates[1]:.2f}: "
        "three times the epochs, yet half the total movement.",
        f"Warm-up goes from {shares[0]:.0%} to {shares[1]:.0%} of all steps.",
        f"“Same memory” rests on {micro[0]} against {micro[1]} tokens a micro-batch; attention "
        "grows with the square of the length, so it has to be measured.",
        "The plan gives two times for the first ten epochs: 1.8 hours and 73 minutes (reported).",
        "The first epochs cannot “match the previous run”: the learning rate is another.",
    ]


Columns = Sequence[tuple[str, Callable, str]]


def _table(rows: Iterable, columns: Columns) -> pd.DataFrame:
    """A row for each of `rows`: under each heading its value in its format."""
    return pd.DataFrame(
        [{heading: _shown(value(row), form) for heading, value, form in columns} for row in rows]
    )


def _shown(value, form: str) -> str:
    """Text as it is, None as nothing, what has no meaning as a dash."""
    if value is None or isinstance(value, str):
        return value or ""
    return format(value, form) if abs(value) < LARGEST or form == "," else NONE


def _of(key: str, divisor: float = 1) -> Callable[[Run], float | None]:
    def value(run: Run) -> float | None:
        found = run.summary.get(key)
        return found / divisor if found is not None and divisor != 1 else found

    return value


_RUN: Columns = (
    ("model", lambda run: title_of(run.name), ""),
    ("seed", lambda run: run.seed, ""),
    ("parameters", _of("parameters"), ","),
    ("MFLOP/token", _of("flops_per_token", 1e6), ".1f"),
    ("minutes", lambda run: run.summary["seconds"] / 60 if run.finished else "unfinished", ".1f"),
    ("tokens/s", _of("tokens_per_second"), ",.0f"),
    ("peak memory (MB)", _of("peak_memory_bytes", 1e6), ",.0f"),
    ("best epoch", lambda r: f"{r.summary['best_epoch']} of {r.experiment.training.epochs}", ""),
    ("valid PPL", _of("ppl"), ".1f"),
    ("valid word PPL", _of("word_ppl"), ".1f"),
    ("valid bits/byte", _of("bits_per_byte"), ".3f"),
    ("valid accuracy", _of("accuracy"), ".1%"),
    ("test PPL", _of("test_ppl"), ".1f"),
    ("test word PPL", _of("test_word_ppl"), ".1f"),
)


def comparison_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One row a run, every number measured; best valid epoch, test once with its weights."""
    return _table(runs, _RUN)


def _mean(key: str) -> Callable[[Sequence[Run]], float]:
    return lambda seeds: float(np.mean([run.summary[key] for run in seeds]))


def _mean_ppl(key: str) -> Callable[[Sequence[Run]], float]:
    return lambda seeds: math.exp(np.mean([math.log(run.summary[key]) for run in seeds]))


def ppl_with_spread(seeds: Sequence[Run]) -> str:
    """Valid PPL (exp of the mean loss), with Student's interval over seeds where there are more."""
    shown = f"{_mean_ppl('ppl')(seeds):,.1f}"
    if len(seeds) < 2:
        return shown
    interval = seed_interval([run.summary["valid_loss"] for run in seeds])
    return f"{shown} [{math.exp(interval.low):,.1f}, {math.exp(interval.high):,.1f}]"


_MODEL: Columns = (
    ("seeds", lambda seeds: str(len(seeds)), ""),
    ("learning rate", lambda seeds: seeds[0].experiment.training.learning_rate, ".3g"),
    ("parameters", lambda seeds: seeds[0].summary["parameters"], ","),
    ("MFLOP/token", lambda seeds: seeds[0].summary["flops_per_token"] / 1e6, ".1f"),
    ("valid PPL [95 % over seeds]", ppl_with_spread, ""),
    ("valid word PPL", _mean_ppl("word_ppl"), ",.1f"),
    ("valid bits/byte", _mean("bits_per_byte"), ".3f"),
    ("valid accuracy", _mean("accuracy"), ".1%"),
    ("test PPL", _mean_ppl("test_ppl"), ",.1f"),
    ("test word PPL", _mean_ppl("test_word_ppl"), ",.1f"),
)


def model_table(evidence: Evidence, published: bool = True) -> pd.DataFrame:
    """One row a model, means over its seeds; then the measured rungs, then published models.

    Word PPL and bits/byte of the rungs follow from the same tokens, words and bytes. Published PPLs
    are reported, on the test split of the whole corpus.
    """
    groups = figures.by_name([run for run in evidence.runs if run.finished])
    name = ("model (measured)", lambda seeds: evidence.title(seeds[0].name), "")
    tables = [_table(groups.values(), (name, *_MODEL))]
    if evidence.runs:
        s = evidence.runs[0].summary
        words = math.log(s["word_ppl"]) / s["valid_loss"]  # tokens a word
        bits = s["bits_per_byte"] / s["valid_loss"]
        columns = (
            (name[0], lambda rung: f"rung: {rung[0]}", ""),
            ("valid PPL [95 % over seeds]", lambda rung: rung[1], ",.1f"),
            ("valid word PPL", lambda rung: rung[1] ** words, ",.1f"),
            ("valid bits/byte", lambda rung: bits * math.log(rung[1]), ".3f"),
        )
        tables.append(_table(evidence.rungs.items(), columns))
    if published:
        columns = (
            (name[0], lambda row: f"reported: {row[0]}", ""),
            ("parameters", lambda row: row[1], ""),
            ("test word PPL", lambda row: row[2], ""),
        )
        tables.append(_table(PUBLISHED, columns))
    return pd.concat(tables, ignore_index=True).fillna("")


def ledger_table(runs: Iterable[Run]) -> pd.DataFrame:
    """Parameters by group, one column a model."""
    ledgers = {title_of(run.name): run.summary["parameter_ledger"] for run in runs}
    table = pd.DataFrame(ledgers).fillna(0).astype(int)
    table.loc["total"] = table.sum()
    return table.map(lambda count: f"{count:,}" if count else NONE)


def fields_table(columns: Mapping[tuple[str, str], Experiment]) -> pd.DataFrame:
    """The fields of experiments side by side, one row a field, and their parameters."""
    fields = {k: e.fields() | {"parameters": e.model.n_parameters} for k, e in columns.items()}
    table = pd.DataFrame(fields).astype(object)
    return table.map(lambda value: "" if pd.isna(value) else _shown(value, ",.10g"))


_CAUSE: Columns = (
    ("suspect", lambda cause: cause.suspect.name, ""),
    ("the plan's confidence (reported)", lambda cause: cause.suspect.confidence, ""),
    ("changed here", lambda cause: cause.here, ""),
    ("effect of mending it", lambda cause: str(cause.effect or "diverges"), ""),
    (
        "PPL",
        lambda cause: (
            f"{cause.ppl_before:,.1f} → "
            + (f"{cause.ppl_after:,.1f}" if cause.effect else "diverges")
        ),
        "",
    ),
    ("verdict", lambda cause: cause.verdict, ""),
)


def causes_table(causes: Iterable[Cause]) -> pd.DataFrame:
    """Root causes in ranked order: suspect, the plan's confidence, effect, PPL, verdict."""
    return _table(causes, _CAUSE)


def health_table(run: Run) -> pd.DataFrame:
    """The health statistics of a run: value, band, meaning; empty where none were kept."""
    columns = {"rule": "statistic", "saw": "value", "threshold": "band", "conclusion": "meaning"}
    found = [dataclasses.asdict(finding) for finding in health_of(run)]
    return pd.DataFrame(found, columns=[*columns]).rename(columns=columns)


def _ratio(row: Mapping) -> str:
    low, high = row["tokens_per_s_ratio_range"]
    return f"{row['tokens_per_s_ratio']:.2f}× ({low:.2f}–{high:.2f})"


def bench_table(result: Mapping) -> pd.DataFrame:
    """Ours against each literal version, a row each, ready to print."""
    columns = (
        ("model", lambda row: pictures.BENCH_NAMES[row["model"]], ""),
        ("against", lambda row: row["against"], ""),
        ("tokens/s", lambda row: row["tokens_per_s"], ",.0f"),
        ("theirs", lambda row: row["against_tokens_per_s"], ",.0f"),
        ("ratio (all rounds)", _ratio, ""),
        ("ms/step", lambda row: row["ms_per_step"], ",.1f"),
        ("peak memory", lambda row: f"{row['memory_bytes'] / 2**20:,.0f} MiB", ""),
        ("of theirs", lambda row: row["memory_ratio"], ".0%"),
        ("of the matmul rate", lambda row: row["share_of_matmul_rate"], ".0%"),
    )
    return _table(result["rows"], columns)


def _as_the_arithmetic_says(point: Mapping) -> str:
    off = point["time_per_token"] / point["arithmetic"]
    return "as it says" if 1 / BENCH_TOLERANCE < off < BENCH_TOLERANCE else f"{off:.2f} × it"


def scaling_table(result: Mapping) -> pd.DataFrame:
    """How the time a token takes grows, beside what the arithmetic says."""
    columns = (
        ("model", lambda point: pictures.BENCH_NAMES[point["model"]], ""),
        ("changed", lambda point: f"{point['axis']} {point['value']:,}", ""),
        ("batch", lambda point: point["batch"], ""),
        ("tokens/s", lambda point: point["tokens_per_s"], ",.0f"),
        ("time per token", lambda point: point["time_per_token"], ".2f"),
        ("arithmetic", lambda point: point["arithmetic"], ".2f"),
        ("measured", _as_the_arithmetic_says, ""),
    )
    return _table(result["scaling"], columns)


def markdown(table: pd.DataFrame) -> str:
    """A pipe table; pandas' own would need one more dependency."""
    rows = [table.columns.astype(str), ["---"] * len(table.columns), *table.astype(str).values]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
