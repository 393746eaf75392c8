"""What stands in this process for a disk that is in the host."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from socket import socket as Socket
from typing import Any

from cowkit.disk import Checkpoint, Extent, Kind
from cowkit.disk.arguments import check_function
from cowkit.disk.disk import Buffer, not_bytes
from cowkit.disk.trace import TraceEvent
from cowkit.errors import CowkitError, DiskClosedError, DiskError, ListenError, ServerError
from cowkit.hosting.checkpoint import POINTS, HostedCheckpoints
from cowkit.hosting.errors_in_transit import reassembled
from cowkit.hosting.messages import Closed
from cowkit.hosting.notices import Notices
from cowkit.hosting.options import DiskOptions
from cowkit.hosting.process import host
from cowkit.hosting.server import HostedServer


class HostedDisk:
    """A disk in the host of this process, with the methods of :class:`cowkit.disk.Disk` that a user needs.

    :param base: see :class:`cowkit.CowDisk`.
    :param name: what to call it; what CowDisk calls it, unless given.
    :raises CowkitError: what CowDisk would raise.
    """

    def __init__(self, base: str | os.PathLike[str] | None, options: DiskOptions, name: str | None) -> None:
        given = _sendable(base)
        self._host = host()
        self._number = next(self._host.disks)
        self._owner = os.getpid()
        self._checkpoints = HostedCheckpoints()
        self._own_server: tuple[str, str] | None = None
        self._servers: list[HostedServer] = []
        self._left = Closed(None, None, [], {})
        self.closed = False
        self.keeps_last = False
        """Whether closing leaves the last state, see :meth:`cowkit.CowDisk.keep_last_state`."""
        self.lost: str | None = None
        """Why closing has left none, though it was to: the host has gone."""
        self._host.open_disks.add(self._number)
        try:
            # A relative path to a base means what it means here and now.
            located = any(each is not None and not os.path.isabs(each) for each in (given, options.overlay))
            asked = options._asdict() | {"name": name}
            facts, _ = self._host.call("open", self._number, (given,), asked, located=located)
        except BaseException:
            self._forget()
            raise
        self.size: int
        self.block_size: int
        self.given: str | None
        self.name: str
        self.size, self.block_size, self.given, self.name = facts

    @property
    def foreign(self) -> bool:
        """Whether this process was forked from the one that the disk belongs to."""
        return os.getpid() != self._owner

    @property
    def has_last(self) -> bool:
        """Whether the disk is closed and the host has its last state."""
        return self._left.last_dirty_bytes is not None

    @property
    def last_dirty_bytes(self) -> int:
        """How many bytes were dirty when it was closed."""
        return self._left.last_dirty_bytes or 0

    def forget_last(self) -> None:
        """Have the host let go of the last state; may be called again."""
        if self.has_last:
            self._left = self._left._replace(last_dirty_bytes=None)
            self._forget()

    def call(self, operation: str, *arguments: Any, **passed: Any) -> Any:
        """Have the host carry out ``operation`` on the disk; its result. What else is ``passed``: see :meth:`Host.call`.

        :raises DiskClosedError: the disk is closed, or another process's.
        :raises ServerError: the host has gone.
        :raises CowkitError: whatever the operation raises.
        """
        if self.foreign or not self.has_last:
            self._open()
        return self._host.call(operation, self._number, arguments, **passed)[0]

    def call_method(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The result of a method of CowDisk that reads or makes files, called with these arguments."""
        progress = options.pop("progress", None)
        if progress is not None:
            check_function(progress, "progress")
        options |= {each: self._checkpoints.argument(point) for each, point in options.items() if each in POINTS}
        return self.call(
            name, *map(_sendable, arguments), options=_all_sendable(options), located=True, progress=progress
        )

    def _open(self) -> None:
        if self.closed:
            raise DiskClosedError("the disk is closed")
        if self.foreign:
            raise DiskClosedError(
                f"the disk belongs to process {self._owner}, which this one was forked from: make a disk of its own here"
            )

    # Requests; see cowkit.disk.Disk

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset`` on."""
        self._open()
        return bytes(self._host.call("pread", self._number, (length, offset))[1])

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write ``data`` at ``offset``."""
        try:
            view = memoryview(data).cast("B")
        except TypeError as error:
            raise not_bytes(data) from error
        self.call("pwrite", offset, data=view)

    def zero(self, length: int, offset: int) -> None:
        """Make the range read as zeroes."""
        self.call("zero", length, offset)

    def trim(self, length: int, offset: int) -> None:
        """Give up the range."""
        self.call("trim", length, offset)

    def cache(self, length: int, offset: int) -> None:
        """Have the range at hand."""
        self.call("cache", length, offset)

    def flush(self) -> None:
        """Nothing is left to do."""
        self.call("flush")

    # Checkpoints

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints, oldest first."""
        if self.closed:
            return []
        return [self._checkpoints.of(number, name) for number, name in self.call("checkpoints")]

    def checkpoint(self, name: str | None = None) -> Checkpoint:
        """Freeze this moment, so that the disk can be rolled back to it."""
        return self._checkpoints.of(*self.call("checkpoint", name))

    def rollback(self, point: Checkpoint | str) -> None:
        """Be as at ``point``, which stays; later checkpoints are gone."""
        self.call("rollback", self._checkpoints.argument(point))

    def reset(self) -> None:
        """Be as the base is; all checkpoints are gone."""
        self.call("reset")

    # What changed

    @property
    def dirty_bytes(self) -> int:
        """How many bytes a layer holds or were zeroed."""
        found: int = self.call("dirty_bytes")
        return found

    def dirty_extents(
        self, offset: int = 0, length: int | None = None, *, since: Checkpoint | str | None = None
    ) -> Iterator[Extent]:
        """The longest runs within a range that a layer holds (``DATA``) or that were zeroed (``ZERO``), in order."""
        runs = self.call("dirty_extents", offset, length, self._checkpoints.argument(since))
        return (Extent(start, span, Kind.ZERO if zeroed else Kind.DATA) for start, span, zeroed in runs)

    def allocation(self, offset: int, length: int) -> Iterator[Extent]:
        """The range as ``DATA``, and ``HOLE`` where it reads as zeroes for sure."""
        runs = self.call("allocation", offset, length)
        return (Extent(start, span, Kind.DATA if data else Kind.HOLE) for start, span, data in runs)

    @property
    def overlay_failure(self) -> DiskError | None:
        """Why the last request failed that found no room or a broken overlay."""
        parts = self._left.overlay_failure if self.closed else self.call("overlay_failure")
        failure = reassembled(parts) if parts else None
        assert failure is None or isinstance(failure, DiskError)
        return failure

    @property
    def trace(self) -> list[TraceEvent]:
        """The last things that were done to it."""
        return [TraceEvent(*event) for event in self.call("trace")]

    # Serving

    @property
    def own_server(self) -> tuple[str, str]:
        """The URI and the socket's path of the server that each disk can have; it starts at the first use."""
        if self._own_server is None or self._host.gone():  # then the call tells of it
            self._own_server = self.call("own_server", located=True)
        self._open()
        return self._own_server

    def serve(self, *, listeners: Sequence[Socket], on_idle: Callable[[], None] | None, **options: Any) -> HostedServer:
        """One more server; see :meth:`cowkit.CowDisk.serve`."""
        self._open()
        sockets = list(listeners)
        descriptors = [each.fileno() for each in sockets]
        if -1 in descriptors:
            raise ListenError("cannot listen on a socket that is closed")
        idle = None if on_idle is None else Notices(on_notice=on_idle)
        try:
            if idle is not None:
                descriptors.append(idle.descriptor)
            facts = self.call(
                "serve", idle is not None, options=_all_sendable(options), descriptors=descriptors, located=True
            )
        except BaseException:
            if idle is not None:
                idle.cancel()
            for each in sockets:  # as a server does that fails to begin
                each.close()
            raise
        number, uris, path = facts
        server = HostedServer(self, number, uris, path, sockets)
        self._servers.append(server)
        if idle is not None:
            server.listen_to(idle)
        return server

    def errors_of(self, number: int) -> list[BaseException]:
        """What went wrong in the threads of the server of that number."""
        errors = self._left.errors_by_server.get(number, []) if self.closed else self.call("errors_of", number)
        return list(map(reassembled, errors))

    @property
    def server_errors(self) -> list[BaseException]:
        """What went wrong in the threads of all servers."""
        return list(map(reassembled, self._left.server_errors if self.closed else self.call("server_errors")))

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        found: int = 0 if self.closed else self.call("connections")
        return found

    def disconnect(self) -> None:
        """End the connections of all clients."""
        self.call("disconnect")

    # The end

    def close(self) -> None:
        """Close the disk there; may be called again.

        :raises BaseChangedError: the base is not what it was at opening. The disk is closed all the same.
        :raises ServerError: the host has gone, and the disk with it.
        """
        if self.closed:
            return
        self.closed = True
        try:
            if not self.foreign and not self._host.ended:
                arguments = (True,) if self.keeps_last else ()
                self._left, _ = self._host.call("close", self._number, arguments)
        except CowkitError as error:
            if self.keeps_last and isinstance(error, ServerError):
                self.lost = str(error)
            raise
        except BaseException:  # an interrupt: the disk is to be closed all the same
            self._forget()
            raise
        finally:
            if not self.has_last:
                self._host.open_disks.discard(self._number)
            for server in self._servers:
                server.let_go()
        if self._left.error:
            raise reassembled(self._left.error)

    def _forget(self) -> None:
        """Have the host close the disk, if it has it; nobody is told of anything."""
        with suppress(CowkitError):  # the host has gone
            self._host.call("forget", self._number)
        self._host.open_disks.discard(self._number)


def _sendable(value: Any) -> Any:
    """A path as a string or bytes: what kind of path object it was may be known in this process alone."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _all_sendable(options: dict[str, Any]) -> dict[str, Any]:
    return {name: _sendable(value) for name, value in options.items()}
