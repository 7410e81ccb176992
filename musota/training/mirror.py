"""A second copy of the results, on a slower or less reliable disk such as a mounted Drive."""

from __future__ import annotations

import errno
import filecmp
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from musota.errors import MusotaError
from musota.training.runs import Run


@dataclass(frozen=True)
class Mirror:
    """`local` is worked in, `remote` keeps a copy. Both are folders of results, or of one run.

    `remote` is made at once; raises OSError where that fails.
    """

    local: Path
    remote: Path
    pushed: dict[Path, tuple[int, int]] = field(default_factory=dict, compare=False)
    root: tuple[Path, int] | None = None  # the whole copy's folder and the disk it lies on
    own: set[Path] = field(default_factory=set, compare=False)  # runs that are trained here

    def __post_init__(self):
        if not self.root:
            self.remote.mkdir(parents=True, exist_ok=True)
            object.__setattr__(self, "root", (self.remote, self.remote.stat().st_dev))

    def part(self, folder: Path) -> Mirror:
        """The same for the folder, inside `local`, of a run that is trained here."""
        self.own.add(folder)
        remote = self.remote / folder.relative_to(self.local)
        return Mirror(folder, remote, self.pushed, self.root, self.own)

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
            if not theirs.isdisjoint(path.parents):
                continue
            copy = self.remote / path.relative_to(self.local)
            stat = path.stat()
            state = stat.st_size, stat.st_mtime_ns
            # A checkpoint's name holds its hash; other files are compared once a process.
            known = path.name.startswith("step-") or self.pushed.get(copy) == state
            same = copy.exists() and copy.stat().st_size == stat.st_size
            if not same or not (known or filecmp.cmp(path, copy, shallow=False)):
                copy.parent.mkdir(parents=True, exist_ok=True)
                _copy(path, copy)
            self.pushed[copy] = state
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
                copy.parent.mkdir(parents=True, exist_ok=True)
                _copy(path, copy)


def _files(folder: Path) -> Iterator[Path]:
    """Files in the order in which they are safe to copy: what others refer to comes first."""
    found = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name[0] != "." and path.parent.name != "executed"
    ]
    late = ("summary.json", "config.json")
    return iter(sorted(found, key=lambda path: (path.name in late, path)))


def _copy(path: Path, copy: Path) -> None:
    temporary = copy.with_name(f".{copy.name}-{os.getpid()}")
    try:
        shutil.copyfile(path, temporary)
        os.replace(temporary, copy)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


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
