"""A client at two pipes, and a client at standard input and output.

What holds for pipes: :meth:`PipeStream.shutdown` ends a wait in another thread. A pipe cannot be shut down as a socket can, so
its descriptors never block, and waiting is for the pipe or for an eventfd, whichever comes first. O_NONBLOCK belongs to what a
descriptor stands for, which the shell and other programs may share; so each pipe is opened anew where the system lets us.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import stat
from collections.abc import Iterable

from cowkit.errors import ListenError
from cowkit.server.channel import Buffer, Stream

_IOV_MAX = 1024  # Linux, UIO_MAXIOV
_ASKED = "--stdio wants a connected socket or two pipes there"


class PipeStream:
    """A :class:`Stream` that receives from one pipe and sends into another. The two descriptors stay the caller's."""

    def __init__(self, receive: int, send: int) -> None:
        self._receive = _opened_anew(receive, os.O_RDONLY)
        self._send = _opened_anew(send, os.O_WRONLY)
        self._ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._open = [self._receive, self._send, self._ended]

    def recv(self, bufsize: int, /) -> bytes:
        """See :meth:`Channel.recv`."""
        while self._wait(self._receive, select.POLLIN):
            try:
                return os.read(self._receive, bufsize)
            except BlockingIOError:
                pass
        return b""

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int:
        """See :meth:`Channel.recv_into`."""
        while self._wait(self._receive, select.POLLIN):
            try:
                return os.readv(self._receive, [buffer[: nbytes or len(buffer)]])
            except BlockingIOError:
                pass
        return 0

    def sendall(self, data: Buffer, /) -> None:
        """See :meth:`Channel.sendall`."""
        left = memoryview(data)
        while left:
            left = left[self.sendmsg([left]) :]

    def sendmsg(self, buffers: Iterable[Buffer], /) -> int:
        """See :meth:`Channel.sendmsg`."""
        batch = list(buffers)[:_IOV_MAX]
        while self._wait(self._send, select.POLLOUT):
            try:
                return os.writev(self._send, batch)
            except BlockingIOError:
                pass
        raise BrokenPipeError(errno.EPIPE, "the connection was shut down")

    def _wait(self, fd: int, events: int) -> bool:
        """Wait until ``fd`` is worth trying; False once the stream was shut down."""
        poll = select.poll()
        poll.register(self._ended, select.POLLIN)
        poll.register(fd, events)
        return all(ready != self._ended for ready, _ in poll.poll())

    def shutdown(self, how: int, /) -> None:
        """See :meth:`Stream.shutdown`."""
        os.eventfd_write(self._ended, 1)

    def close(self) -> None:
        """See :meth:`Stream.close`."""
        while self._open:
            os.close(self._open.pop())


def _opened_anew(fd: int, way: int) -> int:
    try:
        return os.open(f"/proc/self/fd/{fd}", way | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        # Another user's pipe, no /proc, or nobody at the other end any more.
        copy = os.dup(fd)
        os.set_blocking(copy, False)
        return copy


def take_standard_streams() -> Stream:
    """The client at standard input and output: one connected stream socket, or two pipes.

    From then on standard input is ``/dev/null``, and what is printed goes to standard error: nothing that anybody prints
    gets in between NBD's bytes. Where standard error is the client's socket, too (inetd), that becomes ``/dev/null``.

    :raises ListenError: something else is there.
    """
    try:
        into, out = os.fstat(0), os.fstat(1)
    except OSError as error:
        raise ListenError(f"standard input or output is closed: {_ASKED}") from error
    stream: Stream
    if stat.S_ISSOCK(into.st_mode):
        if not os.path.samestat(into, out):
            raise ListenError(f"standard input is a socket, and standard output is not that same socket: {_ASKED}")
        stream = _socket(0)
    elif stat.S_ISFIFO(into.st_mode) and stat.S_ISFIFO(out.st_mode):
        stream = PipeStream(0, 1)
    else:
        which = "output" if stat.S_ISFIFO(into.st_mode) else "input"
        raise ListenError(
            f"standard {which} is neither a socket nor a pipe: {_ASKED}, as a program that starts cowkit makes"
        )
    nowhere = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.path.samestat(os.fstat(2), into):
            os.dup2(nowhere, 2)
    except OSError:
        os.dup2(nowhere, 2)  # standard error is closed
    os.dup2(nowhere, 0)
    os.dup2(2, 1)
    os.close(nowhere)
    return stream


def _socket(fd: int) -> socket.socket:
    sock = socket.socket(fileno=os.dup(fd))
    try:
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE) != socket.SOCK_STREAM:
            raise ListenError(f"standard input is a socket, but no stream socket: {_ASKED}")
        sock.getpeername()
    except OSError as error:
        sock.close()
        raise ListenError(f"standard input is a socket that nobody is connected to: {_ASKED}") from error
    except BaseException:
        sock.close()
        raise
    sock.setblocking(True)
    return sock
