"""An NBD server for one disk: a listening socket, a thread that accepts, a thread for each connection."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from socket import AF_UNIX, IPPROTO_TCP, SHUT_RDWR, TCP_NODELAY
from socket import socket as Socket
from types import TracebackType

from cowkit.disk import Disk
from cowkit.errors import ListenError, ProtocolError
from cowkit.server.block_status import contexts_of
from cowkit.server.connection import serve_connection
from cowkit.server.exports import Export
from cowkit.server.listener import listen_tcp, listen_unix, uri_of
from cowkit.server.runtime import NBD_SOCKET, make_socket_dir, remove_socket_dir
from cowkit.server.transmission import MAXIMUM_PAYLOAD
from cowkit.server.wire import TransmissionFlag

_FLAGS = (
    TransmissionFlag.SEND_FLUSH
    | TransmissionFlag.SEND_FUA
    | TransmissionFlag.SEND_TRIM
    | TransmissionFlag.SEND_WRITE_ZEROES
    | TransmissionFlag.CAN_MULTI_CONN
    | TransmissionFlag.SEND_CACHE
    | TransmissionFlag.SEND_FAST_ZERO
)

_NO_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_RETRY_SECONDS = 0.1


class DiskExports:
    """The one export of a server: its disk, under its name and as the default."""

    def __init__(self, disk: Disk, name: str, description: str) -> None:
        self._disk = disk
        self._name = name
        self._description = description

    def list(self) -> Sequence[tuple[str, str]]:
        """The one export."""
        return [(self._name, self._description)]

    def find(self, name: str) -> Export | None:
        """The export, if it is called that or the default is asked for."""
        return self.export() if name in ("", self._name) else None

    def export(self) -> Export:
        """The disk as it is offered now: the contexts change with its checkpoints."""
        return Export(
            name=self._name,
            description=self._description,
            size=self._disk.size,
            flags=_FLAGS,
            preferred_block=max(self._disk.block_size, 4096),
            maximum_payload=MAXIMUM_PAYLOAD,
            contexts=contexts_of(self._disk),
            handle=self._disk,
        )


class NbdServer:
    """Serves ``disk`` from construction on, until :meth:`stop`. The disk is the caller's and must outlive the server.

    :param socket_path: where to put a Unix socket; in a private directory, unless given.
    :param tcp: listen on ``HOST:PORT`` instead; port 0 takes any free one.
    :param export_name: what clients may ask for; whoever asks for no name gets the disk, too.
    :raises ListenError: no socket can be had there.
    :raises UsageError: the name or description is no text that NBD can carry.
    """

    def __init__(
        self,
        disk: Disk,
        *,
        socket_path: str | os.PathLike[str] | None = None,
        tcp: str | None = None,
        export_name: str = "",
        description: str = "",
    ) -> None:
        if socket_path is not None and tcp is not None:
            raise ListenError(
                f"give a server a socket path ({os.fspath(socket_path)}) or a TCP address ({tcp}), not both"
            )
        self.disk = disk
        self.errors: list[BaseException] = []
        """What went wrong in the server's threads without being any client's fault."""
        self._exports = DiskExports(disk, export_name, description)
        self._exports.export()  # a name that cannot be is said here, not to the first client
        self._lock = threading.Lock()
        self._connections: dict[threading.Thread, Socket] = {}
        self._stopping = False
        self._room = threading.Event()
        self._directory: Path | None = None
        self._path: str | None = None
        if tcp is not None:
            self._listener = listen_tcp(tcp)
        else:
            if socket_path is None:
                self._directory = make_socket_dir()
                self._path = str(self._directory / NBD_SOCKET)
            else:
                self._path = os.path.abspath(os.fspath(socket_path))
            try:
                self._listener = listen_unix(self._path)
            except BaseException:
                self._remove_directory()
                raise
        self.uri = uri_of(self._listener, export_name)
        """Where clients connect."""
        self._acceptor = threading.Thread(target=self._accept, name="cowkit-accept", daemon=True)
        self._acceptor.start()

    def __enter__(self) -> NbdServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def socket(self) -> str | None:
        """The path of the Unix socket; None with TCP."""
        return self._path

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return len(self._connections)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._stopping:
                    return
                if error.errno in _NO_DESCRIPTORS:
                    # The client stays in the queue until a connection ends, here or elsewhere in the process.
                    self._room.clear()
                    self._room.wait(_RETRY_SECONDS)
                elif error.errno != errno.ECONNABORTED:
                    self.errors.append(error)
                    return
                continue
            with self._lock:
                if self._stopping:
                    sock.close()
                    return
                thread = threading.Thread(target=self._serve, args=(sock,), name="cowkit-client", daemon=True)
                self._connections[thread] = sock
            try:
                thread.start()
            except RuntimeError as error:  # no thread to be had
                with self._lock:
                    del self._connections[thread]
                sock.close()
                self.errors.append(error)

    def _serve(self, sock: Socket) -> None:
        try:
            if sock.family != AF_UNIX:
                sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
            serve_connection(sock, self._exports)
        except ProtocolError:
            pass  # that client's own fault, and its own end
        except BaseException as error:
            self.errors.append(error)
        finally:
            # In this order: stop() shuts down what is in the table, which must not be another's descriptor by then.
            with self._lock:
                self._connections.pop(threading.current_thread(), None)
                sock.close()
            self._room.set()

    def stop(self) -> None:
        """End all connections and stop listening; requests under way are finished, but not answered. May be called again."""
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            connections = list(self._connections)
            for sock in self._connections.values():
                with suppress(OSError):
                    sock.shutdown(SHUT_RDWR)
        # Wakes the thread in accept(); closing alone would leave it there, on a descriptor that may become another's.
        with suppress(OSError):
            self._listener.shutdown(SHUT_RDWR)
        self._room.set()
        self._acceptor.join()
        if self._path is not None and self._directory is None:
            self._unlink_own_socket()
        self._listener.close()
        for thread in connections:
            thread.join()
        self._remove_directory()

    def _unlink_own_socket(self) -> None:
        with suppress(OSError):
            assert self._path is not None
            os.unlink(self._path)

    def _remove_directory(self) -> None:
        if self._directory is not None:
            remove_socket_dir(self._directory)
            self._directory = None
