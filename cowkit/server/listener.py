"""Sockets to listen on: Unix sockets and TCP, bound so that a client can connect when the call returns."""

from __future__ import annotations

import errno
import os
import socket
import stat
from urllib.parse import quote

from cowkit.errors import ListenError
from cowkit.server.runtime import SOCKET_PATH_LIMIT

BACKLOG = 128


def check_socket_path(path: str) -> None:
    """Whether a Unix socket can have that path.

    :raises ListenError: it is too long, or empty.
    """
    length = len(os.fsencode(path))
    if not path or "\0" in path:
        raise ListenError(f"{path!r} is no path for a socket")
    if length > SOCKET_PATH_LIMIT:
        raise ListenError(
            f"the socket path {path} has {length} bytes, over the {SOCKET_PATH_LIMIT} that the system allows: choose a shorter one"
        )


def listen_unix(path: str) -> socket.socket:
    """A listening Unix socket at ``path``. A socket there that nobody listens on is replaced.

    :raises ListenError: the path is too long, something else is there, or somebody is listening on it.
    """
    check_socket_path(path)
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ListenError(f"cannot listen on {path}: {error.strerror}") from error
    return sock


def _remove_stale(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise ListenError(
                f"cannot listen on {path}: a file that is no socket is there; choose another path or remove it"
            )
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            probe.connect(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        try:
            os.unlink(path)
        except OSError as error:
            raise ListenError(
                f"cannot replace the socket that nobody listens on at {path}: {error.strerror}"
            ) from error
        return
    except BlockingIOError:
        pass  # somebody listens, and is busy
    except OSError as error:
        raise ListenError(f"cannot listen on {path}: {error.strerror}") from error
    raise ListenError(
        f"cannot listen on {path}: somebody is listening there already; choose another path or end that server"
    )


def listen_tcp(address: str) -> socket.socket:
    """A listening TCP socket at ``address``: ``HOST:PORT``, ``[HOST]:PORT`` or ``PORT``; port 0 takes any free one.

    Without a host it is the loopback address.

    :raises ListenError: the address makes no sense, or cannot be had.
    """
    host, port = _host_and_port(address)
    try:
        family, kind, protocol, _, bound = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ListenError(f"cannot listen on {address}: the host {host!r} is not known ({error})") from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(bound)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        remedy = "; choose another port, or 0 for any free one" if error.errno == errno.EADDRINUSE else ""
        raise ListenError(f"cannot listen on {address}: {error.strerror}{remedy}") from error
    return sock


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ListenError(f"{address!r} is no HOST:PORT: put an IPv6 address in brackets, as in [::1]:10809")
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ListenError(f"{address!r} is no HOST:PORT: the port is a number from 0 to 65535, as in 127.0.0.1:10809")
    return host or "127.0.0.1", int(port)


def uri_of(sock: socket.socket, export_name: str) -> str:
    """The NBD URI of a listening socket (NBD's ``doc/uri.md``)."""
    name = quote(export_name, safe="/")
    if sock.family == socket.AF_UNIX:
        return f"nbd+unix:///{name}?socket={quote(os.fsencode(sock.getsockname()), safe='/')}"
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"nbd://{shown}:{port}/{name}" if name else f"nbd://{shown}:{port}"
