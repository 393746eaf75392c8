"""Whether a file that is about to be written or replaced is what a disk stands on that another process serves."""

from __future__ import annotations

import os

from cowkit.errors import ControlError, OutputError
from cowkit.server.runtime import identity_of, running


def refuse_served(path: str) -> None:
    """See that no running server's disk stands on the file at ``path``.

    :raises OutputError: one does.
    :raises ControlError: the runtime directory is not safe, so that nobody can tell.
    """
    try:
        identity = identity_of(path)
    except (OSError, ValueError):
        return  # who opens it says so
    _refuse(path, identity, others=False)


def refuse_replacing_served(path: str) -> None:
    """See that an output which replaces what is at ``path`` takes no base from a disk that another process serves.

    What this process serves is for who writes the output: that spares what it reads. It costs one stat(2) while
    there is no such file.

    :raises OutputError: one does.
    """
    try:
        identity = identity_of(path)
    except (OSError, ValueError):
        return
    try:
        _refuse(path, identity, others=True)
    except ControlError:
        pass  # in a runtime directory that is not safe, nobody can serve either


def _refuse(path: str, identity: tuple[int, int], *, others: bool) -> None:
    for server in running():
        if others and server.pid == os.getpid():
            continue
        if server.identity == identity:
            raise OutputError(
                f"cannot write {path}: it is the base of the disk {server.name} that process {server.pid} serves; end that first"
            )
        if server.base is not None and any(_is(each, identity) for each in _below(server.base)):
            raise OutputError(
                f"cannot write {path}: the disk {server.name} that process {server.pid} serves stands on it, by way of its base "
                f"{server.base}; end that first"
            )


def _below(base: str) -> list[str]:
    from cowkit.diff.qcow2.header import backing_chain  # for those who have found a server

    return backing_chain(base)


def _is(path: str, identity: tuple[int, int]) -> bool:
    try:
        return identity_of(path) == identity
    except (OSError, ValueError):
        return False
