"""A second copy of a results folder, on a disk that may be slow or disappear, like Google Drive."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from musota.errors import MusotaError
from musota.files import cache_folder, sha256, write_whole

DRIVE = Path("/content/drive")  # where Colab mounts Google Drive


class SavedCopy:
    """A folder `local` in the cache, to work in, and its copy at `remote`. `own`: the folders of
    the runs trained here; those of other machines are never changed at `remote`."""

    def __init__(self, remote: Path):
        """Copies from `remote` what is missing here, and runs that another machine has continued.
        Raises OSError for an unusable folder, MusotaError for a Drive that is not mounted."""
        if remote.absolute().is_relative_to(DRIVE) and not DRIVE.is_mount():
            raise MusotaError(f"{DRIVE} is not mounted: click the folder icon, then “Mount Drive”.")
        place = sha256(str(remote.parent.absolute()).encode())[:12]
        self.local, self.remote = cache_folder() / "work" / place / remote.name, remote
        self.own: set[Path] = set()
        remote.mkdir(parents=True, exist_ok=True)
        self.disk = remote.stat().st_dev
        started_over = set()
        for run in remote.iterdir():
            (start, step), (own_start, own_step) = map(_progress, (run, self.local / run.name))
            if own_start and start != own_start:
                started_over.add(run)
            elif own_start and step > own_step:  # another machine has continued it
                shutil.rmtree(self.local / run.name)
        for path in _files(remote):
            here = self.local / path.relative_to(remote)
            if not here.exists() and started_over.isdisjoint(path.parents):
                _copy(path, here)

    def push(self) -> None:
        """Copy what is new of the runs trained here and of all files next to them, and remove
        summaries and checkpoints at `remote` that are gone here. Raises OSError."""
        self._check_disk()
        self._remove_gone("*/summary.json")  # first: of an earlier run it does not fit the rest
        files = [path for path in _files(self.local) if self._is_own(path)]
        self._copy_out(path for path in files if not _same(path, self._there(path)))
        self._remove_gone("*/checkpoints/step-*")

    def _remove_gone(self, pattern: str) -> None:
        for there in self.remote.glob(pattern):
            here = self.local / there.relative_to(self.remote)
            if self._is_own(here) and not here.exists():
                if there.suffix != ".json":
                    os.truncate(there, 0)  # a Drive keeps what is removed in its bin
                there.unlink()

    def save(self, *files: Path) -> None:
        """Copy these files, or all that is new. Raises MusotaError where that fails."""
        try:
            self._copy_out(files) if files else self.push()
        except OSError as error:
            raise MusotaError(
                f"The results could not be copied to {self.remote} ({error.strerror}): free "
                "some space there, or mount it again, and run this once more."
            ) from None

    def _check_disk(self) -> None:
        if not self.remote.is_dir() or self.remote.stat().st_dev != self.disk:
            raise FileNotFoundError(0, "it is no longer there", str(self.remote))

    def _copy_out(self, files: Iterable[Path]) -> None:
        self._check_disk()
        for path in files:
            _copy(path, self._there(path))

    def _there(self, path: Path) -> Path:
        return self.remote / path.relative_to(self.local)

    def _is_own(self, path: Path) -> bool:
        """Whether `push` takes a file; tables, which other machines write too, are for `save`."""
        top = self.local / path.relative_to(self.local).parts[0]
        return top in self.own or (top.is_file() and top.suffix not in (".csv", ".lock"))


def _files(folder: Path) -> list[Path]:
    """All files, those last that refer to others."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")
    return sorted(found, key=lambda path: (path.name in ("summary.json", "config.json"), path))


def _progress(run: Path) -> tuple[bytes, str]:
    """The first record of a run, and the step of its newest checkpoint. The record contains a time,
    so it differs if the run was started over."""
    records = run / "metrics.jsonl"
    first = records.read_bytes().partition(b"\n")[0] if records.exists() else b""
    return first, max((path.name[:14] for path in run.glob("checkpoints/step-*")), default="")


def _same(path: Path, copy: Path) -> bool:
    if not copy.exists() or copy.stat().st_size != path.stat().st_size:
        return False  # the hash of a checkpoint stands in its name
    return path.name.startswith("step-") or sha256(path.read_bytes()) == sha256(copy.read_bytes())


def _copy(path: Path, copy: Path) -> None:
    copy.parent.mkdir(parents=True, exist_ok=True)
    write_whole(copy, lambda target: shutil.copyfile(path, target))
