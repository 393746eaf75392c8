"""An NBD export as a base."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from cowkit.bases.nbd_client import NbdClient
from cowkit.disk.base import Base
from cowkit.disk.extent import Extent
from cowkit.errors import BaseChangedError, BaseOpenError

_QEMU_OPENS = re.compile(r"nbd(\+tcp|\+unix)?://")


class ClientBase(Base):
    """What an :class:`~cowkit.bases.nbd_client.NbdClient` reads, as a base; it closes the client."""

    def __init__(self, client: NbdClient) -> None:
        super().__init__()
        self._client = client
        self.size = client.size
        self.sparse = client.has_status

    @property
    def view(self) -> None:
        """None: there is no file to map."""

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from ``offset`` on.

        :raises BaseError: the server fails to read, or has gone.
        """
        self._client.read_into(buffer, offset)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The export's data, and what it says reads as zeroes."""
        return self._client.extents(offset, length)

    @property
    def contexts(self) -> frozenset[str]:
        """The further metadata contexts that it was opened with, of which the server tells."""
        return self._client.contexts

    def offered(self) -> list[str]:
        """The metadata contexts that the server lists."""
        return self._client.offered()

    def marks(self, context: str) -> Iterator[tuple[int, int, int]]:
        """What the server says of all the export in one of :attr:`contexts`: ``(offset, length, value)``, in order.

        :raises BaseError: it does not tell, or has gone.
        """
        return self._client.marks(context, 0, self.size)

    def verify(self) -> None:
        """Of an export only the size is known, which stays while a connection does."""

    def interrupt(self) -> None:
        """Have reads that wait for the server fail now."""
        self._client.interrupt()

    def _close(self) -> None:
        self._client.close()


class NbdBase(ClientBase):
    """The export of an NBD URI, such as ``nbd://host/export`` or ``nbd+unix:///?socket=/run/sock``.

    :param contexts: metadata contexts to ask for beside ``base:allocation``.
    :raises BaseOpenError: there is no server, it refuses, or the URI is none.
    :raises MissingToolError: libnbd's Python binding is not installed.
    """

    def __init__(self, uri: str, contexts: Sequence[str] = ()) -> None:
        def connect(handle: Any) -> None:
            # Whoever starts cowkit gives the URI, so it may name a file of keys (tls-psk-file=).
            handle.set_uri_allow_local_file(True)
            handle.aio_connect_uri(uri)

        super().__init__(NbdClient(uri, connect, contexts=contexts))
        self.given = uri
        if not _QEMU_OPENS.match(uri):
            self.backing_refusal = (
                f"base {uri} cannot be a qcow2 backing file, since QEMU opens nbd:// and nbd+unix:// URIs only: copy the disk "
                "to a file (nbdcopy) and name that one (--backing disk.img)"
            )

    def verify_path(self) -> None:
        """Look whether the URI still leads to an export of that size, where a server can be asked beside our connections.

        :raises BaseChangedError: it does not.
        """
        if not self._client.can_multi_conn:
            return
        try:
            size = self._client.size_now()
        except BaseOpenError as error:
            raise BaseChangedError(f"base {self.given} is not there any more: {error}") from error
        if size != self.size:
            raise BaseChangedError(
                f"base {self.given} changed while it was in use: its size went from {self.size} to {size} bytes"
            )
