"""The command line: musota run | train | compare | score | audit | evidence | bench | report.

Commands import what they need when they run, so that help and error messages appear at once.
"""

import ast
import contextlib
import functools
import os
import signal
import sys

import click

from musota.data.sources import find_text
from musota.errors import MusotaError, find_named
from musota.files import as_path, sentence
from musota.lab.profiles import check_changes, find_profile
from musota.own import find_source
from musota.registry import REGISTRY
from musota.workbook.naming import checkout, find_folders, folder_of, is_module, results_root

os.environ["MPLBACKEND"] = "Agg"  # one inherited from a notebook would fail in a script
PARTS = ("models", "sweep", "tuned", "grid")  # of `musota evidence`
TEXTS = ("profile", "corpus", "save_to", "log_with")  # parameters that are always text
PROFILE_HELP = (
    "Size of a run: full (the plan's), study, quick or tiny; auto is full on a GPU, else quick."
)
CORPUS_HELP = (
    "auto, wikitext-2, wikitext-2-raw, wikitext-103, wikitext-103-raw, python-docs, hf:NAME or "
    "hf:NAME:CONFIG (a dataset of the Hugging Face hub), a folder with train.txt, valid.txt and "
    "test.txt, or one text; files may be .gz."
)


def _literal(text: str):
    """A value from the command line: a Python literal if it is one, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text


def _changes(context, parameter, assignments: tuple[str, ...]) -> dict:
    changes = {}
    for text in assignments:
        name, is_set, value = text.partition("=")
        if not is_set:
            raise MusotaError(f"--set takes FIELD=VALUE, for example epochs=50, not {text!r}.")
        changes[name.strip()] = _literal(value.strip())
    return check_changes(changes)


def _profile(context, parameter, name: str) -> str:
    find_profile(name)  # raises MusotaError for an unknown one
    return name


def _corpus(context, parameter, name: str) -> str:
    find_text(name, os.environ.get("MUSOTA_DATA_DIR"))  # raises MusotaError for an unknown one
    return name


def _together(*options):
    """Several options as one decorator."""
    return lambda command: functools.reduce(lambda made, add: add(made), options[::-1], command)


experiment_options = _together(
    click.option("--profile", default="quick", callback=_profile, help=PROFILE_HELP),
    click.option("--corpus", default="auto", callback=_corpus, help=CORPUS_HELP),
    click.option("--seed", default=0, type=click.IntRange(0), help="Of all random numbers."),
    click.option("--fresh", is_flag=True, help="Train again what is already trained."),
    click.option(
        "--save-to", default="", show_default=False, help="Also copy the results to this folder."
    ),
)
changes_option = click.option(
    "--set", "changes", multiple=True, callback=_changes, help="FIELD=VALUE; no profile scales it."
)
place_options = _together(  # where recorded runs are looked for
    click.option("--profile", default="quick", help="Profile of the runs, or folder in results."),
    click.option(
        "--results",
        "--save-to",
        "results",
        default=results_root,
        show_default="results",
        type=as_path,
        metavar="FOLDER",
        help="The folder that holds the results.",
    ),
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def cli():
    """Train MU-SOTA and its parameter-matched transformer, compare them, report the results."""


@cli.command(epilog="Example: musota run --profile quick --only 01,02,03,04")
@experiment_options
@changes_option
@click.option("--only", help="Numbers of notebooks, for example 02,04.")
@click.option("-p", "parameters", nargs=2, multiple=True, help="A notebook parameter: NAME VALUE.")
def run(only, parameters, **values):
    """Run the notebooks in order, then print their headlines.

    Stops at the first failure. Repeat the command to continue: finished runs are loaded, unfinished
    ones resumed.
    """
    from musota.workbook.run_notebooks import chosen_notebooks, run_notebooks

    notebooks, runs = chosen_notebooks(checkout(), only), []
    values["log_with"] = ""
    for name, text in parameters:
        if name == "runs":  # one run, or a list
            value = _literal(text)
            runs += value if isinstance(value, list) else [text]
        else:
            find_named("notebook parameter", name, [*values, "runs"])
            values[name] = text if name in TEXTS else _literal(text)
    run_notebooks(notebooks, values, runs)


@cli.command(epilog="Example: musota train optimized --set epochs=50 --set learning_rate=0.001")
@click.argument("experiment")
@experiment_options
@changes_option
@click.option("--compile/--no-compile", default=None, show_default="in long runs on a GPU")
@click.option("--device", show_default="the best one here", help="cpu or cuda.")
@click.option("--precision", type=click.Choice(["no", "bf16", "fp16"]), show_default="by device")
@click.option("--log-with", multiple=True, metavar="NAME", help="tensorboard, wandb, trackio, …")
def train(experiment, profile, corpus, seed, fresh, save_to, changes, **options):
    """Train an EXPERIMENT, or a module FILE.py:NAME.

    EXPERIMENT: original, optimized, baseline, simplified, redesigned. EXPERIMENT_twin and
    FILE.py:NAME_twin are their parameter-matched transformers; grid/NAME and sweep/NAME are runs of
    `musota evidence --list`.
    """
    if experiment.startswith(("grid/", "sweep/")):  # a row of a table
        if changes or save_to or any(value not in (None, ()) for value in options.values()):
            raise MusotaError(f"{experiment} takes --profile, --corpus, --seed and --fresh alone.")
        from musota.workbook.evidence import train_row

        where = {"profile": profile, "corpus": corpus, "fresh": fresh}
        return train_row(experiment, seed, **where)
    if is_module(experiment):
        find_source(experiment.removesuffix("_twin"))
    elif experiment not in REGISTRY:
        find_named("experiment", experiment.removesuffix("_twin"), REGISTRY)
    from musota.workbook.notebook import Interrupted, Workbook
    from musota.workbook.results import label

    if int(os.environ.get("RANK", 0)):  # of several processes one prints
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    book = Workbook(profile, corpus, seed, fresh, save_to, changes, options.pop("log_with"))
    try:
        run = book.train(experiment, **options)
        reached = f": valid PPL {run.summary['ppl']:,.1f}" if run.summary else ""
        click.echo(f"{label(run)}{reached}, in {book.place(run.path)}")
    except Interrupted as interrupted:
        click.echo(interrupted, err=True)
        sys.exit(130)


@cli.command(epilog="Example: musota compare optimized optimized,epochs=50")
@place_options
@click.argument("runs", nargs=-1, required=True, metavar="RUN RUN ...")
def compare(runs, profile, results):
    """Compare recorded RUNs, each with the first one.

    A RUN is a folder, or the name or title of recorded runs: optimized (all seeds), optimized-seed0
    (one seed), optimized,epochs=50 (changed), study/optimized (another profile).
    """
    profile = folder_of(results, profile)
    for name in runs:  # a wrong one is reported before torch is imported
        find_folders(name, results, profile)
    from musota.lab.verdicts import compare as compared
    from musota.workbook import plots, tables
    from musota.workbook import results as recorded
    from musota.workbook.style import save_figure

    found = (run for name in runs for run in recorded.find_runs(name, results, profile))
    first, *others = groups = [*recorded.group_runs(found).values()]
    recorded.tell_apart(chosen := [run for group in groups for run in group])
    if not others:
        raise MusotaError("compare needs two models or more that differ in more than the seed.")
    click.echo(f"{tables.differences_table(chosen).to_string()}\n")
    click.echo(f"{tables.runs_table(chosen).T.to_string(header=False)}\n")
    ngrams = recorded.ngrams_path(first[0].path.parent, first[0].fingerprint)
    alike = len({run.valid_text for run in chosen}) == 1
    (results / "compared").mkdir(parents=True, exist_ok=True)
    path = results / "compared" / "curves.png"
    about = recorded.footer_of(first[0]) if alike else ""
    save_figure(plots.curves(chosen, recorded.read_ngrams(ngrams)), path, about)
    click.echo(f"Curves: {path}")
    failed = False
    for other in others:
        try:
            click.echo(f"- {compared(other, first)}")
        except MusotaError as error:
            click.echo(f"- {error}", err=True)
            failed = True
    sys.exit(failed)


@cli.command(epilog="Example: musota score optimized my_text.txt")
@place_options
@click.argument("run")
@click.argument("file", type=as_path)
def score(run, file, profile, results):
    """Score a text FILE with a recorded RUN (as in `compare`).

    Prints perplexity, bits per byte and the least likely tokens, and writes a table of all tokens
    to the run's folder. The first token is scored too, as if it followed a line end."""
    profile = folder_of(results, profile)
    find_folders(run, results, profile)
    from musota.data.sources import read_text
    from musota.workbook.results import find_runs
    from musota.workbook.tables import number

    seeds = find_runs(run, results, profile)
    found = next((seed for seed in seeds if seed.has_model), seeds[0])
    scored = found.load_model().score_text(read_text(file))
    ppl, per_byte = number(scored.attrs["ppl"]), scored.attrs["bits_per_byte"]
    click.echo(f"{found}\nPPL {ppl}, {per_byte:.3f} bits per byte")
    click.echo(f"\n{scored.nlargest(15, 'bits').to_string(float_format='%.4g')}")
    scored.to_csv(path := found.path / f"score-{file.stem}.csv", index_label="place")
    click.echo(f"\nEvery token: {path}")


@cli.command(epilog="Example: musota audit my_model.py:MyModel --json audit.json")
@click.argument("model", metavar="FILE.py:NAME")
@click.option("--vocab-size", default=512, help="Vocabulary size of the audit.")
@click.option("--max-seq-len", default=64, help="Tokens per sequence.")
@click.option("--loss", help="Name of a function loss(module, ids) in FILE.py.")
@click.option("--picture", type=as_path, help="Save a figure of the findings here, as PNG.")
@click.option("--json", "record", type=as_path, help="Save the findings here.")
def audit(model, vocab_size, max_seq_len, loss, picture, record):
    """Check that your own model uses no later tokens. Runs FILE.py, calls NAME to make the model.

    Exit status: 0 if the model is honest, 1 if it is not, 2 if it could not be audited. NAME is
    called with vocab_size and max_seq_len if it takes them.
    """
    from musota.files import write_json
    from musota.own import load_module, load_objects

    data = {"honest": None, "findings": []}
    data |= {"model": model, "vocab_size": vocab_size, "max_seq_len": max_seq_len}
    try:
        if record:
            write_json(record, data)  # as it stays if the model cannot be audited
        make, *given = load_objects(model, *filter(None, [loss]))  # a wrong name ends here
        import torch

        torch.manual_seed(0)
        module = load_module(model, vocab_size, max_seq_len, make)
        from musota.lab.audit import audit as audited
        from musota.workbook.style import save_figure

        found = audited(module, vocab_size, max_seq_len, *given)
        click.echo(f"{found}")
        if picture:
            save_figure(found.figure(), picture, f"measured: {model}, not trained")
            click.echo(f"Figure: {picture}")
        if record:
            fields = ("question", "decision", "value", "unit", "reason", "next_step")
            data["findings"] = [{n: getattr(one, n) for n in fields} for one in found.findings]
            data["honest"] = (True, False, None)[found.status]
            write_json(record, data)
        status = found.status
    except BaseException as error:  # also one that ends Python, raised by FILE.py
        expected = isinstance(error, (MusotaError, OSError))
        reason = sentence(error) if expected else f"{model} ended with {error!r}."
        click.echo(f"Error: {reason}", err=True)
        status = 2
    sys.exit(status)


@cli.command(epilog="Example: musota evidence --profile study --corpus wikitext-2 --list")
@experiment_options
@click.option("--seeds", default=3, type=click.IntRange(1, 100), help="Seeds of models and tuned.")
@click.option("--only", default=",".join(PARTS), help="Parts to run.")
@click.option("--list", "listed", is_flag=True, help="Print the commands of the runs instead.")
def evidence(seeds, only, listed, **parameters):
    """Run the plan's experiments with several seeds.

    models: every experiment · sweep: learning rates of MU-SOTA and its matched transformer · tuned:
    both at their best rate · grid: the root causes. Repeat the command to continue.

    With --list, a `musota train` command for each run that is left, for a cluster or GNU parallel.
    """
    parts = [find_named("part", part.strip(), PARTS) for part in only.split(",")]
    from musota.workbook.evidence import carry_out, missing
    from musota.workbook.report import write_report

    if listed:
        if parameters["save_to"] or parameters["fresh"]:
            raise MusotaError("--list needs one folder: leave out --save-to and --fresh.")
        with contextlib.redirect_stdout(sys.stderr):
            commands = [*missing(parts, seeds, **parameters)]
        return click.echo("\n".join(commands), nl=bool(commands))

    book = carry_out(parts, seeds, **parameters)
    write_report(book.folder)
    book.save()
    return click.echo(f"The report: {book.home / 'report.html'}")


@cli.command(epilog="Example: musota bench --repeats 3")
@click.option("--device", show_default="cuda if there is one", help="cpu or cuda.")
@click.option("--repeats", default=7, type=click.IntRange(1), help="Number of steps.")
def bench(device, repeats):
    """Time our training step against the reference.

    About five minutes on two CPU cores.
    """
    from musota.workbook.bench import run_bench

    click.echo(run_bench(device, repeats=repeats).T.to_string(float_format="{:,.4g}".format))


@cli.command(epilog="Example: musota report results/quick")
@click.argument("folders", nargs=-1, type=click.Path(exists=True, file_okay=False))
def report(folders):
    """Write the pages and figures of results FOLDERS.

    Default: all folders in results, results/redesign/path.png and the table in README.md.
    """
    from musota.workbook.report import write_front_page, write_path_figure, write_report

    root = results_root()
    tables = [*root.glob("*/grid.csv"), *root.glob("*/sweep.csv")]
    found = {path.parents[1] for path in root.glob("*/*/config.json")} | {t.parent for t in tables}
    for folder in folders or sorted(found):
        click.echo(write_report(folder))
    if not folders and (repository := checkout()):
        click.echo(write_path_figure(root / "redesign"))
        click.echo(write_front_page(repository / "README.md", root))


def main() -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's: as Ctrl-C
    try:
        cli(prog_name="musota")
    except (MusotaError, OSError) as error:
        click.echo(f"Error: {sentence(error)}", err=True)
        sys.exit(1)
