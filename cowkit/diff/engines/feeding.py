"""Writes what changed to an NBD export, several requests at a time."""

from __future__ import annotations

import os
import socket
from types import TracebackType
from typing import Any, Self

from cowkit.bases.nbd_client import import_nbd
from cowkit.diff.batch import Batch
from cowkit.disk.extent import Kind
from cowkit.errors import ToolError

_MOST_REQUESTS = 16
_LONGEST_ZERO = 1 << 30
"""Bytes of a request to zero; NBD's lengths have 32 bits."""
_LONGEST_WRITE = 2 << 20


class FeedError(ToolError):
    """The export did not take it, in one line."""

    lost = False
    """Whether the connection is gone, and so perhaps the server."""


class Feeder:
    """An NBD client that writes, for the length of a ``with`` block.

    :param sock: connected to the server; the feeder's from now on.
    :param export: its name.
    :raises MissingToolError: libnbd's Python binding is not installed.
    :raises FeedError: the server refuses.
    """

    def __init__(self, sock: socket.socket, export: str) -> None:
        self._nbd: Any = import_nbd("the engine qmp")
        self._inflight = 0
        self._error = 0
        self._handle: Any = self._nbd.NBD()
        try:
            self._handle.set_export_name(export)
            self._handle.connect_socket(sock.detach())
            self.size: int = self._handle.get_size()
            """Of the export, in bytes."""
        except self._nbd.Error as error:
            raise FeedError(_reason(error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._handle  # which closes it: requests that are still under way come to nothing

    def add(self, batch: Batch) -> None:
        """Write the runs of ``batch``, as far as the export goes.

        :raises FeedError: it, or something before it, failed.
        """
        for run, content in batch.pieces():
            if run.kind is Kind.DATA:
                self.write(content[: max(0, self.size - run.offset)], run.offset)
            else:
                self.zero(min(run.length, self.size - run.offset), run.offset)

    def write(self, content: memoryview, offset: int) -> None:
        """Have ``content`` written; it may change afterwards."""
        for at in range(0, len(content), _LONGEST_WRITE):
            buffer = self._nbd.Buffer.from_bytearray(bytearray(content[at : at + _LONGEST_WRITE]))
            self._begin(self._handle.aio_pwrite, buffer, offset + at)

    def zero(self, length: int, offset: int) -> None:
        """Have the range read as zeroes; what it takes to do so is the image's own affair."""
        for at in range(0, length, _LONGEST_ZERO):
            self._begin(self._handle.aio_zero, min(length - at, _LONGEST_ZERO), offset + at)

    def drain(self) -> None:
        """Wait until all is written.

        :raises FeedError: something failed.
        """
        self._drain(0)

    def finish(self) -> None:
        """Wait until all is written, and end the connection.

        :raises FeedError: something failed.
        """
        self.drain()
        try:
            self._handle.flush()
            self._handle.shutdown()
        except self._nbd.Error as error:
            raise self._failed(_reason(error)) from error

    def _failed(self, reason: str) -> FeedError:
        failure = FeedError(reason)
        failure.lost = self._handle.aio_is_dead() or self._handle.aio_is_closed()
        return failure

    def _begin(self, request: Any, what: Any, offset: int) -> None:
        self._drain(_MOST_REQUESTS - 1)
        try:
            request(what, offset, self._done)
        except self._nbd.Error as error:
            raise self._failed(_reason(error)) from error
        self._inflight += 1

    def _done(self, error: Any) -> int:
        self._inflight -= 1
        number = error.value if hasattr(error, "value") else int(error)
        self._error = self._error or number
        return 1  # to be forgotten by libnbd

    def _drain(self, most: int) -> None:
        """Wait until no more than ``most`` requests are under way."""
        try:
            while self._inflight > most and not self._error:
                self._handle.poll(-1)
        except self._nbd.Error as error:
            raise self._failed(_reason(error)) from error
        if self._error:
            raise self._failed(os.strerror(self._error))


def _reason(error: Any) -> str:
    """What libnbd says, in one line; the system's words where it has a number."""
    if getattr(error, "errnum", 0):
        return os.strerror(error.errnum)
    return " ".join(str(getattr(error, "string", None) or error).split())
