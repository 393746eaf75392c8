"""A base that `cowkit apply --in-place` was writing to when it was killed: neither the old one nor the new one."""

from __future__ import annotations

import os

from cowkit.errors import BaseOpenError

_SUFFIX = ".cowkit-journal"


def journal_of(path: str) -> str:
    """Where the journal of an unfinished `cowkit apply --in-place` to the file at ``path`` is."""
    return os.path.realpath(path) + _SUFFIX


def unready_journal_of(path: str) -> str:
    """Where that journal is until it is whole; without a living `cowkit apply`, what a killed one left, which does not count."""
    return journal_of(path) + ".new"


def refuse_unfinished(given: str, path: str) -> None:
    """Let a base alone that is half written.

    :param given: the base as the user calls it.
    :raises BaseOpenError: it is.
    """
    if os.path.lexists(journal_of(path)):
        raise BaseOpenError(
            f"base {given} is half written: `cowkit apply --in-place` is at work on it, or was interrupted; finish it with "
            f"`cowkit apply --finish {given}`"
        )
