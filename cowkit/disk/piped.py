"""Bytes on their way from a socket to a layer's file that wait in a pipe, and are never seen by this process.

A pipe holds references to the pages that the socket received (splice(2)); from there the kernel copies them into the file. That
saves one of the two copies of a payload.
"""

from __future__ import annotations

import fcntl
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from select import poll

_SIZE = 512 << 10
"""Of the pipe, in bytes, which stands for 128 pages or larger pieces: 1.8 MB came from a Unix socket before it was full, and 3 MB
over TCP on the loopback interface. An unprivileged user may have 64 MiB of pipes in all before new ones are made small (pipe(7))."""

_AHEAD = 1536 << 10
"""How many bytes may wait in it, unless one payload is longer: less than a connection's buffer holds, where they go if they are no long
WRITE's. Rewriting by 1 MiB is a third faster than with 1 MiB."""

_OFTEN = 128 << 10
"""After how many bytes that were written more is taken, and the most written at once: the client's socket holds but 208 KiB."""


class Piped:
    """A pipe for the payload of one write at a time, and for what the socket brings behind it. For one thread at a time.

    :raises OSError: there are no descriptors left, or no pipes of that size.
    """

    _look: poll
    """Whether the socket has something; there once ``_more_from`` is."""

    def __init__(self) -> None:
        self.held = 0
        """How many bytes are in it."""
        self.left = 0
        """How many bytes of the payload are still to be taken."""
        self._more_from = -1
        self._written = 0
        """How many bytes since more was taken."""
        self._given_back = memoryview(b"")
        self._source, self._target = os.pipe()
        try:
            fcntl.fcntl(self._target, fcntl.F_SETPIPE_SZ, _SIZE)
        except BaseException:
            self.close()
            raise

    def begin(self, length: int) -> None:
        """A payload of ``length`` bytes is next, of which the first may be here already."""
        self.left = length

    def receive(self, fd: int, *, ahead: bool) -> int:
        """Take from the socket ``fd`` what there is of the payload; how many bytes that were, 0 at the socket's end.

        :param ahead: take what is behind the payload, too, now and while the payload is written: the client need not wait for that.
        :raises BlockingIOError: the socket has nothing, or the pipe is full.
        :raises OSError: the socket failed, or cannot do this.
        """
        most = (max(_AHEAD, self.left) if ahead else self.left) - self.held
        count = os.splice(fd, self._target, most, flags=os.SPLICE_F_NONBLOCK)
        self.held += count
        if not ahead:
            self._more_from = -1
        elif self._more_from != fd:
            from select import POLLIN, poll  # which a disk without clients does without

            self._look = poll()
            self._look.register(fd, POLLIN)
            self._more_from = fd
        return count

    def to_file(self, fd: int, most: int, offset: int) -> int:
        """Write up to ``most`` bytes of the payload to the file ``fd`` at ``offset``; how many that were.

        :raises OSError: the file failed, or its file system cannot do this (EINVAL).
        """
        count = os.splice(self._source, fd, min(most, _OFTEN), offset_dst=offset)
        self.held -= count
        self.left -= count
        self._written += count
        if self._more_from >= 0 and self._written >= _OFTEN and self.held < _AHEAD:
            self._written = 0
            self._take_more()
        return count

    def _take_more(self) -> None:
        try:
            # A TCP socket waits for bytes, whatever splice(2) is told about waiting.
            if self._look.poll(0):
                most = _AHEAD - self.held
                self.held += os.splice(self._more_from, self._target, most, flags=os.SPLICE_F_NONBLOCK)
        except OSError:
            pass  # the pipe is full, or what is wrong will be met when there is nothing to do but to wait

    def take(self, into: memoryview) -> None:
        """Move as much as ``into`` has room for into it: what is behind the payload, unless that is still there."""
        first, self._given_back = self._given_back[: len(into)], self._given_back[len(into) :]
        into[: len(first)] = first
        self.left = max(0, self.left - len(into))
        into = into[len(first) :]
        while into:
            count = os.readv(self._source, [into])
            self.held -= count
            into = into[count:]

    def take_payload(self) -> memoryview:
        """All that is left of the payload, in memory."""
        data = memoryview(bytearray(self.left))
        self.take(data)
        return data

    def give_back(self, data: memoryview) -> None:
        """Have ``data``, which were all that was left of the payload, be that again."""
        self._given_back = data
        self.left = len(data)

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self._source)
        os.close(self._target)
