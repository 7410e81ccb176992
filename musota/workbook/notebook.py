"""The session of a notebook: checked parameters, the corpus, experiments, the results folder."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from IPython.display import Image, display
from matplotlib.figure import Figure

from musota.config import Experiment
from musota.data.corpus import load_corpus
from musota.data.tokenizer import TextTokenizer
from musota.errors import MusotaError, check_seed
from musota.files import as_path, write_json
from musota.lab.ablate import look_inside, measure_ablations
from musota.lab.grid_runs import Row, run_many
from musota.lab.ngrams import measure_ngrams
from musota.lab.plan_rules import CORPUS, VOCAB_SIZE
from musota.lab.profiles import check_changes, find_profile
from musota.lab.root_causes import Suspect, varied_fields
from musota.lab.root_causes import grid as root_cause_grid
from musota.lab.stats import Interval
from musota.models.base import CausalLM
from musota.training.device import about_machine
from musota.training.prepare import start_from
from musota.training.run import Run
from musota.training.trainer import RunOptions, train
from musota.workbook import drawings, plots
from musota.workbook.experiments import effective_changes, experiment_at, module_at
from musota.workbook.jupyter import refuse_unknown_parameters, show_errors_as_sentences
from musota.workbook.naming import (
    is_module,
    results_root,
    run_name,
    safe_name,
    title_of,
    train_command,
)
from musota.workbook.results import Results, find_results, find_runs, footer, read_ngrams
from musota.workbook.saved_copy import SavedCopy, make_folder
from musota.workbook.style import save_figure
from musota.workbook.widgets import Explorer, live_view

PARAMETERS = ("profile", "corpus", "seed", "fresh", "save_to", "changes")


class Interrupted(MusotaError):
    """A training run was stopped before its end; its state is saved."""


class Workbook:
    """One notebook's session, with `grid` at the size of the root-cause grid. Raises MusotaError
    for a parameter that it does not know or cannot use."""

    def __init__(
        self,
        profile: str = "auto",
        corpus: str = "auto",
        seed: int = 0,
        fresh: bool = False,
        save_to: str = "",
        changes: Mapping = {},  # a literal, as in the parameters cell
        grid: bool = False,
    ):
        show_errors_as_sentences()
        refuse_unknown_parameters(PARAMETERS)
        self.profile, self.is_grid = find_profile(profile, grid), grid
        check_seed(seed)
        if not isinstance(fresh, bool):
            raise MusotaError(f"fresh must be True or False, not {fresh!r}.")
        self.seed, self.fresh, self.corpus_name = int(seed), fresh, str(corpus)
        self.changes = dict(check_changes(changes))
        if grid and (varied := varied_fields(root_cause_grid(self.profile.name)[0])):
            self.changes = {f: value for f, value in self.changes.items() if f not in varied}
        vocab_size = self.changes.get("vocab_size", self.profile.vocab_size or VOCAB_SIZE)
        self.whole_corpus = load_corpus(corpus, vocab_size)
        limits = self.profile.train_tokens, self.profile.valid_tokens
        self.corpus = self.whole_corpus.limited(*limits)
        known = self.corpus.label == CORPUS
        name = self.profile.name if known else f"{self.profile.name}-{self.corpus.label}"
        # Where results belong, and where this notebook works: the same, except with save_to.
        self.home = as_path(save_to or results_root()) / name
        self.copy = SavedCopy(self.home) if save_to else None
        self.folder = self.copy.local if self.copy else self.home
        make_folder(self.folder)
        here = self.corpus
        # Whether the plan's reported numbers are of this corpus and vocabulary.
        self.at_plan_size = (here.name, vocab_size) == (CORPUS, VOCAB_SIZE)
        self.footer = footer(here.name, here.tokenizer.size, self.profile.name)
        print(
            f"corpus {here.name} ({here.source}), {len(here.train):,} training and "
            f"{len(here.valid):,} validation tokens, vocabulary {here.tokenizer.size:,}\n"
            f"profile {self.profile.name}, {about_machine()['device']}, results in {self.home}"
        )

    def save(self, *files: Path) -> None:
        """Copy files, or all that is new, to `home`. Raises MusotaError where that fails."""
        if self.copy:
            self.copy.save(*files)

    @property
    def results(self) -> Results:
        """What is recorded in this folder about this corpus."""
        return Results(self.folder, self.corpus.fingerprint)

    def named(self, model: str) -> str:
        """The name of the runs of a model as changed here."""
        return run_name(model, effective_changes(model, self.profile, self.changes))

    def find(self, *models: str) -> tuple[Results, list[list[Run]]]:
        """Recorded results, and in them the seeds of each model as changed here: of this folder,
        or else the committed ones; then `note` says so."""
        names = [self.named(model) for model in models]
        folders = [self.folder, results_root() / "full", results_root() / "study"]
        results = find_results(names, folders, self.corpus.fingerprint)
        return results, [group for group in map(results.group, names) if group]

    def find_runs(self, names: str | Sequence[str]) -> list[list[Run]]:
        """The seeds of recorded models by name, title or folder; of a folder here, or else in
        results of the repository."""
        found = []
        for name in [names] if isinstance(names, str) else names:
            try:
                found.append(find_runs(name, self.folder.parent, self.folder.name))
            except MusotaError:
                found.append(find_runs(name, results_root(), self.folder.name))
        return found

    def trained(self, *models: str) -> list[Run]:
        """The finished runs of models as changed here, with this seed."""
        groups = [self.results.group(self.named(model)) for model in models]
        return [run for g in groups for run in g if run.finished and run.seed == self.seed]

    def experiment(self, name: str) -> Experiment:
        """An experiment (see `experiment_at`) at this profile, with the changes."""
        return experiment_at(name, self.profile, self.changes)

    def sizes(self, *models: str) -> dict[tuple[str, str], Experiment]:
        """Models at full size and as trained here, for `tables.fields_table`."""
        columns = {}
        for model in models:
            columns[model, "full size"] = experiment_at(model, find_profile("full"), {})
            columns[model, f"here ({self.profile.name})"] = self.experiment(model)
        return columns

    @cached_property
    def ngrams(self) -> dict[str, float]:
        """Perplexities of the n-gram baselines, measured once."""
        path = self.folder / ("grid_ngrams.json" if self.is_grid else "ngrams.json")
        text = {"fingerprint": self.corpus.fingerprint}
        if not read_ngrams(path, **text):
            write_json(path, {**text, "ppl": measure_ngrams(self.corpus)})
            self.save(path)
        return read_ngrams(path, **text)

    def ablations(self, run: Run) -> dict[str, Interval]:
        """The loss from disabling each part of a run's model, measured once; empty for a run that
        is recorded without its checkpoint."""
        results = Results(run.path.parent, run.fingerprint)
        if run.has_model and not results.ablations(run):
            about = {"fingerprint": run.fingerprint, "weights": run.summary["weights_sha256"]}
            measured = measure_ablations(run, self.corpus)
            write_json(path := run.path / "ablations.json", {**about, **measured})
            self.save(path)
        return results.ablations(run)

    def train(self, model: str, name="", title="", continue_from=None, **options) -> Run:
        """Train an experiment, go on with it, or load it if it has finished.

        `name` and `title` are by default made of `model` and the changes; `continue_from` is a run
        or its folder; `options` are fields of RunOptions. Raises Interrupted if the run was
        stopped before its end.
        """
        experiment = self.experiment(model)
        changed = effective_changes(model, self.profile, self.changes)
        if self.changes and not changed:
            print(f"The changes make no difference to {model}.")
        if continue_from:
            experiment, _ = start_from(continue_from, experiment, self.corpus)
            changed["started_from"] = experiment.training.started_from
        name = name or run_name(model, changed)
        folder = self.folder / f"{safe_name(name)}-seed{self.seed}"
        wanted = (experiment, self.corpus.fingerprint), self.seed
        if not self.fresh and not folder.exists() and (done := find_finished(self.folder, *wanted)):
            print(f"{done.path}: finished before, loaded as it is.")
            return done
        spelled = {"profile": self.profile.name, "corpus": self.corpus_name, "seed": self.seed}
        spelled["precision"] = options.get("precision")
        spelled["continue_from"] = getattr(continue_from, "path", continue_from)
        about = {
            "title": title or title_of(model, experiment, changed),
            "profile": self.profile.name,
            "changes": changed,
            "command": train_command(model, changed, **spelled),
        }
        options = {"watch": live_view(), "about": about, **options}
        if self.copy:
            self.copy.own.add(folder)
            options["copy"] = self.copy.push
        how = {"seed": self.seed, "resume": not self.fresh, "name": name}
        how |= {"continue_from": continue_from, "options": RunOptions(**options)}
        if is_module(model) and not model.endswith("_twin"):
            experiment, like = module_at(model, self.profile, self.changes, self.seed)
            how |= {"training": like.training, "max_seq_len": like.model.max_seq_len}
        run = None
        with suppress(KeyboardInterrupt):
            run = train(experiment, self.corpus, folder, **how)
        if not (run and run.finished) and options.get("stop_at", 1) == 1:
            raise Interrupted(f"{name} was stopped: run this again, and it goes on from there.")
        self.save()
        return run

    def run_grid(self) -> tuple[dict[str, dict[int, Row]], list[Suspect]]:
        """Train what is missing of the root-cause grid. Returns rows by name and seed, and the
        suspected causes that they decide on."""
        runs, suspects, seeds = root_cause_grid(self.profile.name)
        place = self.profile, self.corpus, self.folder / "grid.csv", self.folder / "grid"
        how = {"fresh": self.fresh, "changes": self.changes, "each": self.save}
        return run_many(runs, [self.seed + seed for seed in seeds], *place, **how), suspects

    def show(self, figure: Figure, name: str, run=None, about: str | None = None) -> None:
        """Save a figure as `<name>.png` in the results folder, or in that of `run`, and show it.
        `about`: the line under it, by default corpus and profile."""
        path = (run.path if run else self.folder) / f"{safe_name(name)}.png"
        save_figure(figure, path, self.footer if about is None else about)
        self.save(path)
        display(Image(data=path.read_bytes()))

    def show_path(self) -> None:
        """The recorded path from MU-SOTA to the redesign, one change at a time."""
        if (path := results_root() / "redesign" / "path.csv").exists():
            about = "profile study, several seeds, recorded with the repository"
            self.show(plots.path(pd.read_csv(path)), "path", about=about)

    def explore(self, runs: Sequence[Run], ngrams: Mapping[str, float] | None = None) -> None:
        """Curves of runs, with controls."""
        if measured := [run for run in runs if run.summary]:
            ngrams = self.ngrams if ngrams is None else ngrams
            explorer = Explorer(measured, ngrams, self.folder / "explorer.png", self.footer)
            self.save(explorer.path)
        else:
            print("No run has finished an epoch yet: there is nothing to explore.")

    def show_blocks(self, run: Run, text: str) -> None:
        """The matrices and gates of the first tokens of a text."""
        if run.has_model:
            self.show(blocks_figure(run.load_model(), self.corpus.tokenizer, text), "blocks", run)
        else:
            print("This run is recorded without its checkpoint: train it here to look inside.")


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


def find_finished(folder: Path, key: tuple[Experiment, str], seed: int) -> Run | None:
    """A finished run of an experiment on a corpus, with a seed, whatever its folder is called."""
    for config in sorted(folder.glob("*/config.json")):
        with suppress(MusotaError):  # damaged
            run = Run(config.parent)
            if (run.key, run.seed) == (key, seed) and run.finished:
                return run
    return None
