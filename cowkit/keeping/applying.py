"""Applying a difference to its base, which nobody may be using."""

from __future__ import annotations

import os
from collections.abc import Callable

from cowkit.diff.applying.in_place import apply_in_place, finish, target_of
from cowkit.diff.applying.report import ApplyReport
from cowkit.diff.identity import Progress
from cowkit.diff.qcow2.header import backing_chain
from cowkit.disk.files import is_same_file
from cowkit.errors import OutputError
from cowkit.server.runtime import identity_of, running


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
    _refuse_served(target_of(path, base))
    return apply_in_place(
        path, base=base, base_format=base_format, full=full, progress=progress, on_finished=on_finished
    )


def finish_base(base: str | os.PathLike[str]) -> ApplyReport | None:
    """See :func:`cowkit.diff.applying.in_place.finish`.

    :raises OutputError: the base is being served, too.
    """
    _refuse_served(os.fspath(base))
    return finish(base)


def _refuse_served(base: str) -> None:
    try:
        identity = identity_of(base)
    except (OSError, ValueError):
        return  # who opens it says so
    for server in running():
        if server.identity == identity:
            raise OutputError(
                f"cannot write {base}: it is the base of the disk {server.name} that process {server.pid} serves; end that first"
            )
        if server.base is not None and any(is_same_file(each, base) for each in backing_chain(server.base)):
            raise OutputError(
                f"cannot write {base}: the disk {server.name} that process {server.pid} serves stands on it, by way of its base "
                f"{server.base}; end that first"
            )
