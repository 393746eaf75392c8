"""A disk that is open, in this process or in the host: what can be done with it, wherever it is, until its end."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Self, TypeVar

from cowkit.disk import Checkpoint, Disk, Extent
from cowkit.disk.disk import Buffer
from cowkit.disk.sizes import format_size
from cowkit.errors import BaseChangedError, DiskClosedError, DiskError, ServerError, UsageError
from cowkit.hosting.local import open_disk
from cowkit.hosting.local_servers import LocalServers, check_serving
from cowkit.hosting.options import DiskOptions

if TYPE_CHECKING:
    from cowkit.disk.trace import TraceEvent
    from cowkit.hosting.disk import HostedDisk
    from cowkit.hosting.server import DiskServer

Where = Literal["thread", "process"]
"""Where a disk and its servers are: in threads of this process, or in a process of their own."""

H = TypeVar("H", bound="DiskHandle")
P = ParamSpec("P")
T = TypeVar("T")


def where_the_disk_is(method: Callable[Concatenate[H, P], T]) -> Callable[Concatenate[H, P], T]:
    """Have the host carry out the method, with the same arguments, if the disk is there."""

    @functools.wraps(method)
    def there(self: H, /, *arguments: P.args, **options: P.kwargs) -> T:
        if self._hosted is None:
            return method(self, *arguments, **options)
        if not self._hosted.has_last:
            if self._hosted.lost is not None:  # more to the point than that it is closed
                raise ServerError(self._hosted.lost)
            self._open()
        result: T = self._hosted.call_method(method.__name__, arguments, options)
        return result

    return there


class DiskHandle:
    """A disk and its servers, to be closed in the end; :class:`cowkit.CowDisk` without what it serves and keeps.

    :param base: see :class:`cowkit.CowDisk`, which raises the same.
    """

    _closed = True  # until there is something to close, also where Python refuses the arguments

    def __init__(
        self, base: str | os.PathLike[str] | None, options: DiskOptions, name: str | None, where: Where
    ) -> None:
        self._hosted: HostedDisk | None = None
        self._disk: Disk | HostedDisk
        self._servers: LocalServers | HostedDisk
        self.base: str | None
        """The base as it was given; None for a blank disk."""
        self.name: str
        """What to call the disk in lists and messages."""
        if where == "process":
            from cowkit.hosting.disk import HostedDisk

            self._disk = self._servers = self._hosted = HostedDisk(base, options, name)
            self.base, self.name = self._hosted.given, self._hosted.name
        else:
            self._disk = open_disk(base, options)
            self._servers = LocalServers(self._disk)
            source = self._disk.base
            self.base = source.given
            self.name = name or (os.path.basename(source.path) if source.path else source.given or "blank")
        self.opened_as: DiskOptions = options
        """The options with their defaults; sizes are in bytes."""
        self._starting = threading.Lock()
        self._closed = False

    @property
    def engine(self) -> Disk:
        """The disk without its servers.

        :raises UsageError: it is in another process.
        """
        if not isinstance(self._disk, Disk):
            raise UsageError(
                f"the engine of the disk {self.name!r} is in its host (server='process'): use the disk itself"
            )
        return self._disk

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except BaseChangedError as changed:
            if error is None:
                raise
            # The block's own error is the news; that the base changed may explain it.
            error.add_note(str(changed))

    def __del__(self) -> None:
        if not self._closed:
            warnings.warn(
                f"{self!r} was not closed: use `with`, or call close()", ResourceWarning, source=self, stacklevel=2
            )
            self.close()

    def __repr__(self) -> str:
        state = ", closed" if self._closed else ""
        return (
            f"<{type(self).__name__} {self.name!r}, {format_size(self._disk.size)}{state}>"
            if hasattr(self, "_disk")
            else "<CowDisk>"
        )

    @property
    def size(self) -> int:
        """The disk's size in bytes."""
        return self._disk.size

    @property
    def block_size(self) -> int:
        """The unit of copy-on-write in bytes."""
        return self._disk.block_size

    @property
    def closed(self) -> bool:
        """Whether the disk is closed."""
        return self._closed

    # In process; libnbd's names and order of arguments

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset`` on.

        :raises OutOfBoundsError: the range is not within the disk.
        """
        return self._disk.pread(length, offset)

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write ``data`` at ``offset``.

        :raises OutOfBoundsError: the range is not within the disk.
        :raises OverlayFullError: no room; the old bytes stand.
        """
        self._disk.pwrite(data, offset)

    def zero(self, length: int, offset: int) -> None:
        """Make the range read as zeroes.

        :raises OutOfBoundsError: the range is not within the disk.
        :raises OverlayFullError: no room for a block that is zeroed in part; nothing has changed.
        """
        self._disk.zero(length, offset)

    def trim(self, length: int, offset: int) -> None:
        """Give up the range: it reads as zeroes, and whole blocks of it take no space any more.

        :raises OutOfBoundsError: the range is not within the disk.
        :raises OverlayFullError: no room for a block that is trimmed in part; nothing has changed.
        """
        self._disk.trim(length, offset)

    def cache(self, length: int, offset: int) -> None:
        """Have the range at hand: copied into the overlay with ``cow_on_cache``, otherwise read ahead.

        :raises OutOfBoundsError: the range is not within the disk.
        :raises OverlayFullError: with ``cow_on_cache``: no room for the copy.
        """
        self._disk.cache(length, offset)

    def flush(self) -> None:
        """Nothing is left to do: what was acknowledged is in the overlay."""
        self._disk.flush()

    # Points in time

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints, oldest first."""
        return self._disk.checkpoints

    def checkpoint(self, name: str | None = None) -> Checkpoint:
        """Freeze this moment, so that the disk can be rolled back to it.

        :param name: ``checkpoint-1`` and so on, unless given.
        :raises CheckpointError: a checkpoint of that name exists.
        :raises UsageError: the name is no printable text, too long, or ``"cow"``.
        """
        return self._disk.checkpoint(name)

    def rollback(self, point: Checkpoint | str) -> None:
        """Be as at ``point``, which stays; later checkpoints are gone. Clients stay connected.

        :raises CheckpointError: the disk has no such checkpoint, or was rolled back past it.
        """
        self._disk.rollback(point)

    def reset(self) -> None:
        """Be as the base is, without ``overlay``; all checkpoints are gone. Clients stay connected."""
        self._disk.reset()

    # What is dirty

    @property
    def dirty_bytes(self) -> int:
        """How many bytes were written or zeroed, in whole blocks."""
        return self._disk.dirty_bytes

    def dirty_extents(
        self, offset: int = 0, length: int | None = None, *, since: Checkpoint | str | None = None
    ) -> Iterator[Extent]:
        """The runs that were written (``DATA``) or zeroed (``ZERO``), in order, in whole blocks.

        :param since: only what was written or zeroed since that checkpoint.
        """
        return self._disk.dirty_extents(offset, length, since=since)

    # Servers

    def _own_server(self) -> tuple[str, str]:
        """The URI and the socket's path of the server that each disk can have; it starts at the first use."""
        if not isinstance(self._servers, LocalServers):
            return self._servers.own_server
        found = self._servers.own_server
        if found is None or self._closed:
            with self._starting:
                self._open()
                found = self._servers.start_own()
        return found

    def _serve(self, **options: Any) -> DiskServer:
        """One more; see :meth:`cowkit.CowDisk.serve`."""
        check_serving(options)
        if not isinstance(self._servers, LocalServers):
            self._open()
            return self._servers.serve(**options)
        with self._starting:
            self._open()
            return self._servers.serve(**options)

    @property
    def server_errors(self) -> list[BaseException]:
        """What went wrong in the servers' threads without being any client's fault; empty unless there is a bug."""
        return self._servers.server_errors

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return self._servers.connections

    def disconnect(self) -> None:
        """End the connections of all clients; requests under way are finished, but not answered. New ones may connect."""
        self._open()
        self._servers.disconnect()

    @property
    def overlay_failure(self) -> DiskError | None:
        """Why the last request failed that found no room or a broken overlay; clients are told but a number. None: none did."""
        return self.engine.overlay.failure if self._hosted is None else self._hosted.overlay_failure

    @property
    def trace(self) -> list[TraceEvent]:
        """The last writes, zeroings, flushes, checkpoints, rollbacks and resets, by whomever, oldest first.

        Empty for a disk that was made without ``trace=``. They are there as well when the disk is closed, in a process of its own
        only if it keeps its last state.
        """
        if self._hosted is not None:
            return self._hosted.trace
        return [] if self.engine.trace is None else self.engine.trace.events()

    # The end

    def _open(self) -> None:
        if self._closed:
            raise DiskClosedError(f"the disk {self.name!r} is closed")

    def close(self) -> None:
        """End the servers, throw away what was written and let go of the base; may be called again.

        :raises BaseChangedError: the base is not what it was at opening. The disk is closed all the same.
        """
        if self._disk.foreign:  # no lock is taken in a forked child: a thread that it does not have may have held it
            self._closed = True
        else:
            with self._starting:
                if self._closed:
                    return
                self._closed = True
            if self._hosted is None and not (self.engine.keeps_last and self._is_idle):
                # Or a client's read that waits for a base which never answers would hold all this up.
                self.engine.base.interrupt()
        if isinstance(self._servers, LocalServers):
            self._servers.stop()
        self._disk.close()

    @property
    def _is_idle(self) -> bool:
        """Whether nobody can be waiting for the base."""
        return not self.connections and not self.engine.gate.busy

    def keep_last_state(self) -> None:
        """Have :meth:`diff` (without checkpoints) work once the disk is closed, too, until :meth:`forget_last_state`.

        Closing costs a few microseconds more. What was written keeps its space meanwhile, and the base stays open, except for
        one behind a server that somebody waits for just then.
        """
        self._disk.keeps_last = True

    @property
    def last_dirty_bytes(self) -> int:
        """How many bytes were dirty when the disk was closed, if it keeps its last state; 0 otherwise."""
        if self._hosted is not None:
            return self._hosted.last_dirty_bytes
        return 0 if self.engine.last is None else self.engine.last.dirty_bytes

    def forget_last_state(self) -> None:
        """Let go of what is left of a closed disk; may be called again."""
        if self._hosted is not None:
            self._hosted.forget_last()
        elif self.engine.last is not None:
            last, self.engine.last = self.engine.last, None
            last.release()
