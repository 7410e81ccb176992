"""MU-SOTA: the model, its baselines and a trainer."""

import contextlib
import sys

from musota.exports import lazy

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
_MODULE_OF, __getattr__, __dir__ = lazy(__name__, _MODULES)
__all__ = list(_MODULE_OF)
