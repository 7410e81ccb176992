"""A second copy of the results, on a slower or less reliable disk such as a mounted Drive."""

import errno
import filecmp
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from musota.errors import MusotaError
from musota.files import write_whole
from musota.training.runs import Run


@dataclass(frozen=True)
class Mirror:
    """`local` is worked in, `remote` keeps a copy. Both are folders of results, or of one run.

    `remote` is made at once; raises OSError where that fails.
    """

    local: Path
    remote: Path
    root: tuple[Path, int] | None = None  # the whole copy's folder and the disk it lies on
    own: set[Path] = field(default_factory=set, compare=False)  # runs that are trained here

    def __post_init__(self):
        if not self.root:
            self.remote.mkdir(parents=True, exist_ok=True)
            object.__setattr__(self, "root", (self.remote, self.remote.stat().st_dev))

    def part(self, folder: Path) -> "Mirror":
        """The same for the folder, inside `local`, of a run that is trained here."""
        self.own.add(folder)
        return Mirror(folder, self.remote / folder.relative_to(self.local), self.root, self.own)

    def push(self) -> None:
        """Copy what is new or changed, each file whole or not at all; raises OSError.

        Checkpoints that are no longer kept here go there, too, once the newer ones have arrived. A
        run that got further there is another machine's, and is left alone.
        """
        root, disk = self.root
        if not root.is_dir() or root.stat().st_dev != disk:
            # A Drive that is no longer mounted: what is written there now would be lost.
            raise FileNotFoundError(errno.ENOENT, "it has vanished", str(root))
        self.remote.mkdir(parents=True, exist_ok=True)
        theirs = {self.local / run for run in _further(self.remote, self.local)} - self.own
        for path in _files(self.local):
            copy = self.remote / path.relative_to(self.local)
            if theirs.isdisjoint(path.parents) and not _same(path, copy):
                _copy(path, copy)
        for copy in self.remote.rglob("checkpoints/step-*"):
            here = self.local / copy.relative_to(self.remote)
            newest = max((path.name for path in here.parent.glob("step-*")), default="")
            if not here.exists() and (here.parents[1] in self.own or copy.name < newest):
                os.truncate(copy, 0)  # a Drive's bin counts, too
                copy.unlink()

    def pull(self) -> None:
        """Copy here what only the other has, and runs that got further there."""
        for run in _further(self.remote, self.local):
            shutil.rmtree(self.local / run, ignore_errors=True)
        for path in _files(self.remote):
            copy = self.local / path.relative_to(self.remote)
            # A run that stands here got at least as far: older checkpoints are of no use to it.
            is_old = path.name.startswith("step-") and (copy.parents[1] / "config.json").exists()
            if not copy.exists() and not is_old:
                _copy(path, copy)


def _files(folder: Path) -> list[Path]:
    """Files in the order in which they are safe to copy: what others refer to comes first."""
    found = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name[0] != "." and path.parent.name != "executed"
    ]
    late = ("summary.json", "config.json")
    return sorted(found, key=lambda path: (path.name in late, path))


def _same(path: Path, copy: Path) -> bool:
    """A checkpoint's name holds its hash; filecmp reads what has changed since it was asked."""
    if not copy.exists() or copy.stat().st_size != path.stat().st_size:
        return False
    return path.name.startswith("step-") or filecmp.cmp(path, copy, shallow=False)


def _copy(path: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    write_whole(copy, lambda target: shutil.copyfile(path, target))


def _further(one: Path, other: Path) -> set[Path]:
    """The runs, as paths inside, that got further in one folder than in the other."""
    described = [path.parent.relative_to(one) for path in one.rglob("config.json")]
    runs = [run for run in described if run.name != "best"]
    return {run for run in runs if _progress(one / run) > _progress(other / run)}


def _progress(folder: Path) -> tuple[bool, str]:
    """(finished, newest checkpoint) of a run's folder; a run that cannot be read has none."""
    try:
        finished = (folder / "config.json").exists() and Run(folder).finished
    except MusotaError:
        finished = False
    names = [path.name[:14] for path in (folder / "checkpoints").glob("step-*")]
    return finished, max(names, default="")
