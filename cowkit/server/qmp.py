"""QMP, the messages of the control socket: bytes in, answers and requests out, no I/O and no threads.

The format and the wording of errors are QEMU's (its docs/interop/qmp-spec), so that what drives QEMU drives cowkit: the
`qemu.qmp` package, `qmp-shell`, or a person with `socat`.

What holds: each message that came in has exactly one answer, in the order of the messages, and nothing that a peer sends
raises out of :class:`QmpSession`: what cannot be understood is answered with an error, and the messages behind it count.
Like QEMU, a message ends where its brackets close, not at the end of a line; the byte 0xFF (which no JSON text contains)
throws away what is unfinished, so that a peer can always get back in step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cowkit.errors import ProtocolError

MESSAGE_LIMIT = 1 << 20
"""The most bytes that one message may have (1 MiB); a longer one is answered with an error and skipped to the end of its line."""

DEPTH_LIMIT = 100
"""How deep brackets may be nested; far below what Python's JSON reader and writer can take."""

GENERIC_ERROR = "GenericError"
COMMAND_NOT_FOUND = "CommandNotFound"

_TYPE_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}

_SPACE = re.compile(rb"[ \t\r\n\xff]*")  # 0xFF too: with nothing unfinished it throws nothing away
_JUNK_END = re.compile(rb"[\n\xff{\[]")
_OUTSIDE_STRING = re.compile(rb'[{}\[\]"\xff]')
_INSIDE_STRING = re.compile(rb'["\\\n\xff]')


class MessageSplitter:
    """Cuts a stream of bytes into JSON texts, each an object or an array; looks at each byte once."""

    def __init__(self, limit: int = MESSAGE_LIMIT) -> None:
        self._limit = limit
        self._buffer = bytearray()
        self._seen = 0  # how much of the buffer has been looked at
        self._depth = 0  # brackets open there
        self._in_string = False
        self._skipping = False  # to the end of the line: the message was too long

    def feed(self, data: bytes) -> Iterator[bytes | ProtocolError]:
        """The messages that ``data`` completes, and in the place of each that cannot be one the error to answer it with."""
        self._buffer += data
        while True:
            if self._skipping:
                if not self._skip_line():
                    return
            elif self._depth:
                found = self._inside()
                if found is None:
                    if len(self._buffer) <= self._limit:
                        return
                    self._skipping = True
                    found = ProtocolError(f"message of over {self._limit} bytes")
                yield found
            else:
                junk = self._between()
                if junk is not None:
                    yield junk
                elif not self._depth:
                    return

    def _take(self, end: int) -> bytes:
        message = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._seen = self._depth = 0
        self._in_string = False
        return message

    def _skip_line(self) -> bool:
        end = self._buffer.find(b"\n")
        self._take(len(self._buffer) if end < 0 else end + 1)
        self._skipping = end < 0
        return end >= 0

    def _between(self) -> ProtocolError | None:
        """Go on to the bracket that opens the next message; an error if there is something else in front of it."""
        space = _SPACE.match(self._buffer)
        start = space.end() if space else 0
        if start == len(self._buffer):
            self._take(start)
            return None
        if self._buffer[start] in b"{[":
            self._take(start)
            self._seen = self._depth = 1
            return None
        end = _JUNK_END.search(self._buffer, max(start, self._seen))
        if end is None:
            self._seen = len(self._buffer)
            if self._seen <= self._limit:
                return None
            self._skipping = True
            return ProtocolError(f"message of over {self._limit} bytes")
        junk = self._take(end.start()).strip()
        return ProtocolError(f"JSON parse error, invalid keyword {junk[:40].decode(errors='replace')!a}")

    def _inside(self) -> bytes | ProtocolError | None:
        """Go on to the bracket that closes the message; None while that has not come."""
        buffer = self._buffer
        while True:
            match = (_INSIDE_STRING if self._in_string else _OUTSIDE_STRING).search(buffer, self._seen)
            if match is None:
                self._seen = len(buffer)
                return None
            byte, at = match[0], match.start()
            if byte == b"\\":
                if at + 1 == len(buffer):
                    self._seen = at
                    return None
                self._seen = at + 2
                continue
            self._seen = at + 1
            if byte in {b"\xff", b"\n"}:
                self._take(at + 1)
                what = "unfinished message" if byte == b"\xff" else "end of line in a string"
                return ProtocolError(f"JSON parse error, {what}")
            if byte == b'"':
                self._in_string = not self._in_string
            elif byte in b"{[":
                self._depth += 1
                if self._depth > DEPTH_LIMIT:
                    self._skipping = True
                    return ProtocolError(f"JSON parse error, nested over {DEPTH_LIMIT} deep")
            else:
                self._depth -= 1
                if not self._depth:
                    return self._take(at + 1)


def _no_constant(name: str) -> Any:
    raise ValueError(f"invalid keyword '{name}'")


def _finite(digits: str) -> float:
    number = float(digits)
    if number in (float("inf"), float("-inf")):
        raise ValueError(f"number out of range '{digits[:40]}'")
    return number


def decode(message: bytes) -> dict[str, Any]:
    """The object that ``message`` holds. :raises ProtocolError: it is no JSON text, or no object."""
    try:
        value = json.loads(message.decode(), parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"JSON parse error, {error}") from error
    if not isinstance(value, dict):
        raise ProtocolError("QMP input must be a JSON object")
    return value


def encode(message: Mapping[str, Any]) -> bytes:
    """``message`` on a line of its own; pure ASCII, so that file names that are no UTF-8 (surrogates here) survive."""
    return json.dumps(message, allow_nan=False).encode("ascii") + b"\r\n"


def encode_event(name: str, data: Mapping[str, Any], *, time: float) -> bytes:
    """An event (qmp-spec, "Asynchronous events"); ``time`` is in seconds since 1970."""
    seconds = int(time)
    stamp = {"seconds": seconds, "microseconds": int((time - seconds) * 1e6)}
    return encode({"event": name, "data": dict(data), "timestamp": stamp})


class Argument(NamedTuple):
    """What a command wants of one argument. ``type`` is str, bool, int, float, list or dict."""

    type: type
    required: bool = True


class Request(NamedTuple):
    """A command to be run: its arguments have been checked. ``tag`` holds the member ``id`` if the client gave one."""

    command: str
    arguments: dict[str, Any]
    tag: dict[str, Any]


class _Refused(Exception):
    """What a message is answered with if it asks for nothing that can be done."""

    def __init__(self, description: str, error_class: str = GENERIC_ERROR) -> None:
        super().__init__(description)
        self.error_class = error_class


def _check_arguments(given: Mapping[str, Any], declared: Mapping[str, Argument]) -> None:
    """Refuse what is unexpected, missing or of another type, in QEMU's words."""
    for name in given:
        if name not in declared:
            raise _Refused(f"Parameter '{name}' is unexpected")
    for name, (kind, required) in declared.items():
        if name not in given:
            if required:
                raise _Refused(f"Parameter '{name}' is missing")
            continue
        value = given[name]
        # type() and not isinstance(): for Python a boolean is an integer, for QMP it is not
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise _Refused(f"Invalid parameter type for '{name}', expected: {_TYPE_NAMES[kind]}")


class QmpSession:
    """The server's side of one connection.

    :param commands: the names of the commands that the server's owner runs, each with its arguments. The session itself
        answers ``qmp_capabilities``, ``query-commands`` and ``query-version``.
    :param version: of the server, such as ``"1.2.3"``.
    """

    def __init__(self, commands: Mapping[str, Mapping[str, Argument]], version: str) -> None:
        self._commands = commands
        numbers = [int(number) for number in re.findall(r"\d+", version)[:3]] + [0, 0, 0]
        # QMP's VersionInfo wants a member called "qemu": clients print it, and none decides anything by it
        self._version = {
            "qemu": {"major": numbers[0], "minor": numbers[1], "micro": numbers[2]},
            "package": f"cowkit {version}",
        }
        self._own = {
            "qmp_capabilities": {"enable": Argument(list, required=False)},
            "query-commands": {},
            "query-version": {},
        }
        self._splitter = MessageSplitter()
        self.negotiated = False
        """Whether the client has ended the negotiation, and so gets events."""

    def greeting(self) -> bytes:
        """What the server says first (qmp-spec, "Server Greeting")."""
        return encode({"QMP": {"version": self._version, "capabilities": []}})

    def feed(self, data: bytes) -> Iterator[bytes | Request]:
        """What the client sent, in order: answers to give as they are, and commands to run and to answer."""
        for message in self._splitter.feed(data):
            if isinstance(message, ProtocolError):
                yield self._error({}, GENERIC_ERROR, str(message))
                continue
            tag: dict[str, Any] = {}
            try:
                asked = decode(message)
                if "id" in asked:
                    tag["id"] = asked["id"]
                yield self._dispatch(asked, tag)
            except ProtocolError as error:
                yield self._error(tag, GENERIC_ERROR, str(error))
            except _Refused as refused:
                yield self._error(tag, refused.error_class, str(refused))

    def _dispatch(self, asked: dict[str, Any], tag: dict[str, Any]) -> bytes | Request:
        for member in asked:
            if member not in ("execute", "arguments", "id"):
                raise _Refused(f"QMP input member '{member}' is unexpected")
        if "execute" not in asked:
            raise _Refused("QMP input lacks member 'execute'")
        command = asked["execute"]
        if not isinstance(command, str):
            raise _Refused("QMP input member 'execute' must be a string")
        arguments = asked.get("arguments", {})
        if not isinstance(arguments, dict):
            raise _Refused("QMP input member 'arguments' must be an object")
        if not self.negotiated and command != "qmp_capabilities":
            raise _Refused("Expecting capabilities negotiation with 'qmp_capabilities'", COMMAND_NOT_FOUND)
        if self.negotiated and command == "qmp_capabilities":
            raise _Refused("Capabilities negotiation is already complete, command ignored", COMMAND_NOT_FOUND)
        declared = self._own.get(command, self._commands.get(command))
        if declared is None:
            raise _Refused(f"The command {command} has not been found", COMMAND_NOT_FOUND)
        _check_arguments(arguments, declared)
        request = Request(command, arguments, tag)
        if command in self._own:
            return self.result(request, self._run_own(request))
        return request

    def _run_own(self, request: Request) -> Any:
        if request.command == "query-version":
            return self._version
        if request.command == "query-commands":
            return [{"name": name} for name in sorted({*self._own, *self._commands})]
        for capability in request.arguments.get("enable", []):
            raise _Refused(f"Capability {json.dumps(capability)} is not offered")
        self.negotiated = True
        return {}

    def result(self, request: Request, value: Any) -> bytes:
        """The answer to a command that was done (qmp-spec, "Success"); ``value`` is made of JSON's types."""
        return encode({"return": value, **request.tag})

    def error(self, request: Request, description: str) -> bytes:
        """The answer to a command that could not be done (qmp-spec, "Error")."""
        return self._error(request.tag, GENERIC_ERROR, description)

    def _error(self, tag: dict[str, Any], error_class: str, description: str) -> bytes:
        return encode({"error": {"class": error_class, "desc": description}, **tag})
