"""A disk in the host, with the numbers by which the other process calls its checkpoints and servers."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from contextlib import suppress
from socket import MSG_DONTWAIT
from socket import socket as Socket
from typing import Any

from cowkit.cow_disk import CowDisk
from cowkit.disk import Checkpoint, Kind
from cowkit.disk.owner_map import OwnerMap
from cowkit.errors import CowkitError
from cowkit.hosting.checkpoint import POINTS, CheckpointArgument
from cowkit.hosting.errors_in_transit import ErrorInTransit, dismantled
from cowkit.hosting.messages import Closed
from cowkit.hosting.server import DiskServer

_numbers = itertools.count(1)
"""For the checkpoints and servers of all disks: never the same one again."""


class Hosted:
    """``disk``, and what the other process knows by number. The methods are the operations of a call."""

    def __init__(self, disk: CowDisk) -> None:
        self.disk = disk
        self._lock = threading.Lock()
        self._points: dict[int, Checkpoint] = {}
        self._servers: dict[int, DiskServer] = {}
        self._idle: dict[int, Socket] = {}
        """Where to tell the other process that the last client of a server has left."""

    # Checkpoints

    def checkpoints(self) -> list[tuple[int, str]]:
        """The number and name of each, oldest first."""
        with self._lock:
            points = self.disk.checkpoints
            self._points = {number: point for number, point in self._points.items() if point in points}
            return [(self._number_of(point), point.name) for point in points]

    def checkpoint(self, name: str | None) -> tuple[int, str]:
        """Make one; its number and name."""
        point = self.disk.checkpoint(name)
        with self._lock:
            return self._number_of(point), point.name

    def _number_of(self, point: Checkpoint) -> int:
        for number, each in self._points.items():
            if each is point:
                return number
        number = next(_numbers)
        self._points[number] = point
        return number

    def _point(self, given: CheckpointArgument | str | None) -> Checkpoint | str | None:
        if not isinstance(given, CheckpointArgument):
            return given
        # A stand-in for one that is not the disk's, so that the disk itself says so.
        return self._points.get(given.number) or Checkpoint(given.name, OwnerMap(1).freeze(), 0)

    def rollback(self, point: CheckpointArgument | str) -> None:
        """Be as at that checkpoint."""
        self.disk.rollback(self._point(point))  # type: ignore[arg-type]

    # What changed

    def dirty_bytes(self) -> int:
        """How many bytes are dirty."""
        return self.disk.dirty_bytes

    def dirty_extents(
        self, offset: int, length: int | None, since: CheckpointArgument | str | None
    ) -> list[tuple[int, int, bool]]:
        """Offset and length of each, and whether it was zeroed."""
        found = self.disk.dirty_extents(offset, length, since=self._point(since))
        return [(start, span, kind is Kind.ZERO) for start, span, kind in found]

    def allocation(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """Offset and length of each run, and whether it has data."""
        return [(start, span, kind is Kind.DATA) for start, span, kind in self.disk.engine.allocation(offset, length)]

    def overlay_failure(self) -> ErrorInTransit | None:
        """Why the last request failed that found no room."""
        failure = self.disk.overlay_failure
        return None if failure is None else dismantled(failure)

    def trace(self) -> list[tuple[Any, ...]]:
        """The last things that were done to it."""
        return list(map(tuple, self.disk.trace))

    # Servers

    def own_server(self) -> tuple[str, str]:
        """The URI and the socket's path of the server that each disk can have."""
        return self.disk.uri, self.disk.socket

    def serve(self, tells: bool, *, given: list[Socket], **options: Any) -> tuple[int, tuple[str, ...], str | None]:
        """One more server; its number, where clients connect, and the path of its Unix socket.

        :param tells: the last socket given is where to tell that the last client has left.
        """
        idle = given[-1] if tells else None
        server = self.disk.serve(
            listeners=given[:-1] if tells else given, on_idle=None if idle is None else _notifier(idle), **options
        )
        number = next(_numbers)
        self._servers[number] = server
        if idle is not None:
            self._idle[number] = idle
        return number, server.uris, server.socket

    def server_errors(self) -> list[ErrorInTransit]:
        """What went wrong in the threads of all servers."""
        return list(map(dismantled, self.disk.server_errors))

    def connections(self) -> int:
        """How many clients all servers have."""
        return self.disk.connections

    def errors_of(self, number: int) -> list[ErrorInTransit]:
        """What went wrong in the threads of that server."""
        return list(map(dismantled, self._servers[number].errors))

    def connections_of(self, number: int) -> int:
        """How many clients that server has."""
        return self._servers[number].connections

    def written_bytes_of(self, number: int) -> int:
        """How much clients of that server wrote."""
        return self._servers[number].written_bytes

    def start_server(self, number: int) -> None:
        """Let clients in."""
        self._servers[number].start()

    def stop_server(self, number: int) -> None:
        """End that server."""
        self._servers[number].stop()
        idle = self._idle.pop(number, None)
        if idle is not None:
            idle.close()

    def adopt(self, number: int, *, given: list[Socket]) -> None:
        """Serve the client at the first socket; the second one is closed when it has left."""
        client, ended = given
        self._servers[number].adopt(client, on_end=ended.close)

    # The end

    def close(self, keeps_last: bool = False) -> Closed:
        """Close the disk, and with ``keeps_last`` keep its last state until :meth:`forget`."""
        error = None
        if keeps_last:
            self.disk.keep_last_state()
        try:
            self.disk.close()
        except CowkitError as found:
            error = dismantled(found)
        while self._idle:
            self._idle.popitem()[1].close()
        return Closed(
            error,
            self.overlay_failure(),
            self.server_errors(),
            {n: self.errors_of(n) for n in list(self._servers)},
            self.disk.last_dirty_bytes if keeps_last else None,
        )

    def forget(self) -> None:
        """Close the disk, and keep nothing of it."""
        self.close()
        self.disk.forget_last_state()

    def carry_out(
        self, operation: str, arguments: tuple[Any, ...], options: dict[str, Any], given: list[Socket]
    ) -> Any:
        """The result of an operation. ``given`` are sockets that came with the call."""
        if operation in _WITH_SOCKETS:
            return getattr(self, operation)(*arguments, given=given, **options)
        if hasattr(Hosted, operation):
            return getattr(self, operation)(*arguments, **options)
        options |= {each: self._point(point) for each, point in options.items() if each in POINTS}
        return getattr(self.disk, operation)(*arguments, **options)


_WITH_SOCKETS = ("serve", "adopt")


def _notifier(sock: Socket) -> Callable[[], None]:
    def notify() -> None:
        with suppress(OSError):  # nobody listens, or there are more unheard notices than anybody wants
            sock.send(b"i", MSG_DONTWAIT)

    return notify
