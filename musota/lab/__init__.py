"""Experiments on models: profiles, sweeps, root causes, ablations, audit, statistics, verdicts."""

from musota.exports import lazy

_MODULES = {
    "musota.lab.ablate": "ablation_effects ablations look_inside measure_ablations weak_spots",
    "musota.lab.audit": "Audit causality_matrix",
    "musota.lab.curves": "health oscillation plateau plateau_start",
    "musota.lab.grid_runs": "GridRun Row read_table run_many",
    "musota.lab.ngrams": "measure_ngrams",
    "musota.lab.plan_rules": "REPORTED plan_applies plan_verdicts",
    "musota.lab.profiles": "GRID_PROFILES PROFILES Profile check_changes find_profile scaled",
    "musota.lab.root_causes": "Cause Suspect advice grid judge",
    "musota.lab.stats": "SEED_SPREAD Interval block_bootstrap pooled_contrast seed_interval",
    "musota.lab.sweep": "best_rate sweep_run swept tuned",
    "musota.lab.verdicts": "Verdict against_ngrams compare compare_with_matched least_to_beat",
}
_MODULE_OF, __getattr__, __dir__ = lazy(__name__, _MODULES)
__all__ = list(_MODULE_OF)
