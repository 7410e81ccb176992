"""The sentence for people: what is wrong, which value, what to do."""

from __future__ import annotations

import difflib


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
