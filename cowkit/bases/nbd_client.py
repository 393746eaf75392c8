"""Reading an NBD export through libnbd: several connections, and a memory for what its block status said.

Written for bases: nothing is ever written, the export never changes, and a connection that is lost is not made again.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

from cowkit.disk.extent import Extent, Kind, merged
from cowkit.errors import BaseError, BaseOpenError, MissingToolError

ALLOCATION_DEPTH = "qemu:allocation-depth"
"""How many images down a byte is allocated: 1 in the topmost, 0 in none."""
DIRTY_BITMAP = "qemu:dirty-bitmap:"
"""With the name of a bitmap behind it: 1 where that is set."""
MOST_CONNECTIONS = 4
CONNECT_SECONDS = 30.0
_FURTHER_SECONDS = 2.0
"""For a connection beside one that works: a server that takes no more of them may leave it waiting."""

_LARGEST_READ = 32 << 20
"""What servers that state no limit can be asked for (doc/proto.md, "Block size constraints")."""
_STATUS_SPAN = 2 << 30
"""The most to ask the block status of at once: below the 4 GiB that a request can name. Servers tell as much of it as they like."""
_MOST_EXTENTS = 100_000
"""What is remembered of the block status: about 20 MB. Then it is forgotten and asked for again."""
_ZERO = 2
"""NBD_STATE_ZERO of base:allocation: it reads as zeroes. A hole alone does not say what it reads as."""


def import_nbd(purpose: str) -> ModuleType:
    """libnbd's binding.

    :raises MissingToolError: it is not installed (the package called "nbd" in the Python package index is another one).
    """
    try:
        import nbd
    except ImportError as error:
        missing: ImportError | None = error
    else:
        if hasattr(nbd, "NBD"):
            module: ModuleType = nbd
            return module
        missing = None
    raise MissingToolError(
        "libnbd's Python binding (`import nbd`)",
        purpose=purpose,
        remedy="apt install python3-libnbd, or dnf install python3-libnbd, in a virtual environment with --system-site-packages",
    ) from missing


class NbdClient:
    """One export, read by several threads at once.

    :param given: what to call it in messages.
    :param connect: begins to connect a libnbd handle (one of its ``aio_connect`` methods).
    :param eager: make all connections now, since ``connect`` cannot be called later.
    :param contexts: metadata contexts to ask for beside ``base:allocation``; what :meth:`marks` tells of.
    :raises BaseOpenError: there is no server, or it refuses.
    """

    def __init__(
        self, given: str, connect: Callable[[Any], None], *, eager: bool = False, contexts: Sequence[str] = ()
    ) -> None:
        self.given = given
        self._nbd: Any = import_nbd(f"reading the base {given}")
        self._connect = connect
        self._contexts = tuple(contexts)
        self._sockets: list[socket.socket] = []
        """Other descriptors of libnbd's sockets, for :meth:`interrupt`."""
        self._changed = threading.Condition()
        self._count = 1
        first = self._kept(self._connection())
        self._idle = [first]
        try:
            self.size: int = first.get_size()
            if self.size < 0:  # libnbd's number is signed, the protocol's is not
                self.close()
                raise BaseOpenError(f"cannot open base {given}: its size is over 2**63 - 1 bytes")
            self.has_status: bool = first.can_meta_context(self._nbd.CONTEXT_BASE_ALLOCATION)
            self.contexts = frozenset(name for name in self._contexts if first.can_meta_context(name))
            """Those of ``contexts`` that the server has."""
            self.can_multi_conn: bool = first.can_multi_conn()
            self._align = max(1, first.get_block_size(self._nbd.SIZE_MINIMUM))
            largest = min(first.get_block_size(self._nbd.SIZE_MAXIMUM) or _LARGEST_READ, _LARGEST_READ)
        except self._nbd.Error as error:
            self.close()
            raise BaseOpenError(f"cannot open base {given}: {_reason(error)}") from error
        self._largest = max(largest - largest % self._align, self._align)
        self._most = MOST_CONNECTIONS if self.can_multi_conn else 1
        self._starts: list[int] = []
        self._known: list[Extent] = []
        self._knowing = threading.Lock()
        if eager:
            while self._count < self._most:
                self._idle.append(self._kept(self._connection()))
                self._count += 1

    def _connection(self, patience: float | None = None) -> Any:
        handle = self._nbd.NBD()
        seconds = CONNECT_SECONDS if patience is None else min(patience, CONNECT_SECONDS)
        try:
            for context in (self._nbd.CONTEXT_BASE_ALLOCATION, *self._contexts):
                handle.add_meta_context(context)
            self._connect(handle)
            deadline = time.monotonic() + seconds
            while handle.aio_is_connecting():
                left = deadline - time.monotonic()
                if left <= 0:
                    raise BaseOpenError(
                        f"cannot open base {self.given}: the server does not answer within {seconds:g} seconds: see whether it is an "
                        "NBD server, and not stuck"
                    )
                handle.poll(int(left * 1000) + 1)
        except self._nbd.Error as error:
            raise BaseOpenError(f"cannot open base {self.given}: {_reason(error)}") from error
        if not handle.aio_is_ready():
            raise BaseOpenError(f"cannot open base {self.given}: the server ended the connection")
        return handle

    def _kept(self, handle: Any) -> Any:
        self._sockets.append(socket.socket(fileno=os.dup(handle.aio_get_fd())))
        return handle

    def interrupt(self) -> None:
        """Have the requests under way fail; libnbd itself waits for a server as long as it takes."""
        for each in list(self._sockets):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    @contextmanager
    def _borrowed(self) -> Iterator[Any]:
        """A connection that nobody else uses meanwhile."""
        handle = self._borrow()
        try:
            yield handle
        finally:
            with self._changed:
                self._idle.append(handle)
                self._changed.notify()

    def _borrow(self) -> Any:
        with self._changed:
            while not self._idle:
                if self._count < self._most:
                    self._count += 1
                    break
                self._changed.wait()
            else:
                return self._idle.pop()
        try:
            return self._kept(self._connection(_FURTHER_SECONDS))
        except BaseOpenError:
            # The server takes no more, or has gone: the next request on the others will tell.
            with self._changed:
                self._count -= 1
                self._most = self._count
        return self._borrow()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on, in requests as long as the server takes.

        :raises BaseError: the server fails to read, or has gone.
        """
        end = offset + len(buffer)
        # Ctrl-C reaches the main thread, and would leave a request under way whose memory is somebody else's by then.
        may_read_straight = threading.current_thread() is not threading.main_thread()
        with self._borrowed() as handle:
            while buffer:
                start = offset - offset % self._align
                stop = min(-(-end // self._align) * self._align, self.size, start + self._largest)
                length = min(stop, end) - offset
                try:
                    if may_read_straight and start == offset and stop <= end:
                        self._read_straight(handle, buffer[:length], offset)
                    else:
                        data = handle.pread(stop - start, start)
                        buffer[:length] = memoryview(data)[offset - start : offset - start + length]
                except self._nbd.Error as error:
                    raise self._failed(handle, offset, error) from error
                buffer = buffer[length:]
                offset += length

    def _read_straight(self, handle: Any, buffer: memoryview, offset: int) -> None:
        """As libnbd's pread(), into memory that is there already, and that needs no zeroes first: it holds nobody else's bytes."""
        handle.set_pread_initialize(False)
        request = handle.aio_pread(self._nbd.Buffer.from_buffer(buffer), offset)
        handle.set_pread_initialize(True)
        while not handle.aio_command_completed(request):
            handle.poll(-1)

    def _failed(self, handle: Any, offset: int, error: Exception) -> BaseError:
        if handle.aio_is_ready():
            return BaseError(f"cannot read base {self.given} at byte {offset}: {_reason(error)}")
        return BaseError(
            f"cannot read base {self.given} at byte {offset}: the NBD server behind it has gone, or broke the protocol"
        )

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Where the export has data, and where it reads as zeroes (``HOLE``)."""
        return merged(self._extents(offset, offset + length))

    def _extents(self, offset: int, end: int) -> Iterator[Extent]:
        if not self.has_status:
            yield Extent(offset, end - offset, Kind.DATA)
            return
        while offset < end:
            extent = self._extent_at(offset)
            stop = min(extent.end, end)
            yield Extent(offset, stop - offset, extent.kind)
            offset = stop

    def _extent_at(self, offset: int) -> Extent:
        with self._knowing:
            index = bisect_right(self._starts, offset)
            if index and self._known[index - 1].end > offset:
                return self._known[index - 1]
            limit = self._starts[index] if index < len(self._starts) else self.size
        found = self._ask(offset, limit)
        with self._knowing:
            if len(self._known) > _MOST_EXTENTS:
                self._known.clear()
                self._starts.clear()
            # Another thread may have asked the same meanwhile: take what is still new.
            index = bisect_right(self._starts, offset)
            if not (index and self._known[index - 1].end > offset):
                limit = self._starts[index] if index < len(self._starts) else self.size
                fresh = [each for each in found if each.end <= limit]
                self._known[index:index] = fresh
                self._starts[index:index] = [each.offset for each in fresh]
        return found[0]

    def _ask(self, offset: int, limit: int) -> list[Extent]:
        """The extents from ``offset`` on: as many as the server tells of at once, within ``limit``; at least one."""
        start = offset - offset % self._align
        stop = min(-(-limit // self._align) * self._align, self.size, start + max(_STATUS_SPAN, self._align))
        runs: list[int] = []

        def told(context: str, _offset: int, entries: list[int], _error: object) -> None:
            if context == self._nbd.CONTEXT_BASE_ALLOCATION:
                runs.extend(entries)

        with self._borrowed() as handle:
            try:
                handle.block_status(stop - start, start, told)
            except self._nbd.Error as error:
                if not handle.aio_is_ready():
                    raise self._failed(handle, offset, error) from error
                runs.clear()
        found: list[Extent] = []
        for length, flags in zip(runs[::2], runs[1::2], strict=True):
            first, last = max(start, offset), min(start + length, limit)
            if first < last:
                found.append(Extent(first, last - first, Kind.HOLE if flags & _ZERO else Kind.DATA))
            start += length
        # A server that cannot tell just now: data is always a safe answer.
        return list(merged(found)) or [Extent(offset, min(stop, limit) - offset, Kind.DATA)]

    def marks(self, context: str, offset: int, length: int) -> Iterator[tuple[int, int, int]]:
        """What the server says of the range in one of :attr:`contexts`: ``(offset, length, value)``, in order, without gaps.

        :raises BaseError: it does not tell, or has gone.
        """
        end = offset + length
        while offset < end:
            start = offset - offset % self._align
            stop = min(-(-end // self._align) * self._align, self.size, start + max(_STATUS_SPAN, self._align))
            with self._borrowed() as handle:
                runs = self._status(handle, context, start, stop)
            for run, value in zip(runs[::2], runs[1::2], strict=True):
                first, last = max(start, offset), min(start + run, end)
                if first < last:
                    yield first, last - first, value
                    offset = last
                start += run

    def _status(self, handle: Any, context: str, start: int, stop: int) -> list[int]:
        """Lengths and values, of which the first length is more than what lies in front of a request's alignment."""
        runs: list[int] = []

        def told(name: str, _offset: int, entries: list[int], _error: object) -> None:
            if name == context:
                runs.extend(entries)

        try:
            handle.block_status(stop - start, start, told)
        except self._nbd.Error as error:
            raise self._failed(handle, start, error) from error
        if sum(runs[::2]) < self._align:
            raise BaseError(
                f"cannot read base {self.given} at byte {start}: the server tells nothing of {context} there"
            )
        return runs

    def offered(self) -> list[str]:
        """The metadata contexts that the server lists, each once; none where it does not tell.

        The connections end first, since a server may have but one client at a time: nothing can be read any more.
        """
        names: list[str] = []
        handles, self._idle = self._idle, []
        for each in handles:
            _end(each, self._nbd.Error)
        handle = self._nbd.NBD()
        try:
            handle.set_opt_mode(True)
            self._connect(handle)
            deadline = time.monotonic() + _FURTHER_SECONDS
            while handle.aio_is_connecting() and (left := deadline - time.monotonic()) > 0:
                handle.poll(int(left * 1000) + 1)
            if handle.aio_is_negotiating():
                handle.opt_list_meta_context(names.append)
                handle.opt_abort()
        except self._nbd.Error:
            pass
        return sorted(set(names))

    def size_now(self) -> int:
        """The export's size as a new connection is told it.

        :raises BaseOpenError: there is none to be had any more.
        """
        with self._changed:
            # A server may count its clients, and take one more only when another has left.
            spare = self._idle.pop() if len(self._idle) > 1 else None
            self._count -= spare is not None
        if spare is not None:
            _end(spare, self._nbd.Error)
        handle = self._connection()
        size: int = handle.get_size()
        _end(handle, self._nbd.Error)
        return size

    def close(self) -> None:
        """End the connections; nobody is reading any more."""
        handles, self._idle = self._idle, []
        for handle in handles:
            _end(handle, self._nbd.Error)
        for each in self._sockets:
            each.close()


def _end(handle: Any, error: type[Exception]) -> None:
    try:
        handle.shutdown()
    except error:
        pass  # it has gone already; the handle is closed when the last reference to it goes


def _reason(error: Any) -> str:
    """What libnbd says, in one line, without the name of its function."""
    text = " ".join(str(error.string or error).split())
    head, colon, rest = text.partition(": ")
    return rest if colon and head.startswith("nbd_") else text
