"""The command line: python -m musota run | train | evidence | bench | report."""

from __future__ import annotations

import ast
import os
import sys
import time
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
    f"Or {', '.join(TUNED)}: at the best rate of the recorded sweeps."
)


class Place(click.Path):
    """A path; `~` is expanded, which a shell does not do everywhere."""

    def convert(self, value, parameter, context):
        return Path(super().convert(as_path(value), parameter, context))


def experiment_options(command):
    """The options of every command that trains."""
    for option in reversed(
        [
            click.option(
                "--profile",
                default="quick",
                show_default=True,
                help=f"auto, {', '.join(profiles)}.",
            ),
            click.option(
                "--corpus",
                default="auto",
                show_default=True,
                help="auto, wikitext-2, wikitext-2-raw, wikitext-103, wikitext-103-raw, "
                "python-docs, or a folder with train.txt, valid.txt and test.txt.",
            ),
            click.option("--seed", default=0, show_default=True),
            click.option("--fresh", is_flag=True, help="Train again what is already trained."),
            click.option("--save-to", default="", help="Folder for results [default: results/]."),
        ]
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def cli():
    """Train MU-SOTA and its dense twin, compare them, and report what was measured."""


@cli.command()
@experiment_options
@click.option("--only", default="", help="Numbers of notebooks, for example 02,04.")
@click.option(
    "-p", "parameters", nargs=2, multiple=True, metavar="NAME VALUE",
    help="A parameter of the notebooks; may be repeated.",
)  # fmt: skip
def run(only, parameters, **values):
    """Run the notebooks in order; then print the comparison, the verdict and the report's place.

    Stops at the first failure. The same command goes on from there: finished training runs are
    loaded, unfinished ones continued.
    """
    from musota.workbook.session import PARAMETERS, Workbook

    for name, text in parameters:
        if name not in PARAMETERS:
            raise nearest_name("notebook parameter", name, PARAMETERS)
        values[name] = text if name in TEXTS else _literal(text)
    notebooks = _chosen_notebooks(only)
    book = Workbook(**values)  # answers bad parameters before any kernel starts
    executed = book.home / "executed"
    executed.mkdir(exist_ok=True)
    started = time.perf_counter()
    for number, notebook in enumerate(notebooks, start=1):
        _execute(notebook, executed / notebook.name, values, f"[{number}/{len(notebooks)}]")
    _tell_end(book, time.perf_counter() - started)


def _chosen_notebooks(only: str) -> list[Path]:
    found = {
        path.name[:2]: path for path in sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    }
    if not only:
        return list(found.values())
    wanted = [part.strip().zfill(2) for part in only.split(",")]
    for number in wanted:
        if number not in found:
            raise nearest_name("notebook number", number, found)
    return [found[number] for number in sorted(set(wanted))]


def _execute(notebook: Path, output: Path, parameters: dict, prefix: str) -> None:
    """One notebook through papermill, its progress relayed line by line."""
    import papermill

    os.environ["MUSOTA_HEADLESS"] = "1"  # inherited by the kernel
    started = time.perf_counter()
    click.echo(f"{prefix} {notebook.stem} …")
    relay = _Relay()
    try:
        papermill.execute_notebook(
            notebook,
            output,
            parameters,
            kernel_name="python3",
            kernel_manager_class=_this_python(),
            cwd=os.getcwd(),
            progress_bar=False,
            log_output=False,
            stdout_file=relay,
            stderr_file=relay,
            iopub_timeout=60,
            extra_arguments=["--log-level=ERROR"],
            start_timeout=120,
        )
    except papermill.PapermillExecutionError as error:
        raise MusotaError(
            f"{notebook.stem} stopped in cell {error.cell_index}: {error.ename}: {error.evalue}\n"
            f"The executed notebook is {output}. The same command goes on from here."
        ) from None
    except (RuntimeError, TimeoutError) as error:
        raise MusotaError(
            f"{notebook.stem}: its kernel died or does not answer, perhaps for want of memory "
            f"({error}). The same command goes on from here."
        ) from None
    click.echo(f"{prefix} {notebook.stem} done in {time.perf_counter() - started:.0f} s")


def _this_python():
    """What starts a kernel of this very Python, whatever is installed here under that name."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisPython(AsyncKernelManager):
        kernel_spec = property(lambda _: KernelSpec(**get_kernel_dict()))

    return ThisPython


class _Relay:
    """Passes the progress lines of a notebook's output on to this command's own output."""

    def write(self, text: str) -> None:
        for line in text.splitlines():
            if "tokens/s" in line:
                click.echo(f"      {line.strip()}")

    def flush(self) -> None:
        sys.stdout.flush()


def _tell_end(book, seconds: float) -> None:
    from musota.workbook.evidence import read_evidence, verdict_lines
    from musota.workbook.pages import write_report
    from musota.workbook.tables import comparison_table

    write_report(book.folder)
    evidence = read_evidence(book.folder)
    if evidence.runs:
        columns = ["model", "seed", "parameters", "valid PPL", "valid word PPL", "valid bits/byte"]
        columns.append("valid accuracy")
        click.echo("\n" + comparison_table(evidence.runs)[columns].to_string(index=False) + "\n")
    for line in verdict_lines(evidence):
        click.echo(f"- {line}")
    book.deliver()
    click.echo(f"\nDone in {seconds / 60:.1f} minutes. The report: {book.home / 'README.md'}")


@cli.command(help=TRAIN_HELP)
@click.argument("experiment")
@experiment_options
@click.option(
    "--compile/--no-compile",
    default=None,
    help="Use torch.compile [default: in long runs on a GPU].",
)
@click.option("--auto-remedy", is_flag=True, help="Let the plan's remedies apply themselves.")
@click.option("--device", default=None, help="cpu, cuda or mps [default: the best one here].")
def train(experiment, compile, auto_remedy, device, **parameters):
    from musota.workbook.session import Workbook

    if int(os.environ.get("RANK", 0)):  # of several processes one speaks
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if experiment not in TUNED:
        find_experiment(experiment)  # a wrong name is answered before the corpus is read
    how = {"compile": compile, "auto_remedy": auto_remedy, "device": device}
    finished = Workbook(**parameters).train(experiment, **how)
    click.echo(f"{finished}")
    if not finished.finished:
        sys.exit(130)


@cli.command()
@experiment_options
@click.option(
    "--seeds", default=3, show_default=True, help="How many, from --seed on.",
    type=click.IntRange(1, 100),
)  # fmt: skip
@click.option("--only", default="models,sweep,tuned,grid", show_default=True, help="Parts to do.")
def evidence(seeds, only, **parameters):
    """Carry the plan out with several seeds, then write the report.

    The five models; both large ones over a sweep of learning rates; both again at their own best
    rate (tuned); the root-cause grid. The same command goes on where it was stopped.
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
@click.option("--device", default=None, help="cpu or cuda [default: cuda if there is one].")
@click.option("--json", "file", type=Place(dir_okay=False), help="Write the numbers here.")
@click.option(
    "--repeats", default=7, show_default=True, help="Rounds in which all take turns.",
    type=click.IntRange(1, 1000),
)  # fmt: skip
@click.option("--scaling/--no-scaling", default=True, help="Also other shapes.  [default: yes]")
def bench(device, file, repeats, scaling):
    """Measure our training step against the literal version of the same model on this machine.

    About a quarter of an hour on two CPU cores, five minutes without the scaling part.
    """
    from musota.files import write_json
    from musota.workbook.bench import SCALING, run_bench
    from musota.workbook.tables import bench_table, scaling_table

    if file:  # a folder that cannot be made is told before the minutes, not after
        file.parent.mkdir(parents=True, exist_ok=True)
    axes = SCALING if scaling else {}
    result = run_bench(device, repeats=repeats, scaling=axes, say=lambda line: click.echo(line))
    if file:
        write_json(file, result)
    click.echo("\n" + bench_table(result).to_string(index=False))
    for kind, difference in result["agreement"].items():
        click.echo(f"{kind}: ours and literal differ by {difference:.1e} in the loss, 20 steps")
    if scaling:
        click.echo("\n" + scaling_table(result).to_string(index=False))


@cli.command()
@click.argument("folders", nargs=-1, type=Place(exists=True, file_okay=False))
@click.option("--pack", is_flag=True, help="First pack run folders and probes into a few files.")
def report(folders, pack):
    """Write README.md and figures of results FOLDERS anew from their records [default: all].

    Without FOLDERS also the measured part of the workbook's own README.
    """
    from musota.workbook import pages, records
    from musota.workbook.session import COMMITTED

    everything = not folders
    if everything:
        found = [
            *(ROOT / "results").glob("*/SHA256SUMS"),
            *(ROOT / "results").glob("*/*/config.json"),
        ]
        folders = {p.parent if p.name == "SHA256SUMS" else p.parent.parent for p in found}
        folders = [*sorted(folders), *(ROOT / "results").glob("bench")]
    for folder in folders:
        is_bench = folder.name == "bench"
        if pack and not is_bench:
            records.pack(folder)
        click.echo(f"{(pages.write_bench_report if is_bench else pages.write_report)(folder)}")
    if everything:
        kept = [path for name in COMMITTED if (path := ROOT / "results" / name).exists()]
        pages.write_front_page(ROOT / "README.md", kept)
        click.echo(f"{ROOT / 'README.md'}")


def _literal(text: str):
    """A value from the command line: a Python literal if it is one, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main() -> None:
    try:
        cli()
    except (MusotaError, OSError) as error:
        click.echo(f"Error: {sentence(error)}", err=True)
        sys.exit(1)
