"""What people see: notebooks, figures, tables, pages, widgets, the command line."""

from importlib import import_module

_MODULE_OF = {
    "Workbook": "musota.workbook.notebook",
    "load_module": "musota.own",
    "show_verdicts": "musota.workbook.notebook",
}


def __getattr__(name: str):
    """What notebooks import; the command line, which needs less, does not wait for it."""
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'musota.workbook' has no attribute {name!r}")
