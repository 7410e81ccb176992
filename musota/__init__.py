"""MU-SOTA workbook: train it, train its dense twin, compare, and say what holds it back."""

import contextlib
import sys
from importlib import import_module

with contextlib.suppress(AttributeError):  # other things stand in for it in notebooks
    sys.stdout.reconfigure(errors="replace")  # where "→" cannot be shown nothing may fail

_HOMES = {
    "musota.data.corpus": "Corpus load_corpus",
    "musota.errors": "MusotaError",
    "musota.models.base": "CausalLM",
    "musota.models.sharing": "build_model load_model",
    "musota.plan.architectures": "DenseConfig MuConfig OwnConfig RedesignedConfig",
    "musota.plan.config": "Experiment TrainConfig",
    "musota.plan.layout": "BlockLayout",
    "musota.plan.profiles": "match_width profiles scaled twin",
    "musota.plan.registry": "experiments",
    "musota.studies.audit": "Audit audit",
    "musota.training.evaluate": "evaluate",
    "musota.training.runs": "Run",
    "musota.training.trainer": "train",
    "musota.workbook.answers": "compare",
    "musota.workbook.evidence": "read_evidence",
    "musota.workbook.pages": "write_report",
    "musota.workbook.records": "load_runs",
    "musota.workbook.session": "Workbook",
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
