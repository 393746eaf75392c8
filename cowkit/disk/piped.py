"""Bytes on their way from a socket to a layer's file that wait in a pipe, and are never seen by this process.

A pipe holds references to the pages that the socket received (splice(2)); from there the kernel copies them into the file. That
saves one of the two copies of a payload.
"""

from __future__ import annotations

import fcntl
import os

_SIZE = 512 << 10
"""Of the pipe, in bytes, which stands for 128 pages or larger pieces: 1.8 MB came from a Unix socket before it was full, and 3 MB
over TCP on the loopback interface. An unprivileged user may have 64 MiB of pipes in all before new ones are made small (pipe(7))."""


class Piped:
    """A pipe for the payload of one write at a time. For one thread at a time; :meth:`close` it.

    :raises OSError: there are no descriptors left, or no pipes of that size.
    """

    def __init__(self) -> None:
        self.left = 0
        """How many bytes are in it."""
        self._given_back = memoryview(b"")
        self._source, self._target = os.pipe()
        try:
            fcntl.fcntl(self._target, fcntl.F_SETPIPE_SZ, _SIZE)
        except BaseException:
            self.close()
            raise

    def receive(self, fd: int, most: int) -> int:
        """Take up to ``most`` bytes from the socket ``fd``; how many that were, 0 at the socket's end.

        :raises BlockingIOError: the socket has nothing, or the pipe is full.
        :raises OSError: the socket failed, or cannot do this.
        """
        count = os.splice(fd, self._target, most, flags=os.SPLICE_F_NONBLOCK)
        self.left += count
        return count

    def to_file(self, fd: int, most: int, offset: int) -> int:
        """Write up to ``most`` bytes to the file ``fd`` at ``offset``; how many that were.

        :raises OSError: the file failed, or its file system cannot do this (EINVAL).
        """
        count = os.splice(self._source, fd, most, offset_dst=offset)
        self.left -= count
        return count

    def take(self, into: memoryview) -> None:
        """Move all that is left to the beginning of ``into``, which has room for it."""
        first, self._given_back = self._given_back, memoryview(b"")
        into[: len(first)] = first
        self.left -= len(first)
        into = into[len(first) :]
        while self.left:
            count = os.readv(self._source, [into[: self.left]])
            self.left -= count
            into = into[count:]

    def take_all(self) -> memoryview:
        """All that is left, in memory."""
        data = memoryview(bytearray(self.left))
        self.take(data)
        return data

    def give_back(self, data: memoryview) -> None:
        """Have ``data``, which were all that was left, be that again."""
        self._given_back = data
        self.left = len(data)

    def close(self) -> None:
        """Give the descriptors back."""
        os.close(self._source)
        os.close(self._target)
