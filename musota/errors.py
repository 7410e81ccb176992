"""The user-facing error: one sentence with what is wrong, the value, and what to do."""

import difflib
import os
import traceback
from collections.abc import Mapping
from contextlib import contextmanager


class MusotaError(ValueError):
    """A mistake that the user can correct: one sentence with the value and advice."""


def find_named(kind: str, name: str, known):
    """`known[name]`, or `name` itself if `known` is a list of names. Raises MusotaError for an
    unknown name, with the closest of the known ones."""
    if name in [*known]:  # a list: the name may not be hashable
        return known[name] if isinstance(known, Mapping) else name
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}."
    raise MusotaError(f"Unknown {kind} {name!r}: {hint}")


# Code of this package, the standard library and no file: never the place of a user's mistake.
_NOT_THE_USERS = (*(os.path.dirname(file) + os.sep for file in (__file__, os.__file__)), "<")


@contextmanager
def blaming(whose: str):
    """A context in which any exception of the user's own code becomes a MusotaError with its type,
    message and line."""
    try:
        yield
    except MusotaError:
        raise
    except Exception as error:
        places = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError):
            places.append((error.filename or "", error.lineno))
        own = [p for p in places if not p[0].startswith(_NOT_THE_USERS) and "-packages" not in p[0]]
        place = f" (line {own[-1][1]} of {own[-1][0]})" if own else ""
        message = (str(error).strip().splitlines() or [""])[0]
        raise MusotaError(f"{whose} raised {type(error).__name__}: {message}{place}") from error
