"""The command line: python -m musota run | train | compare | score | audit | evidence | …"""

import ast
import functools
import os
import signal
import sys
from pathlib import Path

import click

from musota.errors import MusotaError, nearest_name
from musota.files import ROOT, as_path, sentence
from musota.plan.profiles import profiles
from musota.plan.registry import TUNED, find_experiment, registry

RESULTS = ROOT / "results"
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


def _literal(text: str):
    """A value from the command line: a Python literal if it is one, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _changes(context, parameter, assignments: tuple[str, ...]) -> dict:
    changes = {}
    for text in assignments:
        name, is_set, value = text.partition("=")
        if not is_set:
            raise MusotaError(f"--set takes FIELD=VALUE, for example epochs=50, not {text!r}.")
        changes[name.strip()] = _literal(value.strip())
    return changes


def _together(*options):
    """Several options as one decorator."""
    return lambda command: functools.reduce(lambda made, add: add(made), options[::-1], command)


profile_option = click.option("--profile", default="quick", help=f"auto, {', '.join(profiles)}.")
experiment_options = _together(
    profile_option,
    click.option("--corpus", default="auto", help=CORPUS_HELP),
    click.option("--seed", default=0),
    click.option("--fresh", is_flag=True, help="Train again what is already trained."),
    click.option("--save-to", default="", show_default="results/", help="Folder for results."),
)
changes_option = click.option(
    "--set", "changes", multiple=True, callback=_changes, help="FIELD=VALUE, after the profile."
)
place_options = _together(  # where the labels of recorded runs are sought
    click.option("--profile", default="quick", help="The folder of results/ to look in first."),
    click.option("--save-to", "results", default=RESULTS, show_default="results/", type=Place()),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def cli():
    """Train MU-SOTA and its dense twin, compare them, and report what was measured."""


@cli.command()
@experiment_options
@changes_option
@click.option("--only", help="Numbers of notebooks, for example 02,04.")
@click.option("-p", "parameters", nargs=2, multiple=True, help="A parameter: NAME VALUE.")
def run(only, parameters, **values):
    """Run the notebooks in order; then print the comparison, the verdict and the report's place.

    Stops at the first failure. The same command goes on from there: finished training runs are
    loaded, unfinished ones continued.
    """
    from musota.workbook.headless import chosen_notebooks, run_notebooks
    from musota.workbook.session import PARAMETERS, Workbook

    notebooks, own = chosen_notebooks(only), {}
    known = (*PARAMETERS, "runs")
    for name, text in parameters:
        if name not in known:
            raise nearest_name("notebook parameter", name, known)
        value = text if name in TEXTS else _literal(text)
        (own if name == "runs" else values)[name] = value
    run_notebooks(Workbook(**values), notebooks, values, own)


@cli.command(help=TRAIN_HELP)
@click.argument("experiment")
@experiment_options
@changes_option
@click.option("--continue-from", help="Another run's folder or label: start at its best weights.")
@click.option("--compile/--no-compile", default=None, show_default="in long runs on a GPU")
@click.option("--auto-remedy", is_flag=True, help="Let the plan's remedies apply themselves.")
@click.option("--device", show_default="the best one here", help="cpu, cuda or mps.")
@click.option("--precision", type=click.Choice(["no", "bf16", "fp16"]), show_default="what pays")
def train(experiment, profile, corpus, seed, fresh, save_to, changes, continue_from, **choices):
    from musota.workbook.evidence import find_runs
    from musota.workbook.session import Workbook

    if int(os.environ.get("RANK", 0)):  # of several processes one speaks
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if experiment not in TUNED:
        find_experiment(experiment)  # a wrong name is answered before the corpus is read
    book = Workbook(profile, corpus, seed, fresh, save_to, changes)
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
    """Compare recorded RUNs, each with the first: where they differ, table, verdicts, curves.

    A RUN is a run's folder, a label of results/PROFILE as tables have it (optimized,epochs=50,
    with -seed0 for one seed), or one of another folder there (study/tuned).
    """
    from musota.workbook import figures, tables
    from musota.workbook.answers import against_first
    from musota.workbook.evidence import chosen_runs
    from musota.workbook.style import save_figure

    chosen = chosen_runs(runs, results, profile)
    click.echo(f"{tables.differences_table(chosen.runs).to_string()}\n")
    shown = tables.comparison_table(chosen.runs).set_index("model").T
    click.echo(f"{shown.to_string()}\n{chosen.note}")
    found = {}
    for finding, interval in against_first(chosen.runs):
        click.echo(f"- {finding.sentence}")
        found[finding.rule] = interval
    drawn = {"curves": figures.curves(chosen.runs, chosen.rungs, reported=False)}
    if found:
        drawn["verdicts"] = figures.difference(found, "Against the first", figures.FIRST)
    (results / "compared").mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        path = results / "compared" / f"{name}.png"
        save_figure(figure, path, chosen.footer)
        click.echo(f"drawn: {path}")


@cli.command()
@click.argument("run")
@click.argument("file", type=Place(exists=True, dir_okay=False))
@place_options
def score(run, file, profile, results):
    """Score a text FILE (UTF-8) with the best weights of a RUN (as in `compare`): perplexity, bits
    per byte, and which tokens were surprising, as a table and a picture in the run's folder."""
    from musota.workbook.evidence import find_runs
    from musota.workbook.pictures import surprises
    from musota.workbook.style import save_figure

    found = find_runs(run, results, profile)[0]
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise MusotaError(f"{file} is not UTF-8: convert it, for example with iconv.") from None
    scored = found.load_model().score_text(text)
    told = "PPL {ppl:,.1f}, {bits_per_byte:.3f} bits per byte".format(**scored.attrs)
    click.echo(f"{found}\n{told}\n")
    click.echo(scored.nlargest(15, "bits").to_string(float_format="%.4g"))
    path = found.path / f"score-{file.stem}"
    scored.to_csv(f"{path}.csv", index_label="place")
    save_figure(surprises(scored), Path(f"{path}.png"), f"{file.name} by {found.name}")
    click.echo(f"\nEvery token: {path}.csv, {path}.png")


@cli.command()
@experiment_options
@click.option(
    "--seeds",
    default=3,
    type=click.IntRange(1, 100),
    help="How many; the grid has its own, a sweep takes the first.",
)
@click.option("--only", default="models,sweep,tuned,grid,path", help="Parts to do.")
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
    _ = book.ladder  # measured once, and in the report
    write_report(book.folder)
    book.deliver()
    click.echo(f"The report: {book.home / 'README.md'}")


@cli.command()
@click.argument("model", metavar="FILE.py:NAME")
@click.option("--vocab-size", default=512, help="Tokens to audit it with.")
@click.option("--max-seq-len", default=64, help="Tokens a sequence.")
@click.option("--arguments", default="{}", help="For NAME, as JSON: '{\"width\": 64}'.")
@click.option("--loss", help="The file's function loss(module, ids), if it has one.")
@click.option("--picture", type=Place(dir_okay=False), help="Draw what was found here.")
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
@click.option("--device", show_default="cuda if there is one", help="cpu or cuda.")
@click.option("--json", "file", type=Place(dir_okay=False), help="Write the numbers here.")
@click.option("--repeats", default=7, type=click.IntRange(1), help="Rounds.")
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
@click.option("--pack", is_flag=True, help="First pack run folders and probes into a few files.")
def report(folders, pack):
    """Write README.md and figures of results FOLDERS anew from their records [default: all].

    Without FOLDERS also the measured part of the workbook's own README.
    """
    from musota.workbook import pages, records
    from musota.workbook.results import COMMITTED

    packed, whole = RESULTS.glob(f"*/{records.SUMS}"), RESULTS.glob("*/*/config.json")
    found = {path.parent for path in packed} | {path.parent.parent for path in whole}
    for folder in folders or [*sorted(found), *RESULTS.glob("bench")]:
        if folder.name == "bench":
            click.echo(pages.write_bench_report(folder))
            continue
        if pack:
            records.pack(folder)
        click.echo(pages.write_report(folder))
    if not folders:
        kept = [path for name in COMMITTED if (path := RESULTS / name).exists()]
        pages.write_front_page(ROOT / "README.md", kept)
        click.echo(ROOT / "README.md")


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's: as Ctrl-C
    try:
        cli()
    except (MusotaError, OSError) as error:
        click.echo(f"Error: {sentence(error)}", err=True)
        sys.exit(1)
