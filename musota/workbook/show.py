"""What a notebook shows: tables, verdicts, its headline card; errors without tracebacks."""

import math
from collections.abc import Iterable

import pandas as pd
from IPython import get_ipython
from IPython.display import Markdown, display
from jinja2 import Environment

from musota.errors import MusotaError
from musota.files import sentence
from musota.lab.verdicts import NATS, PPL, Verdict, measured
from musota.workbook.style import BLUE, GREEN, RED
from musota.workbook.tables import escaped, markdown, number

SIGNS = {True: ("✓", GREEN), False: ("✗", RED), None: ("?", BLUE)}  # by Verdict.good
TIE = ("=", BLUE)
CARD = """
<div style="border:1px solid #8886; border-left:6px solid {{ colour }}; border-radius:6px;
padding:0.6em 1.2em; max-width:46em; font-size:1.05em">
<span style="font-size:2.4em; font-weight:700; line-height:1.3">
<span style="color:{{ colour }}">{{ sign }}</span> {{ number }}</span> {{ unit }}
<p style="margin:0.2em 0"><strong>{{ verdict.answer }}</strong></p>
{% if verdict.next_step %}Next: {{ verdict.next_step }}.{% endif %}
<details><summary>What was measured</summary>
<ul>{% for each in measured %}<li>{{ each }}</li>{% endfor %}</ul></details></div>
"""


def show_table(table: pd.DataFrame) -> None:
    """Show a table with text on the left, numbers on the right and the best values in bold. Row
    numbers are hidden."""
    if not isinstance(table.index, pd.RangeIndex):
        table = table.reset_index(names=table.index.name or "")
    display(Markdown(markdown(table)))


def show_verdicts(verdicts: Iterable[Verdict]) -> None:
    """Show verdicts as a list, question and decision in bold."""
    texts = ((escaped(v.answer), escaped(v.explanation)) for v in verdicts)
    display(Markdown("\n".join(f"- **{answer}** {rest}" for answer, rest in texts)))


def show_card(verdict: Verdict, details: Iterable[Verdict] = ()) -> None:
    """Show the headline card of a notebook: the verdict as one large number, a sentence and the
    next step; what was measured, and further verdicts, folded."""
    sign, colour = TIE if verdict.decision == "tie" else SIGNS[verdict.good]
    sign = sign if verdict.question.endswith("?") else ""  # a statistic is no question
    number, unit = large_number(verdict)
    text = " ".join(filter(None, (sign, number, unit and f"{unit}:", verdict.answer)))
    look = {"sign": sign, "colour": colour, "number": number, "unit": unit}
    card = Environment(autoescape=True).from_string(CARD)
    shown = card.render(look, verdict=verdict, measured=[verdict, *details])
    display({"text/plain": text, "text/html": shown}, raw=True)


def large_number(verdict: Verdict) -> tuple[str, str]:
    """The value of a verdict as one large number, and what it is: a difference of losses is given
    as one of perplexities, in percent."""
    if verdict.value is None:
        return "", ""
    if verdict.unit == NATS and verdict.value < 5:  # a larger difference stays in nats
        change = math.expm1(verdict.value)
        style = "+.1%" if abs(change) < 0.01 else "+.0%"
        return format(change, style).replace("-", "−"), "valid perplexity"
    if verdict.unit == PPL:
        return number(verdict.value, ",.0f"), "valid perplexity"
    return measured(verdict), ""


def show_errors_as_sentences() -> None:
    """In a notebook, show a MusotaError, or an error about a file, without a traceback."""

    def show(shell, kind, error, traceback, tb_offset=None):
        if isinstance(error, OSError) and not error.filename:  # of the user's own code
            shell.showtraceback((kind, error, traceback), tb_offset=tb_offset)
        else:
            shell._showtraceback(kind, error, [f"{kind.__name__}: {sentence(error)}"])

    if shell := get_ipython():
        shell.set_custom_exc((MusotaError, OSError), show)
