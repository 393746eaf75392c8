"""An NBD server: listening sockets, a thread that accepts, a thread for each connection.

Design note. All connections are in one table; who takes one out of it closes it, under the lock, so that nobody shuts down a
descriptor that has become another's. A client that has not chosen an export yet is in a second table, oldest first: it has a
minute, and when very many of them wait, the oldest has to go. So a hostile client that connects and stays silent holds one
thread for a minute at most, and however many it is, others get in.

The thread that accepts waits in ``poll`` for all the listeners and for the eventfd that ends it. The listeners may be
somebody else's, too (systemd's), and are never shut down.
"""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from socket import AF_INET, AF_INET6, IPPROTO_TCP, TCP_NODELAY
from socket import socket as Socket
from types import TracebackType
from typing import TYPE_CHECKING

from cowkit.disk import Disk
from cowkit.errors import ListenError, ProtocolError
from cowkit.server.channel import Stream
from cowkit.server.connection import Connection
from cowkit.server.listener import listen_tcp, listen_unix, listen_vsock, uri_of
from cowkit.server.quiet_thread import QuietThread
from cowkit.server.runtime import NBD_SOCKET, make_socket_dir, remove_socket_dir
from cowkit.server.shares import Share, share_disk

if TYPE_CHECKING:
    from cowkit.server.tls import Tls

HANDSHAKE_SECONDS = 60.0
"""How long a client may take until it has chosen an export."""

MOST_NEGOTIATING = 256
"""How many clients that have not chosen an export yet may be connected at a time."""

_NO_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_RETRY_MS = 100
"""When no descriptor is left for a new connection: how long until the next try."""


class NbdServer:
    """Serves ``disk`` from construction on (or from :meth:`start` on), until :meth:`stop`. The disk is the caller's and must
    outlive the server.

    It listens wherever it is told to, in several places if need be; in a private directory if it is told of none.

    :param socket_path: where to put a Unix socket.
    :param tcp: listen on ``HOST:PORT``; port 0 takes any free one.
    :param vsock: listen on that vsock port; 0 takes any free one.
    :param listeners: listen on these sockets, too, which it closes in the end.
    :param export_name: what clients may ask for; whoever asks for no name gets this export.
    :param description: for people.
    :param read_only: refuse what would change the disk.
    :param tls: how to do TLS; None: not at all.
    :param share: who shares a disk: ``"all"`` clients have this one; with ``"export"`` there is one for each export name that
        a client asks for, kept until the server ends; with ``"connection"`` each connection has its own, gone when it leaves.
        These begin as the base is.
    :param max_exports: with ``"export"``: how many there may be; 64, unless given.
    :param on_idle: called, from a thread of the server, when the last client has left, and one of them had chosen an export.
        It must not stop the server itself.
    :param start: False: those who connect wait until :meth:`start` is called.
    :param handshake_seconds: how long a client may take until it has chosen an export.
    :param most_negotiating: how many such clients there may be at a time; the oldest has to go for one more.
    :raises ListenError: no socket can be had there.
    :raises UsageError: the name or description is no text that NBD can carry, or arguments do not go together.
    """

    def __init__(
        self,
        disk: Disk,
        *,
        socket_path: str | os.PathLike[str] | None = None,
        tcp: str | None = None,
        vsock: int | None = None,
        listeners: Sequence[Socket] = (),
        export_name: str = "",
        description: str = "",
        read_only: bool = False,
        tls: Tls | None = None,
        share: Share = "all",
        max_exports: int | None = None,
        on_idle: Callable[[], None] | None = None,
        start: bool = True,
        handshake_seconds: float = HANDSHAKE_SECONDS,
        most_negotiating: int = MOST_NEGOTIATING,
    ) -> None:
        self.disk = disk
        self.errors: list[BaseException] = []
        """What went wrong in the server's threads without being any client's fault."""
        self._tls = tls
        self._on_idle = on_idle
        self._handshake_seconds = handshake_seconds
        self._most_negotiating = most_negotiating
        self._lock = threading.Lock()
        self._connections: dict[threading.Thread, Connection] = {}
        self._negotiating: dict[threading.Thread, float] = {}
        """Until when, by ``time.monotonic()``."""
        self._given_up: set[threading.Thread] = set()
        self._chosen = False
        self._stopping = False
        self._owner = os.getpid()
        self._directory: Path | None = None
        self._path: str | None = None
        self._file: os.stat_result | None = None
        self._listeners = list(listeners)
        self._wake = -1
        try:
            self._shares = share_disk(
                disk, share, name=export_name, description=description, read_only=read_only, max_exports=max_exports
            )
            self._listen(socket_path, tcp, vsock)
            known = (uri_of(listener, export_name, tls=tls is not None) for listener in self._listeners)
            self.uris = tuple(uri for uri in known if uri is not None)
            """Where clients connect: the Unix socket, TCP, vsock, and then the listeners that were given."""
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._acceptor = QuietThread(target=self._accept, name="cowkit-accept")
            if start:
                self.start()
        except BaseException:
            self._close_listeners()
            raise

    def _listen(self, socket_path: str | os.PathLike[str] | None, tcp: str | None, vsock: int | None) -> None:
        given, self._listeners[:] = self._listeners[:], []
        try:
            if socket_path is None and tcp is None and vsock is None and not given:
                self._directory = make_socket_dir()
                socket_path = self._directory / NBD_SOCKET
            if socket_path is not None:
                path = os.path.abspath(os.fsdecode(socket_path))
                self._listeners.append(listen_unix(path))
                self._path = path
                self._file = os.stat(path)
            if tcp is not None:
                self._listeners.append(listen_tcp(tcp))
            if vsock is not None:
                self._listeners.append(listen_vsock(vsock))
        finally:
            self._listeners += given

    def start(self) -> None:
        """Let clients in, unless that was done at construction."""
        self._acceptor.start()

    def __enter__(self) -> NbdServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def uri(self) -> str:
        """Where clients connect: the first of ``uris``.

        :raises ListenError: all it was given are sockets without an address.
        """
        if not self.uris:
            raise ListenError("the server listens on nothing that an NBD URI can tell")
        return self.uris[0]

    @property
    def socket(self) -> str | None:
        """The path of the Unix socket; None without one."""
        return self._path

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        with self._lock:  # a client that was greeted counts
            return len(self._connections)

    @property
    def written_bytes(self) -> int:
        """How many bytes clients wrote or zeroed, in whole blocks: on the disk, or on all that they had of their own."""
        return self._shares.written_bytes

    def adopt(self, stream: Stream, *, on_end: Callable[[], None]) -> None:
        """Serve the client at ``stream``, which is the server's from now on. It may take its time to choose an export.

        :param on_end: called, from a thread of the server, when the client has left. It must not stop the server itself.
        """
        if not self._begin(stream, patient=True, on_end=on_end):
            on_end()

    # The thread that accepts

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        listening = {listener.fileno(): listener for listener in self._listeners}
        for listener in self._listeners:
            listener.setblocking(False)
            poll.register(listener, select.POLLIN)
        while not self._stopping:
            starved = False
            for fd, _ in poll.poll(self._end_overdue()):
                if fd in listening and not self._stopping:
                    try:
                        starved |= not self._welcome(listening[fd])
                    except OSError as error:
                        self.errors.append(error)
                        poll.unregister(listening.pop(fd))
            if starved:
                # The clients stay in the queue until a connection ends, here or elsewhere in the process.
                for fd in listening:
                    poll.unregister(fd)
                poll.poll(_RETRY_MS)
                for fd in listening:
                    poll.register(fd, select.POLLIN)

    def _welcome(self, listener: Socket) -> bool:
        """Let one client in; False if there is no room for it now.

        :raises OSError: nobody can be let in there any more.
        """
        try:
            sock, _ = listener.accept()
        except (BlockingIOError, ConnectionError):
            return True
        except OSError as error:
            if error.errno in _NO_DESCRIPTORS:
                return False
            raise
        sock.setblocking(True)
        if sock.family in (AF_INET, AF_INET6):
            try:
                sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
            except OSError:
                pass  # it has left
        if len(self._negotiating) >= self._most_negotiating:
            self._end_oldest()
        self._begin(sock)
        return True

    def _end_overdue(self) -> int | None:
        """End the clients that took too long to choose; how many milliseconds the next one has, None if there is none."""
        now = time.monotonic()
        with self._lock:
            for thread, until in list(self._negotiating.items()):
                if until > now:
                    return int((until - now) * 1000) + 1
                self._give_up(thread)
        return None

    def _end_oldest(self) -> None:
        with self._lock:
            oldest = next(iter(self._negotiating), None)
            if oldest is None:
                return
            self._give_up(oldest)
        oldest.join()  # so that there are never more threads of such clients than there may be

    def _give_up(self, thread: threading.Thread) -> None:
        del self._negotiating[thread]
        self._given_up.add(thread)
        self._connections[thread].shut_down()

    # The threads of the connections

    def _begin(self, stream: Stream, *, patient: bool = False, on_end: Callable[[], None] | None = None) -> bool:
        """Have a new thread serve the client; False if that cannot be: then the stream is closed."""
        connection = Connection(stream, self._shares, tls=self._tls, on_choice=self._choice)
        thread = QuietThread(target=self._serve, args=(connection, on_end), name="cowkit-client")
        with self._lock:
            try:
                if self._stopping:
                    stream.close()
                    return False
                if not patient:
                    connection.greet()
                thread.start()
            except RuntimeError as error:  # no thread to be had
                stream.close()
                self.errors.append(error)
                return False
            self._connections[thread] = connection
            if not patient:
                self._negotiating[thread] = time.monotonic() + self._handshake_seconds
        return True

    def _choice(self) -> None:
        thread = threading.current_thread()
        with self._lock:
            if thread in self._given_up:
                raise ConnectionAbortedError(errno.ECONNABORTED, "the client was given up just now")
            self._negotiating.pop(thread, None)
            self._chosen = True

    def _serve(self, connection: Connection, on_end: Callable[[], None] | None) -> None:
        with self._lock:
            pass  # it is in the table by now
        try:
            connection.serve()
        except ProtocolError:
            pass  # that client's own fault, and its own end
        except BaseException as error:
            self.errors.append(error)
        finally:
            thread = threading.current_thread()
            with self._lock:
                self._negotiating.pop(thread, None)
                self._given_up.discard(thread)
                del self._connections[thread]
                connection.stream.close()
                idle = self._chosen and not self._connections and not self._stopping
            if on_end is not None:
                on_end()
            if idle and self._on_idle is not None:
                self._on_idle()

    # The end

    def disconnect(self) -> None:
        """End all connections, and listen on; requests under way are finished, but not answered."""
        with self._lock:
            threads = list(self._connections)
            for connection in self._connections.values():
                connection.shut_down()
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()

    def stop(self) -> None:
        """End all connections and stop listening; requests under way are finished, but not answered. May be called again."""
        if os.getpid() != self._owner:
            self._forget()
            return
        with self._lock:
            if self._stopping:
                return
            self._stopping = True
            threads = list(self._connections)
            for connection in self._connections.values():
                connection.shut_down()
        os.eventfd_write(self._wake, 1)
        # The collector may close a forgotten disk in any thread, these included.
        here = threading.current_thread()
        if self._acceptor is not here:
            self._acceptor.join()
        self._close_listeners()
        for thread in threads:
            if thread is not here:
                thread.join()
        self._shares.close()

    def _forget(self) -> None:
        """In a forked child: close its copies of the descriptors, and do nothing that the parent's clients would notice.

        No lock is taken, since a thread that the child does not have may have held it.
        """
        self._stopping = True
        for listener in self._listeners:
            listener.close()
        for connection in list(self._connections.values()):
            connection.stream.close()

    def _close_listeners(self) -> None:
        if self._wake >= 0:
            os.close(self._wake)
        if self._path is not None and self._file is not None and self._directory is None:
            try:
                if os.path.samestat(os.lstat(self._path), self._file):
                    os.unlink(self._path)
            except OSError:
                pass  # somebody removed it
        for listener in self._listeners:
            listener.close()
        if self._directory is not None:
            remove_socket_dir(self._directory)
            self._directory = None
