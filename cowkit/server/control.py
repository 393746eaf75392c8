"""The control socket: a Unix socket where a running server is asked for things in QMP.

One thread does all that concerns sockets; each command runs in a thread of its own, one at a time for each connection, so
that a long one holds up nobody else, its events go out while it runs, and its client's departure is noticed at once.

What holds:

- All state of connections belongs to the loop's thread. Others reach it through :meth:`ControlServer._post` alone.
- A client that hangs up gives up what it asked for: ``context.check()`` ends the command that runs for it. One that
  merely ends its input (``shutdown(SHUT_WR)``, `nc -N`) still gets its answers.
- A client can end its own connection and nothing else, whatever it sends and whether or not it reads.
"""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

from cowkit.errors import ControlError, CowkitError, ListenError
from cowkit.server.control_client import why_not
from cowkit.server.qmp import Argument, QmpSession, Request, encode_event
from cowkit.server.quiet_thread import QuietThread

_RECEIVE = 1 << 16
_WAITING_LIMIT = 8
"""How many commands of one client may wait for their turn before the server stops reading from it; QEMU's number."""
_UNREAD_LIMIT = 4 << 20
"""How many bytes may wait for a client to read them before it is taken for dead."""
_RETRY_MS = 100
"""When no descriptor is left for a new connection: how long until the next try."""


class CommandContext:
    """What a command may do beside giving its result."""

    def __init__(self, emit: Callable[[str, Mapping[str, Any]], None]) -> None:
        self._emit = emit
        self._cancelled: str | None = None

    def check(self) -> None:
        """To be called every now and then by what takes long.

        :raises ControlError: nobody waits for the result any more: the client has gone, or the server is stopping.
        """
        if self._cancelled is not None:
            raise ControlError(f"given up: {self._cancelled}")

    def emit(self, event: str, data: Mapping[str, Any]) -> None:
        """Send an event to the client that gave the command."""
        self._emit(event, data)

    def cancel(self, why: str) -> None:
        """Ask the command to end."""
        self._cancelled = why


class Command(NamedTuple):
    """A command of the server's owner: what it runs (in a thread of its own) and the arguments that it takes.

    What ``run`` returns is made of JSON's types. The message of a :class:`CowkitError` that it raises is the answer.
    """

    run: Callable[[CommandContext, dict[str, Any]], Any]
    arguments: Mapping[str, Argument] = {}


class _Connection:
    def __init__(self, sock: socket.socket, session: QmpSession) -> None:
        self.socket = sock
        self.session = session
        self.waiting: deque[bytes | Request] = deque()
        self.unsent = bytearray()
        self.running: CommandContext | None = None
        self.input_ended = False
        self.open = True


class ControlServer:
    """Serves ``commands`` over QMP at the Unix socket ``path``; a context manager.

    :param version: the version of the server, for ``query-version`` and the greeting.
    """

    def __init__(self, path: str | os.PathLike[str], commands: Mapping[str, Command], *, version: str) -> None:
        self.path = os.fspath(path)
        self.errors: list[BaseException] = []
        """What commands raised that was no error of theirs to raise: mistakes in the program."""
        self._commands = commands
        self._declared = {name: command.arguments for name, command in commands.items()}
        self._version = version
        self._connections: dict[int, _Connection] = {}
        self._workers: set[threading.Thread] = set()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._posted: deque[Callable[[], None]] = deque()
        self._post_lock = threading.Lock()
        self._wake: int | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Listen: when this returns, clients can connect.

        :raises ListenError: no socket can be had at ``path``.
        """
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(self.path)
            listener.listen(64)
            self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except (OSError, ValueError) as error:
            listener.close()
            raise ListenError(f"cannot listen for control at {self.path}: {why_not(error)}") from error
        listener.setblocking(False)
        self._listener = listener
        self._poll = select.poll()
        self._poll.register(self._wake, select.POLLIN)
        self._poll.register(listener, select.POLLIN)
        self._thread = QuietThread(target=self._loop, name="cowkit-control")
        self._thread.start()

    def emit(self, event: str, data: Mapping[str, Any] | None = None) -> None:
        """Send an event to all clients; from any thread."""
        message = encode_event(event, data or {}, time=time.time())

        def send() -> None:
            for connection in list(self._connections.values()):
                if connection.session.negotiated:  # before that a client expects no events (qmp-spec)
                    self._send(connection, message)

        self._post(send)

    def stop(self) -> None:
        """End all connections and remove the socket. Commands that run are asked to give up, and waited for.

        Not to be called from a command.
        """
        thread = self._thread
        if thread is not None:
            self._post(self._begin_to_stop)
            thread.join()
            self._thread = None

    def _post(self, call: Callable[[], None]) -> None:
        """Have the loop's thread call ``call``; nothing happens once the server has stopped."""
        with self._post_lock:
            if self._wake is not None:
                self._posted.append(call)
                os.eventfd_write(self._wake, 1)

    # From here on everything happens in the loop's thread, but for _run.

    def _loop(self) -> None:
        while not self._stopping or self._workers:
            knocks = False
            for fd, events in self._poll.poll():
                if fd == self._wake:
                    os.eventfd_read(fd)
                    while self._posted:
                        self._posted.popleft()()
                elif fd in self._connections:
                    self._serve(self._connections[fd], events)
                else:
                    knocks = True
            # Last of all: the descriptor of a connection that was closed above is used again for the new one, and what
            # poll() told of the old one must not be taken for the new one's.
            if knocks and not self._stopping and not self._accept():
                # Not listening for a moment, for poll() would say at once that somebody still wants to connect.
                self._poll.unregister(self._listener)
                self._poll.poll(_RETRY_MS)
                self._poll.register(self._listener, select.POLLIN)
        for connection in list(self._connections.values()):
            self._close(connection)
        with self._post_lock:
            assert self._wake is not None
            os.close(self._wake)
            self._wake = None
            self._posted.clear()

    def _begin_to_stop(self) -> None:
        if self._stopping:
            return
        self._stopping = True
        self._poll.unregister(self._listener)
        self._listener.close()
        try:
            os.unlink(self.path)
        except OSError:
            pass  # somebody removed it, or the whole directory
        for connection in list(self._connections.values()):
            connection.waiting.clear()
            if connection.running:
                connection.running.cancel("the server is stopping")

    def _accept(self) -> bool:
        """Let one client in; False if there is no room for it now."""
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return True
        except OSError:  # out of descriptors or memory
            return False
        sock.setblocking(False)
        connection = _Connection(sock, QmpSession(self._declared, self._version))
        self._connections[sock.fileno()] = connection
        self._poll.register(sock, select.POLLIN)
        self._send(connection, connection.session.greeting())
        return True

    def _serve(self, connection: _Connection, events: int) -> None:
        try:
            if events & (select.POLLHUP | select.POLLERR | select.POLLNVAL):
                self._close(connection)
                return
            if events & select.POLLIN:
                data = connection.socket.recv(_RECEIVE)
                connection.input_ended = not data
                if not self._stopping:
                    connection.waiting.extend(connection.session.feed(data))
            self._send(connection, b"")
            self._advance(connection)
        except BlockingIOError:
            return
        except OSError:
            self._close(connection)
        except Exception as error:
            self.errors.append(error)
            self._close(connection)

    def _advance(self, connection: _Connection) -> None:
        """Give the answers that are due, start the next command, and listen for what comes next."""
        while connection.waiting and not connection.running:
            item = connection.waiting.popleft()
            if isinstance(item, Request):
                self._begin(connection, item)
            else:
                self._send(connection, item)
        if connection.open:
            idle = not connection.waiting and not connection.running
            if connection.input_ended and idle and not connection.unsent:
                self._close(connection)
            else:
                self._listen_to(connection)

    def _listen_to(self, connection: _Connection) -> None:
        events = select.POLLOUT if connection.unsent else 0
        # With no event asked for, poll() still tells of a client that hangs up.
        if not connection.input_ended and len(connection.waiting) < _WAITING_LIMIT:
            events |= select.POLLIN
        self._poll.modify(connection.socket, events)

    def _send(self, connection: _Connection, data: bytes) -> None:
        if not connection.open:
            return
        if data and len(connection.unsent) > _UNREAD_LIMIT:
            self._close(connection)
            return
        connection.unsent += data
        try:
            while connection.unsent:
                del connection.unsent[: connection.socket.send(connection.unsent)]
        except BlockingIOError:
            pass  # the rest goes when poll() says so
        except OSError:
            self._close(connection)
            return
        self._listen_to(connection)

    def _close(self, connection: _Connection) -> None:
        if connection.open:
            connection.open = False
            connection.waiting.clear()
            if connection.running:
                connection.running.cancel("the client has gone")
            del self._connections[connection.socket.fileno()]
            self._poll.unregister(connection.socket)
            connection.socket.close()

    def _begin(self, connection: _Connection, request: Request) -> None:
        def emit(event: str, data: Mapping[str, Any]) -> None:
            message = encode_event(event, data, time=time.time())
            self._post(lambda: self._send(connection, message))

        context = CommandContext(emit)
        worker = QuietThread(
            target=self._run, args=(connection, request, context), name=f"cowkit-command-{request.command}"
        )
        try:
            worker.start()
        except RuntimeError as error:  # the system has no thread to give
            self._send(connection, connection.session.error(request, str(error)))
            return
        connection.running = context
        self._workers.add(worker)

    def _run(self, connection: _Connection, request: Request, context: CommandContext) -> None:
        """The life of a command's thread."""
        session = connection.session
        try:
            answer = session.result(request, self._commands[request.command].run(context, request.arguments))
        except CowkitError as error:
            answer = session.error(request, str(error))
        except BaseException as error:
            self.errors.append(error)
            answer = session.error(request, f"internal error in {request.command}: {type(error).__name__}: {error}")
        worker = threading.current_thread()
        self._post(lambda: self._end(connection, worker, answer))

    def _end(self, connection: _Connection, worker: threading.Thread, answer: bytes) -> None:
        worker.join()
        self._workers.discard(worker)
        connection.running = None
        self._send(connection, answer)
        if connection.open:
            self._advance(connection)
