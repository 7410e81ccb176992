"""What a notebook needs at hand: checked parameters, the corpus, scaled experiments, results."""

from __future__ import annotations

import ast
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pandas as pd

from musota.data.corpus import Corpus, load_corpus
from musota.errors import MusotaError, check_seed, nearest_name
from musota.files import sentence
from musota.plan.config import Experiment, check_changes
from musota.plan.profiles import Profile, changed, find_profile, scaled, twin
from musota.plan.registry import TUNED, find_experiment, registry, run_name
from musota.plan.suspects import Cell, Suspect, turned_by
from musota.plan.suspects import grid as suspects_grid
from musota.rules.findings import Finding
from musota.rules.plan import plan_does_not_apply
from musota.studies import campaign
from musota.studies.cells import run_cells
from musota.studies.path import Judged, run_path
from musota.studies.probes import measure_ablations
from musota.training.machine import about_machine
from musota.training.runs import Run
from musota.training.start import started_from
from musota.training.trainer import train
from musota.workbook.evidence import PATH, SWEEP, read_path
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
        _check_parameters(seed, fresh, save_to)
        self.seed, self.changes = seed, check_changes(changes)
        if grid and (moot := turned_by(suspects_grid(size.name)[0]) & self.changes.keys()):
            print(f"The grid turns {', '.join(sorted(moot))} itself: left out of changes here.")
            self.changes = {f: v for f, v in self.changes.items() if f not in moot}
        self.vocab_size = self.changes.get("vocab_size", size.vocab_size or 50_000)
        self.whole_corpus = load_corpus(corpus, self.vocab_size)
        super().__init__(size, self.whole_corpus.limited(size), fresh, save_to, grid)
        print(self.about)

    @property
    def about(self) -> str:
        """Corpus and profile in two lines, for every output and figure."""
        corpus = self.corpus
        return (
            f"corpus {corpus.name} ({corpus.source}), {len(corpus.train):,} training and "
            f"{len(corpus.valid):,} validation tokens, vocabulary {corpus.tokenizer.size:,}\n"
            f"profile {self.profile.name}, {about_machine()['device']}, results in {self.home}"
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
        if name in TUNED:
            kept = results_folder(self.profile.name, self.corpus)
            losses = self._swept(self.root, name) or self._swept(kept, name)
            return scaled(campaign.tuned(name, self.profile, losses), self.profile)
        if name.endswith("_twin") and name not in registry:
            return twin(self._unchanged(name.removesuffix("_twin")))
        return scaled(find_experiment(name), self.profile)

    def _swept(self, folder: Path, name: str) -> dict[float, list[float]]:
        runs = [r for r in read_runs(folder, SWEEP)[0] if r.fingerprint == self.corpus.fingerprint]
        return campaign.swept(runs, TUNED[name], self.profile)

    def train(self, name: str, **choices) -> Run:
        """Train an experiment here as changed, go on with it, or load it if it has finished.

        `choices` are passed to `musota.train`. Whoever watches the notebook sees live curves.
        """
        from musota.workbook.widgets import live_view

        experiment, row = self.experiment(name), name
        if source := choices.get("continue_from"):
            experiment, _ = started_from(source, experiment, self.corpus)
        name = self.called(row, experiment)
        if self.changes and experiment == self._unchanged(row):
            print(f"The changes leave {row} as it is.")
        folder = self.folder / f"{name}-seed{self.seed}"
        wanted = experiment, self.corpus.fingerprint, self.seed
        same = [run for run in self.known if run.finished and run.identity == wanted]
        if same and not self.fresh and not (folder / "config.json").exists():
            print(f"{same[0].path}: finished before, loaded as it is.")
            self.deliver()
            return same[0]
        choices.setdefault("watch", live_view())
        if self.mirror:
            choices["copy"] = self.mirror.part(folder).push
        resume, profile = not self.fresh, self.profile.name
        run = train(
            experiment, self.corpus, folder, resume, self.seed, name=name, profile=profile,
            **choices,
        )  # fmt: skip
        self.deliver()
        return run

    def run_grid(self) -> tuple[dict[str, dict[int, Run]], list[Suspect]]:
        """Train the root-cause grid of this profile, or go on with it (see `suspects.grid`)."""
        cells, suspects, seeds = suspects_grid(self.profile.name)
        longest = "epochs" if "epochs" in cells else "original"  # to look inside afterwards
        seeds = [self.seed + n for n in seeds]
        try:
            how = {"known": self.known, "keep": (longest,)}
            how |= {**self._how, "changes": self.changes}
            return run_cells(cells, seeds, *self._place, **how), suspects
        finally:
            self.push()

    @property
    def _place(self) -> tuple[Profile, Corpus, Path]:
        return self.profile, self.corpus, self.folder

    @property
    def _how(self) -> dict:
        return {"fresh": self.fresh, "each": self.push}

    def carry_out(self, part: str, seeds: int) -> None:
        """Train one of `PARTS` of the plan with `seeds` seeds, or go on with it."""
        how = {**self._how, "quiet": False}
        if part == "sweep":
            profile, corpus, folder = self._place
            how["known"] = read_runs(self.root, SWEEP)[0]
            campaign.run_sweeps(profile, corpus, folder / SWEEP, self.seed, **how)
            return
        if part == "path":
            self.run_path(seeds)
            return
        cells = campaign.models()
        if part == "tuned":
            losses = {name: self._swept(self.root, name) for name in TUNED}
            cells = {n: Cell(campaign.tuned(n, self.profile, losses[n])) for n in TUNED}
        seeds = range(self.seed, self.seed + seeds)
        runs = run_cells(cells, seeds, *self._place, **how, known=self.known, keep=cells)
        for name in ("tuned",) if part == "tuned" else ("optimized", "redesigned"):
            if (run := runs[name][self.seed]).has_model:
                self.kept(f"ablations_{name}", measure_ablations, run, self.corpus)

    def run_path(self, seeds: int = 1) -> dict[str, Judged]:
        """Train the path from `optimized` to `redesigned`, or go on with it."""
        how = {**self._how, "known": read_runs(self.root, PATH)[0]}
        seeds = range(self.seed, self.seed + seeds)
        try:
            run_path(self.profile, self.corpus, self.folder / PATH, seeds, **how)
        finally:
            self.push()
        return read_path(self.folder, self.corpus.fingerprint)

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
        columns = {}
        for name in names:
            columns[name, "plan"] = find_experiment(name)
            here = f"profile {self.profile.name}" + (", changed" if self.changes else "")
            columns[name, here] = self.experiment(name)
        return fields_table(columns)


def tell(findings: Finding | Sequence[Finding]) -> None:
    """Show findings as a list of sentences."""
    findings = [findings] if isinstance(findings, Finding) else findings
    from IPython.display import Markdown, display

    display(Markdown("\n".join(f"- {finding.sentence}" for finding in findings)))


def _check_parameters(seed, fresh, save_to) -> None:
    check_seed(seed)
    if not isinstance(fresh, bool):
        raise MusotaError(f"fresh must be True or False, not {fresh!r}.")
    if not isinstance(save_to, (str, os.PathLike)) or "\0" in str(save_to):
        raise MusotaError(f"save_to must be the path of a folder, not {save_to!r}.")


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
