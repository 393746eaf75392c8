"""Letting the requests of a client gather that is busy with its replies.

A client with many requests under way sends the next one for each reply that it has read. A server that is quicker receives them one
by one, as they come, and pays for each what it might pay for a dozen: waking, receiving, sending. So while the client has many
replies still to read, and hardly any request is here, the thread naps: the more there is to read, the longer.

4 KiB random reads at depth 32 come 15 at a time then instead of 1.5: the server needs a third less processor time, and the client
is as quick or quicker, since it is not disturbed (Linux 6.18, two processors; medians of nine alternating rounds). What such naps
would cost a client that is starved by them shows at depth 16: a third. So they begin where that client has no more replies to read.
"""

from __future__ import annotations

import socket
import termios
from fcntl import ioctl
from time import sleep

from cowkit.server.channel import Channel

_MUCH = 90_000
"""From how many bytes on that the client has not read a nap pays, in the kernel's reckoning, which counts the buffers in whole: a dozen
replies of 4 KiB that were sent one by one, or two dozen that were sent together."""

_NS_A_BYTE = 1
"""How long to nap for each byte more. A nap takes 50 microseconds more than that, the slack of the kernel's timers."""

_LONGEST_NS = 60_000
"""However much there is to read, no request waits longer, and that slack; longer naps save nothing more."""

_COUNT = bytes(4)


class Gathering:
    """For the replies to the client at the other end of ``sock``: a Unix socket, where the kernel tells what the client has not read."""

    def __init__(self, sock: Channel) -> None:
        self._sock = sock if isinstance(sock, socket.socket) and sock.family == socket.AF_UNIX else None

    def nap(self) -> bool:
        """Nap, if the client has much to read; whether it had."""
        if self._sock is None:
            return False
        try:
            unread = int.from_bytes(ioctl(self._sock, termios.TIOCOUTQ, _COUNT), "little")  # unix(7): SIOCOUTQ
        except (OSError, ValueError):  # it was closed by another thread
            return False
        if unread < _MUCH:
            return False
        sleep(min((unread - _MUCH) * _NS_A_BYTE, _LONGEST_NS) / 1e9)
        return True
