"""Names of classes, and the number of the class that a word means."""

import difflib
from collections.abc import Sequence

SHOWN = 10  # names in an error


def numbered(count: int) -> tuple[str, ...]:
    """The names "0", "1", ... of classes without other names."""
    return tuple(str(number) for number in range(count))


def class_number(word: str, names: Sequence[str], of: str) -> int:
    """The class of that name; or of that number, unless names are numbers themselves.

    >>> class_number("dog", ("cat", "dog"), of="the model"), class_number("0", ("cat", "dog"), "")
    (1, 0)

    Args:
        word: name or number.
        names: names of the classes 0, 1, ...
        of: owner of the classes, for errors.

    Raises:
        ValueError: there is no such class; the message has the nearest name.
    """
    if word in names:
        return names.index(word)
    if word.isdecimal() and int(word) < len(names) and not any(n.isdecimal() for n in names):
        return int(word)
    near = difflib.get_close_matches(word, names, n=1)
    known = f"did you mean {near[0]!r}?" if near else f"expected one of {listed(names)}"
    raise ValueError(f"{of} has no class {word!r}: {known}")


def listed(names: Sequence[str]) -> str:
    """Names as text, the first ten of a longer list."""
    shown = ", ".join(names[:SHOWN])
    return shown if len(names) <= SHOWN else f"{shown}, ... ({len(names):,} in all)"
