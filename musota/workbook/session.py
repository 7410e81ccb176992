"""What a notebook needs at hand: checked parameters, the corpus, scaled experiments, results."""

from __future__ import annotations

import ast
import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from musota.data.corpus import Corpus, load_corpus
from musota.errors import MusotaError, check_seed, nearest_name
from musota.files import as_path, cache_folder, sentence, sha256, system_error, write_json
from musota.plan.config import Experiment
from musota.plan.profiles import Profile, find_profile, scaled, twin
from musota.plan.registry import TUNED, find_experiment
from musota.plan.suspects import Cell, Suspect, grid
from musota.rules.findings import Finding
from musota.rules.plan import plan_does_not_apply
from musota.studies import campaign
from musota.studies.cells import run_cells
from musota.studies.ngrams import measure_ladder
from musota.studies.probes import measure_ablations
from musota.training.machine import about_machine
from musota.training.mirror import Mirror
from musota.training.runs import Run
from musota.training.trainer import train
from musota.workbook.evidence import GRID, SWEEP, Evidence, footer, read_evidence, read_rungs
from musota.workbook.records import read_probes, read_runs
from musota.workbook.style import save_figure
from musota.workbook.tables import fields_table

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = ("profile", "corpus", "seed", "fresh", "save_to")
PARTS = ("models", "sweep", "tuned")  # of the plan carried out with several seeds
COMMITTED = ("full", "study")  # results that come with the repository, best first


def results_folder(profile: str, corpus: Corpus, save_to: str | os.PathLike = "") -> Path:
    """Where results of a profile and corpus belong: WikiText-2 under the profile's bare name, any
    other text under a name that ends in its fingerprint, whatever the text is called now."""
    base = as_path(save_to or ROOT / "results")
    if corpus.label == "wikitext-2":
        return base / profile
    same_text = sorted(base.glob(f"{profile}-*-{corpus.text_hash[:8]}"))
    return same_text[0] if same_text else base / f"{profile}-{corpus.label}"


class Results:
    """Where the results of a profile and corpus are kept: runs, probes, pictures, and their copy.

    With `grid` it is the part of the root-cause grid. Raises MusotaError for a folder that cannot
    be made.
    """

    def __init__(
        self, profile: Profile, corpus: Corpus, fresh: bool, save_to: str | os.PathLike, grid: bool
    ):
        self.profile, self.corpus, self.fresh = profile, corpus, fresh
        self.part = GRID if grid else ""
        # Where results belong, and where they are worked on: a Drive loses writes, a disk does not.
        self.home = work = results_folder(self.profile.name, self.corpus, save_to)
        if save_to:
            key = sha256(str(as_path(save_to).resolve()).encode())[:12]
            work = cache_folder() / "work" / key / self.home.name
        self.mirror, self.folder = None, work / self.part
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            if save_to:
                self.mirror = Mirror(work, self.home)
                self.mirror.pull()
        except OSError as error:
            instead = "set save_to to another"
            raise system_error(f"The results folder {self.home}", error, instead) from None
        self.root = work

    def push(self) -> bool:
        """Copy what is new to where results belong; False, and a sentence, where that fails."""
        try:
            if self.mirror:
                self.mirror.push()
        except OSError as error:
            print(f"Not copied to {self.home}: {error.strerror}. It stands in {self.folder}.")
            return False
        return True

    def deliver(self) -> None:
        """`push`, raising MusotaError where that fails: nothing ends well that is not copied."""
        if not self.push():
            raise MusotaError(
                f"The results could not be copied to {self.home}: make room there, or mount it "
                "again, and do this once more."
            )

    def kept(self, name: str, measure: Callable[..., dict], *arguments) -> dict:
        """What `measure(*arguments)` returns, measured once and kept as the probe `name`."""
        fingerprint = self.corpus.fingerprint
        recorded = self.probes.get(name, {})
        if recorded.get("fingerprint") == fingerprint and not self.fresh:
            return recorded
        measured = measure(*arguments)
        write_json(self.folder / f"{name}.json", {"fingerprint": fingerprint, **measured})
        self.push()
        return measured

    @property
    def probes(self) -> dict[str, dict]:
        """What is recorded here besides runs, by name."""
        found = read_probes(self.root)
        start = f"{self.part}/" if self.part else ""
        return {name.removeprefix(start): v for name, v in found.items() if name.startswith(start)}

    @property
    def known(self) -> list[Run]:
        """What is recorded in this folder, packed or not."""
        return read_runs(self.root, self.part)[0]

    @property
    def footer(self) -> str:
        return footer(self.corpus.name, self.corpus.tokenizer.size, self.profile.name)

    @property
    def recorded(self) -> Evidence:
        """The runs of this folder on this corpus, with the rungs."""
        self.ladder  # noqa: B018  measured, if it was not
        return read_evidence(self.folder, self.corpus.fingerprint)

    def evidence(self, *names: str) -> Evidence:
        """Recorded rows: of this folder, else, where it has not all of them, those that come with
        the repository; `.note` says so, or what is missing, in one sentence."""
        own = self.recorded.only(*names)
        missing = [name for name in names if name not in own.names]
        if not missing:
            return own
        note = f"{', '.join(missing)} not yet trained in {self.home}"
        for profile in COMMITTED:
            kept = read_evidence(ROOT / "results" / profile).only(*names)
            if kept.names >= set(names):
                note += f": here is profile {profile} as kept with the workbook."
                return dataclasses.replace(kept, note=note)
        return dataclasses.replace(own, note=f"{note}: run the notebook that trains it first.")

    @cached_property
    def ladder(self) -> dict[str, float]:
        """Perplexity of the measured rungs on valid, measured once."""
        fingerprint = self.corpus.fingerprint
        if rungs := read_rungs(self.probes, fingerprint):
            return rungs
        rungs = measure_ladder(self.corpus)
        write_json(self.folder / "ladder.json", {"fingerprint": fingerprint, "ppl": rungs})
        return rungs

    def record(self, name: str, findings: Sequence[Finding], **numbers) -> None:
        """Write `<name>.json` beside the results: what this notebook found.

        Raises MusotaError if results could not be copied to where they belong.
        """
        found = [dataclasses.asdict(finding) for finding in findings]
        write_json(self.folder / f"{name}.json", {**numbers, "findings": found})
        self.deliver()
        print(f"written: {self.home / name}.json")

    def show(
        self, figure: Figure, name: str, run: Run | None = None, about: str | None = None
    ) -> None:
        """Save a figure as `<name>.png` beside the results (or in a run's folder) and show it.

        `about` is the line under it, by default this corpus and profile.
        """
        path = (run.path if run else self.folder) / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)  # a packed run's has none
        save_figure(figure, path, self.footer if about is None else about)
        from IPython.display import Image, display

        display(Image(data=path.read_bytes()))


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
        grid: bool = False,
    ):
        _plain_errors()
        _refuse_unknown_parameters()
        size = find_profile(profile, grid)
        _check_parameters(seed, fresh, save_to)
        self.seed = seed
        self.whole_corpus = load_corpus(corpus, size.vocab_size or 50_000)
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
        vocab_size = self.profile.vocab_size or 50_000
        return plan_does_not_apply(self.corpus.name, vocab_size, self.profile.name)

    def experiment(self, name: str) -> Experiment:
        """A row of the registry, or `<row>_twin`, at this profile's size."""
        if name in TUNED:
            kept = results_folder(self.profile.name, self.corpus)
            losses = self._swept(self.root, name) or self._swept(kept, name)
            return scaled(campaign.tuned(name, self.profile, losses), self.profile)
        if name.endswith("_twin"):
            return twin(self.experiment(name.removesuffix("_twin")))
        return scaled(find_experiment(name), self.profile)

    def _swept(self, folder: Path, name: str) -> dict[float, list[float]]:
        runs = [r for r in read_runs(folder, SWEEP)[0] if r.fingerprint == self.corpus.fingerprint]
        return campaign.swept(runs, TUNED[name], self.profile)

    def train(self, name: str, **choices) -> Run:
        """Train an experiment here, go on with it, or load it if it has finished.

        `choices` are passed to `musota.train`. Whoever watches the notebook sees live curves.
        """
        from musota.workbook.widgets import live_view

        experiment, folder = self.experiment(name), self.folder / f"{name}-seed{self.seed}"
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
        cells, suspects, seeds = grid(self.profile.name)
        longest = "epochs" if "epochs" in cells else "original"  # to look inside afterwards
        seeds = [self.seed + n for n in seeds]
        try:
            how = {"known": self.known, "keep": (longest,)}
            return run_cells(cells, seeds, *self._place, **self._how, **how), suspects
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
        cells = campaign.models()
        if part == "tuned":
            losses = {name: self._swept(self.root, name) for name in TUNED}
            cells = {n: Cell(campaign.tuned(n, self.profile, losses[n])) for n in TUNED}
        seeds = range(self.seed, self.seed + seeds)
        runs = run_cells(cells, seeds, *self._place, **how, known=self.known, keep=cells)
        looked = "tuned" if part == "tuned" else "optimized"
        if runs[looked][self.seed].has_model:
            self.kept(
                f"ablations_{looked}", measure_ablations, runs[looked][self.seed], self.corpus
            )

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
            columns[name, f"profile {self.profile.name}"] = self.experiment(name)
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
    for source in cells:
        if source.startswith("# Parameters\n"):  # the cell papermill injects
            for statement in ast.parse(source).body:
                name = statement.targets[0].id
                if name not in PARAMETERS:
                    raise nearest_name("notebook parameter", name, PARAMETERS)


def _plain_errors() -> None:
    """In a notebook, show a MusotaError, or what the system refuses, without a traceback."""
    try:
        shell = get_ipython()
    except NameError:
        return

    def show(shell, kind, error, _, tb_offset=None):
        shell._showtraceback(kind, error, [f"{kind.__name__}: {sentence(error)}"])

    shell.set_custom_exc((MusotaError, OSError), show)
