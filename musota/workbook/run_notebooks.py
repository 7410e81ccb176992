"""Runs the notebooks through papermill, in order, and prints what they trained."""

import io
import os
import time
from collections.abc import Sequence
from pathlib import Path

import click
import nbformat

from musota.errors import MusotaError, find_named
from musota.files import METRICS

COMPARES_RUNS, OWN_MODULE = "04_compare", "08_your_model"


def chosen_notebooks(repository: Path | None, only: str | None) -> list[Path]:
    """The notebooks of a repository, or those with the numbers `only`, such as "02,04"."""
    if not repository:
        raise MusotaError(
            "There are no notebooks here: clone the repository and run this inside it, or use "
            "`musota train`, which needs none."
        )
    found = {path.name[:2]: path for path in sorted(repository.glob("notebooks/[0-9]*.ipynb"))}
    wanted = [part.strip().zfill(2) for part in only.split(",")] if only is not None else [*found]
    return [find_named("notebook number", number, found) for number in sorted({*wanted})]


def run_notebooks(notebooks: Sequence[Path], values: dict, runs: Sequence[str]) -> None:
    """Execute `notebooks` with the parameters `values`, and `runs` where runs are compared. Prints
    their headlines, a table of the runs trained, and where the report is."""
    from musota.workbook.experiments import MODULE_FIELDS
    from musota.workbook.notebook import Workbook
    from musota.workbook.report import write_report
    from musota.workbook.tables import runs_table

    book, started = Workbook(**values), time.time()
    executed = book.home / "executed"
    executed.mkdir(exist_ok=True)
    for place, notebook in enumerate(notebooks, start=1):
        given = {**values}
        if notebook.stem == COMPARES_RUNS and runs:
            given["runs"] = list(runs)
        if notebook.stem == OWN_MODULE:  # which has sizes of its own
            given["changes"] = {f: v for f, v in book.changes.items() if f in MODULE_FIELDS}
        execute(notebook, executed / notebook.name, given, f"[{place}/{len(notebooks)}]")
    write_report(book.folder)
    book.save()
    click.echo()
    for notebook in notebooks:
        for text in headlines(executed / notebook.name):
            click.echo(f"{notebook.stem[:2]}  {text}")
    new = [r for r in book.results.runs if (r.path / METRICS).stat().st_mtime >= started]
    columns = ["model", "epochs", "minutes", "valid PPL", "accuracy (%)"]
    table = runs_table(new)[columns].to_string(index=False)
    click.echo(f"\n{table if new else 'No model was left to train.'}")
    minutes = f"{(time.time() - started) / 60:.1f}"
    click.echo(f"\nDone in {minutes} minutes. The report: {book.home / 'report.html'}")


def headlines(executed: Path) -> list[str]:
    """The texts of the headline cards of an executed notebook."""
    cells = nbformat.read(executed, as_version=4).cells
    outputs = [output for cell in cells if cell.id == "headline" for output in cell.outputs]
    shown = [output.data for output in outputs if output.output_type == "display_data"]
    return [data["text/plain"] for data in shown if "text/html" in data]


def execute(notebook: Path, output: Path, parameters: dict, prefix: str) -> None:
    """Run one notebook through papermill, with its progress lines. Raises MusotaError where it
    stops."""
    import papermill

    from musota.workbook.panel import HEADLESS

    os.environ[HEADLESS] = "1"  # inherited by the kernel
    started, relay = time.perf_counter(), _Relay()
    click.echo(f"{prefix} {notebook.stem} …")
    how = {"kernel_name": "python3", "kernel_manager_class": _this_python(), "cwd": os.getcwd()}
    how |= {"stdout_file": relay, "stderr_file": relay, "log_output": False, "progress_bar": False}
    how["language"] = "python"  # a notebook may have lost its metadata
    how |= {"extra_arguments": ["--log-level=CRITICAL"], "iopub_timeout": 60, "start_timeout": 120}
    try:
        papermill.execute_notebook(notebook, output, parameters, **how)
        tidy(output)
        return click.echo(f"{prefix} {notebook.stem} done in {time.perf_counter() - started:.0f} s")
    except KeyboardInterrupt:
        stopped = "was stopped."
    except papermill.PapermillExecutionError as error:
        stopped = f"stopped in cell {error.cell_index}: {error.ename}: {error.evalue}\n"
        stopped += f"The executed notebook is {output}."
    except (RuntimeError, TimeoutError) as error:
        stopped = f"stopped: its kernel died or does not answer ({error}), possibly out of memory."
    raise MusotaError(f"{notebook.stem} {stopped} Repeat the command to continue.")


def tidy(executed: Path) -> None:
    """Remove paths of this machine (papermill's notes), times and the state of widgets from an
    executed notebook."""
    book = nbformat.read(executed, as_version=4)
    for part in (book, *book.cells):
        for name in ("papermill", "execution", "widgets"):
            part.metadata.pop(name, None)
    nbformat.write(book, executed)


def _this_python():
    """A kernel manager that starts this very Python, whatever is installed under that name."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisPython(AsyncKernelManager):
        kernel_spec = property(lambda _: KernelSpec(**get_kernel_dict()))

    return ThisPython


class _Relay(io.TextIOBase):
    """A file that passes the progress lines of a notebook on to this command's output."""

    def write(self, text: str) -> None:
        for line in text.splitlines():
            if "tokens/s" in line or ", seed " in line:  # of a run, or of one that has ended
                click.echo(f"      {line.strip()}")
