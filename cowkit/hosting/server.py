"""What stands in this process for a server of a disk that is in the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from socket import socket as Socket
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from cowkit.errors import ListenError, UsageError
from cowkit.hosting.notices import Notices

if TYPE_CHECKING:
    from cowkit.server.channel import Stream


class DiskServer(Protocol):
    """A server of a disk, wherever that is; a context manager, which stops it. See :class:`cowkit.server.server.NbdServer`."""

    uris: tuple[str, ...]
    """Where clients connect: the Unix socket, TCP, vsock, and then the listeners that were given."""

    def start(self) -> None:
        """Let clients in, unless that was done at construction."""

    def stop(self) -> None:
        """End all connections and stop listening; may be called again."""

    def adopt(self, stream: Stream, *, on_end: Callable[[], None]) -> None:
        """Serve the client at ``stream``, which is the server's from now on."""

    def __enter__(self) -> DiskServer: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def uri(self) -> str:
        """Where clients connect: the first of ``uris``."""

    @property
    def socket(self) -> str | None:
        """The path of the Unix socket; None without one."""

    @property
    def errors(self) -> Sequence[BaseException]:
        """What went wrong in the server's threads without being any client's fault."""

    @property
    def connections(self) -> int:
        """How many clients are connected."""

    @property
    def written_bytes(self) -> int:
        """How many bytes clients wrote or zeroed."""


class ServedDisk(Protocol):
    """What a server in the host needs of its disk; see :class:`cowkit.hosting.disk.HostedDisk`."""

    closed: bool

    @property
    def foreign(self) -> bool:
        """Whether this process was forked from the one that the disk belongs to."""

    def call(self, operation: str, *arguments: Any, descriptors: Sequence[int]) -> Any:
        """Have the host carry out ``operation`` on the disk; its result."""

    def errors_of(self, number: int) -> list[BaseException]:
        """What went wrong in the threads of the server of that number."""


class HostedServer:
    """A server in the host, with the methods of :class:`cowkit.server.server.NbdServer` that a user needs.

    :param number: its number among the disk's.
    :param uris: where clients connect.
    :param path: of its Unix socket.
    :param listeners: sockets that it was given: it has copies of them, and these here are closed with it.
    """

    def __init__(
        self, disk: ServedDisk, number: int, uris: tuple[str, ...], path: str | None, listeners: Sequence[Socket]
    ) -> None:
        self.uris = uris
        """Where clients connect: the Unix socket, TCP, vsock, and then the listeners that were given."""
        self.socket = path
        """The path of the Unix socket; None without one."""
        self._disk = disk
        self._number = number
        self._listeners = list(listeners)
        self._notices: list[Notices] = []

    def __enter__(self) -> HostedServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _call(self, operation: str, *arguments: Any, descriptors: Sequence[int] = ()) -> Any:
        return self._disk.call(operation, self._number, *arguments, descriptors=descriptors)

    @property
    def uri(self) -> str:
        """Where clients connect: the first of ``uris``.

        :raises ListenError: all it was given are sockets without an address.
        """
        if not self.uris:
            raise ListenError("the server listens on nothing that an NBD URI can tell")
        return self.uris[0]

    @property
    def errors(self) -> list[BaseException]:
        """What went wrong in the server's threads without being any client's fault."""
        return self._disk.errors_of(self._number)

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        if self._disk.closed:
            return 0
        found: int = self._call("connections_of")
        return found

    @property
    def written_bytes(self) -> int:
        """How many bytes clients wrote or zeroed, in whole blocks: on the disk, or on all that they had of their own."""
        found: int = self._call("written_bytes_of")
        return found

    def start(self) -> None:
        """Let clients in, unless that was done at construction."""
        self._call("start_server")

    def adopt(self, stream: Stream, *, on_end: Callable[[], None]) -> None:
        """Serve the client at ``stream``, which is the server's from now on. It may take its time to choose an export.

        :param on_end: called, from another thread, when the client has left. It must not stop the server itself.
        :raises UsageError: the stream is no socket, which alone can be handed to another process.
        """
        if type(stream) is not Socket:
            raise UsageError("a disk with server='process' serves clients at sockets: give a connected socket")
        ended = Notices(on_end=on_end)
        try:
            with stream:
                self._call("adopt", descriptors=[stream.fileno(), ended.descriptor])
        except BaseException:
            ended.cancel()
            raise
        self.listen_to(ended)

    def listen_to(self, notices: Notices) -> None:
        """Have them arrive until the server ends, which they have a part in."""
        notices.begin()
        self._notices.append(notices)

    def stop(self) -> None:
        """End all connections and stop listening; requests under way are finished, but not answered. May be called again."""
        if not self._disk.closed and not self._disk.foreign:
            self._call("stop_server")
        self.let_go()

    def let_go(self) -> None:
        """The server has ended: close what is left of it here."""
        while self._listeners:
            self._listeners.pop().close()
        for each in self._notices:
            if self._disk.foreign:
                each.forget()
            else:
                each.join()
