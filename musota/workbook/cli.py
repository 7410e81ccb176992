"""The command line: python -m musota run | train | compare | score | audit | evidence | …"""

from __future__ import annotations

import ast
import os
import signal
import sys
from pathlib import Path

import click

from musota.errors import MusotaError, nearest_name
from musota.files import as_path, sentence
from musota.plan.profiles import profiles
from musota.plan.registry import TUNED, find_experiment, registry

ROOT = Path(__file__).resolve().parents[2]
# A backend inherited from a notebook would break scripts that are started from one.
os.environ["MPLBACKEND"] = "Agg"
TEXTS = ("profile", "corpus", "save_to")  # parameters that are text even where they look otherwise
TRAIN_HELP = (
    f"Train one EXPERIMENT: {', '.join(name for name in registry if name not in TUNED)}. "
    f"Or {', '.join(TUNED)}: at the best rate of the recorded sweeps. Or a model of your own, "
    "FILE.py:NAME (a function or class that makes it), or its dense twin, FILE.py:NAME_twin."
)
CORPUS_HELP = (
    "auto, wikitext-2, wikitext-2-raw, wikitext-103, wikitext-103-raw, python-docs, or a folder "
    "with train.txt, valid.txt and test.txt."
)


class Place(click.Path):
    """A path; `~` is expanded, which a shell does not do everywhere."""

    def convert(self, value, parameter, context):
        return Path(super().convert(as_path(value), parameter, context))


def _option(*names, **how):
    """An option whose help shows its default, where that says something."""
    return click.option(*names, show_default=bool(how.get("default")), **how)


def experiment_options(command):
    """The options of every command that trains."""
    options = (
        _option("--profile", default="quick", help=f"auto, {', '.join(profiles)}."),
        _option("--corpus", default="auto", help=CORPUS_HELP),
        _option("--seed", default=0),
        _option("--fresh", is_flag=True, help="Train again what is already trained."),
        _option("--save-to", default="", help="Folder for results [default: results/]."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def _changes(context, parameter, assignments: tuple[str, ...]) -> dict:
    for text in assignments:
        if "=" not in text:
            raise MusotaError(f"--set takes FIELD=VALUE, for example epochs=50, not {text!r}.")
    pairs = [text.partition("=") for text in assignments]
    return {name.strip(): _literal(value.strip()) for name, _, value in pairs}


def _literal(text: str):
    """A value from the command line: a Python literal if it is one, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


PRECISION_HELP = "Of training [default: what pays there]; a CPU with bf16 gains from it, too."
SET_HELP = "FIELD=VALUE of the experiment, after the profile; may be repeated."
changes_option = _option("--set", "changes", multiple=True, callback=_changes, help=SET_HELP)


def place_options(command):
    """Where the labels of recorded runs are sought."""
    results = ROOT / "results"
    folder = click.option("--save-to", "results", default=results, type=Place())
    return _option("--profile", default="quick")(folder(command))


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli():
    """Train MU-SOTA and its dense twin, compare them, and report what was measured."""


@cli.command()
@experiment_options
@changes_option
@_option("--only", default="", help="Numbers of notebooks, for example 02,04.")
@_option("-p", "parameters", nargs=2, multiple=True, help="NAME VALUE of a notebooks' parameter.")
def run(only, parameters, **values):
    """Run the notebooks in order; then print the comparison, the verdict and the report's place.

    Stops at the first failure. The same command goes on from there: finished training runs are
    loaded, unfinished ones continued.
    """
    from musota.workbook.headless import chosen_notebooks, run_notebooks
    from musota.workbook.session import PARAMETERS, Workbook

    known, own = (*PARAMETERS, "runs"), {}
    for name, text in parameters:
        if name not in known:
            raise nearest_name("notebook parameter", name, known)
        value = text if name in TEXTS else _literal(text)
        (own if name == "runs" else values)[name] = value
    notebooks = chosen_notebooks(only)
    run_notebooks(Workbook(**values), notebooks, values, own)


@cli.command(help=TRAIN_HELP)
@click.argument("experiment")
@experiment_options
@changes_option
@_option("--continue-from", default="", help="Another run's folder or label: start at its best.")
@_option("--compile/--no-compile", default=None, help="[default: in long runs on a GPU]")
@_option("--auto-remedy", is_flag=True, help="Let the plan's remedies apply themselves.")
@_option("--device", default=None, help="cpu, cuda or mps [default: the best one here].")
@_option("--precision", type=click.Choice(["no", "bf16", "fp16"]), help=PRECISION_HELP)
def train(experiment, compile, auto_remedy, continue_from, device, precision, **parameters):
    from musota.workbook.compare import find_runs
    from musota.workbook.session import Workbook

    if int(os.environ.get("RANK", 0)):  # of several processes one speaks
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if experiment not in TUNED:
        find_experiment(experiment)  # a wrong name is answered before the corpus is read
    book = Workbook(**parameters)
    choices = {"compile": compile, "auto_remedy": auto_remedy}
    choices |= {"device": device, "precision": precision}
    if continue_from:
        choices["continue_from"] = find_runs(continue_from, book.root.parent, book.root.name)[0]
    finished = book.train(experiment, **choices)
    click.echo(f"{finished}")
    if not finished.finished:
        sys.exit(130)


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN ...")
@place_options
def compare(runs, profile, results):
    """Compare recorded RUNs, each with the first: where they differ, curves, table, verdicts.

    A RUN is a run's folder, a label of results/PROFILE as tables have it (optimized,epochs=50,
    with -seed0 for one seed), or one of another folder there (study/tuned).
    """
    from musota.workbook import figures, tables
    from musota.workbook.compare import against_first, chosen_runs
    from musota.workbook.style import save_figure

    evidence = chosen_runs(runs, results, profile)
    shown = tables.comparison_table(evidence.runs, columns=tables.BRIEF)
    click.echo(f"{evidence.note}\n\n{tables.differences_table(evidence.runs).to_string()}\n")
    click.echo(shown.to_string(index=False) + "\n")
    found = {}
    for finding, interval in against_first(evidence.runs):
        click.echo(f"- {finding.sentence}")
        found[finding.rule] = interval
    drawn = {"curves": figures.curves(evidence.runs, evidence.rungs, reported=False)}
    if found:
        drawn["verdicts"] = figures.difference(found, "Against the first", figures.FIRST)
    (results / "compared").mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        path = results / "compared" / f"{name}.png"
        save_figure(figure, path, evidence.footer)
        click.echo(f"drawn: {path}")


@cli.command()
@click.argument("run")
@click.argument("file", type=Place(exists=True, dir_okay=False))
@place_options
def score(run, file, profile, results):
    """Score a text FILE (UTF-8) with the best weights of a RUN (as in `compare`): perplexity, bits
    per byte, and which tokens were surprising, as a table and a picture in the run's folder."""
    from musota.workbook.compare import find_runs
    from musota.workbook.pictures import surprises
    from musota.workbook.style import save_figure

    found = find_runs(run, results, profile)[0]
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise MusotaError(f"{file} is not UTF-8: convert it, for example with iconv.") from None
    scored = found.load_model().score_text(text)
    click.echo(f"{found}\nPPL {scored.ppl:,.1f}, {scored.bits_per_byte:.3f} bits per byte\n")
    click.echo(scored.table.nlargest(15, "bits").to_string(float_format="%.4g"))
    path = found.path / f"score-{file.stem}"
    scored.table.to_csv(path.with_suffix(".csv"), index_label="place")
    save_figure(surprises(scored), path.with_suffix(".png"), f"{file.name} by {found.name}")
    click.echo(f"\nEvery token: {path}.csv, {path}.png")


@cli.command()
@experiment_options
@_option("--seeds", default=3, type=click.IntRange(1, 100), help="How many, from --seed on.")
@_option("--only", default="models,sweep,tuned,grid,path", help="Parts to do.")
def evidence(seeds, only, **parameters):
    """Carry the plan out with several seeds, then write the report.

    The models; both large ones over a sweep of learning rates; both again at their own best rate
    (tuned); the root-cause grid; the path to the redesign, each row at its own best rate. The same
    command goes on where it was stopped.
    """
    from musota.workbook.pages import write_report
    from musota.workbook.session import PARTS, Workbook

    chosen = [part.strip() for part in only.split(",")]
    for part in chosen:
        if part not in (*PARTS, "grid"):
            raise nearest_name("part", part, (*PARTS, "grid"))
    book = Workbook(**parameters)
    for part in chosen:
        click.echo(f"--- {part} ---")
        if part == "grid":
            Workbook(**parameters, grid=True).run_grid()
        else:
            book.carry_out(part, seeds)
    for name, ppl in book.ladder.items():  # measured once, and in the report
        click.echo(f"rung {name}: {ppl:,.1f}")
    write_report(book.folder)
    book.deliver()
    click.echo(f"The report: {book.home / 'README.md'}")


@cli.command()
@click.argument("model", metavar="FILE.py:NAME")
@_option("--vocab-size", default=512, help="Tokens to audit it with.")
@_option("--max-seq-len", default=64, help="Tokens a sequence.")
@_option("--arguments", default="{}", help="For NAME, as JSON: '{\"width\": 64}'.")
@_option("--loss", default="", help="The file's function loss(module, ids), if it has one.")
@_option("--picture", type=Place(dir_okay=False), help="Draw what was found here.")
def audit(model, vocab_size, max_seq_len, arguments, loss, picture):
    """Does a model of your own see the future? Runs FILE.py, and calls NAME to make the model.

    Ends with status 1 where it is not honest. NAME is called with vocab_size and max_seq_len,
    where it takes them.
    """
    from musota.plan import own
    from musota.plan.architectures import OwnConfig
    from musota.studies.audit import audit as audit_module
    from musota.workbook.style import save_figure

    config = OwnConfig(model, arguments, vocab_size, max_seq_len)
    file = config.source.partition(":")[0]
    given = own.find(f"{file}:{loss}", config.sha256) if loss else None
    found = audit_module(config.build(), vocab_size, max_seq_len, given)
    click.echo(f"{found}")
    if picture:
        save_figure(found.figure(), picture, f"measured: {config.source}, freshly made")
        click.echo(f"The picture: {picture}")
    sys.exit(not found.honest)


@cli.command()
@_option("--device", default=None, help="cpu or cuda [default: cuda if there is one].")
@_option("--json", "file", type=Place(dir_okay=False), help="Write the numbers here.")
@_option("--repeats", default=7, type=click.IntRange(1, 1000), help="Rounds; all take turns.")
def bench(device, file, repeats):
    """Measure our training step against the literal version of the same model on this machine.

    About five minutes on two CPU cores.
    """
    from musota.files import write_json
    from musota.workbook.bench import run_bench
    from musota.workbook.tables import bench_table

    if file:  # a folder that cannot be made is told before the minutes, not after
        file.parent.mkdir(parents=True, exist_ok=True)
    result = run_bench(device, repeats=repeats)
    if file:
        write_json(file, result)
    click.echo("\n" + bench_table(result).to_string(index=False))
    for kind, difference in result["agreement"].items():
        click.echo(f"{kind}: ours and literal differ by {difference:.1e} in the loss, 20 steps")


@cli.command()
@click.argument("folders", nargs=-1, type=Place(exists=True, file_okay=False))
@_option("--pack", is_flag=True, help="First pack run folders and probes into a few files.")
def report(folders, pack):
    """Write README.md and figures of results FOLDERS anew from their records [default: all].

    Without FOLDERS also the measured part of the workbook's own README.
    """
    from musota.workbook import pages, records
    from musota.workbook.results import COMMITTED

    results = ROOT / "results"
    packed, whole = results.glob(f"*/{records.SUMS}"), results.glob("*/*/config.json")
    found = {path.parent for path in packed} | {path.parent.parent for path in whole}
    for folder in folders or [*sorted(found), *results.glob("bench")]:
        is_bench = folder.name == "bench"
        if pack and not is_bench:
            records.pack(folder)
        click.echo((pages.write_bench_report if is_bench else pages.write_report)(folder))
    if not folders:
        kept = [path for name in COMMITTED if (path := results / name).exists()]
        pages.write_front_page(ROOT / "README.md", kept)
        click.echo(ROOT / "README.md")


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's: as Ctrl-C
    try:
        cli()
    except (MusotaError, OSError) as error:
        click.echo(f"Error: {sentence(error)}", err=True)
        sys.exit(1)
