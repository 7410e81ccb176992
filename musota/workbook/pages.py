"""The pages people read: those of results folders, and the measured part of the front page.

Code collects findings, tables and figures; `templates/*.md.j2` say what stands where.
"""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from musota.data.sources import SOURCES
from musota.errors import MusotaError
from musota.files import write_text
from musota.plan.architectures import MuConfig, OwnConfig
from musota.plan.config import Experiment, TrainConfig
from musota.plan.path import EARNED
from musota.plan.profiles import profiles, scaled
from musota.plan.registry import TUNED, find_experiment, registry, title_of
from musota.rules import verdicts
from musota.rules.plan import REPORTED, broke_through
from musota.studies.path import OF_A_CHANGE
from musota.training.runs import Run
from musota.workbook import figures, pictures, tables
from musota.workbook.answers import answers, plateau_of, rule_lines, set_beside
from musota.workbook.evidence import GRID, Evidence, read_evidence
from musota.workbook.naming import brief_titles, footer_of, label_of, models_of, progress_of
from musota.workbook.style import save_figure

FRONT_MARKS = ("<!-- measured -->", "<!-- end of measured -->")
BESIDE = ("simplified", "simplified_twin")  # another size: not on the front page
OUTCOME = {"helps": "beats", "hurts": "loses to", "undecided": "cannot be told from"}
OWNS = {"helps": "gain", "hurts": "cost more than they bring", "undecided": "may be worth nothing"}


def _mean_ppl(seeds: Sequence[Run]) -> str:
    return f"{tables.mean_ppl(seeds):,.1f}{tables.interval_of(seeds)}"


def _without_attention(looked: tuple[Run, dict]) -> float:
    return next(looked[1][part].mean for part in verdicts.CONTEXT & looked[1].keys())


_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters |= {
    "table": tables.markdown,
    "count": "{:,}".format,
    "title": title_of,
    "ppl": _mean_ppl,
    "progress": progress_of,
    "plateau": lambda run: plateau_of(run).conclusion,
    "without_attention": _without_attention,
}
_templates.globals |= {
    "label_of": label_of,
    "tables": tables,
    "earned": EARNED,
    "root_causes": GRID,
    "reported": REPORTED,
    "outcome": OUTCOME,
    "owns": OWNS,
    "earns": OF_A_CHANGE[1],
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
    shown = [group[0] for group in models_of(evidence.runs).values()]
    drawn = _figures(evidence, shown) if shown else {}
    for name, figure in drawn.items():
        save_figure(figure, folder / f"{name}.png", evidence.footer)
    if evidence.path:
        first = next(iter(evidence.path.values())).runs[0]
        figure = figures.path(evidence.path, evidence.rungs)
        save_figure(figure, folder / "path.png", footer_of(first))
    grid_runs, causes = evidence.grid
    if causes:
        figure = figures.root_causes(causes, verdicts.RELEVANT)
        (folder / GRID).mkdir(exist_ok=True)
        save_figure(figure, folder / GRID / "root_causes.png", footer_of(grid_runs[0]))
    again = [(run, how) for run in shown if (how := _training_again(evidence, run))]
    text = _render(
        "report",
        evidence=evidence,
        name=folder.name,
        shown=shown,
        answers=answers(evidence) if shown else {},
        rules=rule_lines(evidence) if shown else [],
        named=[command for _, command in again if " --" not in command],
        by_hand=[(run, command) for run, command in again if " --" in command],
        corpora=SOURCES,
        figures=list(drawn),
    )
    return _write(folder / "README.md", text)


def _figures(evidence: Evidence, shown: Sequence[Run]) -> dict[str, Figure]:
    beside_plan = evidence.at_the_plans_size
    drawn = {
        "answer": figures.answer(evidence.runs, evidence.rungs, evidence.sweeps, beside_plan),
        "curves": figures.curves(evidence.runs, evidence.rungs, reported=beside_plan),
    }
    titles = brief_titles({name: [evidence.best(name)] for name in evidence.compared})
    both = {
        f"{titles[name]}: {finding.verdict}\n{kind.splitlines()[0]}": interval
        for name, (finding, intervals) in evidence.compared.items()
        for kind, interval in intervals.items()
    }
    if both:
        drawn["verdicts"] = figures.difference(both, "Each against its dense twin")
    rows = [name for name in evidence.names if name.split(",")[0] == "redesigned"]
    redesigned = next(filter(None, map(evidence.ablation_of, rows)), None)
    looked = {"ablations": evidence.ablated, "ablations_redesigned": redesigned}
    for name, found in looked.items():
        if found:
            drawn[name] = figures.ablations(*found)
    for row, (_, measured) in evidence.measured("names").items():
        drawn[f"names_{row}"] = pictures.names(measured)
    ledgers: dict[str, dict] = {}  # each once, however its model was trained
    for run in shown:
        if (ledger := run.summary["parameter_ledger"]) not in ledgers.values():
            row = title_of(run.name.split(",")[0])
            ledgers[title_of(run.name) if row in ledgers else row] = ledger
    return drawn | {"ledger": pictures.ledgers(ledgers)}


def _training_again(evidence: Evidence, run: Run) -> str:
    """What trains a run again: a name for the command, and for what is no row of the registry what
    to `--set` in the nearest one. What a run is called decides nothing."""
    model, profile = run.experiment.model, profiles.get(run.config["profile"])
    if not isinstance(model, OwnConfig):
        roles = evidence.roles or {n: find_experiment(n) for n in registry if n not in TUNED}
    else:
        if model.arguments != "{}":  # which no option takes
            return ""
        sizes = {"vocab_size": OwnConfig.vocab_size, "max_seq_len": OwnConfig.max_seq_len}
        own = Experiment(dataclasses.replace(model, **sizes), TrainConfig())
        roles = {f"FOLDER/{model.source}": scaled(own, profile) if profile else own}
    changes = {
        name: run.experiment.differences(role)
        for name, role in roles.items()
        if type(role.model) is type(model)
    }
    if not changes:
        return ""
    nearest = min(changes, key=lambda name: len(changes[name]))
    flags = [
        "--continue-from RUN" if change.startswith("started_from=") else f"--set {quote(change)}"
        for change in changes[nearest]
    ]
    precision = run.config.get("precision", "no")
    if precision != "no" and run.summary["device"].startswith("CPU"):  # where it was asked for
        flags.append(f"--precision {precision}")
    return " ".join([nearest, *flags])


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
            "rows": [name for name in models_of(evidence.runs) if name not in BESIDE],
            **_standing(evidence),
        }
        for evidence in found
    ]
    measured = _render("front", pages=pages, spread=next((e for e in found if e.spread), None))
    before, after = text.split(begin)[0], text.split(end)[1]
    _write(path, f"{before}{begin}\n\n{measured}\n{end}{after}")


def _standing(evidence: Evidence) -> dict:
    """What the front page says of a folder: how MU-SOTA's best row (`beside`) stands to its dense
    twin, and the best redesigned model to both. Empty where there is no MU-SOTA."""
    groups, weak = models_of(evidence.runs), evidence.weak_spots()
    ours = [n for n, g in groups.items() if isinstance(g[0].experiment.model, MuConfig)]
    if not ours:
        return {"beside": None}
    best = min(ours, key=lambda name: tables.mean_ppl(groups[name]))
    beside = next((name for name in ("tuned", "optimized") if evidence.compare(name)), best)
    plain = [*evidence.seeds(evidence.twin_of(beside)).values()]
    compared = evidence.compare(beside)
    redesigned = {name: g for name, g in groups.items() if name.split(",")[0] == "redesigned"}
    whole = {name: group for name, group in redesigned.items() if "without=" not in name}
    told = [groups["redesigned"]] if "redesigned" in groups else (whole or redesigned).values()
    found = {
        "beside": beside,
        "ours": [*evidence.seeds(beside).values()] if compared else groups[best],
        "plain": plain,
        "compared": compared and compared[0],
        "is_tuned": beside in TUNED,
        "repeated": groups.get("original"),
        "goals": {"MU-SOTA": evidence.goal(best)},
        "is_idle": any((spot.rule, spot.verdict) == ("Context", "idle") for spot in weak),
        "redesign": min(told, key=tables.mean_ppl, default=None),
        "redesign_wins": False,
        "on_the_way": [r for r in evidence.path.values() if r.step.kind == "made" and r.effect],
    }
    if runs := found["redesign"]:
        mu = models_of(evidence.only(beside).runs).popitem()[1]
        found["against_ours"] = set_beside(runs, mu, "redesigned", "MU-SOTA")
        found["against_plain"] = plain and set_beside(runs, plain, "redesigned", "the plain one")
        modern = evidence.compare(runs[0].name)  # with its own twin
        found["against_modern"] = modern and (modern[0], [*modern[1].values()][-1])
        found["redesign_wins"] = found["against_ours"][0].verdict == "better"
        ppls, so_far = [run.summary["ppl"] for run in runs], progress_of(runs[0])
        budget = "" if runs[0].finished else so_far
        found["goals"]["the redesign"] = broke_through(ppls, "the redesign", None, budget)
    steps = [spot.next_step for spot in weak if spot.next_step and not found["redesign_wins"]]
    found["advice"] = [f"In the model: {step}." for step in steps[:1]]
    last = [name for name, row in evidence.path.items() if row.step.kind == "made"][-1:]
    found["advice"] += [
        f"Better still: {row.step.title}, {row.effect}."
        for row in evidence.path.values()
        if row.step.kind in ("added", "taken back") and row.step.before in last
        if row.effect and row.effect.beyond(-EARNED) < 0
    ]
    if causes := evidence.grid[1]:
        found["advice"].append(verdicts.root_cause_advice(causes))
    return found


def write_bench_report(folder: str | os.PathLike) -> Path:
    """README.md and figures of a folder of `bench --json` files; returns the README's path."""
    folder, results = Path(folder), {}
    for path in sorted(folder.glob("*.json")):
        results[path.stem] = result = json.loads(path.read_text(encoding="utf-8"))
        save_figure(pictures.bench(result), folder / f"{path.stem}.png", "")
    return _write(folder / "README.md", _render("bench", results=results))
