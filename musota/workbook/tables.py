"""Records -> tables, ready to print."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import pandas as pd

from musota.plan.profiles import PLAN_TRAIN_TOKENS
from musota.plan.registry import LABELS, experiments
from musota.rules.stats import seed_interval
from musota.rules.verdicts import Cause
from musota.training.runs import Run
from musota.training.schedule import learning_rate_at
from musota.workbook import figures
from musota.workbook.evidence import Evidence, health_of

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


def comparison_table(runs) -> pd.DataFrame:
    """One row a run, every number measured; best valid epoch, test once with its weights."""
    rows = []
    for run in runs:
        s = run.summary
        rows.append(
            {
                "model": LABELS.get(run.name, run.name),
                "seed": run.seed,
                "parameters": f"{s['parameters']:,}",
                "MFLOP/token": f"{s['flops_per_token'] / 1e6:.1f}",
                "minutes": f"{s['seconds'] / 60:.1f}" if run.finished else "unfinished",
                "tokens/s": f"{s['tokens_per_second']:,.0f}" if run.finished else "",
                "peak memory (MB)": f"{s['peak_memory_bytes'] / 1e6:,.0f}",
                "best epoch": f"{s['best_epoch']} of {run.experiment.training.epochs}",
                "valid PPL": f"{s['ppl']:.1f}",
                "valid word PPL": f"{s['word_ppl']:.1f}",
                "valid bits/byte": f"{s['bits_per_byte']:.3f}",
                "valid accuracy": f"{s['accuracy']:.1%}",
                "test PPL": f"{s['test_ppl']:.1f}" if run.finished else "",
                "test word PPL": f"{s['test_word_ppl']:.1f}" if run.finished else "",
            }
        )
    return pd.DataFrame(rows)


def model_table(evidence: Evidence, published: bool = True) -> pd.DataFrame:
    """One row a model, means over its seeds; then the measured rungs, then published models.

    A PPL is exp of the mean loss, its interval Student's over seeds. Word PPL and bits/byte of the
    rungs follow from the same tokens, words and bytes. Published PPLs are reported, on the test
    split of the whole corpus.
    """
    rows = []
    for name, group in figures.by_name([run for run in evidence.runs if run.finished]).items():
        first = group[0].summary
        mean = {key: _mean_ppl(group, key) for key in _PPLS}
        spread = ""
        if len(group) > 1:
            interval = seed_interval([run.summary["valid_loss"] for run in group])
            spread = f" [{math.exp(interval.low):,.1f}, {math.exp(interval.high):,.1f}]"
        averages = {
            key: sum(run.summary[key] for run in group) / len(group)
            for key in ("bits_per_byte", "accuracy")
        }
        rows.append(
            {
                "model (measured)": LABELS.get(name, name),
                "seeds": str(len(group)),
                "learning rate": f"{group[0].experiment.training.learning_rate:.3g}",
                "parameters": f"{first['parameters']:,}",
                "MFLOP/token": f"{first['flops_per_token'] / 1e6:.1f}",
                "valid PPL [95 % over seeds]": f"{mean['ppl']:,.1f}{spread}",
                "valid word PPL": f"{mean['word_ppl']:,.1f}",
                "valid bits/byte": f"{averages['bits_per_byte']:.3f}",
                "valid accuracy": f"{averages['accuracy']:.1%}",
                "test PPL": f"{mean['test_ppl']:,.1f}",
                "test word PPL": f"{mean['test_word_ppl']:,.1f}",
            }
        )
    if evidence.runs:
        s = evidence.runs[0].summary
        words = math.log(s["word_ppl"]) / s["valid_loss"]  # tokens a word
        bits = s["bits_per_byte"] / s["valid_loss"]
        rows += [
            {
                "model (measured)": f"rung: {name}",
                "valid PPL [95 % over seeds]": f"{ppl:,.1f}",
                "valid word PPL": f"{ppl**words:,.1f}",
                "valid bits/byte": f"{bits * math.log(ppl):.3f}",
            }
            for name, ppl in evidence.rungs.items()
        ]
    if published:
        rows += [
            {"model (measured)": f"reported: {name}", "parameters": size, "test word PPL": f"{ppl}"}
            for name, size, ppl in PUBLISHED
        ]
    return pd.DataFrame(rows).fillna("")


_PPLS = ("ppl", "word_ppl", "test_ppl", "test_word_ppl")


def _mean_ppl(runs: Sequence[Run], key: str) -> float:
    return math.exp(sum(math.log(run.summary[key]) for run in runs) / len(runs))


def ledger_table(runs) -> pd.DataFrame:
    """Parameters by group, one column a model."""
    ledgers = {LABELS.get(run.name, run.name): run.summary["parameter_ledger"] for run in runs}
    table = pd.DataFrame(ledgers).fillna(0).astype(int)
    table.loc["total"] = table.sum()
    return table.map(lambda count: f"{count:,}" if count else "–")


def causes_table(causes: Sequence[Cause]) -> pd.DataFrame:
    """Root causes in ranked order: suspect, the plan's confidence, effect, PPL, verdict."""
    rows = [
        {
            "suspect": cause.suspect.name,
            "the plan's confidence (reported)": cause.suspect.confidence,
            "changed here": cause.here,
            "effect of mending it": str(cause.effect or "diverges"),
            "PPL": f"{cause.ppl_before:,.1f} → "
            + (f"{cause.ppl_after:,.1f}" if cause.effect else "diverges"),
            "verdict": cause.verdict,
        }
        for cause in causes
    ]
    return pd.DataFrame(rows)


def health_table(run: Run) -> pd.DataFrame:
    """The health statistics of a run: value, band, meaning; empty where none were kept."""
    columns = {"rule": "statistic", "saw": "value", "threshold": "band", "conclusion": "meaning"}
    found = [dataclasses.asdict(finding) for finding in health_of(run)]
    table = pd.DataFrame(found, columns=[*columns])
    return table.rename(columns=columns)


def bench_table(result: Mapping) -> pd.DataFrame:
    """Ours against each literal version, a row each, ready to print."""
    rows = []
    for row in result["rows"]:
        low, high = row["tokens_per_s_ratio_range"]
        rows.append(
            {
                "model": figures.BENCH_NAMES[row["model"]],
                "against": row["against"],
                "tokens/s": f"{row['tokens_per_s']:,.0f}",
                "theirs": f"{row['against_tokens_per_s']:,.0f}",
                "ratio (all rounds)": f"{row['tokens_per_s_ratio']:.2f}× ({low:.2f}–{high:.2f})",
                "ms/step": f"{row['ms_per_step']:,.1f}",
                "peak memory": f"{row['memory_bytes'] / 2**20:,.0f} MiB",
                "of theirs": f"{row['memory_ratio']:.0%}",
                "of the matmul rate": f"{row['share_of_matmul_rate']:.0%}",
            }
        )
    return pd.DataFrame(rows)


def scaling_table(result: Mapping) -> pd.DataFrame:
    """How the time a token takes grows, beside what the arithmetic says."""
    rows = []
    for point in result["scaling"]:
        off = point["time_per_token"] / point["arithmetic"]
        name = "as it says" if 1 / BENCH_TOLERANCE < off < BENCH_TOLERANCE else f"{off:.2f} × it"
        rows.append(
            {
                "model": figures.BENCH_NAMES[point["model"]],
                "changed": f"{point['axis']} {point['value']:,}",
                "batch": point["batch"],
                "tokens/s": f"{point['tokens_per_s']:,.0f}",
                "time per token": f"{point['time_per_token']:.2f}",
                "arithmetic": f"{point['arithmetic']:.2f}",
                "measured": name,
            }
        )
    return pd.DataFrame(rows)


def profile_table(result: Mapping) -> pd.DataFrame:
    columns = []
    for kind, shares in result["profile"].items():
        lines = [f"{share:.0%} {name.removeprefix('aten::')}" for name, share in shares.items()]
        columns.append(pd.Series(lines, name=figures.BENCH_NAMES[kind]))
    return pd.concat(columns, axis=1).fillna("")


def markdown(table: pd.DataFrame) -> str:
    """A pipe table; pandas' own would need one more dependency."""
    rows = [table.columns.astype(str), ["---"] * len(table.columns), *table.astype(str).values]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
