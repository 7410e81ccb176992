"""Files that are whole or not there, and that show when they were damaged."""

import errno
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from musota.errors import MusotaError

ROOT = Path(__file__).resolve().parents[1]  # of the checkout
SEAL = "sha256"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary_path)` make a file, then move it into place: never half a file."""
    write_together({path: write})


def write_together(writes: Mapping[Path, Callable[[Path], object]]) -> None:
    """`write_whole` of files that belong together: all are on the disk before the first is moved
    into place."""
    temporary = {path: path.with_name(f".{path.name}-{os.getpid()}") for path in writes}
    try:
        for path, write in writes.items():
            write(temporary[path])
            with temporary[path].open("rb+") as file:  # on the disk before it takes another's place
                os.fsync(file.fileno())
        for path in writes:
            os.replace(temporary[path], path)
    except BaseException as error:
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a full disk's names none
        for path in temporary.values():
            path.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    write_whole(path, lambda target: target.write_bytes(data))


def write_text(path: Path, text: str) -> None:
    """UTF-8, and line ends as they stand, on every system: texts are hashed."""
    write_bytes(path, text.encode())


def write_json(path: Path, data) -> None:
    """Indented, with null for the numbers that JSON has no word for."""
    write_text(path, _dump(data))


def write_sealed(path: Path, data: dict) -> None:
    """`write_json` with the hash of the rest as a last entry, see `read_sealed`."""
    write_json(path, _sealed(data))


def _sealed(data: dict) -> dict:
    return {**data, SEAL: sha256(_dump(data).encode())}


def read_sealed(path: Path) -> dict:
    """What `write_sealed` wrote. Raises MusotaError if a single byte differs."""
    try:
        text = path.read_bytes().decode()
        data = json.loads(text)
        del data[SEAL]
        if text != _dump(_sealed(data)):
            raise ValueError("its sha256 does not fit")
    except FileNotFoundError:
        raise MusotaError(f"There is no {path}: not a run folder.") from None
    except OSError as error:
        raise MusotaError(f"{path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise MusotaError(
            f"{path} is damaged or was changed by hand: restore it, or train the run again with "
            "fresh=True (--fresh)."
        ) from None
    return data


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def jsonable(value):
    """`value` with None for the numbers JSON has no word for."""
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
    """A path as people write it, `~` being their home. Raises MusotaError for what is none."""
    try:
        return Path(place).expanduser()
    except (TypeError, RuntimeError) as error:  # no path; nobody's home
        raise MusotaError(f"{place!r} is no path that can be used here: {error}") from None


def system_error(what: str, error: OSError, instead: str) -> MusotaError:
    """What the system refused, as a sentence with a way out."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    advice = f"make room there, or {instead}" if full else instead
    return MusotaError(f"{what} cannot be used ({error.strerror or error}): {advice}.")


def sentence(error: Exception) -> str:
    """An error as people read it, where nothing above knows more of it."""
    if isinstance(error, OSError) and error.filename:
        error = system_error(error.filename, error, "choose another folder (save_to)")
    return str(error)


def cache_folder() -> Path:
    folder = as_path(os.environ.get("MUSOTA_CACHE") or "~/.cache/musota")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        instead = "set MUSOTA_CACHE to another"
        raise system_error(f"The cache folder {folder}", error, instead) from None
    return folder
