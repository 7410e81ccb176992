"""The pages people read: those of results folders, and the measured part of the front page.

Code collects what is recorded; the words around it stand in `templates/`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from musota.errors import MusotaError
from musota.files import write_json, write_whole
from musota.plan.profiles import profiles, scaled
from musota.plan.registry import PAIRS, find_experiment, registry, title_of
from musota.rules import verdicts
from musota.rules.verdicts import Cause
from musota.studies.grid import judge
from musota.training.runs import Run
from musota.workbook import figures, pictures
from musota.workbook.evidence import (
    GRID,
    Evidence,
    answers,
    footer,
    read_evidence,
    read_grid,
    rule_lines,
)
from musota.workbook.style import figure_png, save_figure
from musota.workbook.tables import (
    bench_table,
    causes_table,
    comparison_table,
    health_table,
    ledger_table,
    markdown,
    model_table,
    ppl_with_spread,
    scaling_table,
)

__all__ = ["figure_png", "save_figure"]
FRONT_MARKS = ("<!-- measured -->", "<!-- end of measured -->")
OUTCOME = {"helps": "beats", "hurts": "loses to", "undecided": "cannot be told from"}
FRONT_ROWS = ("original", "optimized", "baseline", "tuned", "redesigned")


@cache
def _templates() -> jinja2.Environment:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    return jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined)


def _render(template: str, **values) -> str:
    return _templates().get_template(f"{template}.md.j2").render(values).strip() + "\n"


def _write(path: Path, text: str) -> Path:
    write_whole(path, lambda target: target.write_bytes(text.encode()))
    return path


def write_root_causes(folder: Path, causes: Sequence[Cause], advice: str, **about) -> None:
    """root_causes.json: every suspect's row and the advice."""
    rows = [dataclasses.asdict(cause) for cause in causes]
    write_json(folder / "root_causes.json", {**about, "advice": advice, "suspects": rows})


def write_report(folder: str | os.PathLike) -> Path:
    """Draw the figures of a results folder anew and write its README.md, from the records alone.

    Returns the README's path. Raises MusotaError for a damaged record.
    """
    evidence = read_evidence(folder)
    folder, shown = evidence.folder, _one_each(evidence)
    values = {"folder": folder.resolve().name, "runs": len(evidence.runs)}
    if evidence.runs:
        pictures = _figures(evidence)
        for name, figure in pictures.items():
            save_figure(figure, folder / f"{name}.png", evidence.footer)
        health = {figures.label_of(run): health_table(run) for run in shown}
        values |= {
            "about": _about(evidence),
            "left_out": evidence.left_out,
            "answers": answers(evidence),
            "rules": rule_lines(evidence),
            "models": markdown(model_table(evidence)),
            "rerun": _rerun(evidence),
            "every_run": markdown(comparison_table(evidence.runs)),
            "pictures": list(pictures),
            "ledgers": markdown(ledger_table(shown).reset_index(names="group")),
            "health": {title: markdown(table) for title, table in health.items() if len(table)},
            "causes": _root_causes(folder),
            "samples": {figures.label_of(run): _last_samples(run) for run in shown},
        }
    return _write(folder / "README.md", _render("report", **values))


def _one_each(evidence: Evidence) -> list[Run]:
    return [evidence.best(name) for name in dict.fromkeys(run.name for run in evidence.runs)]


def _figures(evidence: Evidence) -> dict[str, Figure]:
    plan_applies = evidence.plan_does_not_apply is None
    drawn = {
        "answer": figures.answer(evidence.runs, evidence.rungs, evidence.sweeps),
        "curves": figures.curves(evidence.runs, evidence.rungs, reported=plan_applies),
    }
    for name in PAIRS:
        if compared := evidence.compare(name):
            finding, intervals = compared
            title = f"{finding.rule}: {finding.conclusion}"
            drawn[f"verdict_{name}"] = figures.difference(intervals, title)
    if looked := evidence.ablated:
        run, effects = looked
        layout = run.experiment.model.layout
        drawn["ablations"] = figures.ablations(effects, run.summary["ppl"], layout)
    ledgers = {title_of(run.name): run.summary["parameter_ledger"] for run in _one_each(evidence)}
    return drawn | {"ledger": pictures.ledgers(ledgers)}


def _rerun(evidence: Evidence) -> str:
    """How to train each row again: by command where it is a row of the registry, else by hand."""
    config = evidence.runs[0].config
    options = f"--profile {config['profile']} --corpus {config['corpus']['name']}"
    names = list(dict.fromkeys(run.name for run in evidence.runs))
    named = [name for name in names if name in registry]
    said = [
        f"NAME is one of {', '.join(named)}. Train a row again (to the same bits on a like machine "
        f"with as many `OMP_NUM_THREADS`):\n\n```sh\npython -m musota train NAME {options} --seed "
        "SEED --save-to elsewhere\n```\n\nAll of it, sweeps and root-cause grid included: "
        f"`python -m musota evidence {options}`."
    ]
    for run in (evidence.best(name) for name in names if name not in registry):
        row, changes = _nearest_row(run)
        changed = ", ".join(f"{field}={value!r}" for field, value in changes.items())
        said.append(
            f"{title_of(run.name)} is no row of the registry: from Python, `scaled(experiments"
            f"[{row!r}], {run.config['profile']!r}).with_({changed})`."
        )
    return "\n\n".join(said)


def _nearest_row(run: Run) -> tuple[str, dict]:
    """The row of the registry that differs in the fewest fields, and the run's own values there."""
    profile, best = profiles.get(run.config["profile"], profiles["full"]), None
    for name in (name for name, row in registry.items() if not row.tuned_from):
        fields = scaled(find_experiment(name), profile).fields()
        own = run.experiment.fields()
        changes = {key: own[key] for key in own if own[key] != fields.get(key)}
        if best is None or len(changes) < len(best[1]):
            best = name, changes
    return best


def _root_causes(folder: Path) -> dict[str, str] | None:
    runs, suspects = read_grid(folder)
    if not runs or not (causes := judge(runs, suspects)):
        return None
    seeds = sorted(runs["original"])
    run = runs["original"][seeds[0]]
    corpus, model = run.config["corpus"], run.experiment.model
    about = footer(corpus["name"], corpus["vocabulary_in_use"], run.config["profile"])
    figure = figures.root_causes(causes, verdicts.RELEVANT)
    (folder / GRID).mkdir(exist_ok=True)
    save_figure(figure, folder / GRID / "root_causes.png", about)
    return {
        "about": f"Smaller models than above: {model.n_layer} layers, V {model.vocab_size:,}, "
        f"{model.max_seq_len} tokens, {corpus['tokens']['train']:,} training tokens, "
        f"{run.experiment.training.epochs} epochs; {len(seeds)} seeds. One suspect mended at a "
        "time; intervals from the spread over seeds, pooled over all cells.",
        "advice": verdicts.root_cause_advice(causes),
        "table": markdown(causes_table(causes)),
    }


def _last_samples(run: Run) -> list[str]:
    last = run.samples[run.samples.epoch == run.samples.epoch.max()]
    return [
        f"{prompt.strip()} → *{' '.join(text.split())}*".replace("<", "&lt;")
        for prompt, text in zip(last.prompt, last.text, strict=True)
    ]


def write_front_page(path: str | os.PathLike, folders: Sequence[Path]) -> None:
    """Put the answer recorded in results `folders`, the best first, between the marks in a README.

    Raises MusotaError where the README has no marks.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    if not all(text.count(mark) == 1 for mark in FRONT_MARKS):
        raise MusotaError(f"{path} has not one line {FRONT_MARKS[0]} and one {FRONT_MARKS[1]}.")
    before, rest = text.split(FRONT_MARKS[0])
    after = rest.split(FRONT_MARKS[1])[1]
    recorded = [e for e in map(read_evidence, folders) if e.runs]
    measured = _front(recorded, path.parent) if recorded else "Nothing is recorded yet.\n"
    _write(path, f"{before}{FRONT_MARKS[0]}\n\n{measured}\n{FRONT_MARKS[1]}{after}")


def _front(recorded: Sequence[Evidence], root: Path) -> str:
    evidence = recorded[0]
    sentences, advice = _answer(evidence)
    rows = {
        name: list(seeds.values())
        for name in FRONT_ROWS
        if name not in evidence.aliases and (seeds := evidence.seeds(name))
    }
    table = model_table(evidence, published=False)
    columns = ["model (measured)", "seeds", "learning rate", "parameters",
               "valid PPL [95 % over seeds]", "valid accuracy", "test PPL"]  # fmt: skip
    kept = table["model (measured)"].isin([evidence.title(name) for name in rows])
    places = [e.folder.resolve().relative_to(root.resolve()).as_posix() for e in recorded]
    return _render(
        "front",
        sentences=sentences,
        advice=advice,
        place=places[0],
        table=markdown(table[kept][columns]),
        about=_about(evidence),
        rungs=", ".join(f"{name} {ppl:,.0f}" for name, ppl in evidence.rungs.items()),
        others=[
            {"place": place, "about": _about(other)}
            for place, other in zip(places[1:], recorded[1:], strict=True)
        ],
    )


def _answer(evidence: Evidence) -> tuple[list[str], list[str]]:
    """What was found in at most three sentences, and what to change next; from the findings."""
    sentences, advice = [], []
    name = next((n for n in ("tuned", "optimized") if evidence.compare(n)), None)
    if name:
        finding, intervals = evidence.compare(name)
        sides = [list(evidence.seeds(side).values()) for side in (name, PAIRS[name])]
        own, other = map(ppl_with_spread, sides)
        at_best = ", each at its best learning rate," if name == "tuned" else ""
        rungs = evidence.rungs
        counted = f"; counting pairs of tokens reaches {rungs['bigram']:,.0f}" if rungs else ""
        sentences.append(
            f"**MU-SOTA {OUTCOME[finding.verdict]} a plain transformer of its size**{at_best} "
            f"at valid PPL {own} against {other}{counted} ({list(intervals.values())[-1]})."
        )
    if looked := evidence.ablated:
        run, effects = looked
        ledger, names = run.summary["parameter_ledger"], run.experiment.model.layout.names
        spots = {spot.rule: spot for spot in verdicts.weak_spots(effects, ledger, names)}
        if (context := spots.get("Context")) and context.verdict == "idle":
            cost = effects["both attentions"].mean
            sentences.append(
                f"It hardly reads its context: with all attention switched off it loses {cost:.3f} "
                "nats a token, so it is mostly a table of which token follows which."
            )
            advice.append(f"{context.next_step[0].upper()}{context.next_step[1:]}.")
    runs, suspects = read_grid(evidence.folder)
    if runs and (causes := judge(runs, suspects)):
        advice.append(verdicts.root_cause_advice(causes))
    return sentences, advice


def _about(evidence: Evidence) -> str:
    run = evidence.runs[0]
    corpus, model = run.config["corpus"], evidence.best("optimized") or run
    return (
        f"Measured on {corpus['name']} ({corpus['source']}), profile {run.config['profile']}: "
        f"{corpus['tokens']['train']:,} training and {corpus['tokens']['valid']:,} validation "
        f"tokens, byte-level BPE with {corpus['vocabulary_in_use']:,} tokens in use; MU-SOTA of "
        f"{model.experiment.model.n_layer} layers, {model.experiment.training.epochs} epochs. "
        f"{run.summary['device']}, {max(r.summary['date'] for r in evidence.runs)}. "
        "Perplexities in windows without overlap; the best epoch is chosen on valid, test is "
        "scored once."
    )


def write_bench_report(folder: str | os.PathLike) -> Path:
    """README.md and figures of a folder of `bench --json` files; returns the README's path."""
    folder, results = Path(folder), []
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_bytes())
        save_figure(pictures.bench(result), folder / f"{path.stem}.png", "")
        if result["scaling"]:
            save_figure(pictures.bench_scaling(result), folder / f"{path.stem}-scaling.png", "")
        results.append(_bench_values(path.stem, result))
    return _write(folder / "README.md", _render("bench", results=results))


def _bench_values(name: str, result: Mapping) -> dict:
    models, agreement = result["models"], result["agreement"]
    names = pictures.BENCH_NAMES
    shape = [f"{names[k]}: {c['n_layer']} layers, V {c['vocab_size']:,}" for k, c in models.items()]
    return {
        **{key: result[key] for key in ("device", "date", "precision", "batch")},
        "name": name,
        "torch": result["versions"]["torch"],
        "length": next(iter(models.values()))["max_seq_len"],
        "shape": " · ".join(shape),
        "rate": f"{result['matmul_flops'] / 1e9:,.0f}",
        "table": markdown(bench_table(result)),
        "agreement": ", ".join(f"{names[k]} {value:.0e}" for k, value in agreement.items()),
        "scaling": markdown(scaling_table(result)) if result["scaling"] else "",
    }
