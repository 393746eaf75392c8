"""The asking side of a control socket: what `cowkit diff` and its like have of QMP.

It is apart from the server's side since it is all that a short command needs of it, and each module more costs a millisecond.
Messages are lines here: a QMP server ends each of its own with CRLF (qmp-spec, "General Definitions"), and JSON has no
line's end within a text that is written on one line.
"""

from __future__ import annotations

import os
from _socket import AF_UNIX, SOCK_STREAM, socket  # without what the module socket adds, which takes 4 ms

from cowkit.errors import ControlError
from cowkit.quick_json import dumps, loads

TYPE_CHECKING = False  # as typing has it, which takes longer to import than all that is here
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Any, Self

_RECEIVE = 1 << 18
_NBD_GREETING = b"NBDMAGIC"
_ANSWER_LIMIT = 1 << 28
"""How many bytes are taken for one answer: a report may list many extents."""


class ControlClient:
    """A client of a control socket, for one thread; a context manager.

    :param path: the socket's path.
    :param timeout: how long the server may take to greet, in seconds; commands may take as long as they want.
    :raises ControlError: nobody listens there, or it is no QMP server.
    """

    def __init__(self, path: str | os.PathLike[str], *, timeout: float = 5) -> None:
        self.path = os.fspath(path)
        self._received = bytearray()
        self._socket = socket(AF_UNIX, SOCK_STREAM)
        try:
            self._socket.settimeout(timeout)
            self._negotiate()
            self._socket.settimeout(None)
        except BaseException:
            self.close()
            raise

    def _negotiate(self) -> None:
        try:
            self._socket.connect(self.path)
        except (OSError, ValueError) as error:
            raise ControlError(f"cannot reach a server at {self.path}: {why_not(error)}") from error
        if "QMP" not in self._receive():
            raise ControlError(f"what answers at {self.path} does not speak QMP")
        self.execute("qmp_capabilities")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        on_event: Callable[[str, dict[str, Any]], None] | None = None,
    ) -> Any:
        """The result of ``command``; ``on_event`` is given the name and data of each event that comes before it.

        :raises ControlError: the server refuses (its words), or ends before it answers.
        """
        asked = dumps({"execute": command, "arguments": dict(arguments or {})})
        try:
            self._socket.sendall(asked.encode("ascii") + b"\r\n")
        except OSError:
            pass  # the server has gone: what it said last tells more
        while True:
            message = self._receive()
            if "event" in message:
                if on_event is not None:
                    on_event(str(message["event"]), message.get("data", {}))
            elif "error" in message:
                raise ControlError(str(message["error"].get("desc", message["error"])))
            elif "return" in message:
                return message["return"]

    def _receive(self) -> dict[str, Any]:
        line = b""
        while not line:
            line = self._line().strip()
        try:
            message = loads(line)
        except (ValueError, RecursionError) as error:
            raise ControlError(f"what answers at {self.path} does not speak QMP: {error}") from error
        if not isinstance(message, dict):
            raise ControlError(
                f"what answers at {self.path} does not speak QMP: it says {line[:40].decode('ascii', 'replace')}"
            )
        return message

    def _line(self) -> bytes:
        """The next line; the last one may lack its end."""
        received = self._received
        looked = 0
        while (end := received.find(b"\n", looked)) < 0:
            looked = len(received)
            if received.startswith(_NBD_GREETING):  # and then waits for us
                from urllib.parse import quote

                uri = f"nbd+unix:///?socket={quote(os.path.abspath(self.path))}"
                raise ControlError(
                    f"what answers at {self.path} speaks NBD: it is no control socket of cowkit's (as the source of a difference, "
                    f"give its URI: {uri})"
                )
            if looked > _ANSWER_LIMIT:
                raise ControlError(
                    f"what answers at {self.path} does not speak QMP: message of over {_ANSWER_LIMIT} bytes"
                )
            try:
                data = self._socket.recv(_RECEIVE)
            except TimeoutError as error:
                raise ControlError(f"the server at {self.path} does not answer") from error
            except OSError as error:
                raise ControlError(f"the server at {self.path} cannot be asked: {error.strerror}") from error
            if not data:
                if received.strip():
                    end = looked
                    break
                raise ControlError(f"the server at {self.path} ended before it answered")
            received += data
        line = bytes(received[: end + 1])
        del received[: end + 1]
        return line

    def close(self) -> None:
        """Hang up; what was asked for and not answered is given up by the server."""
        self._socket.close()


def why_not(error: OSError | ValueError) -> str:
    """What the system says, without the number; Python's own complaint of a path too long has none."""
    return (isinstance(error, OSError) and error.strerror) or str(error)
