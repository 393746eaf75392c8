"""Sends replies, whole: also where a view in one of them cannot be read any more."""

from __future__ import annotations

import errno
import os
import socket
from contextlib import suppress

from cowkit.server import wire
from cowkit.server.channel import Channel
from cowkit.server.replies import Buffers, Dialect, Extended, Structured

IOV_MAX = 1024
"""How many buffers one call takes (Linux, UIO_MAXIOV)."""


_SEND_BUFFER = 512 << 10
"""What the kernel may hold of replies that the client has not read, and as much again for its own overhead (socket(7), SO_SNDBUF); the
usual 208 KiB in all are less than one long reply: server and client wake each other for each piece of it. 256 KiB and 1 MiB reads are
twice as fast with 512 KiB, 4 KiB reads at depth 32 a tenth; 1 and 2 MiB add nothing. Where net.core.wmem_max is at its usual 208 KiB, that
is what there is of it, and most of the gain."""


def make_room(sock: socket.socket) -> None:
    """Have the kernel hold more of what ``sock``'s client is to read. Over TCP it finds the size itself, unless it is told one."""
    if sock.family == socket.AF_UNIX:
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)


class Sender:
    """Sends to the client at the other end of ``sock``, which speaks ``dialect``."""

    def __init__(self, sock: Channel, dialect: Dialect) -> None:
        self._sock = sock
        self._dialect = dialect

    def send(self, out: Buffers) -> None:
        """Send ``out``, however long that takes.

        :raises OSError: the connection broke, or was ended since a reply that had begun cannot be.
        """
        try:
            while out:
                out = unsent(out, self._sock.sendmsg(out[:IOV_MAX]))
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            self._send_carefully(out)

    def _send_carefully(self, out: Buffers) -> None:
        """A mapping cannot be read, since its file was cut short or its disk fails: answer those READs with an error.

        A head is ``bytes``, the data behind it are views. What is left begins with a head, unless sending stopped within the
        data of a reply, whose head has promised all of them: then only ending the connection is left. In place of a chunk of
        several comes the error, which is the reply's last chunk: those that were to follow it are left out.
        """
        if not isinstance(out[0], bytes):
            raise self._unreadable()
        spare = os.memfd_create("cowkit-unreadable")
        try:
            index = 0
            while index < len(out):
                stop = index + 1
                while stop < len(out) and not isinstance(out[stop], bytes):
                    stop += 1
                reply = out[index:stop]
                if all(_readable(part, spare) for part in reply[1:]):
                    self._send_all(b"".join(reply[:1]), reply[1:])
                else:
                    self._send_all(self._refusal(reply[0]), [])
                    while not self._ends_reply(out[index]):
                        index, stop = stop, stop + 1
                        while stop < len(out) and not isinstance(out[stop], bytes):
                            stop += 1
                index = stop
        finally:
            os.close(spare)

    def _refusal(self, head: bytes | memoryview) -> bytes:
        if isinstance(self._dialect, Extended):
            _, _, _, cookie, offset, _ = wire.EXTENDED_REPLY.unpack_from(head)
        elif isinstance(self._dialect, Structured):
            _, _, _, cookie, _ = wire.STRUCTURED_REPLY.unpack_from(head)
            offset = 0
        else:
            _, _, cookie = wire.SIMPLE_REPLY.unpack_from(head)
            offset = 0
        return self._dialect.failed(
            cookie, offset, wire.NbdError.EIO, "the base or the overlay cannot be read any more"
        )

    def _ends_reply(self, head: bytes | memoryview) -> bool:
        """Whether this head is that of a reply's last or only chunk."""
        if not self._dialect.structured:
            return True
        _, flags, *_ = wire.STRUCTURED_REPLY.unpack_from(head)  # the beginning is that of an extended head, too
        return bool(flags & wire.REPLY_FLAG_DONE)

    def _send_all(self, head: bytes, parts: Buffers) -> None:
        try:
            self._sock.sendall(head)
            for part in parts:
                self._sock.sendall(part)
        except OSError as error:
            if error.errno != errno.EFAULT:
                raise
            raise self._unreadable() from error  # it was readable a moment ago, and its head is on its way

    @staticmethod
    def _unreadable() -> ConnectionAbortedError:
        return ConnectionAbortedError(errno.ECONNABORTED, "the base or the overlay cannot be read any more")


def unsent(out: Buffers, sent: int) -> Buffers:
    """What is left of ``out`` when its first ``sent`` bytes have gone."""
    for index, part in enumerate(out):
        if sent < len(part):
            return [memoryview(part)[sent:], *out[index + 1 :]] if sent else out[index:]
        sent -= len(part)
    return []


def _readable(part: bytes | memoryview, spare: int) -> bool:
    """Have the kernel copy it elsewhere: that fails where Python's touching it would end the process."""
    try:
        done = 0
        while done < len(part):
            done += os.pwrite(spare, memoryview(part)[done:], 0)
    except OSError:
        return False
    return True
