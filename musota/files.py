"""Atomic writes, and JSON files that carry a hash of their own content."""

import errno
import hashlib
import json
import math
import os
import uuid
from collections.abc import Callable
from pathlib import Path

from musota.errors import MusotaError

CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"  # files of a run
SEAL = "sha256"
START_OVER = "--fresh (in a notebook fresh = True, in musota.train resume=False)"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file with `write(temporary_path)` and, when it is on the disk, move it into place:
    never half a file."""
    unique = uuid.uuid4().hex[:12]  # also among threads, and machines that share a folder
    temporary = path.with_name(f".{path.name}-{unique}")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a full disk's error names no file
        raise
    finally:
        temporary.unlink(missing_ok=True)


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
    write_text(path, _sealed(data))


def read_sealed(path: Path) -> dict:
    """The data that `write_sealed` wrote. Raises MusotaError if a single byte differs."""
    try:
        text = path.read_bytes().decode()
        data = json.loads(text)
        del data[SEAL]
        if text == _sealed(data):
            return data
    except OSError as error:
        raise MusotaError(f"No run can be read from {path}: {error.strerror}.") from None
    except KeyError:
        why = "not the record of a run (a saved model is loaded with CausalLM.from_pretrained)"
        raise MusotaError(f"{path} has no hash: it is {why}.") from None
    except (ValueError, TypeError):
        pass  # no JSON, or no object
    damaged = f"{path} is damaged or was changed by hand"
    raise MusotaError(f"{damaged}: restore it, or train again with {START_OVER}.")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def jsonable(value):
    """`value` with None in place of infinite numbers and NaN."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def nan_for_null(value):
    """What was read from JSON, with nan where the records have null for a number that is not
    finite."""
    if isinstance(value, dict):
        return {key: nan_for_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nan_for_null(item) for item in value]
    return math.nan if value is None else value


def _dump(data) -> str:
    return json.dumps(jsonable(data), indent=1, ensure_ascii=False) + "\n"


def _sealed(data: dict) -> str:
    return _dump({**data, SEAL: sha256(_dump(data).encode())})


def as_path(place: str | os.PathLike) -> Path:
    """A path, with `~` for the home folder. Raises MusotaError for what is not a path, or
    cannot be encoded in UTF-8, as records are."""
    try:
        path = Path(place).expanduser()
        if b"\0" in os.fspath(path).encode():
            raise ValueError("it has a null character")
        return path
    except UnicodeEncodeError:
        raise MusotaError(f"The name of {place!r} is not UTF-8: rename it.") from None
    except (TypeError, ValueError, RuntimeError) as error:
        raise MusotaError(f"{place!r} cannot be used as a path here: {error}") from None


def sentence(error: Exception, advice: str = "") -> str:
    """The message of an error, with advice where it is one of the operating system."""
    if not (isinstance(error, OSError) and error.filename):
        return str(error)
    if not advice:
        advice = "check the path" if error.errno == errno.ENOENT else "choose another folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = f"free some space there, or {advice}"
    return f"{error.filename} cannot be used ({error.strerror}): {advice}."


def cache_folder() -> Path:
    """`$MUSOTA_CACHE`, else ~/.cache/musota; created if missing."""
    folder = as_path(os.environ.get("MUSOTA_CACHE") or "~/.cache/musota")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MusotaError(sentence(error, "set MUSOTA_CACHE to another folder")) from None
    return folder
