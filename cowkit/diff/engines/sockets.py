"""The sockets between us and a storage daemon, which gets them as descriptors: nobody else can connect."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from cowkit.errors import OutputError


@contextmanager
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two sockets that are connected with each other, until the block ends."""
    ours, its = socket.socketpair()
    with ours, its:
        yield ours, its


class Listening:
    """A listening Unix socket for another program, for the length of a ``with`` block.

    :param directory: a private one; its path is short enough for a socket in it (unix(7)).
    """

    def __init__(self, directory: str) -> None:
        self._path = os.path.join(directory, os.urandom(4).hex())
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.bind(self._path)
            self._socket.listen()
        except OSError as error:
            self._socket.close()
            raise OutputError(f"cannot listen in {directory}: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        with suppress(OSError):
            os.unlink(self._path)

    def fileno(self) -> int:
        """The descriptor to hand over."""
        return self._socket.fileno()

    def let_go(self) -> None:
        """Keep no copy of it, once it is handed over: when the other program has ended, nobody is to listen."""
        self._socket.close()

    def connect(self) -> socket.socket:
        """A new connection to whoever has got it.

        :raises OSError: nobody has it any more.
        """
        made = socket.socket(socket.AF_UNIX)
        try:
            made.connect(self._path)
        except BaseException:
            made.close()
            raise
        return made
