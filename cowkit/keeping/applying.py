"""Applying a difference to its base, or to a copy: neither writes a file that somebody is using."""

from __future__ import annotations

import os
from collections.abc import Callable

from cowkit.diff.applying.copy import apply_to
from cowkit.diff.applying.in_place import apply_in_place, finish, target_of
from cowkit.diff.applying.report import ApplyReport
from cowkit.diff.identity import Progress
from cowkit.keeping.in_use import refuse_replacing_served, refuse_served


def apply_to_base(
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    base_format: str | None = None,
    full: bool | None = None,
    progress: Progress | None = None,
    on_finished: Callable[[ApplyReport], None] | None = None,
) -> ApplyReport:
    """See :func:`cowkit.diff.applying.in_place.apply_in_place`.

    :raises OutputError: the base is being served, too.
    """
    refuse_served(target_of(path, base))
    return apply_in_place(
        path, base=base, base_format=base_format, full=full, progress=progress, on_finished=on_finished
    )


def apply_to_copy(
    path: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    base_format: str | None = None,
    full: bool | None = None,
    progress: Progress | None = None,
) -> ApplyReport:
    """See :func:`cowkit.diff.applying.copy.apply_to`.

    :raises OutputError: the file that would be replaced is being served, too.
    """
    refuse_replacing_served(os.fspath(target))
    return apply_to(path, target, base=base, base_format=base_format, full=full, progress=progress)


def finish_base(base: str | os.PathLike[str]) -> ApplyReport | None:
    """See :func:`cowkit.diff.applying.in_place.finish`.

    :raises OutputError: the base is being served, too.
    """
    refuse_served(os.fspath(base))
    return finish(base)
