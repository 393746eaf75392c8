"""What is said to the user on standard error: remarks, and errors in one line each."""

from __future__ import annotations

import sys

from cowkit.errors import CowkitError

_ESCAPED = {number: f"\\x{number:02x}" for number in (*range(32), *range(127, 160))}
"""What would move a terminal's cursor, or worse: names may contain anything."""


def note(text: str) -> None:
    """Tell the user ``text``; whether anybody reads it makes no difference."""
    try:
        print(f"cowkit: {printable(text)}", file=sys.stderr, flush=True)
    except (OSError, ValueError):
        pass


def complain(error: Exception) -> None:
    """Say ``error`` in one line."""
    if isinstance(error, CowkitError):
        text = str(error)
    elif isinstance(error, OSError):
        text = (error.strerror or str(error)) if error.filename is None else f"{error.filename}: {error.strerror}"
    else:
        text = f"internal error: {type(error).__name__}: {error} (COWKIT_DEBUG=1 shows where)"
    note(" ".join(text.split("\n")))


def printable(text: str) -> str:
    """``text`` without what would move a terminal's cursor."""
    return text.translate(_ESCAPED)
