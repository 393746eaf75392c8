"""Being told by the host, at any time, that something has happened."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

from cowkit.errors import ServerError
from cowkit.server.quiet_thread import QuietThread


class Notices:
    """A socket of which the host gets the other end: a byte is a notice, and its end is the end.

    :param on_notice: called for each notice, from a thread of its own.
    :param on_end: called at the end, from that thread; the end of the host is one, too.
    :raises ServerError: no socket is to be had.
    """

    def __init__(
        self, *, on_notice: Callable[[], None] | None = None, on_end: Callable[[], None] | None = None
    ) -> None:
        try:
            self._ours, self._theirs = socket.socketpair()
        except OSError as error:
            raise ServerError(f"cannot reach the host of the disk: {error.strerror}; raise `ulimit -n`") from error
        self._on_notice = on_notice
        self._on_end = on_end
        self._thread = QuietThread(target=self._listen, name="cowkit-notices")

    @property
    def descriptor(self) -> int:
        """What to send to the host."""
        return self._theirs.fileno()

    def begin(self) -> None:
        """The host has its end: listen."""
        self._theirs.close()
        self._thread.start()

    def cancel(self) -> None:
        """The host did not take it."""
        self._theirs.close()
        self._ours.close()

    def _listen(self) -> None:
        with self._ours:
            while self._next():
                if self._on_notice is not None:
                    self._on_notice()
        if self._on_end is not None:
            self._on_end()

    def _next(self) -> bool:
        try:
            return bool(self._ours.recv(1))
        except OSError:
            return False

    def join(self) -> None:
        """Wait for the end, unless this is called by what is called from here."""
        if self._thread is not threading.current_thread():
            self._thread.join()

    def forget(self) -> None:
        """In a forked child, which has no such thread: close its copy of the socket."""
        self._ours.close()
