"""MU-SOTA: the model, its baselines and a trainer."""

import contextlib
import sys
from importlib import import_module

with contextlib.suppress(AttributeError):  # notebooks replace sys.stdout
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks "→" prints "?"

_MODULES = {
    "musota.config": "DenseConfig Experiment MuConfig RedesignedConfig TrainConfig",
    "musota.data.corpus": "Corpus load_corpus",
    "musota.errors": "MusotaError",
    "musota.lab.audit": "Audit audit",
    "musota.lab.verdicts": "compare",
    "musota.matching": "match_width twin",
    "musota.models.base": "CausalLM",
    "musota.models.hub": "build_model load_model",
    "musota.models.layout": "BlockLayout",
    "musota.registry": "experiments",
    "musota.training.evaluate": "evaluate",
    "musota.training.run": "Run load_runs",
    "musota.training.trainer": "RunOptions train",
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names.split()}
__all__ = list(_MODULE_OF)


def __getattr__(name: str):
    """Public names are imported on first use, so that `musota --help` does not wait for torch."""
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'musota' has no attribute {name!r}")


def __dir__():
    return __all__
