"""The sentence for people: what is wrong, which value, what to do."""

import difflib
import os
import traceback
from contextlib import contextmanager


class MusotaError(ValueError):
    """A mistake the user can mend: one sentence saying what, which value, what to do."""


def nearest_name(kind: str, name: str, known) -> MusotaError:
    """The error for an unknown `name`, suggesting the closest of the `known` ones."""
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(known)}."
    return MusotaError(f"Unknown {kind} {name!r}: {hint}")


def check_seed(seed) -> None:
    """Raises MusotaError for what cannot seed a run."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise MusotaError(f"seed must be a whole number from 0 to {2**31 - 1}, not {seed!r}.")


# Never to blame for what somebody's own code raises.
_BLAMELESS = (os.path.dirname(__file__), os.path.dirname(os.__file__), "<")


@contextmanager
def blaming(whose: str):
    """Raises MusotaError for whatever somebody's own code raises within: its message, its line."""
    try:
        yield
    except MusotaError:
        raise
    except Exception as error:
        places = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError):
            places.append((error.filename or "", error.lineno))
        own = [p for p in places if not p[0].startswith(_BLAMELESS) and "-packages" not in p[0]]
        place = f" (line {own[-1][1]} of {own[-1][0]})" if own else ""
        said = (str(error).strip().splitlines() or [""])[0]
        raise MusotaError(f"{whose} raised {type(error).__name__}: {said}{place}") from error
