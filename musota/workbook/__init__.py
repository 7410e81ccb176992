"""The user interface: notebooks, figures, tables, pages, widgets, the command line."""

from musota.exports import lazy

_MODULES = {
    "musota.own": "load_module",
    "musota.workbook.notebook": "Workbook",
    "musota.workbook.show": "show_card show_table show_verdicts",
}
_MODULE_OF, __getattr__, __dir__ = lazy(__name__, _MODULES)
