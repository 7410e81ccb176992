"""What only matters inside a notebook: verdicts on display, errors, injected parameters."""

import ast
from collections.abc import Iterable
from itertools import pairwise

from IPython import get_ipython
from IPython.display import Markdown, display

from musota.errors import MusotaError, nearest_name
from musota.files import sentence
from musota.lab.verdicts import Verdict


def show_verdicts(verdicts: Verdict | Iterable[Verdict]) -> None:
    """Show verdicts as a list, question and decision in bold."""
    lines = []
    for verdict in [verdicts] if isinstance(verdicts, Verdict) else verdicts:
        answer = f"{verdict.question} {verdict.decision[:1].upper()}{verdict.decision[1:]}"
        lines.append(f"- **{answer}**{str(verdict).removeprefix(answer)}")
    display(Markdown("\n".join(lines)))


def show_errors_as_sentences() -> None:
    """In a notebook, show a MusotaError, or an error of the system, without a traceback."""

    def show(shell, kind, error, _, tb_offset=None):
        shell._showtraceback(kind, error, [f"{kind.__name__}: {sentence(error)}"])

    if shell := get_ipython():
        shell.set_custom_exc((MusotaError, OSError), show)


def refuse_unknown_parameters(parameters: Iterable[str]) -> None:
    """Raises MusotaError for a parameter that papermill injected and the notebook does not have;
    papermill only warns. `parameters`: some that every notebook has."""
    shell = get_ipython()
    for own, injected in pairwise(shell.user_ns["In"] if shell else ()):
        known = _assigned(own) if injected.startswith("# Parameters\n") else set()
        if known & {*parameters}:  # the parameters cell, after which papermill adds its own
            for name in _assigned(injected) - known:
                raise nearest_name("notebook parameter", name, sorted(known))


def _assigned(cell: str) -> set[str]:
    """The names that a cell assigns, in any form."""
    names = (node for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, ast.Store)}
