"""What a client is reached through: a socket, a pair of pipes, or TLS over either."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

Buffer = bytes | bytearray | memoryview


class Channel(Protocol):
    """Bytes in both directions, blocking, for one thread. A connected ``socket.socket`` is one as it is."""

    def recv(self, bufsize: int, /) -> bytes:
        """At least one byte and at most ``bufsize``; nothing at the end."""
        ...

    def recv_into(self, buffer: memoryview, nbytes: int = 0, flags: int = 0, /) -> int:
        """The same, into ``buffer``; how many bytes came. ``flags`` may be MSG_WAITALL, which is a hint."""
        ...

    def sendall(self, data: Buffer, /) -> None:
        """Send all of ``data``."""
        ...

    def sendmsg(self, buffers: Iterable[Buffer], /) -> int:
        """Send as much of ``buffers``, at most 1024 of them, as is convenient; how many bytes that was.

        The buffers may be mappings of files.

        :raises OSError: EFAULT: a mapping cannot be read. Nothing was sent by this call.
        """
        ...


class Stream(Channel, Protocol):
    """A channel with an end that another thread may bring about."""

    def shutdown(self, how: int, /) -> None:
        """End both directions: whoever waits in another method returns. Any thread may call this."""
        ...

    def close(self) -> None:
        """Give its descriptors back."""
        ...
