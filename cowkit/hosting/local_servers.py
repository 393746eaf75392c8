"""The servers of a disk of this process."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from cowkit.disk import Disk
from cowkit.disk.arguments import check_flag, check_function, check_number, check_text
from cowkit.disk.files import path_text
from cowkit.errors import UsageError

if TYPE_CHECKING:
    from cowkit.server.server import NbdServer
    from cowkit.server.tls import TlsChoice

_Check = Callable[[Any, str], object]

_ALWAYS: Final[tuple[tuple[str, _Check], ...]] = (
    ("export_name", check_text),
    ("description", check_text),
    ("read_only", check_flag),
    ("tls_verify_peer", check_flag),
    ("start", check_flag),
)
_WHERE_GIVEN: Final[tuple[tuple[str, _Check], ...]] = (
    ("socket", path_text),
    ("tcp", check_text),
    ("vsock", check_number),
    ("max_exports", check_number),
    ("tls_certs", path_text),
    ("tls_psk", path_text),
    ("on_idle", check_function),
)
"""What may be None. ``share`` and ``tls`` are compared with the words that they can be."""


class LocalServers:
    """What :class:`cowkit.hosting.disk.HostedDisk` is for the servers in the host. One thread at a time may start any."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._all: list[NbdServer] = []
        self._own: NbdServer | None = None

    @property
    def own_server(self) -> tuple[str, str] | None:
        """The URI and the socket's path of the server that each disk can have; None before :meth:`start_own`."""
        if self._own is None:
            return None
        assert self._own.socket is not None  # it is never a TCP one
        return self._own.uri, self._own.socket

    def start_own(self) -> tuple[str, str]:
        """The same, once it is started, on a private Unix socket; may be called again."""
        if self._own is None:
            from cowkit.server.server import NbdServer

            self._own = NbdServer(self._disk)
            self._all.append(self._own)
        found = self.own_server
        assert found is not None
        return found

    def serve(
        self,
        *,
        socket: str | os.PathLike[str] | None,
        tls_certs: str | os.PathLike[str] | None,
        tls_psk: str | os.PathLike[str] | None,
        tls_verify_peer: bool,
        tls: TlsChoice | None,
        **options: Any,
    ) -> NbdServer:
        """One more; see :meth:`cowkit.CowDisk.serve`."""
        from cowkit.server.server import NbdServer

        credentials = None
        if tls_certs is not None or tls_psk is not None or tls_verify_peer or tls is not None:
            from cowkit.server.tls import load_tls

            credentials = load_tls(certs=tls_certs, psk=tls_psk, verify_peer=tls_verify_peer, choice=tls)
        server = NbdServer(self._disk, socket_path=socket, tls=credentials, **options)
        self._all.append(server)
        return server

    @property
    def server_errors(self) -> list[BaseException]:
        """What went wrong in the threads of all of them."""
        return [error for server in self._all for error in server.errors]

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return sum(server.connections for server in self._all)

    def disconnect(self) -> None:
        """End the connections of all clients."""
        for server in list(self._all):
            server.disconnect()

    def stop(self) -> None:
        """End them all; may be called again."""
        for server in self._all:
            server.stop()


def check_serving(options: Mapping[str, Any]) -> None:
    """See that the options of :meth:`cowkit.CowDisk.serve` are of types that they can be, wherever the disk is.

    :raises UsageError: one is not.
    """
    for name, check in _ALWAYS:
        check(options[name], name)
    for name, check in _WHERE_GIVEN:
        if options[name] is not None:
            check(options[name], name)
    from socket import socket as Socket  # for those who serve

    listeners = options["listeners"]
    if not isinstance(listeners, Sequence) or not all(isinstance(each, Socket) for each in listeners):
        raise UsageError(f"listeners are sockets in a list, not {listeners!r}")
