"""The pages people read: those of results folders, and the measured part of the front page.

Code collects findings, tables and figures; `templates/*.md.j2` say what stands where.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from musota.data.sources import SOURCES
from musota.errors import MusotaError
from musota.files import write_text
from musota.plan.architectures import MuConfig, OwnConfig
from musota.plan.path import EARNED
from musota.plan.registry import TUNED, find_experiment, registry, title_of
from musota.rules import verdicts
from musota.rules.plan import REPORTED, broke_through
from musota.training.runs import Run
from musota.workbook import figures, pictures, tables
from musota.workbook.answers import answers, rule_lines
from musota.workbook.evidence import GRID, Evidence, by_name, footer_of, progress_of, read_evidence
from musota.workbook.style import save_figure

FRONT_MARKS = ("<!-- measured -->", "<!-- end of measured -->")
BESIDE = ("simplified", "simplified_twin")  # another size: not on the front page
OUTCOME = {"helps": "beats", "hurts": "loses to", "undecided": "cannot be told from"}

_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters |= {"table": tables.markdown, "count": "{:,}".format, "title": title_of}
_templates.globals |= {
    "label_of": figures.label_of,
    "tables": tables,
    "earned": EARNED,
    "root_causes": GRID,
}


def _render(template: str, **found) -> str:
    text = _templates.get_template(f"{template}.md.j2").render(found)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _write(path: Path, text: str) -> Path:
    write_text(path, text)
    return path


def write_report(folder: str | os.PathLike) -> Path:
    """Draw the figures of a results folder anew and write its README.md, from the records alone.

    Returns the README's path. Raises MusotaError for a damaged record.
    """
    evidence = read_evidence(folder)
    folder = evidence.folder.resolve()
    shown = [group[0] for group in by_name(evidence.runs).values()]
    drawn = _figures(evidence, shown) if shown else {}
    for name, figure in drawn.items():
        save_figure(figure, folder / f"{name}.png", evidence.footer)
    if evidence.path:
        figure = figures.path(evidence.path, evidence.rungs)
        save_figure(figure, folder / "path.png", evidence.footer)
    grid_runs, causes = evidence.grid
    if causes:
        figure = figures.root_causes(causes, verdicts.RELEVANT)
        (folder / GRID).mkdir(exist_ok=True)
        save_figure(figure, folder / GRID / "root_causes.png", footer_of(grid_runs[0]))
    text = _render(
        "report",
        evidence=evidence,
        name=folder.name,
        shown=shown,
        answers=answers(evidence) if shown else {},
        rules=rule_lines(evidence) if shown else [],
        again=_training_again(evidence, shown),
        figures=list(drawn),
    )
    return _write(folder / "README.md", text)


def _figures(evidence: Evidence, shown: Sequence[Run]) -> dict[str, Figure]:
    beside_plan = evidence.at_the_plans_size
    drawn = {
        "answer": figures.answer(evidence.runs, evidence.rungs, evidence.sweeps, beside_plan),
        "curves": figures.curves(evidence.runs, evidence.rungs, reported=beside_plan),
    }
    for name, (finding, intervals) in evidence.compared.items():
        title = f"{finding.rule}: {finding.conclusion}"
        drawn[f"verdict_{name}"] = figures.difference(intervals, title)
    looked = {"ablations": evidence.ablated}
    rows = (name for name in evidence.names if name.split(",")[0] == "redesigned")
    looked["ablations_redesigned"] = next(filter(None, map(evidence.ablation_of, rows)), None)
    for name, (run, effects) in ((n, found) for n, found in looked.items() if found):
        layout = run.experiment.model.layout
        drawn[name] = figures.ablations(effects, run.summary["ppl"], layout)
    ledgers = {title_of(run.name): run.summary["parameter_ledger"] for run in shown}
    return drawn | {"ledger": pictures.ledgers(ledgers)}


def _training_again(evidence: Evidence, shown: Sequence[Run]) -> dict:
    """What trains each row again: names for the command, and for runs that are no row of the
    registry what to `--set` in the nearest one. What a run is called decides nothing."""
    named, by_hand = [], []
    of_python = {name: find_experiment(name) for name in registry if name not in TUNED}
    for run in shown:
        model = run.experiment.model
        if isinstance(model, OwnConfig):
            named.append(f"FOLDER/{model.source}")
            continue
        changes = {
            name: run.experiment.differences(role)
            for name, role in (evidence.roles or of_python).items()
            if type(role.model) is type(model)
        }
        nearest = min(changes, key=lambda name: len(changes[name]), default="")
        flags = [f"--set {change}" for change in changes.get(nearest, ())]
        precision = run.config.get("precision", "no")
        if precision != "no" and run.summary["device"].startswith("CPU"):  # where it was asked for
            flags.append(f"--precision {precision}")
        if flags:
            by_hand.append((run, " ".join([nearest, *flags])))
        elif nearest:
            named.append(nearest)
    corpus = shown[0].config["corpus"]["name"] if shown else ""
    return {"named": named, "by_hand": by_hand, "corpus": corpus if corpus in SOURCES else "FOLDER"}


def write_front_page(path: str | os.PathLike, folders: Sequence[Path]) -> None:
    """Put the answers recorded in results `folders`, best first, between the marks in a README.

    Raises MusotaError where the README has no marks.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    begin, end = FRONT_MARKS
    if text.count(begin) != 1 or text.count(end) != 1:
        raise MusotaError(f"{path} has not one line {begin} and one {end}.")
    found = [evidence for evidence in map(read_evidence, folders) if evidence.runs]
    # What is furthest stands first: a profile none of whose runs has finished comes last.
    found.sort(key=lambda evidence: not any(run.finished for run in evidence.runs))
    pages = [
        {
            "evidence": evidence,
            "place": evidence.folder.resolve().relative_to(path.parent.resolve()).as_posix(),
            "rows": [name for name in by_name(evidence.runs) if name not in BESIDE],
            **dict(zip(("answer", "advice"), _answer(evidence), strict=True)),
        }
        for evidence in found
    ]
    measured = _render("front", pages=pages)
    before, after = text.split(begin)[0], text.split(end)[1]
    _write(path, f"{before}{begin}\n\n{measured}\n{end}{after}")


def _answer(evidence: Evidence) -> tuple[list[str], list[str]]:
    """At most four sentences: how MU-SOTA does, why, what the redesign brings, and the goal; and
    what to change next."""
    groups = by_name(evidence.runs)
    ours = [n for n, g in groups.items() if isinstance(g[0].experiment.model, MuConfig)]
    if not ours:
        return [], []
    best = min(ours, key=lambda name: tables.mean_ppl(groups[name]))
    beside = next((n for n in ("tuned", "optimized") if evidence.compare(n)), best)
    if compared := evidence.compare(beside):
        verdict, conclusion = compared[0].verdict, compared[0].conclusion
        own, other = (
            _ppl([*evidence.seeds(n).values()]) for n in (beside, evidence.twin_of(beside))
        )
        said = f"**MU-SOTA {OUTCOME[verdict]} a plain transformer of its size**"
        said += ", each at its best learning rate" if beside in TUNED else ""
        said += f": valid PPL {own} against {other}"
        said += " (provisional: seeds not measured)" if "provisional" in conclusion else ""
    else:
        said = f"**MU-SOTA reaches valid PPL {_ppl(groups[best])}**"
        said += f"{_unfinished(groups[best][0])} ({title_of(best)})"
    if evidence.at_the_plans_size:
        told = f"PPL {REPORTED['ppl']:.0f} after {REPORTED['epochs']} epochs"
        said = f"Reported by the plan: {told}. Measured here: {said}"
    if {"bigram", "trigram"} <= evidence.rungs.keys():
        pairs, triples = (evidence.rungs[name] for name in ("bigram", "trigram"))
        said += f"; counting pairs of tokens reaches {pairs:,.0f}, triples {triples:,.0f}"
    sentences, advice, weak = [f"{said}."], [], evidence.weak_spots()
    if any((spot.rule, spot.verdict) == ("Context", "idle") for spot in weak):
        sentences.append(
            f"It hardly reads its context: with attention switched off it loses "
            f"{_without_attention(evidence.ablated):.3f} nats a token, so it is mostly a table of "
            "which token follows which."
        )
    rows = [name for name in groups if name.split(",")[0] == "redesigned"]
    rows = [n for n in rows if {r.seed for r in groups[n]} & {r.seed for r in groups[beside]}]
    if rows:
        row = min(rows, key=lambda name: tables.mean_ppl(groups[name]))
        plain = [*evidence.seeds(evidence.twin_of(beside)).values()]
        told, verdict = _of_redesign(evidence, groups[row], groups[beside], plain)
        sentences.append(told)
        if verdict == "better":
            advice.append("Train the redesign: `python -m musota train redesigned`.")
    if evidence.at_the_plans_size:
        goals = {"MU-SOTA": evidence.goal(best)}
        if rows:
            goals["the redesign"] = broke_through(
                [r.summary["ppl"] for r in groups[row]], row, None
            )
        said = "; ".join(f"{who} is {goal.conclusion}" for who, goal in goals.items() if goal)
        sentences.append(f"The plan's goals, PPL under 200 and under 100: {said}.")
    advice += [f"In the model: {spot.next_step}." for spot in weak if spot.next_step][:1]
    causes = evidence.grid[1]
    return sentences, advice + ([verdicts.root_cause_advice(causes)] if causes else [])


def _of_redesign(
    evidence: Evidence, runs: list[Run], beside: list[Run], plain: list[Run]
) -> tuple[str, str]:
    """How the best redesigned model stands beside MU-SOTA's, with the verdict's word on that, and
    beside the plain transformer, where there is one."""
    own, theirs, plains = ({r.seed: r.summary for r in side} for side in (runs, beside, plain))
    finding, text, over_seeds = verdicts.better_or_worse(own, theirs, "redesigned", "MU-SOTA")
    said = (
        f"**[The redesign](notebooks/07_redesign.ipynb), of the same size, reaches "
        f"{_ppl(runs)}**{_unfinished(runs[0])}, {finding.conclusion}: {over_seeds or text}"
    )
    if own.keys() & plains.keys():
        name = "the plain transformer"
        other, *intervals = verdicts.better_or_worse(own, plains, "redesigned", name)
        said += f"; against {name} {intervals[1] or intervals[0]}, {other.verdict}"
    if looked := evidence.ablation_of(runs[0].name):
        said += f"; without attention it loses {_without_attention(looked):.2f} nats"
    return f"{said}.", finding.verdict


def _unfinished(run: Run) -> str:
    return "" if run.finished else f" after {progress_of(run)}, unfinished"


def _without_attention(looked: tuple[Run, dict]) -> float:
    return next(looked[1][part].mean for part in verdicts.CONTEXT & looked[1].keys())


def _ppl(seeds: Sequence[Run]) -> str:
    return f"{tables.mean_ppl(seeds):,.1f}{tables.interval_of(seeds)}"


def write_bench_report(folder: str | os.PathLike) -> Path:
    """README.md and figures of a folder of `bench --json` files; returns the README's path."""
    folder, results = Path(folder), {}
    for path in sorted(folder.glob("*.json")):
        results[path.stem] = result = json.loads(path.read_text(encoding="utf-8"))
        save_figure(pictures.bench(result), folder / f"{path.stem}.png", "")
    return _write(folder / "README.md", _render("bench", results=results))
