"""CowDisk, the object that users hold: an engine disk, its servers and its differences."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from cowkit.disk import Checkpoint, Disk, Extent, FileBase, ZeroBase
from cowkit.disk.disk import DEFAULT_BLOCK_SIZE, Buffer, check_block_size
from cowkit.disk.sizes import format_size, parse_size
from cowkit.errors import BaseChangedError, DiskClosedError, UsageError

if TYPE_CHECKING:
    from cowkit.diff import DiffReport
    from cowkit.server.server import NbdServer

Round = Literal["exact", "down", "up"]


class CowDisk:
    """A writable disk that may be wrecked: what is written to it is thrown away when it is closed.

    ::

        with CowDisk("disk.img") as disk:
            subprocess.run(["qemu-io", "-f", "raw", "-c", "write 0 1M", disk.uri], check=True)
            disk.pwrite(b"boo", 4096)
            disk.diff("diff.qcow2")

    Sizes are numbers of bytes or strings such as ``"64K"`` and ``"1G"`` (powers of 1024). Nothing is opened besides the
    base, and no thread started, before it is needed: an NBD server at the first use of :attr:`uri` or :attr:`socket`, an
    overlay file at the first write.

    :param base: a raw image file or a block device, opened read-only; without one the disk is blank.
    :param size: the size of a blank disk; with a base, a size over the base's, beyond which the disk reads as zeroes.
    :param block_size: the unit of copy-on-write: a power of two from 512 bytes to 16 MiB; 4096 unless given.
    :param round: what to do with a size that is no multiple of the block size: keep it (``"exact"``), or round ``"down"``
        or ``"up"`` to one.
    :param cow_on_read: copy into the overlay what is read from the base.
    :param cow_on_cache: copy into the overlay what a cache request names.
    :param tmpdir: where the overlay's files live: ``$TMPDIR`` or ``/var/tmp``, unless given.
    :param name: what to call the disk in lists and messages; the base's file name, unless given.
    :raises UsageError: an argument makes no sense.
    :raises BaseOpenError: the base cannot be opened.
    """

    def __init__(
        self,
        base: str | os.PathLike[str] | None = None,
        *,
        size: int | str | None = None,
        block_size: int | str | None = None,
        round: Round = "exact",
        cow_on_read: bool = False,
        cow_on_cache: bool = False,
        tmpdir: str | os.PathLike[str] | None = None,
        name: str | None = None,
    ) -> None:
        self._closed = True  # until there is something to close
        block = (
            DEFAULT_BLOCK_SIZE if block_size is None else check_block_size(parse_size(block_size, what="block size"))
        )
        if round not in ("exact", "down", "up"):
            raise UsageError(f"round is 'exact', 'down' or 'up', not {round!r}")
        wanted = None if size is None else parse_size(size)
        if base is None and wanted is None:
            raise UsageError(
                "a disk needs a base or a size: CowDisk('disk.img'), or CowDisk(size='1G') for a blank one"
            )
        source = ZeroBase(wanted or 0) if base is None else FileBase(base)
        try:
            if wanted is not None and wanted < source.size:
                raise UsageError(
                    f"size {wanted} is below that of the base {source.given}, {source.size}: it can only be larger"
                )
            whole = _rounded(source.size if wanted is None else wanted, block, round)
            self.engine = Disk(
                source, block_size=block, size=whole, tmpdir=tmpdir, cow_on_read=cow_on_read, cow_on_cache=cow_on_cache
            )
        except BaseException:
            source.release()
            raise
        self.base: str | None = source.given
        """The base as it was given; None for a blank disk."""
        self.name = name or (os.path.basename(source.path) if source.path else "blank")
        self._servers: list[NbdServer] = []
        self._own_server: NbdServer | None = None
        self._starting = threading.Lock()
        self._closed = False

    def __enter__(self) -> CowDisk:
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
            f"<CowDisk {self.name!r}, {format_size(self.engine.size)}{state}>"
            if hasattr(self, "engine")
            else "<CowDisk>"
        )

    @property
    def size(self) -> int:
        """The disk's size in bytes."""
        return self.engine.size

    @property
    def block_size(self) -> int:
        """The unit of copy-on-write in bytes."""
        return self.engine.block_size

    @property
    def closed(self) -> bool:
        """Whether the disk is closed."""
        return self._closed

    # In process; libnbd's names and order of arguments

    def pread(self, length: int, offset: int) -> bytes:
        """``length`` bytes from ``offset`` on.

        :raises OutOfBoundsError: the range is not within the disk.
        """
        return self.engine.pread(length, offset)

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write ``data`` at ``offset``.

        :raises OutOfBoundsError: the range is not within the disk.
        :raises OverlayFullError: no room; the old bytes stand.
        """
        self.engine.pwrite(data, offset)

    def zero(self, length: int, offset: int) -> None:
        """Make the range read as zeroes.

        :raises OutOfBoundsError: the range is not within the disk.
        :raises OverlayFullError: no room for a block that is zeroed in part; nothing has changed.
        """
        self.engine.zero(length, offset)

    def trim(self, length: int, offset: int) -> None:
        """Give up the range: it reads as zeroes, and whole blocks of it take no space any more.

        :raises OutOfBoundsError: the range is not within the disk.
        :raises OverlayFullError: no room for a block that is trimmed in part; nothing has changed.
        """
        self.engine.trim(length, offset)

    def cache(self, length: int, offset: int) -> None:
        """Have the range at hand: copied into the overlay with ``cow_on_cache``, otherwise read ahead.

        :raises OutOfBoundsError: the range is not within the disk.
        :raises OverlayFullError: with ``cow_on_cache``: no room for the copy.
        """
        self.engine.cache(length, offset)

    def flush(self) -> None:
        """Nothing is left to do: what was acknowledged is in the overlay."""
        self.engine.flush()

    # Points in time

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The checkpoints, oldest first."""
        return self.engine.checkpoints

    def checkpoint(self, name: str | None = None) -> Checkpoint:
        """Freeze this moment, so that the disk can be rolled back to it.

        :param name: ``checkpoint-1`` and so on, unless given.
        :raises CheckpointError: a checkpoint of that name exists.
        """
        return self.engine.checkpoint(name)

    def rollback(self, point: Checkpoint | str) -> None:
        """Be as at ``point``, which stays; later checkpoints are gone. Clients stay connected.

        :raises CheckpointError: the disk has no such checkpoint, or was rolled back past it.
        """
        self.engine.rollback(point)

    def reset(self) -> None:
        """Be as the base is; all checkpoints are gone. Clients stay connected."""
        self.engine.reset()

    # What changed

    @property
    def dirty_bytes(self) -> int:
        """How many bytes were written or zeroed, in whole blocks."""
        return self.engine.dirty_bytes

    def dirty_extents(
        self, offset: int = 0, length: int | None = None, *, since: Checkpoint | str | None = None
    ) -> Iterator[Extent]:
        """The runs that were written (``DATA``) or zeroed (``ZERO``), in order, in whole blocks.

        :param since: only what was written or zeroed since that checkpoint.
        """
        return self.engine.dirty_extents(offset, length, since=since)

    def diff(
        self,
        path: str | os.PathLike[str],
        *,
        backing_file: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> DiffReport:
        """Keep what changed: a qcow2 image at ``path`` with the base as its backing file, as of this moment.

        Clients go on reading and writing meanwhile. A file that is there already is replaced when the new one is complete.

        :param backing_file: the name of the base to record; unless given, the base's path: relative to ``path``'s directory
            if the base was given as a relative path.
        :param progress: called now and then with the number of bytes dealt with and of those there are.
        :raises OutputError: the image cannot be written; an old file at ``path`` is as it was.
        :raises BaseChangedError: the base is not what it was when the disk was opened.
        """
        from cowkit.diff import backing_name, write_diff

        self._open()
        base = self.engine.base
        if backing_file is None:
            backing_file = backing_name(base.given, base.path, path)
        elif base.path is None:
            raise UsageError(f"a blank disk has no base to be called {backing_file!r}: its difference stands alone")
        with self.engine.freeze() as view:
            return write_diff(view, path, backing_file=backing_file, progress=progress)

    # Serving

    @property
    def uri(self) -> str:
        """The NBD URI for clients; starts a server on a private Unix socket at its first use."""
        return self._server().uri

    @property
    def socket(self) -> str:
        """The path of the Unix socket for clients; starts a server at its first use."""
        path = self._server().socket
        assert path is not None  # the own server is never a TCP one
        return path

    def serve(
        self,
        *,
        socket: str | os.PathLike[str] | None = None,
        tcp: str | None = None,
        export_name: str = "",
        description: str = "",
    ) -> NbdServer:
        """Start one more server of this disk; it ends with the disk, or by its ``stop()``.

        :param socket: the path of the Unix socket; in a private directory, unless given.
        :param tcp: listen on ``HOST:PORT`` instead; port 0 takes any free one.
        :param export_name: what clients may ask for; whoever asks for none gets the disk, too.
        :raises ListenError: no socket can be had there.
        """
        from cowkit.server.server import NbdServer

        with self._starting:
            self._open()
            server = NbdServer(
                self.engine, socket_path=socket, tcp=tcp, export_name=export_name, description=description
            )
            self._servers.append(server)
        return server

    def _server(self) -> NbdServer:
        if self._own_server is None or self._closed:
            with self._starting:
                self._open()
                if self._own_server is None:
                    from cowkit.server.server import NbdServer

                    self._own_server = NbdServer(self.engine)
                    self._servers.append(self._own_server)
        return self._own_server

    @property
    def server_errors(self) -> list[BaseException]:
        """What went wrong in the servers' threads without being any client's fault; empty unless there is a bug."""
        return [error for server in self._servers for error in server.errors]

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return sum(server.connections for server in self._servers)

    def _open(self) -> None:
        if self._closed:
            raise DiskClosedError(f"the disk {self.name!r} is closed")

    def close(self) -> None:
        """End the servers, throw away what was written and let go of the base; may be called again.

        :raises BaseChangedError: the base is not what it was at opening. The disk is closed all the same.
        """
        with self._starting:
            if self._closed:
                return
            self._closed = True
        for server in self._servers:
            server.stop()
        self.engine.close()


def _rounded(size: int, block: int, how: Round) -> int:
    if how == "exact" or size % block == 0:
        return size
    return size - size % block + (block if how == "up" else 0)
