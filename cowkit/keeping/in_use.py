"""Whether a file that is about to be written or replaced is what a disk stands on that another process serves."""

from __future__ import annotations

import os

from cowkit.disk.files import is_same_file
from cowkit.errors import ControlError, OutputError


def refuse_served(path: str) -> None:
    """See that no running server's disk stands on the file at ``path``.

    :raises OutputError: one does.
    :raises ControlError: the runtime directory is not safe, so that nobody can tell.
    """
    if _is_there(path):
        _refuse(path, own=True)


def refuse_replacing_served(path: str) -> None:
    """See that an output which replaces what is at ``path`` takes no base from a disk that another process serves.

    What this process serves is for who writes the output: that spares what it reads. It costs one stat(2) while
    there is no such file.

    :raises OutputError: one does.
    """
    if _is_there(path):
        try:
            _refuse(path, own=False)
        except ControlError:
            pass  # from a runtime directory that is not safe, nobody can serve either


def _is_there(path: str) -> bool:
    try:
        os.stat(path)
    except (OSError, ValueError):
        return False  # who opens it says so
    return True


def _refuse(path: str, *, own: bool) -> None:
    from cowkit.diff.qcow2.header import backing_chain  # most outputs replace nothing, and do without these
    from cowkit.server.runtime import running

    for server in running():
        if not own and server.pid == os.getpid():
            continue
        if server.identity is not None and _is(path, server.identity):
            raise OutputError(
                f"cannot write {path}: it is the base of the disk {server.name} that process {server.pid} serves; end that first"
            )
        if server.base is not None and any(is_same_file(each, path) for each in backing_chain(server.base)):
            raise OutputError(
                f"cannot write {path}: the disk {server.name} that process {server.pid} serves stands on it, by way of its base "
                f"{server.base}; end that first"
            )


def _is(path: str, identity: tuple[int, int]) -> bool:
    from cowkit.server.runtime import identity_of

    try:
        return identity_of(path) == identity
    except (OSError, ValueError):
        return False
