"""Atomic writes, and JSON files that carry a hash of their own content."""

import errno
import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from musota.errors import MusotaError

SEAL = "sha256"


def write_together(writes: Mapping[Path, Callable[[Path], object]]) -> None:
    """Write each file with `write(temporary_path)`, in order; when all are on the disk, move them
    into place: never half a file."""
    unique = uuid.uuid4().hex[:12]  # also among threads, and machines that share a folder
    temporary = {path: path.with_name(f".{path.name}-{unique}") for path in writes}
    try:
        for path, write in writes.items():
            write(temporary[path])
            with temporary[path].open("rb+") as file:
                os.fsync(file.fileno())
        for path in writes:
            os.replace(temporary[path], path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a full disk's error names no file
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`write_together` of one file."""
    write_together({path: write})


def write_bytes(path: Path, data: bytes) -> None:
    write_whole(path, lambda target: target.write_bytes(data))


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 with the line ends as they are, on every system."""
    write_bytes(path, text.encode())


def write_json(path: Path, data) -> None:
    """Write indented JSON, with null for infinite numbers and NaN."""
    write_text(path, _dump(data))


def write_sealed(path: Path, data: dict) -> None:
    """`write_json`, with the sha256 of the rest as the last entry."""
    write_json(path, {**data, SEAL: sha256(_dump(data).encode())})


def read_sealed(path: Path) -> dict:
    """The data that `write_sealed` wrote. Raises MusotaError if a single byte differs."""
    try:
        text = path.read_bytes().decode()
        data = json.loads(text)
        whole = _dump(data) == text
        if data.pop(SEAL) != sha256(_dump(data).encode()) or not whole:
            raise ValueError("its sha256 does not fit")
    except FileNotFoundError:
        raise MusotaError(f"There is no {path}: not a run folder.") from None
    except OSError as error:
        raise MusotaError(f"{path} cannot be read: {error.strerror}.") from None
    except KeyError:
        raise MusotaError(f"{path} has no sha256: it is not the record of a run.") from None
    except (ValueError, AttributeError, TypeError):
        raise MusotaError(
            f"{path} is damaged or was changed by hand: restore it, or train the run again with "
            "fresh=True (--fresh)."
        ) from None
    return data


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def jsonable(value):
    """`value` with None in place of infinite numbers and NaN."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _dump(data) -> str:
    return json.dumps(jsonable(data), indent=1, ensure_ascii=False) + "\n"


def as_path(place: str | os.PathLike) -> Path:
    """A path, with `~` for the home folder. Raises MusotaError for what is not a path."""
    try:
        return Path(place).expanduser()
    except (TypeError, RuntimeError) as error:
        raise MusotaError(f"{place!r} cannot be used as a path here: {error}") from None


def system_error(what: str, error: OSError, instead: str) -> MusotaError:
    """The user-facing error for an error of the operating system; `instead` is the advice."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = f"make room there, or {instead}" if full else instead
    return MusotaError(f"{what} cannot be used ({error.strerror or error}): {advice}.")


def sentence(error: Exception) -> str:
    """The message of an error, with advice where it is one of the operating system."""
    if isinstance(error, OSError) and error.filename:
        error = system_error(error.filename, error, "choose another folder (save_to)")
    return str(error)


def cache_folder() -> Path:
    """`$MUSOTA_CACHE`, else ~/.cache/musota; created if missing."""
    folder = as_path(os.environ.get("MUSOTA_CACHE") or "~/.cache/musota")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        instead = "set MUSOTA_CACHE to another"
        raise system_error(f"The cache folder {folder}", error, instead) from None
    return folder
