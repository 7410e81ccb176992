"""What a notebook shows: tables, verdicts, its headline card; errors without tracebacks."""

import html
import math
from collections.abc import Iterable

import pandas as pd
from IPython import get_ipython
from IPython.display import Markdown, display

from musota.errors import MusotaError
from musota.files import sentence
from musota.lab.verdicts import NATS, PPL, Verdict, measured
from musota.workbook.style import BLUE, GREEN, RED
from musota.workbook.tables import alignments

SIGNS = {True: ("✓", GREEN), False: ("✗", RED), None: ("?", BLUE)}
CARD = (
    '<div style="border:1px solid #8886; border-left:6px solid {colour}; border-radius:6px; '
    'padding:0.6em 1.2em; max-width:46em; font-size:1.05em">'
    '<span style="font-size:2.4em; font-weight:700; line-height:1.3"><span style="color:{colour}">'
    "{sign}</span> {number}</span> {unit}"
    '<p style="margin:0.2em 0"><strong>{answer}</strong></p>{step}{details}</div>'
)


def show_table(table: pd.DataFrame) -> None:
    """Show a table with text on the left, numbers on the right and the best values in bold. Row
    numbers are hidden."""
    shown = table if table.columns.is_unique and table.index.is_unique else table.reset_index()
    styled = shown.style.format(escape="html")
    if isinstance(shown.index, pd.RangeIndex):
        styled = styled.hide(axis="index")
    sides = zip(shown.columns, alignments(shown), strict=True)
    look = {
        column: [{"selector": "th, td", "props": [("text-align", side)]}] for column, side in sides
    }
    best = [
        (shown.index[row], shown.columns[column]) for row, column in shown.attrs.get("best", [])
    ]
    for row, column in best:
        styled = styled.set_properties(subset=([row], [column]), **{"font-weight": "bold"})
    display(styled.set_table_styles(look))


def show_verdicts(verdicts: Iterable[Verdict]) -> None:
    """Show verdicts as a list, question and decision in bold."""
    display(Markdown("\n".join(f"- **{v.answer}** {v.explanation}" for v in verdicts)))


def show_card(verdict: Verdict, details: Iterable[Verdict] = ()) -> None:
    """Show the headline card of a notebook: the verdict as one large number, a sentence and the
    next step; what was measured, and further verdicts, folded."""
    (sign, colour), (number, unit) = SIGNS[verdict.good], large_number(verdict)
    step = f"Next: {html.escape(verdict.next_step)}." if verdict.next_step else ""
    rows = "".join(f"<li>{html.escape(str(each))}</li>" for each in (verdict, *details))
    shown = {
        "text/plain": " ".join(
            filter(None, (sign, number, f"{unit}:" if unit else "", verdict.answer))
        ),
        "text/html": CARD.format(
            colour=colour,
            sign=sign,
            number=number,
            unit=unit,
            answer=html.escape(verdict.answer),
            step=step,
            details=f"<details><summary>What was measured</summary><ul>{rows}</ul></details>",
        ),
    }
    display(shown, raw=True)


def large_number(verdict: Verdict) -> tuple[str, str]:
    """The value of a verdict as one large number, and what it is: a difference of losses is given
    as one of perplexities, in percent."""
    if verdict.value is None:
        return "", ""
    if verdict.unit == NATS:
        change = f"{math.expm1(verdict.value):+.0%}".replace("-", "−")
        return change, "valid perplexity"
    if verdict.unit == PPL:
        return f"{verdict.value:,.0f}", "valid perplexity"
    return measured(verdict), ""


def show_errors_as_sentences() -> None:
    """In a notebook, show a MusotaError, or an error of the system, without a traceback."""

    def show(shell, kind, error, _, tb_offset=None):
        shell._showtraceback(kind, error, [f"{kind.__name__}: {sentence(error)}"])

    if shell := get_ipython():
        shell.set_custom_exc((MusotaError, OSError), show)
