"""A layer: a sparse file that holds the blocks written since the last checkpoint, at the disk's own offsets.

The file has no name from birth on, so nothing of it is left after a kill. It is counted: the overlay and each frozen view
that needs it hold it, and the last one to let go closes it, which gives all its space back.
"""

from __future__ import annotations

import errno
import os

from cowkit.disk.counted import Counted
from cowkit.disk.files import ShortReadError, map_for_reading, pread_whole
from cowkit.disk.piped import Piped
from cowkit.disk.room import Room
from cowkit.errors import OverlayError, OverlayFullError

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def default_directory() -> str:
    """``$TMPDIR`` or, without it, ``/var/tmp``: overlays may be large, and ``/tmp`` is memory on many machines."""
    return os.environ.get("TMPDIR") or "/var/tmp"


_FRESH_PIECE = 64 << 10
"""Bytes written at once where the file has nothing yet.

The length of a write decides how large a folio the page cache takes for it, and each small write into a folio goes through all
the buffers of that one (Linux 6.18, ext4). Rewriting 4 KiB costs 2.4 microseconds in what was written by 4 KiB, 4.6 in what was
written by 64 KiB, 6.7 by 256 KiB and 13.6 by 1 MiB (medians of six; at best 2.3, 3.6, 3.6 and 5.3). Fresh writes by 64 KiB run at
3.2 GB/s instead of 3.7 and 4.5, which a client does not see: it brings less.
"""

_ROOM_FROM = 128 << 10
"""Bytes of a write to fresh blocks beyond which room is found for all of it first: 1 MiB then runs at 4.0 GB/s instead of 3.1, and a client
writes 256 KiB one after the other a third faster."""


class Layer(Counted):
    """A sparse unnamed file of ``size`` bytes in ``directory``.

    :raises OverlayError: it cannot be made there.
    """

    fd = -1
    _view: memoryview | None = None

    def __init__(self, size: int, directory: str) -> None:
        super().__init__()
        self._room = Room()
        self._unmapped = True
        self.size = size
        self.directory = directory
        try:
            self.fd = _unnamed_file(directory)
        except OSError as error:
            remedy = "set TMPDIR (or tmpdir=, --tmpdir) to a directory where files can be written"
            if error.errno in (errno.EMFILE, errno.ENFILE):
                remedy = "allow more (`ulimit -n`), or let fewer clients connect"
            raise OverlayError(f"cannot make the overlay's file in {directory}: {error.strerror}; {remedy}") from error
        self._sized = True
        try:
            os.ftruncate(self.fd, size)
        except OSError:
            # Some file systems hold no file as large as the disk (ext4: 16 TiB). Blocks near the beginning still fit.
            self._sized = False

    @property
    def view(self) -> memoryview | None:
        """A mapping for system calls to read; see :class:`cowkit.disk.source.Source`."""
        if self._view is None and self._sized:
            self._view = map_for_reading(self.fd, self.size)
        return self._view

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``; what was never written reads as zeroes."""
        try:
            pread_whole(self.fd, buffer, offset)
        except ShortReadError:
            raise OverlayError(
                f"the overlay's file in {self.directory} ends before byte {offset + len(buffer)}"
            ) from None
        except OSError as error:
            raise self.failed("read", error) from error

    def write(self, parts: list[memoryview], offset: int) -> None:
        """Write ``parts``, one behind the other, at ``offset``.

        :raises OverlayFullError: no space; some of the bytes may have been written.
        """
        left = sum(map(len, parts))
        try:
            while True:
                count = os.pwritev(self.fd, parts, offset)
                left -= count
                if not left:
                    return
                offset += count
                while count >= len(parts[0]):
                    count -= len(parts[0])
                    parts = parts[1:]
                parts = [parts[0][count:], *parts[1:]]
        except OSError as error:
            raise self.failed("write", error) from error

    def write_one(self, data: memoryview, offset: int) -> None:
        """:meth:`write` of one part, in the fewest steps: the way of each rewrite."""
        try:
            count = os.pwrite(self.fd, data, offset)
        except OSError as error:
            raise self.failed("write", error) from error
        if count < len(data):
            self.write([data[count:]], offset + count)

    def write_fresh(self, parts: list[memoryview], offset: int) -> None:
        """The same where the file has nothing yet: long parts in pieces, see ``_FRESH_PIECE``."""
        length = sum(map(len, parts))
        if length <= _FRESH_PIECE:
            self.write(parts, offset)
            return
        if length > _ROOM_FROM:
            self._room.find(self.fd, offset, length, limit=self.size)
        for part in parts:
            for start in range(0, len(part), _FRESH_PIECE):
                piece = part[start : start + _FRESH_PIECE]
                self.write([piece], offset)
                offset += len(piece)

    def write_piped(self, piped: Piped, length: int, offset: int) -> None:
        """:meth:`write` of the next ``length`` bytes of the payload in a pipe.

        :raises OverlayFullError: no space; some of the bytes may have been written, and are no longer in the pipe.
        """
        while length:
            try:
                count = piped.to_file(self.fd, length, offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise self.failed("write", error) from error
                rest = piped.take_payload()  # a file system that takes nothing from pipes (splice(2))
                try:
                    self.write([rest], offset)
                except (OverlayFullError, OverlayError):
                    piped.give_back(rest)  # how much of it was written, nobody knows
                    raise
                return
            length -= count
            offset += count

    def write_fresh_piped(self, piped: Piped, offset: int) -> None:
        """:meth:`write_fresh` of the payload in a pipe."""
        if piped.left > _ROOM_FROM:
            self._room.find(self.fd, offset, piped.left, limit=self.size)
        while piped.left:
            length = min(piped.left, _FRESH_PIECE)
            self.write_piped(piped, length, offset)
            offset += length

    def take_back(self, piped: Piped, length: int, offset: int) -> memoryview:
        """The ``length`` bytes that were in a pipe when writing it at ``offset`` began, which failed."""
        data = memoryview(bytearray(length))
        written = length - piped.left
        piped.take(data[written:])
        self.read_into(data[:written], offset)
        return data

    def failed(self, what: str, error: OSError) -> OverlayError | OverlayFullError:
        """The error to raise for a system call that failed on the layer's file."""
        if error.errno == errno.EFBIG:
            return OverlayFullError(
                f"the overlay in {self.directory} cannot hold a disk of {self.size} bytes that far: {error.strerror}; "
                "set TMPDIR (or tmpdir=, --tmpdir) to a file system with larger files (XFS, Btrfs), or raise `ulimit -f`"
            )
        if error.errno in _FULL:
            return OverlayFullError(
                f"no room for the overlay in {self.directory}: {error.strerror}; "
                "free some space there or set TMPDIR (or tmpdir=, --tmpdir) to a roomier directory"
            )
        return OverlayError(f"cannot {what} the overlay's file in {self.directory}: {error.strerror}")

    def punch(self, offset: int, length: int) -> None:
        """Give back the space of ``length`` bytes, which read as zeroes from then on; where the system can't, keep them."""
        from cowkit.disk.punch import punch_hole  # ctypes takes 10 ms to import, and few disks are ever trimmed

        punch_hole(self.fd, offset, length)

    def abandon(self, offset: int, length: int) -> None:
        """Give back what room a write to fresh blocks has found that could not find all: smaller ones may have use for it."""
        try:
            self.punch(offset, length)
        except (OSError, ImportError):
            pass  # no descriptor to be had for importing what does it

    def gives_up_room(self) -> bool:
        """Find no more room ahead of writes; whether any was found, which what was never written may hold."""
        return self._room.give_up()

    def space(self) -> int:
        """The bytes of storage that the file takes, as the file system accounts them."""
        return os.fstat(self.fd).st_blocks * 512

    def unmap(self) -> bool:
        """Let go of the mapping; False while somebody still has a view of it, such as a reply that is not sent yet."""
        view, self._view = self._view, None
        if view is None:
            return self._unmapped
        mapping = view.obj
        view.release()
        try:
            mapping.close()  # type: ignore[attr-defined]
        except BufferError:
            self._unmapped = False
        return self._unmapped

    def _close(self) -> None:
        self._view = None
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        # For what an interrupt or a fork kept from being released.
        self._close()


def _unnamed_file(directory: str) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    import tempfile  # takes 6 ms, and nearly every file system has O_TMPFILE

    # No O_TMPFILE on this file system (overlayfs of old kernels, NFS, 9p): a name for as short a time as possible.
    fd, path = tempfile.mkstemp(prefix="cowkit-", dir=directory)
    os.unlink(path)
    return fd
