"""Messages between a process and its host: one after the other over a Unix socket pair, each with bytes and descriptors.

::

    u32  length of the head          in the byte order of the machine
    u64  length of the data
    head                             a pickled object
    data                             raw bytes, for reads and writes: they are copied no more often than the system does

Pickle, because both ends are the same program of the same user and there is no border between them to be kept: whoever
could put a byte into this socket could as well write into either process. It carries exceptions, extents and reports as they
are; JSON would need a second description of each.

Descriptors travel with the first bytes of a message (SCM_RIGHTS, unix(7)).
"""

from __future__ import annotations

import array
import errno
import os
import pickle
import select
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

Data = bytes | bytearray | memoryview

MOST_DESCRIPTORS = 253
"""How many can go with one message (SCM_MAX_FD)."""

CANNOT_BE_PICKLED = (pickle.PicklingError, AttributeError, RecursionError, TypeError, ValueError)
"""What :func:`packed` raises. Not just any exception, which may be one from outside, as ctrl-C is."""

_FRAME = struct.Struct("=IQ")
_DRAIN_SECONDS = 0.5
_DESCRIPTORS = socket.CMSG_SPACE(MOST_DESCRIPTORS * 4)


class Channel:
    """One end, for one thread at a time; the socket is the channel's."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._hang_up = select.poll()
        self._hang_up.register(sock, select.POLLRDHUP)

    def send(self, head: bytes, data: Data = b"", descriptors: Sequence[int] = ()) -> None:
        """Send a message. The descriptors stay the caller's.

        :param head: what :func:`packed` gave.
        :raises OSError: the other end has gone.
        """
        frame = _FRAME.pack(len(head), len(data)) + head
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        buffers = [frame, data] if len(data) else [frame]
        sent = self._socket.sendmsg(buffers, rights)
        if sent < len(frame):
            self._socket.sendall(memoryview(frame)[sent:])
            sent = len(frame)
        if sent < len(frame) + len(data):
            self._socket.sendall(memoryview(data)[sent - len(frame) :])

    def receive(self) -> tuple[Any, bytearray]:
        """The next message's head and data.

        :raises OSError: the other end has gone (:class:`EOFError` tells nothing more, and is never raised).
        """
        buffer = bytearray(_FRAME.size)
        self._fill(memoryview(buffer))
        return self._rest(buffer)

    def receive_with_descriptors(self) -> tuple[Any, bytearray, list[int]]:
        """The next message's head, data, and descriptors, which are the caller's now and are not inherited by children.

        :raises OSError: the other end has gone, or there is no room for the descriptors.
        """
        buffer, rights, flags, _ = self._socket.recvmsg(_FRAME.size, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        if not buffer:
            raise _ended()
        found = array.array("i")
        for _, _, some in rights:
            found.frombytes(some[: len(some) - len(some) % found.itemsize])
        try:
            if flags & socket.MSG_CTRUNC:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            frame = bytearray(_FRAME.size)
            frame[: len(buffer)] = buffer
            self._fill(memoryview(frame)[len(buffer) :])
            return *self._rest(frame), found.tolist()
        except BaseException:
            for fd in found:
                os.close(fd)
            raise

    def _rest(self, frame: bytearray) -> tuple[Any, bytearray]:
        head_length, data_length = _FRAME.unpack(frame)
        head = bytearray(head_length)
        self._fill(memoryview(head))
        data = bytearray(data_length)
        self._fill(memoryview(data))
        return pickle.loads(head), data  # noqa: S301 - see the module's note

    def _fill(self, buffer: memoryview) -> None:
        while buffer:
            count = self._socket.recv_into(buffer)
            if not count:
                raise _ended()
            buffer = buffer[count:]

    def hung_up(self) -> bool:
        """Whether the other end will send no more: it has given up the call, or has ended."""
        return bool(self._hang_up.poll(0))

    def shut(self) -> None:
        """End it: whoever waits at either end is told that the other has gone. Any thread may call this."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def abandon(self) -> None:
        """Give up the call under way. Wait for the other end to notice and to clean up, but not for long."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
            self._socket.settimeout(_DRAIN_SECONDS)
            while self._socket.recv(1 << 16):
                pass
        except OSError:
            pass
        finally:
            self.close()

    def close(self) -> None:
        """Close this end; may be called again."""
        self._socket.close()

    def __del__(self) -> None:
        # For what an interrupt kept from being closed.
        self._socket.close()


def packed(head: object) -> bytes:
    """``head`` as :meth:`Channel.send` takes it.

    :raises CANNOT_BE_PICKLED: it has a part that cannot be pickled.
    """
    return pickle.dumps(head, pickle.HIGHEST_PROTOCOL)


def _ended() -> OSError:
    return ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
