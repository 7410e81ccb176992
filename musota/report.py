"""From recorded runs to tables, verdicts, figures and `results/<profile>/README.md`."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from musota import diagnose, plots
from musota.config import PLAN_TRAIN_TOKENS, MuConfig, experiments
from musota.diagnose import Cause, Finding, Suspect
from musota.files import write_json, write_whole
from musota.intervals import Interval
from musota.probes import grid, judge
from musota.runs import Run, load_runs
from musota.training import learning_rate_at

ORDER = ("original", "optimized", "baseline", "simplified", "simplified_twin")
GRID_FOLDER = "root_causes"  # of a results folder
BENCH_TOLERANCE = 1.25  # nearer to the arithmetic than this counts as following it
PAIRS = {"optimized": "baseline", "simplified": "simplified_twin"}  # a model and its dense twin


def footer(corpus: str, vocabulary: int, profile: str | None) -> str:
    """The line under every figure: what was measured on what."""
    name = f"{corpus} (not WikiText!)" if "wikitext" not in corpus else corpus
    return (
        f"measured: {name} · byte-level BPE {vocabulary:,} · profile {profile} · valid, windows "
        "without overlap"
    )


@dataclass(frozen=True)
class Evidence:
    """Finished and unfinished runs on one corpus, with the rungs measured on the same tokens."""

    folder: Path
    runs: tuple[Run, ...]
    rungs: Mapping[str, float]
    note: str = ""  # why these runs and not others, in one sentence

    def only(self, *names: str) -> Evidence:
        return dataclasses.replace(self, runs=tuple(r for r in self.runs if r.name in names))

    @property
    def names(self) -> set[str]:
        return {run.name for run in self.runs}

    def best(self, name: str) -> Run | None:
        """The run of a name with the lowest seed: the one shown where one stands for all."""
        return next((run for run in self.runs if run.name == name), None)

    @property
    def footer(self) -> str:
        if not self.runs:
            return ""
        run = self.runs[0]
        corpus = run.config["corpus"]
        return footer(corpus["name"], corpus["vocabulary_in_use"], run.config["profile"])

    @property
    def plan_does_not_apply(self) -> str | None:
        if not self.runs:
            return "there are no runs"
        return _reason(self.runs[0])

    def compare(self, name: str = "optimized") -> tuple[Finding, dict[str, Interval]] | None:
        """The verdict on a model against its dense twin and its intervals; None without both."""
        sides = [
            {run.seed: run.summary for run in self.runs if run.name == side and run.finished}
            for side in (name, PAIRS[name])
        ]
        if not sides[0].keys() & sides[1].keys():
            return None
        finding, text, seeds = diagnose.helps_or_hurts(*sides, plots.LABELS[name])
        intervals = {"over blocks of text\n(these trained models)": text}
        if seeds:
            intervals["over seeds\n(training again)"] = seeds
        return finding, intervals


def read_evidence(folder: str | os.PathLike, fingerprint: str | None = None) -> Evidence:
    """The runs of a results folder in the plan's order, with the rungs recorded beside them.

    Runs on another corpus than `fingerprint` (default: that of the first run) are left out.
    """
    folder = Path(folder)
    runs = load_runs(folder)
    if fingerprint is None and runs:
        fingerprint = runs[0].config["corpus"]["fingerprint"]
    runs = [run for run in runs if run.config["corpus"]["fingerprint"] == fingerprint]
    place = {name: index for index, name in enumerate(ORDER)}
    runs.sort(key=lambda run: (place.get(run.name, len(ORDER)), run.name, run.seed))
    return Evidence(folder, tuple(runs), read_rungs(folder, fingerprint))


def read_rungs(folder: Path, fingerprint: str | None) -> dict[str, float]:
    """The rungs recorded in a results folder; empty if there are none, or of another corpus."""
    path = folder / "ladder.json"
    recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return recorded["ppl"] if recorded.get("fingerprint") == fingerprint and recorded else {}


def _reason(run: Run) -> str | None:
    corpus, vocab_size = run.config["corpus"]["name"], run.experiment.model.vocab_size
    return diagnose.plan_does_not_apply(corpus, vocab_size, run.config["profile"], run.finished)


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


def run_findings(
    run: Run, rungs: Mapping[str, float], baseline: Run | None = None
) -> list[Finding]:
    """Every rule that speaks of one run: the plan's where they apply, the rungs, the curve's shape.

    The plan's rules judge MU-SOTA; of a dense model only rungs and the curve are told.
    """
    ppl, accuracy = run.summary["ppl"], run.summary["accuracy"]
    reason = _reason(run)
    findings, judged = [], isinstance(run.experiment.model, MuConfig)
    if judged and reason:
        findings = [diagnose.not_applicable("Scenario, bottom line, expectation", reason)]
    elif judged:
        findings = [
            diagnose.scenario(ppl, accuracy, baseline.summary["ppl"] if baseline else None),
            diagnose.bottom_line(ppl),
            diagnose.expectation(ppl, accuracy),
        ]
    if rungs:
        findings.append(diagnose.on_the_ladder(ppl, rungs))
    training, steps = run.experiment.training, run.steps
    findings += diagnose.phases(run.history, training.epochs)
    findings.append(plateau_of(run))
    findings.append(diagnose.oscillation(steps, training.warmup_steps))
    return findings


def plateau_of(run: Run, **rule) -> Finding:
    """`diagnose.plateau` of a run; `rule` may change its window and least gain."""
    blocks = run.valid_block_nats, run.summary["valid_block_tokens"]
    return diagnose.plateau(run.history, run.experiment.training.epochs, *blocks, **rule)


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


def write_root_causes(folder: Path, causes: Sequence[Cause], advice: str, **about) -> None:
    """root_causes.json: every suspect's row and the advice."""
    rows = [
        {
            "suspect": cause.suspect.name,
            "plan_confidence_reported": cause.suspect.confidence,
            "before": cause.suspect.before,
            "after": cause.suspect.after,
            "changed_here": cause.here,
            "effect_nats": dataclasses.asdict(cause.effect) if cause.effect else None,
            "ppl_before": cause.ppl_before,
            "ppl_after": cause.ppl_after,
            "verdict": cause.verdict,
        }
        for cause in causes
    ]
    write_json(folder / "root_causes.json", {**about, "causes": rows, "advice": advice})


def read_grid(folder: Path) -> tuple[dict[str, dict[int, Run]], list[Suspect]]:
    """The recorded runs of a root-cause grid by cell and seed, and its suspects."""
    runs: dict[str, dict[int, Run]] = {}
    for path in sorted(folder.glob("*/config.json")):
        run = Run(path.parent)
        runs.setdefault(run.name, {})[run.seed] = run
    profile = next(iter(runs["original"].values())).config["profile"] if runs else "quick"
    cells, suspects, _ = grid(profile)
    return {name: by_seed for name, by_seed in runs.items() if name in cells}, suspects


def health_table(run: Run) -> pd.DataFrame:
    """The health statistics of a run: value, band, meaning; empty where none were kept."""
    model, training, steps = run.experiment.model, run.experiment.training, run.steps
    norms = steps.grad_norm[steps.step > training.warmup_steps]
    sizes = training.grad_clip, model.d_model, model.max_seq_len
    found = diagnose.health(run.health, norms, *sizes)
    columns = {"rule": "statistic", "saw": "value", "threshold": "band", "conclusion": "meaning"}
    table = pd.DataFrame([dataclasses.asdict(finding) for finding in found], columns=[*columns])
    return table.rename(columns=columns)


def comparison_table(runs) -> pd.DataFrame:
    """One row a run, every number measured; best valid epoch, test once with its weights."""
    rows = []
    for run in runs:
        s = run.summary
        rows.append(
            {
                "model": plots.LABELS.get(run.name, run.name),
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


def ledger_table(runs) -> pd.DataFrame:
    """Parameters by group, one column a model."""
    ledgers = {
        plots.LABELS.get(run.name, run.name): run.summary["parameter_ledger"] for run in runs
    }
    table = pd.DataFrame(ledgers).fillna(0).astype(int)
    table.loc["total"] = table.sum()
    return table.map(lambda count: f"{count:,}" if count else "–")


def save_figure(figure: Figure, path: Path, about: str) -> None:
    """Write a PNG whole, with a line under it that says what was measured on what."""
    picture = figure_png(figure, about)
    write_whole(path, lambda target: target.write_bytes(picture))


def figure_png(figure: Figure, about: str) -> bytes:
    """A figure as a PNG, `about` in a line under it."""
    if about:
        figure.supxlabel(about, fontsize=7.5, color="0.35", x=0.01, ha="left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def verdict_lines(evidence: Evidence) -> list[str]:
    """The answer in a few sentences: the comparisons first, then where each model stands."""
    lines = [compared[0].sentence for name in PAIRS if (compared := evidence.compare(name))]
    reason = evidence.plan_does_not_apply
    optimized, baseline = evidence.best("optimized"), evidence.best("baseline")
    if baseline and not reason:
        lines.append(diagnose.plans_own_test(baseline.summary["ppl"]).sentence)
    if optimized:
        lines += [f.sentence for f in run_findings(optimized, evidence.rungs, baseline)]
        compared = evidence.compare()
        ppl = None if reason else optimized.summary["ppl"]
        lines.append(diagnose.option_three(ppl, compared[0] if compared else None).sentence)
    return lines


def write_report(folder: str | os.PathLike) -> Path:
    """Draw the figures of a results folder anew and write its README.md, from the records alone.

    Returns the README's path. Raises MusotaError for a damaged record.
    """
    evidence = read_evidence(folder)
    folder = evidence.folder
    plan_applies = evidence.plan_does_not_apply is None
    parts = [f"# Results: {folder.name}", "Generated by `python -m musota report`; do not edit."]
    if not evidence.runs:
        parts.append("No run has finished an epoch yet.")
    else:
        corpus = evidence.runs[0].config["corpus"]
        device, date = (evidence.runs[0].summary["device"], evidence.runs[0].summary["date"])
        parts.append(
            f"Measured on {corpus['name']} ({corpus['source']}), profile "
            f"{evidence.runs[0].config['profile']}, {device}, {date}. "
            f"{corpus['tokens']['train']:,} training and {corpus['tokens']['valid']:,} validation "
            f"tokens, byte-level BPE with {corpus['vocabulary_in_use']:,} tokens in use."
        )
        lines = verdict_lines(evidence)
        if lines:
            parts += ["## Verdict", "\n".join(f"- {line}" for line in lines)]
        parts += ["## Measured", _markdown(comparison_table(evidence.runs))]
        if evidence.rungs:
            rungs = " · ".join(f"{name} {ppl:,.1f}" for name, ppl in evidence.rungs.items())
            parts.append(f"Rungs measured on the same tokens, valid PPL: {rungs}.")
        for name, figure in _figures(evidence, plan_applies).items():
            save_figure(figure, folder / f"{name}.png", evidence.footer)
            parts.append(f"![{name.replace('_', ' ')}]({name}.png)")
        ledgers = _markdown(ledger_table(_one_each(evidence)).reset_index(names="group"))
        parts += ["## Parameters by group", ledgers]
        health = {run: health_table(run) for run in _one_each(evidence)}
        for run, table in health.items():
            if len(table):
                parts += [f"## Health: {plots.label_of(run)}", _markdown(table)]
        parts += _root_cause_parts(folder)
        parts.append("## Samples of the last epoch")
        for run in _one_each(evidence):
            parts.append(f"**{plots.label_of(run)}**")
            last = run.samples[run.samples.epoch == run.samples.epoch.max()]
            shown = last[["prompt", "text"]].to_dict("records")
            parts.append("\n".join(f"- {_quoted(sample)}" for sample in shown))
    text = "\n\n".join(parts) + "\n"
    path = folder / "README.md"
    write_whole(path, lambda target: target.write_text(text, encoding="utf-8"))
    return path


def _root_cause_parts(folder: Path) -> list[str]:
    runs, suspects = read_grid(folder / GRID_FOLDER)
    if not runs or not (causes := judge(runs, suspects)):
        return []
    seeds = sorted(runs["original"])
    run = runs["original"][seeds[0]]
    corpus, model = run.config["corpus"], run.experiment.model
    about = footer(corpus["name"], corpus["vocabulary_in_use"], run.config["profile"])
    figure = plots.root_causes(causes, diagnose.RELEVANT)
    save_figure(figure, folder / GRID_FOLDER / "root_causes.png", about)
    return [
        "## Which suspect holds the model back?",
        f"Smaller models than above: {model.n_layer} layers, V {model.vocab_size:,}, "
        f"{model.max_seq_len} tokens, {corpus['tokens']['train']:,} training tokens, "
        f"{run.experiment.training.epochs} epochs; {len(seeds)} seeds. One suspect mended at a "
        "time; intervals from the spread over seeds, pooled over all cells.",
        diagnose.root_cause_advice(causes),
        f"![root causes]({GRID_FOLDER}/root_causes.png)",
        _markdown(causes_table(causes)),
    ]


def _one_each(evidence: Evidence) -> list[Run]:
    return [evidence.best(name) for name in dict.fromkeys(run.name for run in evidence.runs)]


def _figures(evidence: Evidence, plan_applies: bool) -> dict[str, Figure]:
    shown = _one_each(evidence)
    figures = {"curves": plots.curves(shown, evidence.rungs, reported=plan_applies)}
    for name in PAIRS:
        if compared := evidence.compare(name):
            finding, intervals = compared
            title = f"{finding.rule}: {finding.conclusion}"
            figures[f"verdict_{name}"] = plots.difference(intervals, title)
    if len(shown) > 1:
        figures["ppl_against_parameters"] = plots.ppl_against_parameters(evidence.runs)
    figures["ledger"] = plots.ledgers(
        {plots.LABELS.get(run.name, run.name): run.summary["parameter_ledger"] for run in shown}
    )
    return figures


def _markdown(table: pd.DataFrame) -> str:
    """A pipe table; pandas' own would need one more dependency."""
    rows = [table.columns.astype(str), ["---"] * len(table.columns), *table.astype(str).values]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _quoted(sample: Mapping[str, str]) -> str:
    text = " ".join(sample["text"].split()).replace("<", "&lt;")
    return f"{sample['prompt'].strip().replace('<', '&lt;')} → *{text}*"


def bench_table(result: Mapping) -> pd.DataFrame:
    """Ours against each literal version, a row each, ready to print."""
    rows = []
    for row in result["rows"]:
        low, high = row["tokens_per_s_ratio_range"]
        rows.append(
            {
                "model": plots.BENCH_NAMES[row["model"]],
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
                "model": plots.BENCH_NAMES[point["model"]],
                "changed": f"{point['axis']} {point['value']:,}",
                "batch": point["batch"],
                "tokens/s": f"{point['tokens_per_s']:,.0f}",
                "time per token": f"{point['time_per_token']:.2f}",
                "arithmetic": f"{point['arithmetic']:.2f}",
                "measured": name,
            }
        )
    return pd.DataFrame(rows)


def write_bench_report(folder: str | os.PathLike) -> Path:
    """README.md and figures of a folder of `bench --json` files; returns the README's path."""
    folder = Path(folder)
    parts = [
        "# Bench: ours against the literal version",
        "The literal models (`musota/bench.py`) loop over the blocks with `nn.MultiheadAttention` "
        "(dense: a plain GPT block), compute in fp32 and hold every logit at once; dropout of "
        "attention weights changes the mathematics and is a row of its own. Ours and a literal "
        "version train in a process each and take turns. A ratio is the median over the rounds; "
        "memory is the peak of the process above what it held before its first step (gradients and "
        "the optimizer's state included).",
    ]
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        shape = " · ".join(
            f"{plots.BENCH_NAMES[kind]}: {config['n_layer']} layers, V {config['vocab_size']:,}"
            for kind, config in result["models"].items()
        )
        agreement = ", ".join(
            f"{plots.BENCH_NAMES[kind]} {value:.0e}" for kind, value in result["agreement"].items()
        )
        length = next(iter(result["models"].values()))["max_seq_len"]
        parts += [
            f"## {result['device']}",
            f"Measured {result['date']}, torch {result['versions']['torch']}, "
            f"{result['precision']}, steps of {result['batch']} × {length} tokens. {shape}. The "
            f"machine's own rate for a large matrix product: {result['matmul_flops'] / 1e9:,.0f} "
            f"GFLOP/s. Command: `python -m musota bench --json results/bench/{path.name} && "
            "python -m musota report`",
            _markdown(bench_table(result)),
            f"Largest relative difference between our loss and the literal one over 20 training "
            f"steps at dropout 0: {agreement}.",
            _figure_of(plots.bench(result), folder / f"{path.stem}.png", "Throughput and memory"),
            "Where our step's time goes (share of a profiled step):",
            _markdown(_profile_table(result)),
        ]
        if result["scaling"]:
            parts += [
                "Time per token relative to the shape above, and the ratio of operations. Longer "
                "sequences come in smaller batches. The arithmetic counts matrix products only: "
                "attention of many narrow heads costs exponentials and memory traffic besides.",
                _figure_of(
                    plots.bench_scaling(result), folder / f"{path.stem}-scaling.png", "Scaling"
                ),
                _markdown(scaling_table(result)),
            ]
    path = folder / "README.md"
    text = "\n\n".join(parts) + "\n"
    write_whole(path, lambda target: target.write_text(text, encoding="utf-8"))
    return path


def _figure_of(figure: Figure, path: Path, title: str) -> str:
    save_figure(figure, path, "")
    return f"![{title}]({path.name})"


def _profile_table(result: Mapping) -> pd.DataFrame:
    columns = []
    for kind, shares in result["profile"].items():
        lines = [f"{share:.0%} {name.removeprefix('aten::')}" for name, share in shares.items()]
        columns.append(pd.Series(lines, name=plots.BENCH_NAMES[kind]))
    return pd.concat(columns, axis=1).fillna("")
