"""The notebooks without a front end: through papermill, in order, with their progress told."""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import click

from musota.errors import MusotaError, nearest_name
from musota.files import ROOT
from musota.plan.architectures import OwnConfig
from musota.plan.config import TrainConfig

TAKES_RUNS, OWN_MODEL = "04_compare", "08_your_model"
OWN_FIELDS = {f.name for kind in (OwnConfig, TrainConfig) for f in dataclasses.fields(kind)}


def chosen_notebooks(only: str | None) -> list[Path]:
    found = {path.name[:2]: path for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))}
    wanted = [part.strip().zfill(2) for part in only.split(",")] if only else [*found]
    for number in wanted:
        if number not in found:
            raise nearest_name("notebook number", number, found)
    return [found[number] for number in sorted(set(wanted))]


def run_notebooks(book, notebooks: Sequence[Path], values: dict, own: dict) -> None:
    """Execute `notebooks` with the parameters `values`, and `own` where runs are compared; then
    tell the comparison, the verdicts and where the report is."""
    from musota.workbook.answers import rule_lines
    from musota.workbook.evidence import read_evidence
    from musota.workbook.pages import write_report
    from musota.workbook.tables import comparison_table

    executed = book.home / "executed"
    executed.mkdir(exist_ok=True)
    started = time.perf_counter()
    for number, notebook in enumerate(notebooks, start=1):
        output = executed / f"{book.named(notebook.stem)}.ipynb"
        given = values | (own if notebook.stem == TAKES_RUNS else {})
        if notebook.stem == OWN_MODEL:  # which has none of the other models' sizes
            given["changes"] = {f: v for f, v in book.changes.items() if f in OWN_FIELDS}
        _execute(notebook, output, given, f"[{number}/{len(notebooks)}]")
    write_report(book.folder)
    evidence = read_evidence(book.folder)
    if evidence.runs:
        shown = comparison_table(evidence.runs).set_index("model").T  # a run a column
        click.echo(f"\n{shown.to_string()}\n")
    compared = [finding.sentence for finding, _ in evidence.compared.values()]
    for line in compared + rule_lines(evidence):
        click.echo(f"- {line}")
    book.deliver()
    minutes = (time.perf_counter() - started) / 60
    click.echo(f"\nDone in {minutes:.1f} minutes. The report: {book.home / 'README.md'}")


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
