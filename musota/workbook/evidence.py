"""The plan carried out with several seeds: `musota evidence`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress

from musota.errors import MusotaError, find_named
from musota.files import CONFIG
from musota.lab.grid_runs import find_jobs, identity_of, read_table, run_many
from musota.lab.sweep import TUNED, tuned
from musota.registry import REGISTRY
from musota.training.run import Run
from musota.training.trainer import Diverged
from musota.workbook.naming import train_command
from musota.workbook.notebook import Workbook

TABLES = ("grid", "sweep")  # parts whose runs are rows of a table


def carry_out(parts: Sequence[str], seeds: int, seed: int = 0, **parameters) -> Workbook:
    """Train what is missing of `parts` with seeds from `seed` on. Returns the workbook of the first
    seed. `parameters` are those of Workbook."""
    book = Workbook(seed=seed, **parameters)
    for part in parts:
        print(f"--- {part} ---")
        if part in TABLES:
            on = Workbook(seed=seed, grid=True, **parameters) if part == "grid" else book
            on.run_table(part)
            continue
        for model, changes, about in _models(part, book):
            if changes and book.experiment(model).with_(**changes) == book.experiment(model):
                if "models" in parts:
                    continue  # it was one of them
                changes, about = {}, {}
            wanted = book.experiment(model).with_(**changes)
            for each in range(seed, seed + seeds):
                held = book.folder / f"{about['name']}-seed{each}" if about else None
                if held and (held / CONFIG).exists() and Run(held).experiment != wanted:
                    about = {}  # that name belongs to a run at the best rate of an earlier sweep
                with suppress(Diverged):  # which is recorded
                    Workbook(seed=each, changes=changes, **parameters).train(model, **about)
    _ = book.ngrams  # measured for the report
    return book


def missing(parts: Sequence[str], seeds: int, seed: int = 0, **parameters) -> Iterator[str]:
    """The command of each run that is left to train, a `musota train` that needs no other run. The
    rates of `tuned`, and of a wider sweep, are known once the sweep has been run."""
    book, wanted = Workbook(seed=seed, **parameters), range(seed, seed + seeds)
    known = {(*run.key, run.seed) for run in book.results.runs if run.ended}
    where = {"profile": parameters["profile"], "corpus": parameters["corpus"]}
    for part in parts:
        if part in TABLES:
            on = Workbook(seed=seed, grid=part == "grid", **parameters)
            rows = {row.identity for row in read_table(on.folder / f"{part}.csv")}
            jobs = find_jobs(*on.planned(part), on.profile, on.corpus)
            for (name, each), job in jobs.items():
                if identity_of(job) not in rows:
                    yield train_command(f"{part}/{name}", {}, **where, seed=each)
            continue
        with suppress(MusotaError):  # the sweep has not been run
            for model, changes, _ in _models(part, book):
                experiment = book.experiment(model).with_(**changes)
                for each in wanted:
                    if (identity := (experiment, book.corpus.fingerprint, each)) not in known:
                        known.add(identity)
                        yield train_command(model, changes, **where, seed=each)


def train_row(name: str, seed: int, **parameters) -> None:
    """Train one run of a table, named grid/NAME or sweep/NAME, and add its row. Raises MusotaError
    for an unknown name."""
    part, _, run = name.partition("/")
    book = Workbook(seed=seed, grid=part == "grid", **parameters)
    runs, _ = book.planned(part)
    where = book.profile, book.corpus, book.folder / f"{part}.csv", book.folder / part
    run_many({run: find_named("run", run, runs)}, [seed], *where, fresh=book.fresh)


def _models(part: str, book: Workbook) -> Iterator[tuple[str, Mapping, Mapping]]:
    """The models of a part with their changes, and what to call them: all of the registry, or the
    two at the best rates of the sweep. Raises MusotaError where the sweep has not been run."""
    if part == "models":
        yield from ((model, {}, {}) for model in REGISTRY)
        return
    rows = read_table(book.folder / "sweep.csv")
    for model, name in (("optimized", "tuned"), ("baseline", "tuned_baseline")):
        rate = tuned(model, book.profile, rows).training.learning_rate
        yield model, {"learning_rate": rate}, {"name": name, "title": TUNED[model]}
