"""The user interface: notebooks, figures, tables, pages, widgets, the command line."""

from importlib import import_module

_MODULE_OF = {
    "Workbook": "musota.workbook.notebook",
    "load_module": "musota.own",
    "show_verdicts": "musota.workbook.notebook",
}


def __getattr__(name: str):
    """Names for notebooks, imported on first use so that the command line starts fast."""
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'musota.workbook' has no attribute {name!r}")
