"""Where results are kept: runs, probes, pictures, and their copy on a Drive."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from matplotlib.figure import Figure

from musota.data.corpus import Corpus
from musota.errors import MusotaError
from musota.files import ROOT, as_path, cache_folder, sha256, system_error, write_json
from musota.plan.profiles import Profile
from musota.rules.findings import Finding
from musota.studies.ngrams import measure_ladder
from musota.studies.path import Judged
from musota.training.mirror import Mirror
from musota.training.runs import Run
from musota.workbook.evidence import GRID, Evidence, chosen_runs, read_evidence, read_rungs
from musota.workbook.naming import footer
from musota.workbook.records import read_probes, read_runs
from musota.workbook.style import save_figure

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
    """Where the results of a profile and corpus are kept, with `grid` those of the root-cause grid.
    Raises MusotaError for a folder that cannot be made."""

    def __init__(
        self, profile: Profile, corpus: Corpus, fresh: bool, save_to: str | os.PathLike, grid: bool
    ):
        self.profile, self.corpus, self.fresh = profile, corpus, fresh
        self.part = GRID if grid else ""
        # Where results belong, and where they are worked on: a Drive loses writes, a disk does not.
        self.home = self.root = results_folder(profile.name, corpus, save_to)
        if save_to:
            key = sha256(str(as_path(save_to).resolve()).encode())[:12]
            self.root = cache_folder() / "work" / key / self.home.name
        self.mirror, self.folder = None, self.root / self.part
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if save_to:
                self.mirror = Mirror(self.root, self.home)  # which makes the home
                self.mirror.pull()
        except OSError as error:
            instead = "set save_to to another"
            raise system_error(f"The results folder {self.home}", error, instead) from None

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

    def named(self, name: str) -> str:
        """`name` for a file, with the changes it rests on."""
        return ",".join([name, *(f"{field}={value}" for field, value in self.changes.items())])

    def kept(self, name: str, measure: Callable[..., dict], *arguments) -> dict:
        """What `measure(*arguments)` returns, measured once and kept as the probe `name`; anew for
        another text, or for a run with other weights."""
        of = {"fingerprint": self.corpus.fingerprint}
        for run in (argument for argument in arguments if isinstance(argument, Run)):
            # Of a run that has not finished, how far it is stands for its weights.
            of["weights"] = run.summary.get("weights_sha256", run.summary["epochs_done"])
        name = self.named(name)
        recorded = self.probes.get(name, {})
        if self.fresh or any(recorded.get(field) != value for field, value in of.items()):
            recorded = {**of, **measure(*arguments)}
            write_json(self.folder / f"{name}.json", recorded)
            self.push()
        return recorded

    @property
    def probes(self) -> dict[str, dict]:
        """What is recorded here besides runs, by name."""
        start = f"{self.part}/" if self.part else ""
        found = read_probes(self.root).items()
        return {name.removeprefix(start): data for name, data in found if name.startswith(start)}

    def known(self, part: str = "") -> list[Run]:
        """What is recorded in this folder or a part of it, packed or not."""
        return read_runs(self.root, part or self.part)[0]

    @property
    def footer(self) -> str:
        return footer(self.corpus.name, self.corpus.tokenizer.size, self.profile.name)

    @cached_property
    def ladder(self) -> dict[str, float]:
        """Perplexity of the measured rungs on valid, measured once."""
        recorded = read_rungs(self.probes, self.corpus.fingerprint)
        return recorded or self.kept("ladder", lambda: {"ppl": measure_ladder(self.corpus)})["ppl"]

    @property
    def recorded(self) -> Evidence:
        """The runs of this folder on this corpus, with the rungs."""
        self.ladder  # noqa: B018  measured, if it was not
        return read_evidence(self.folder, self.corpus.fingerprint)

    def evidence(self, *names: str) -> Evidence:
        """Recorded rows as changed here: of this folder, else, where it has not all of them, those
        that come with the repository; `.note` says so, or what is missing, in one sentence."""
        names = [self.called(name) for name in names]
        own = self.recorded.only(*names)
        missing = [name for name in names if name not in own.names]
        if not missing:
            return own
        note = f"{', '.join(missing)} not yet trained in {self.home}"
        for profile in COMMITTED:
            kept = read_evidence(ROOT / "results" / profile).only(*names)
            if {*kept.names} >= {*names}:
                note += f": here is profile {profile} as kept with the workbook."
                return dataclasses.replace(kept, note=note)
        return dataclasses.replace(own, note=f"{note}: run the notebook that trains it first.")

    def chosen(self, names: Sequence[str]) -> Evidence:
        """Any recorded runs, by label or folder (see `find_runs`); what stands in no folder here is
        sought in the repository's results."""
        here, kept = self.root.parent, ROOT / "results"

        def found(name: str) -> str:
            elsewhere = (as_path(name) / "config.json").exists() or (here / name).parent.is_dir()
            return name if elsewhere else str(kept / name)

        return chosen_runs([*map(found, names)], here, self.root.name)

    @property
    def path(self) -> dict[str, Judged]:
        """The path to the redesign as trained here, else as it comes with the repository."""
        folders = self.folder, *(ROOT / "results" / profile for profile in COMMITTED)
        return next(filter(None, (Evidence(folder, ()).path for folder in folders)), {})

    def record(self, name: str, findings: Sequence[Finding], **numbers) -> None:
        """Write `<name>.json` beside the results: what this notebook found.

        Raises MusotaError if results could not be copied to where they belong.
        """
        found, name = [dataclasses.asdict(finding) for finding in findings], self.named(name)
        write_json(self.folder / f"{name}.json", {**numbers, "findings": found})
        self.deliver()
        print(f"written: {self.home / name}.json")

    def show(
        self, figure: Figure, name: str, run: Run | None = None, about: str | None = None
    ) -> None:
        """Save a figure as `<name>.png` beside the results (or in a run's folder) and show it.

        `about` is the line under it, by default this corpus and profile.
        """
        path = run.path / f"{name}.png" if run else self.folder / f"{self.named(name)}.png"
        path.parent.mkdir(parents=True, exist_ok=True)  # a packed run's has none
        save_figure(figure, path, self.footer if about is None else about)
        from IPython.display import Image, display

        display(Image(data=path.read_bytes()))
