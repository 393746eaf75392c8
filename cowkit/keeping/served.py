"""A state of a disk, served read-only on a private Unix socket for as long as a program of QEMU's needs it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from cowkit.disk import Base, Disk, Extent
from cowkit.errors import BaseChangedError
from cowkit.server.server import NbdServer


class Served(Base):
    """``base`` with a count of what is read of it; it lets go of ``base`` when it is closed."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self._base = base
        self._adding = threading.Lock()
        self.size = base.size
        self.sparse = base.sparse
        self.given = base.given
        self.bytes_read = 0
        self.uri = self.socket = ""

    @property
    def view(self) -> None:
        """None: what is read through a mapping nobody could count."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on."""
        self._base.read_into(buffer, offset)
        with self._adding:
            self.bytes_read += len(buffer)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """Data and holes."""
        return self._base.extents(offset, length)

    def verify(self) -> None:
        """See :meth:`cowkit.disk.base.Base.verify`."""
        self._base.verify()

    def _close(self) -> None:
        self._base.release()


@contextmanager
def served(base: Base, block_size: int) -> Iterator[Served]:
    """``base`` under its ``uri`` and ``socket``, for the length of the block; it is let go of then.

    :param block_size: the unit of copy-on-write of the disk that it belongs to: how large a disk is allowed to be.
    :raises ListenError: there is no private directory for the socket.
    """
    counted = Served(base)
    disk = Disk(counted, block_size=block_size)
    try:
        with NbdServer(disk, read_only=True) as server:
            assert server.socket is not None
            counted.uri, counted.socket = server.uri, server.socket
            yield counted
    finally:
        with suppress(BaseChangedError):  # whoever writes the image looks, and says so
            disk.close()
