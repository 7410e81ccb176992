"""The plan carried out with several seeds: `musota evidence`."""

from collections.abc import Sequence
from contextlib import suppress

from musota.lab.grid_runs import print_run, read_table
from musota.lab.sweep import TUNED, run_sweeps, tuned
from musota.registry import REGISTRY
from musota.training.trainer import Diverged
from musota.workbook.notebook import Workbook


def carry_out(parts: Sequence[str], seeds: int, seed: int = 0, **parameters) -> Workbook:
    """Train what is missing of `parts` with seeds from `seed` on. Returns the workbook of the first
    seed. `parameters` are those of Workbook."""
    book = Workbook(seed=seed, **parameters)
    table, seeds = book.folder / "sweep.csv", range(seed, seed + seeds)
    for part in parts:
        print(f"--- {part} ---")
        if part == "grid":
            Workbook(seed=seed, grid=True, **parameters).run_grid()
        elif part == "sweep":
            how = {"seed": seed, "fresh": book.fresh, "each": print_run}
            run_sweeps(book.profile, book.corpus, table, book.folder / "sweep", **how)
        elif part == "models":
            for model in REGISTRY:
                _train(model, {}, seeds, parameters)
        else:
            for model, name in (("optimized", "tuned"), ("baseline", "tuned_baseline")):
                training = tuned(model, book.profile, read_table(table)).training
                changes = {"learning_rate": training.learning_rate}
                _train(model, changes, seeds, parameters, name=name, title=TUNED[model])
    _ = book.ngrams  # measured for the report
    return book


def _train(model: str, changes: dict, seeds: Sequence[int], parameters: dict, **about) -> None:
    for seed in seeds:
        with suppress(Diverged):  # which is recorded
            Workbook(seed=seed, changes=changes, **parameters).train(model, **about)
