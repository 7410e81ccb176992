"""The pages of results: README.md and report.html of a folder, and the front page's table."""

import re
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from musota.errors import MusotaError
from musota.files import as_path, write_text
from musota.lab.ablate import weak_spots
from musota.lab.plan_rules import REPORTED
from musota.lab.root_causes import valid_losses
from musota.lab.stats import RELEVANT
from musota.lab.verdicts import Verdict, representative
from musota.workbook import drawings, plots, tables
from musota.workbook.results import QUESTIONS, Results, label, progress
from musota.workbook.style import save_figure

MATCHED = "Matched models have equal parameters, not equal compute (see notebook 05)."
GENERATED = "musota report`; do not edit"  # stands in every README.md of a results folder
FRONT_MARKS = ("<!-- results -->", "<!-- end of results -->")


@dataclass
class Section:
    """A folded question of a page, and what is shown under it."""

    question: str
    note: str = ""
    figures: Sequence[str] = ()  # names of PNG files beside the page
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)  # by caption, which may be empty
    commands: Sequence[str] = ()

    def __bool__(self) -> bool:
        return bool(self.figures or self.commands or any(map(len, self.tables.values())))


def write_report(folder: str | Path) -> Path:
    """Draws the figures of a results folder and writes its README.md and report.html, from the
    records alone. Returns the path of README.md. Raises MusotaError for a damaged record and a
    README.md that is no report."""
    if not as_path(folder).is_dir():
        raise MusotaError(f"There is no results folder {folder}.")
    results = Results(folder)
    old = results.folder / "README.md"
    if old.exists() and GENERATED.encode() not in old.read_bytes():
        raise MusotaError(f"{old} is not a report and is not replaced: name another folder.")
    page = _page(results) | {"name": results.folder.resolve().name, "folder": results.folder}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=StrictUndefined,
        autoescape=lambda name: name.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for change in (tables.alignments, tables.escaped, tables.markdown):
        environment.filters[change.__name__] = change
    environment.filters["base64"] = lambda picture: b64encode(picture.read_bytes()).decode()
    for template, name in (("report.html.j2", "report.html"), ("report.md.j2", "README.md")):
        text = environment.get_template(template).render(page)
        write_text(results.folder / name, re.sub(r"\n{3,}", "\n\n", text).strip() + "\n")
    return results.folder / "README.md"


def _page(results: Results) -> dict:
    """What the templates of a page are rendered with; saves the figures on the way."""
    verdicts, figures = results.verdicts(), _figures(results)
    for name, figure in figures.items():
        about = "counted from the built models" if name == "parameters" else results.footer
        save_figure(figure, results.folder / f"{name}.png", about)
    sections = [section for section in _sections(results, verdicts, [*figures]) if section]
    if not results.measured:
        return {"table": None, "sections": sections}
    summaries = [group[0].summary for group in results.measured]
    return {
        "answer": _answer(results, verdicts),
        "table": tables.model_table(results),
        "notebooks": sorted(path.name for path in results.folder.glob("executed/*.ipynb")),
        "sections": sections,
        "corpus": results.runs[0].config["corpus"],
        "devices": sorted({summary["device"] for summary in summaries}),
        "dates": sorted({end(summary["date"] for summary in summaries) for end in (min, max)}),
    }


def _figures(results: Results) -> dict[str, Figure]:
    """The figures of a page by name, as far as there is something to draw."""
    found, ledgers = {}, {}  # a ledger once: training changes no parameter counts
    for run in (group[0] for group in results.measured):
        ledger = run.summary["parameter_ledger"]
        if ledger not in ledgers.values():
            ledgers[run.title] = ledger
    if ledgers:
        found["curves"] = plots.curves(results.runs, results.ngrams, results.at_plan_size)
        found["parameters"] = drawings.ledgers(ledgers)
    against = results.architecture()
    if any(verdict.value is not None for verdict in against.values()):
        title = "Each model minus its parameter-matched transformer"
        found["architecture"] = plots.difference(against, title)
    if results.grid:
        found["root_causes"] = plots.root_causes(results.grid)
    if results.sweeps:
        found["rate_sweep"] = plots.rate_sweep(results.sweeps)
    for run, effects in results.ablated.items():
        found[f"ablations_{run.path.name}"] = plots.ablations(run, effects)
    return found


def _sections(results: Results, verdicts: dict, figures: list[str]) -> list[Section]:
    """The folded questions, some of them empty."""

    shown = {group[0]: label(group[0]) for group in results.measured}
    parts = {
        label(run): tables.verdict_table(weak_spots(run, effects))
        for run, effects in results.ablated.items()
    }
    judged = {name: {"": tables.verdict_table(found)} for name, found in verdicts.items()}
    judged["causes"]["Suspects"] = tables.causes_table(results.grid)
    last = {t: r.samples.drop_duplicates("prompt", keep="last") for r, t in shown.items()}
    written = {title: samples[["prompt", "text"]] for title, samples in last.items()}
    healths = {title: tables.health_table(run) for run, title in shown.items()}
    grid_note = _grid_note(results) if results.grid_rows else ""
    tried = [len(seeds) for losses in results.sweeps.values() for seeds in losses.values()]
    rate_note = f"Seeds of each rate: {min(tried)}." if tried else ""
    unused = f"Used: the 95 % interval of what disabling a part costs is above {RELEVANT} nats per "
    unused += "token. Hardly used: it is below."
    parts_note = unused if parts else ""
    plan_note = f"Applied to: {results.judged[0].title}." if results.judged else ""

    def drawn(*starts: str) -> list[str]:
        return [name for name in figures if name.startswith(starts)]

    return [
        Section(QUESTIONS["architecture"], MATCHED, drawn("architecture"), judged["architecture"]),
        Section(QUESTIONS["causes"], grid_note, drawn("root"), judged["causes"]),
        Section(QUESTIONS["rate"], rate_note, drawn("rate"), judged["rate"]),
        Section(QUESTIONS["parts"], parts_note, drawn("parameters", "ablations"), parts),
        Section("Was training healthy?", tables=healths),
        Section("What do the models write?", tables=written),
        Section(QUESTIONS["plan"], plan_note, tables=judged["plan"]),
        Section(
            "How can this be repeated?",
            "Speeds are of different machines, threads and precisions. “musota evidence”, with the "
            "same profile and corpus, trains every seed, the sweep and the grid.",
            tables={"Every run": tables.runs_table(results.runs)},
            commands=[run.config["command"] for run in shown if run.config.get("command")],
        ),
    ]


def _grid_note(results: Results) -> str:
    """The size of the runs of the root-cause grid."""
    row = next(iter(next(iter(results.grid_rows.values())).values()))
    seeds = next(iter(valid_losses(results.grid_rows).values()), ())
    model = row.experiment.model
    return (
        "Grid runs make one change at a time. They are smaller than the runs above: "
        f"{model.n_layer} layers, sequences of {model.max_seq_len} tokens, {row.train_tokens:,} "
        f"training tokens, epochs: {row.experiment.training.epochs}, seeds: {len(seeds)}. "
        "Intervals are 95 %, pooled over all runs."
    )


def _answer(results: Results, verdicts: dict[str, list[Verdict]]) -> list[tuple[str, str]]:
    """The lines of the answer: what is shown in bold, and the rest."""
    lines, original, ngrams = [], results.group("original"), results.ngrams
    if results.at_plan_size:
        epochs, ppl = REPORTED["epochs"], REPORTED["ppl"]
        reported = f"MU-SOTA's reported PPL is {ppl:.0f} after {epochs} epochs"
        if original in results.ended and not representative(original).diverged:
            reported += f"; the same settings reach {original[0].summary['ppl']:,.1f} here"
        lines.append((f"{reported}.", ""))
    for name in ("best", "architecture", "causes"):
        lines += [(found.answer, found.explanation) for found in verdicts[name]]
    if {"bigram", "trigram"} <= ngrams.keys():
        ppls = f"bigram {ngrams['bigram']:,.0f}, trigram {ngrams['trigram']:,.0f}"
        lines.append((f"PPL of the n-gram baselines, which count tokens: {ppls}.", ""))
    for group in results.groups.values():
        run = representative(group)
        if run.diverged:
            lines.append((f"{run.title}: {progress(run)}.", ""))
        elif not run.finished:
            rest = "It has not finished, so there is no verdict on it yet."
            lines.append((f"{run.title}: {progress(run)} epochs.", rest))
    return lines


def write_front_page(readme: str | Path, results_root: str | Path) -> Path:
    """Puts a table of the results at full size between the two marks in a README. Raises
    MusotaError where the README does not have each mark once."""
    readme = as_path(readme)
    text, (begin, end) = readme.read_text(encoding="utf-8"), FRONT_MARKS
    if text.count(begin) != 1 or text.count(end) != 1:
        raise MusotaError(f"{readme} needs the lines {begin} and {end}, each once.")
    table = tables.markdown(tables.front_table(Results(as_path(results_root) / "full")))
    before, after = text.split(begin)[0], text.split(end)[1]
    write_text(readme, f"{before}{begin}\n\n{table}\n\n{end}{after}")
    return readme


def write_path_figure(folder: str | Path) -> Path:
    """Draws path.csv of a folder as path.png, the way from MU-SOTA to the redesign."""
    folder = as_path(folder)
    figure = plots.path(pd.read_csv(folder / "path.csv"))
    save_figure(figure, folder / "path.png", plots.PATH_RUNS)
    return folder / "path.png"
