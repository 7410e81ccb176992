"""The session of a notebook: checked parameters, the corpus, experiments, the results folder."""

import ast
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import pandas as pd
import torch
from IPython import get_ipython
from IPython.display import Image, display
from matplotlib.figure import Figure

from musota.config import Experiment, check_value
from musota.data.corpus import load_corpus
from musota.data.tokenizer import TextTokenizer
from musota.errors import MusotaError, find_named
from musota.files import SUMMARY, as_path, write_json
from musota.lab import root_causes
from musota.lab.ablate import look_inside, measure_ablations, weak_spots
from musota.lab.grid_runs import GridRun, Row, merge_table, print_run, read_table, run_many
from musota.lab.ngrams import measure_ngrams
from musota.lab.plan_rules import CORPUS, VOCAB_SIZE, WORDS
from musota.lab.profiles import check_changes, find_profile
from musota.lab.stats import Interval
from musota.lab.sweep import sweep
from musota.models.base import CausalLM
from musota.training.device import about_machine
from musota.training.run import Run
from musota.training.trackers import check_trackers
from musota.training.trainer import RunOptions, train
from musota.workbook import drawings, naming, plots, results
from musota.workbook.experiments import effective_changes, experiment_at, module_at
from musota.workbook.panel import RunPanel, in_notebook
from musota.workbook.results import Results
from musota.workbook.saved_copy import SavedCopy
from musota.workbook.show import show_errors_as_sentences, show_verdicts
from musota.workbook.style import save_figure
from musota.workbook.widgets import Explorer

NO_WEIGHTS = """This run's weights are not here, or it is of another text. To look inside, train it
(with fresh = True where it is recorded)."""
PARAMETERS = ("profile", "corpus", "seed", "fresh", "save_to", "log_with", "changes")


class Interrupted(MusotaError):
    """A training run was stopped before its end; its state is saved."""


@contextmanager
def stopping(what: str, fresh: bool):
    """A context that turns KeyboardInterrupt into Interrupted, which says how to continue."""
    how = ", without --fresh (in a notebook fresh = False)" if fresh else ""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"{what} was stopped: run this again to continue{how}.") from None


class Session:
    """The checked parameters of a notebook, its corpus and its results folder; with `grid` at the
    size of the root-cause grid. Raises MusotaError for a parameter that it does not know or cannot
    use."""

    def __init__(
        self,
        profile: str = "auto",
        corpus: str = "auto",
        seed: int = 0,
        fresh: bool = False,
        save_to: str = "",
        changes: Mapping = {},  # a literal, as in the parameters cell
        log_with: str = "",
        grid: bool = False,
    ):
        show_errors_as_sentences()
        refuse_unknown_parameters()
        self.profile = find_profile(profile, grid)
        self.seed, self.fresh = check_value("seed", seed, int), check_value("fresh", fresh, bool)
        self.changes = check_changes(changes)
        self.log_with = check_trackers(log_with) if log_with else ()
        if grid and (varied := root_causes.varied_fields(root_causes.grid(self.profile.name)[0])):
            if ignored := self.changes.keys() & varied:
                print(f"The grid varies {', '.join(sorted(ignored))} itself: not changed here.")
            self.changes = {f: value for f, value in self.changes.items() if f not in varied}
        vocab_size = self.changes.get("vocab_size", self.profile.vocab_size or VOCAB_SIZE)
        self.whole_corpus = load_corpus(corpus, vocab_size)
        limits = self.profile.train_tokens, self.profile.valid_tokens
        self.corpus = self.whole_corpus.limited(*limits)
        known = self.corpus.label == CORPUS
        found = corpus == "auto" and self.corpus.name in (CORPUS, "python-docs")
        self.corpus_name = self.corpus.name if found else str(corpus)  # for commands
        name = self.profile.name if known else f"{self.profile.name}-{self.corpus.label}"
        # Where results belong, and where this notebook works: the same, except with save_to.
        self.home = as_path(save_to or naming.results_root()) / name
        self.copy = SavedCopy(self.home) if save_to else None
        self.folder = self.copy.local if self.copy else self.home
        for table in ("grid.csv", "sweep.csv") if self.copy else ():
            merge_table(self.folder / table, self.home / table)
        self.figures = self.folder / "figures"
        self.figures.mkdir(parents=True, exist_ok=True)
        here = self.corpus
        size = here.name, vocab_size, here.words["valid"]
        self.at_plan_size = size == (CORPUS, VOCAB_SIZE, WORDS)
        self.footer = results.footer(here.name, here.tokenizer.size, self.profile.name)
        device, place = about_machine()["device"], naming.shown(self.home)
        print(
            f"corpus {here.name} ({here.source}), {len(here.train):,} training and "
            f"{len(here.valid):,} validation tokens, vocabulary {here.tokenizer.size:,}\n"
            f"profile {self.profile.name}, {device}, results in {place}"
        )

    def place(self, path: Path) -> Path:
        """Where a file of this session's results folder belongs, as it is printed."""
        return naming.shown(self.home / path.relative_to(self.folder))

    def save(self, *files: Path) -> None:
        """Copy files of this session's folder, or all that is new there, to `home`. Raises
        MusotaError where that fails."""
        if self.copy and all(file.is_relative_to(self.folder) for file in files):
            self.copy.save(*files)


class Workbook(Session):
    """What one notebook trains, measures and shows."""

    @property
    def examples(self) -> Path:
        """The repository's folder of example models. Raises MusotaError outside a repository."""
        if not (repository := naming.checkout()):
            raise MusotaError("The example models are in the repository: clone it or use your own.")
        return repository / "notebooks" / "examples"

    @property
    def results(self) -> Results:
        """What is recorded in this folder about this corpus."""
        return Results(self.folder, self.corpus.fingerprint)

    def named(self, model: str) -> str:
        """The name of the runs of a model as changed here."""
        return naming.run_name(model, effective_changes(model, self.profile, self.changes))

    def find(self, *models: str) -> tuple[Results, list[list[Run]]]:
        """Recorded results, and in them the seeds of each model as changed here: of this folder,
        or else the committed ones; then `note` says so."""
        names = [self.named(model) for model in models]
        folders = [self.folder, naming.results_root() / "full", naming.results_root() / "study"]
        found = results.find_results(names, folders, self.corpus.fingerprint, self.home)
        groups = [group for group in map(found.group, names) if group]
        if groups and not any(run.seed == self.seed for group in groups for run in group):
            found.note += f" None of them has seed {self.seed}."
        return found, groups

    def find_runs(self, names: str | Sequence[str]) -> list[list[Run]]:
        """The seeds of recorded models by name, title or folder; of a folder here or of
        `save_to`, or else in results of the repository."""
        names = [names] if isinstance(names, str) else names
        roots = self.folder.parent, self.home.parent, naming.results_root()
        return results.find_models(names, roots, self.folder.name)

    def trained(self, *models: str) -> list[Run]:
        """The finished runs of models as changed here, with this seed."""
        groups = [self.results.group(self.named(model)) for model in models]
        return [run for g in groups for run in g if run.finished and run.seed == self.seed]

    def experiment(self, name: str) -> Experiment:
        """An experiment (see `experiment_at`) at this profile, with the changes."""
        return experiment_at(name, self.profile, self.changes)

    def sizes(self, *models: str) -> dict[str, Experiment]:
        """Models at full size and as trained here, for `tables.fields_table`."""
        columns = {}
        for model in models:
            columns[f"{model}, full size"] = experiment_at(model, find_profile("full"), {})
            columns[f"{model}, {self.profile.name}"] = self.experiment(model)
        return columns

    @cached_property
    def ngrams(self) -> dict[str, float]:
        """Perplexities of the n-gram baselines, measured once."""
        path = results.ngrams_path(self.folder, self.corpus.fingerprint)
        if not path.exists():
            write_json(path, {"ppl": measure_ngrams(self.corpus)})
            self.save(path)
        return results.read_ngrams(path)

    def ablations(self, run: Run) -> dict[str, Interval]:
        """The loss from disabling each part of a run's model, measured once; empty for a run that
        is recorded without its checkpoint, or of another text."""
        here = run.fingerprint == self.corpus.fingerprint
        if here and run.has_model and not results.read_ablations(run):
            about = {"fingerprint": run.fingerprint, "weights": run.summary["weights_sha256"]}
            measured = measure_ablations(run, self.corpus)
            write_json(path := run.path / "ablations.json", {**about, **measured})
            self.save(path)
        return results.read_ablations(run)

    def train(self, model: str, name="", title="", **options) -> Run:
        """Train an experiment, continue it, or load it if it has finished.

        `name` and `title` are by default made of `model` and the changes; `options` are fields of
        RunOptions. Raises Interrupted if the run was stopped before its end.
        """
        experiment = self.experiment(model)
        changed = effective_changes(model, self.profile, self.changes)
        if self.changes and not changed:
            print(f"The changes make no difference to {model}.")
        name = name or naming.run_name(model, changed)
        folder = self.folder / f"{naming.safe_name(name)}-seed{self.seed}"
        panel = RunPanel(self.footer, self.ngrams if in_notebook() else {}, self.at_plan_size)
        for done in () if (folder / SUMMARY).exists() else self.results.runs:
            if (done.experiment, done.seed) != (experiment, self.seed):
                continue
            folder, name, title = done.path, done.name, done.recorded_title
            if done.finished and not self.fresh:
                print(f"{done.path.name}: already finished, loaded.")
                panel.draw(done)
                return done
        where = {"profile": self.profile.name, "corpus": self.corpus_name, "seed": self.seed}
        where["precision"] = options.get("precision")
        about = {
            "title": title or naming.title_of(model, experiment, changed),
            "model": naming.ROWS.get(model, model),
            "profile": self.profile.name,
            "changes": changed,
            "command": naming.train_command(model, changed, **where),
        }
        watch = panel.update if panel.watched else None
        options = {"watch": watch, "about": about, "log_with": self.log_with, **options}
        if self.copy:
            self.copy.own.add(folder)
            options["copy"] = self.copy.push
        how = {"seed": self.seed, "resume": not self.fresh, "name": name}
        how["options"] = RunOptions(**options)
        if naming.is_module(model) and not model.endswith("_twin"):
            experiment, like = module_at(model, self.profile, self.changes, self.seed)
            how |= {"training": like.training, "max_seq_len": like.model.max_seq_len}
        with stopping(name, self.fresh):
            try:
                run = train(experiment, self.corpus, folder, **how)
            finally:
                with suppress(MusotaError):  # nothing is recorded yet
                    panel.draw(Run(folder))
            if not run.finished and options.get("stop_at", 1) == 1:
                raise KeyboardInterrupt
        self.save()
        return run

    def planned(self, part: str, fresh: bool = False) -> tuple[dict[str, GridRun], list[int]]:
        """The runs of the grid or of the sweep by name, and their seeds. The rates of the sweep
        follow from its recorded runs; a `fresh` sweep begins with the first six rates."""
        if part == "sweep":
            rows = [] if fresh else read_table(self.folder / "sweep.csv")
            return sweep(self.profile, rows), [self.seed]
        runs, _, seeds = root_causes.grid(self.profile.name)
        return runs, [self.seed + seed for seed in seeds]

    def run_table(self, part: str) -> dict[str, dict[int, Row]]:
        """Train the missing runs of the grid, with the changes applied, or of the sweep, which is
        widened until each best rate lies between two others. Returns all recorded rows by name and
        seed."""
        table, trained = self.folder / f"{part}.csv", {}

        def share() -> None:
            merge_table(table, self.home / table.name)  # other machines add rows, too
            self.save(table)

        def each(row: Row | None, *progress) -> None:
            print_run(row, *progress)
            if row:
                share()

        how = {"fresh": self.fresh, "each": each}
        how["changes"] = self.changes if part == "grid" else {}
        with stopping(f"The {part}", self.fresh):
            runs, seeds = self.planned(part, self.fresh)
            while left := {name: runs[name] for name in runs if name not in trained}:
                where = self.profile, self.corpus, table, self.folder / part
                trained |= run_many(left, seeds, *where, **how)
                runs, _ = self.planned(part)
        share()  # also rows whose copy failed
        return root_causes.by_name(read_table(table)) | trained

    def show(self, figure: Figure, name: str, run=None, about: str | None = None) -> None:
        """Save a figure as `figures/<name>.png` in the results folder, or in the folder of `run`,
        and show it. `about`: the line under it, by default corpus and profile."""
        path = (run.path if run else self.figures) / f"{naming.safe_name(name)}.png"
        save_figure(figure, path, self.footer if about is None else about)
        self.save(path)
        display(Image(data=path.read_bytes()))

    def show_path(self) -> None:
        """The recorded path from MU-SOTA to the redesign, one change at a time."""
        if (path := naming.results_root() / "redesign" / "path.csv").exists():
            self.show(plots.path(pd.read_csv(path)), "path", about=plots.PATH_RUNS)

    def explore(self, runs: Sequence[Run], ngrams: Mapping[str, float], about=None) -> None:
        """Curves of runs, with controls; `about` as in `show`."""
        if any(run.summary for run in runs):
            about = self.footer if about is None else about
            self.save(Explorer(runs, ngrams, self.figures / "explorer.png", about).path)
        else:
            print("None of these runs has ended an epoch: there are no curves to explore.")

    def show_ablations(self, run: Run, name: str, about: str | None = None) -> None:
        """The cost of disabling each part of a run's model, as a figure and as verdicts."""
        if effects := self.ablations(run):
            self.show(plots.ablations(run, effects), name, about=about)
            show_verdicts(weak_spots(run, effects))
        else:
            print(NO_WEIGHTS)

    def show_blocks(self, run: Run, text: str) -> None:
        """The matrices and gates of the first tokens of a text."""
        if run.has_model:
            self.show(blocks_figure(run.load_model(), self.corpus.tokenizer, text), "blocks", run)
        else:
            print(NO_WEIGHTS)


def blocks_figure(model: CausalLM, tokenizer: TextTokenizer, text: str, most: int = 12) -> Figure:
    """The matrices and gates of at most `most` tokens of a text. Raises MusotaError for a text
    without a token and a model without blocks."""
    ids = tokenizer.encode(text)[: min(most, model.config.max_seq_len)]
    if not len(ids):
        raise MusotaError("The text is empty: write a few words.")
    inside = look_inside(model, torch.from_numpy(ids))
    tokens = [tokenizer.decode([int(token)]).strip() or "␣" for token in ids]
    shown = inside["channels"].numpy(), inside["gate"].numpy(), tokens
    return drawings.block_view(*shown, model.config.layout, model.config.n_layer)


def refuse_unknown_parameters() -> None:
    """Raises MusotaError for a parameter that papermill injected and the notebook does not have;
    papermill only warns."""
    shell = get_ipython()
    for own, injected in pairwise(shell.user_ns["In"] if shell else ()):
        known = _assigned(own) if injected.startswith("# Parameters\n") else set()
        if known & {*PARAMETERS}:  # the parameters cell, after which papermill adds its own
            for name in _assigned(injected):
                find_named("notebook parameter", name, sorted(known))


def _assigned(cell: str) -> set[str]:
    """The names that a cell assigns, in any form."""
    names = (node for node in ast.walk(ast.parse(cell)) if isinstance(node, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, ast.Store)}
