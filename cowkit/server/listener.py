"""Sockets to listen on: Unix sockets, TCP and vsock, bound so that a client can connect when the call returns."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
import struct
from urllib.parse import quote

from cowkit.errors import ListenError
from cowkit.server.runtime import SOCKET_PATH_LIMIT

BACKLOG = 128

_ANY_VSOCK = 0xFFFFFFFF  # VMADDR_PORT_ANY
_IOCTL_VM_SOCKETS_GET_LOCAL_CID = 0x7B9


def check_socket_path(path: str) -> None:
    """Whether a Unix socket can have that path.

    :raises ListenError: it is too long, or empty.
    """
    try:
        length = len(os.fsencode(path))
    except UnicodeEncodeError as error:
        raise ListenError(f"{path!r} is no path for a socket: {error.reason}") from error
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
    if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ListenError(f"{address!r} is no HOST:PORT: the port is a number from 0 to 65535, as in 127.0.0.1:10809")
    return host or "127.0.0.1", int(port)


def listen_vsock(port: int) -> socket.socket:
    """A listening vsock socket, for the guests of this machine or the host of this guest; port 0 takes any free one.

    :raises ListenError: the port makes no sense or cannot be had, or the system has no vsock.
    """
    if not 0 <= port < _ANY_VSOCK:
        raise ListenError(f"{port} is no vsock port: that is a number from 0 to {_ANY_VSOCK - 1}")
    if not hasattr(socket, "AF_VSOCK"):
        raise ListenError(f"cannot listen on vsock port {port}: this Python knows no vsock")
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except OSError as error:
        raise ListenError(
            f"cannot listen on vsock port {port}: this kernel has no vsock ({error.strerror}); modprobe vsock may bring it"
        ) from error
    try:
        sock.bind((socket.VMADDR_CID_ANY, port or _ANY_VSOCK))
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ListenError(f"cannot listen on vsock port {port}: {error.strerror}") from error
    return sock


def _vsock_cid() -> int:
    """This machine's own number: guests reach the host as 2, which it says of itself, too."""
    try:
        with open("/dev/vsock", "rb") as device:
            return int(struct.unpack("=I", fcntl.ioctl(device, _IOCTL_VM_SOCKETS_GET_LOCAL_CID, bytes(4)))[0])
    except OSError:
        return socket.VMADDR_CID_HOST


def uri_of(sock: socket.socket, export_name: str, *, tls: bool = False) -> str | None:
    """The NBD URI of a listening socket (NBD's ``doc/uri.md``); None for a Unix socket that is no file."""
    scheme = "nbds" if tls else "nbd"
    name = quote(export_name, safe="/")
    if sock.family == socket.AF_UNIX:
        path = os.fsencode(sock.getsockname())
        if not path or path.startswith(b"\0"):
            return None
        return f"{scheme}+unix:///{name}?socket={quote(os.path.abspath(path), safe='/')}"
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return f"{scheme}+vsock://{_vsock_cid()}:{sock.getsockname()[1]}/{name}"
    host, port = sock.getsockname()[:2]
    shown = f"[{quote(host, safe=':')}]" if ":" in host else host
    return f"{scheme}://{shown}:{port}/{name}" if name else f"{scheme}://{shown}:{port}"
