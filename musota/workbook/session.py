"""What a notebook needs at hand: checked parameters, the corpus, scaled experiments, results."""

import ast
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import pandas as pd

from musota.data.corpus import load_corpus
from musota.errors import MusotaError, check_seed, nearest_name
from musota.files import sentence
from musota.plan.config import Experiment, check_changes
from musota.plan.profiles import changed, find_profile, scaled, twin
from musota.plan.registry import TUNED, find_experiment, registry, run_name
from musota.plan.suspects import Cell, Suspect, turned_by
from musota.plan.suspects import grid as suspects_grid
from musota.rules.findings import Finding
from musota.rules.plan import plan_does_not_apply
from musota.studies import campaign
from musota.studies.cells import run_cells
from musota.studies.path import run_path
from musota.studies.probes import measure_ablations
from musota.training.machine import about_machine
from musota.training.runs import Run, started_from
from musota.training.trainer import train
from musota.workbook.evidence import PATH, SWEEP
from musota.workbook.records import read_runs
from musota.workbook.results import Results, results_folder
from musota.workbook.tables import fields_table

PARAMETERS = ("profile", "corpus", "seed", "fresh", "save_to", "changes")
PARTS = ("models", "sweep", "tuned", "path")  # of the plan carried out with several seeds


class Workbook(Results):
    """One notebook's session. Raises MusotaError for a parameter it does not know or cannot use.

    With `grid` it works at the size of the root-cause grid, in a folder of its own.
    """

    def __init__(
        self,
        profile: str = "auto",
        corpus: str = "auto",
        seed: int = 0,
        fresh: bool = False,
        save_to: str = "",
        changes: dict | str = {},  # noqa: B006  a plain literal, as in the parameters cell
        grid: bool = False,
    ):
        _plain_errors()
        _refuse_unknown_parameters()
        size = find_profile(profile, grid)
        check_seed(seed)
        if not isinstance(fresh, bool):
            raise MusotaError(f"fresh must be True or False, not {fresh!r}.")
        if not isinstance(save_to, (str, os.PathLike)) or "\0" in str(save_to):
            raise MusotaError(f"save_to must be the path of a folder, not {save_to!r}.")
        self.seed, self.changes = seed, check_changes(changes)
        if grid and (moot := turned_by(suspects_grid(size.name)[0]) & self.changes.keys()):
            print(f"The grid turns {', '.join(sorted(moot))} itself: left out of changes here.")
            self.changes = {f: v for f, v in self.changes.items() if f not in moot}
        self.vocab_size = self.changes.get("vocab_size", size.vocab_size or 50_000)
        self.whole_corpus = load_corpus(corpus, self.vocab_size)
        super().__init__(size, self.whole_corpus.limited(size), fresh, save_to, grid)
        here = self.corpus
        print(
            f"corpus {here.name} ({here.source}), {len(here.train):,} training and "
            f"{len(here.valid):,} validation tokens, vocabulary {here.tokenizer.size:,}\n"
            f"profile {size.name}, {about_machine()['device']}, results in {self.home}"
        )

    @property
    def plan_does_not_apply(self) -> str | None:
        """Why the plan's thresholds say nothing of what is trained here; None where they do."""
        return plan_does_not_apply(self.corpus.name, self.vocab_size, self.profile.name)

    def experiment(self, name: str) -> Experiment:
        """A row of the registry, FILE.py:NAME, or `<either>_twin`, at this profile's size, with the
        changes asked for: what they say is what trains."""
        return changed(self._unchanged(name), self.changes)

    def called(self, name: str, experiment: Experiment | None = None) -> str:
        """A row's name with what is changed in it here, as in `optimized,epochs=50`."""
        experiment = experiment or self.experiment(name)
        changes = experiment.differences(self._unchanged(name))
        return ",".join([run_name(name, experiment), *changes])

    def _unchanged(self, name: str) -> Experiment:
        if name.endswith("_twin") and name not in registry:
            return twin(self._unchanged(name.removesuffix("_twin")))
        if name not in TUNED:
            return scaled(find_experiment(name), self.profile)
        kept = results_folder(self.profile.name, self.corpus)
        losses = self._swept(self.root, name) or self._swept(kept, name)
        return scaled(campaign.tuned(name, self.profile, losses), self.profile)

    def _swept(self, folder: Path, name: str) -> dict[float, list[float]]:
        runs = [r for r in read_runs(folder, SWEEP)[0] if r.fingerprint == self.corpus.fingerprint]
        return campaign.swept(runs, TUNED[name], self.profile)

    def train(self, name: str, **choices) -> Run:
        """Train an experiment here as changed, go on with it, or load it if it has finished.

        `choices` are passed to `musota.train`. Whoever watches the notebook sees live curves.
        """
        from musota.workbook.widgets import live_view

        experiment = self.experiment(name)
        if source := choices.get("continue_from"):
            experiment, _ = started_from(source, experiment, self.corpus)
        if self.changes and experiment == self._unchanged(name):
            print(f"The changes leave {name} as it is.")
        label = self.called(name, experiment)
        folder = self.folder / f"{label}-seed{self.seed}"
        wanted = experiment, self.corpus.fingerprint, self.seed
        same = [run for run in self.known() if run.finished and run.identity == wanted]
        if same and not self.fresh and not (folder / "config.json").exists():
            print(f"{same[0].path}: finished before, loaded as it is.")
            run = same[0]
        else:
            if self.mirror:
                choices["copy"] = self.mirror.part(folder).push
            choices = {"watch": live_view(), "name": label, **choices}
            choices["profile"] = self.profile.name
            run = train(experiment, self.corpus, folder, not self.fresh, self.seed, **choices)
        self.deliver()
        return run

    def run_grid(self) -> tuple[dict[str, dict[int, Run]], list[Suspect]]:
        """Train the root-cause grid of this profile, or go on with it (see `suspects.grid`)."""
        cells, suspects, seeds = suspects_grid(self.profile.name)
        longest = "epochs" if "epochs" in cells else "original"  # to look inside afterwards
        how = {"cells": cells, "seeds": [self.seed + n for n in seeds], "changes": self.changes}
        return self._trained(run_cells, **how, keep=(longest,)), suspects

    def carry_out(self, part: str, seeds: int) -> None:
        """Train one of `PARTS` of the plan with `seeds` seeds, or go on with it."""
        seeds = range(self.seed, self.seed + seeds)
        if part == SWEEP:
            self._trained(campaign.run_sweeps, part, seed=self.seed)
        elif part == PATH:
            self._trained(run_path, part, seeds=seeds)
        else:
            cells, looked = campaign.models(), ("optimized", "redesigned")
            if part == "tuned":
                losses = {name: self._swept(self.root, name) for name in TUNED}
                cells = {n: Cell(campaign.tuned(n, self.profile, losses[n])) for n in TUNED}
                looked = ("tuned",)
            runs = self._trained(run_cells, cells=cells, seeds=seeds, keep=cells)
            for name in looked:
                if (run := runs[name][self.seed]).has_model:
                    self.kept(f"ablations_{name}", measure_ablations, run, self.corpus)

    def _trained(self, study: Callable, part: str = "", **how):
        """What a study that trains many runs returns; however it ends, what it made is copied."""
        how |= {"profile": self.profile, "corpus": self.corpus, "folder": self.folder / part}
        try:
            return study(**how, fresh=self.fresh, each=self.push, known=self.known(part))
        finally:
            self.push()

    def show_blocks(self, run: Run, sentence: str) -> None:
        """The matrices and gates of a sentence, to be changed by the reader (see `widgets`)."""
        from musota.workbook.widgets import block_view

        if not run.has_model:
            print("This run is kept without its checkpoint: train it here to look inside.")
            return
        about = f"{self.corpus.name} · profile {self.profile.name}"
        path, tokenizer = run.path / "blocks.png", self.corpus.tokenizer
        block_view(run.load_model(), tokenizer, sentence, path, about, self.push)

    def scaling_table(self, *names: str) -> pd.DataFrame:
        """Every scaled value beside the plan's, for the experiments named."""
        columns, here = {}, f"profile {self.profile.name}" + (", changed" if self.changes else "")
        for name in names:
            columns |= {(name, "plan"): find_experiment(name), (name, here): self.experiment(name)}
        return fields_table(columns)


def tell(findings: Finding | Sequence[Finding]) -> None:
    """Show findings as a list of sentences."""
    findings = [findings] if isinstance(findings, Finding) else findings
    from IPython.display import Markdown, display

    display(Markdown("\n".join(f"- {finding.sentence}" for finding in findings)))


def _refuse_unknown_parameters() -> None:
    """Papermill only warns of parameters a notebook does not have; here they are an error."""
    try:
        cells = get_ipython().user_ns["In"]
    except NameError:
        return  # not in a notebook
    for own, injected in pairwise(cells):
        if injected.startswith("# Parameters\n"):  # what papermill adds after the own
            known = [statement.targets[0].id for statement in ast.parse(own).body]
            for statement in ast.parse(injected).body:
                if (name := statement.targets[0].id) not in known:
                    raise nearest_name("notebook parameter", name, known)


def _plain_errors() -> None:
    """In a notebook, show a MusotaError, or what the system refuses, without a traceback."""
    try:
        shell = get_ipython()
    except NameError:
        return

    def show(shell, kind, error, _, tb_offset=None):
        shell._showtraceback(kind, error, [f"{kind.__name__}: {sentence(error)}"])

    shell.set_custom_exc((MusotaError, OSError), show)
