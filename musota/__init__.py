"""MU-SOTA workbook: train it, train its dense twin, compare, and say what holds it back."""

from importlib import import_module

_HOMES = {
    "musota.config": (
        "DenseConfig Experiment MuConfig MusotaError TrainConfig experiments match_width profiles "
        "scaled twin"
    ),
    "musota.data": "Corpus load_corpus",
    "musota.layout": "BlockLayout",
    "musota.lm": "CausalLM build_model load_model",
    "musota.report": "read_evidence write_report",
    "musota.runs": "Run load_runs",
    "musota.training": "evaluate train",
    "musota.workbook": "Workbook",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = list(_HOME_OF)


def __getattr__(name: str):
    """Public names, imported on first use: `python -m musota --help` need not wait for torch."""
    if name in _HOME_OF:
        return getattr(import_module(_HOME_OF[name]), name)
    raise AttributeError(f"module 'musota' has no attribute {name!r}")


def __dir__():
    return __all__
