"""What a misspelt name or value probably stands for."""

from collections.abc import Collection
from difflib import get_close_matches


def closest(word: object, known: Collection[str]) -> str | None:
    """The known name that a misspelled one probably stands for."""
    return next(iter(get_close_matches(str(word), known, n=1)), None)


def one_of(value: object, legal: Collection[str]) -> str:
    """What an option must be, with its full stop: the legal values, and the one that was probably meant."""
    close = closest(value, legal)
    return f"one of {', '.join(map(repr, legal))}" + (f"; did you mean {close!r}?" if close else ".")
