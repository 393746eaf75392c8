"""Sockets that whoever started this program listens on already: systemd, or libnbd with ``nbdinfo [ cowkit serve ... ]``.

The way of handing them over is sd_listen_fds(3)'s: descriptors from 3 on, ``LISTEN_FDS`` says how many and ``LISTEN_PID``
for whom.
"""

from __future__ import annotations

import os
import socket

from cowkit.errors import ListenError

_FIRST = 3
_FAMILIES = {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, getattr(socket, "AF_VSOCK", socket.AF_UNIX)}


def activated_listeners() -> list[socket.socket]:
    """The listening sockets that were handed over; none where this program was started in another way.

    They belong to the caller now, are not inherited by children, and the environment does not speak of them any more.

    :raises ListenError: what was handed over makes no sense.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []  # none, or another program's
    del os.environ["LISTEN_PID"]
    count = os.environ.pop("LISTEN_FDS", "0")
    os.environ.pop("LISTEN_FDNAMES", None)
    if not (count.isascii() and count.isdigit()):
        raise ListenError(f"LISTEN_FDS={count!r} is no number of sockets: whoever started this program is to mend that")
    sockets: list[socket.socket] = []
    try:
        sockets.extend(map(_listener, range(_FIRST, _FIRST + int(count))))
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _listener(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ListenError(f"descriptor {fd}, handed over by LISTEN_FDS, is no socket: {error.strerror}") from error
    sock.set_inheritable(False)
    kind, listens = (sock.getsockopt(socket.SOL_SOCKET, option) for option in (socket.SO_TYPE, socket.SO_ACCEPTCONN))
    if kind != socket.SOCK_STREAM or not listens or sock.family not in _FAMILIES:
        sock.close()
        raise ListenError(
            f"descriptor {fd}, handed over by LISTEN_FDS, is no listening stream socket: "
            "in a systemd unit, use ListenStream= with Accept=no"
        )
    return sock
