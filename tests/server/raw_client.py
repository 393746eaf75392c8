"""An NBD client that sends whatever bytes a test wants, and takes replies apart strictly.

It shares no number and no structure with the server's code, and never does what a test did not ask for: it does not wait
for replies, does not check what it sends, and hangs up without a word unless told otherwise.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Literal, NamedTuple, Self

from cowkit.disk import Base, Disk, ZeroBase
from cowkit.hosting.server import DiskServer
from cowkit.server.server import NbdServer
from tests.server.negotiating import (
    ACK,
    EXTENDED_HEADERS,
    GO,
    META_CONTEXT,
    NO_ZEROES_TOO,
    SET_META_CONTEXT,
    STRUCTURED_REPLY,
    infos,
    option,
    queries,
)

DialectName = Literal["simple", "structured", "extended"]
DIALECTS: tuple[DialectName, ...] = ("simple", "structured", "extended")
BOTH_STRUCTURED: tuple[DialectName, ...] = ("structured", "extended")

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << bit for bit in range(6))
EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 95, 108
NONE, OFFSET_DATA, OFFSET_HOLE, STATUS, STATUS_EXT, ERROR, ERROR_OFFSET = 0, 1, 2, 5, 6, 32769, 32770
DONE = 1

TIMEOUT = 30.0
"""Seconds after which a test fails instead of hanging."""


class Chunk(NamedTuple):
    """One chunk of a structured or extended reply; of a simple reply, the whole of it as one chunk."""

    flags: int
    kind: int
    cookie: int
    offset: int | None
    """Echoed by extended replies."""
    payload: bytes


class Reply(NamedTuple):
    """A whole reply."""

    cookie: int
    error: int
    message: str
    data: bytes
    """Of a READ: the data in order, holes filled."""
    holes: list[tuple[int, int]]
    """Of a READ: offset and length of each OFFSET_HOLE."""
    status: dict[int, list[tuple[int, int]]]
    """Of a BLOCK_STATUS: id of the context, and its descriptors (length, flags)."""
    chunks: list[Chunk]


class RawClient:
    """A connection; :meth:`negotiate` brings it to transmission.

    :param where: the path of a Unix socket, host and port, or a socket that is connected already.
    """

    def __init__(self, where: str | tuple[str, int] | socket.socket) -> None:
        if isinstance(where, socket.socket):
            self.sock = where
        else:
            self.sock = socket.socket(socket.AF_UNIX if isinstance(where, str) else socket.AF_INET, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT)
        if not isinstance(where, socket.socket):
            try:
                self.sock.connect(where)
            except OSError:
                self.sock.close()
                raise
        self.extended = False
        self.structured = False
        self.size = 0
        self.flags = 0
        self.contexts: dict[str, int] = {}
        self._cookie = 0
        self._reads: dict[int, tuple[int, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up, without DISC."""
        self.sock.close()

    def send(self, data: bytes) -> None:
        """Send any bytes."""
        self.sock.sendall(data)

    def take(self, length: int) -> bytes:
        """The next ``length`` bytes; the end of the stream before them is a :class:`ConnectionError`."""
        found = bytearray()
        while len(found) < length:
            if not (more := self.sock.recv(min(length - len(found), 1 << 20))):
                raise ConnectionError(f"the server hung up {length - len(found)} bytes too soon")
            found += more
        return bytes(found)

    def at_end(self) -> bool:
        """Whether the server hangs up next, and sends nothing before it does."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    # Negotiation

    def greet(self, flags: bytes = NO_ZEROES_TOO) -> None:
        """Take the server's greeting and answer with client flags."""
        assert self.take(18) == b"NBDMAGICIHAVEOPT\0\3"
        self.send(flags)

    def option_replies(self) -> list[tuple[int, int, bytes]]:
        """The replies to one option up to the final one: option, type, data."""
        found = []
        while True:
            magic, number, kind, length = struct.unpack(">QIII", self.take(20))
            assert magic == 0x3E889045565A9
            found.append((number, kind, self.take(length)))
            if kind == ACK or kind >= 2**31:
                return found

    def ask(self, number: int, data: bytes = b"") -> int:
        """Send one option; the type of its final reply."""
        self.send(option(number, data))
        return self.option_replies()[-1][1]

    def go(self, name: str = "") -> None:
        """Choose an export."""
        self.send(option(GO, infos(name)))
        replies = self.option_replies()
        assert replies[-1][1] == ACK, replies
        _, self.size, self.flags = struct.unpack(">HQH", replies[0][2])

    def negotiate(self, dialect: DialectName = "structured", *contexts: str, name: str = "") -> Self:
        """Come to transmission in a dialect, with metadata contexts."""
        self.greet()
        if dialect != "simple":
            assert self.ask(STRUCTURED_REPLY if dialect == "structured" else EXTENDED_HEADERS) == ACK
        self.structured = dialect != "simple"
        self.extended = dialect == "extended"
        if contexts:
            self.send(option(SET_META_CONTEXT, queries(name, *contexts)))
            *selected, last = self.option_replies()
            assert last[1] == ACK
            for _, kind, data in selected:
                assert kind == META_CONTEXT
                self.contexts[data[4:].decode()] = int.from_bytes(data[:4])
        self.go(name)
        return self

    # Requests

    def header(self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 0) -> bytes:
        """A request's header in the connection's dialect."""
        if self.extended:
            return struct.pack(">IHHQQQ", 0x21E41C71, flags, command, cookie, offset, length)
        return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, length)

    def request(
        self, command: int, offset: int = 0, length: int | None = None, data: bytes = b"", *, flags: int = 0
    ) -> tuple[int, bytes]:
        """A request with a new cookie, not yet sent: cookie and bytes. WRITE sets PAYLOAD_LEN where the protocol wants it."""
        self._cookie += 1
        cookie = 0xC0FFEE << 32 | self._cookie
        if command == WRITE and self.extended:
            flags |= PAYLOAD_LEN
        if length is None:
            length = len(data)
        if command == READ:
            self._reads[cookie] = (offset, length)
        return cookie, self.header(command, offset, length, flags=flags, cookie=cookie) + data

    def do(
        self, command: int, offset: int = 0, length: int | None = None, data: bytes = b"", *, flags: int = 0
    ) -> Reply:
        """Send one request and take its reply."""
        cookie, request = self.request(command, offset, length, data, flags=flags)
        self.send(request)
        reply = self.reply()
        assert reply.cookie == cookie
        return reply

    def read(self, length: int, offset: int) -> bytes:
        """READ, which has to go well."""
        reply = self.do(READ, offset, length)
        assert reply.error == 0, reply.message
        return reply.data

    def write(self, data: bytes, offset: int) -> None:
        """WRITE, which has to go well."""
        reply = self.do(WRITE, offset, data=data)
        assert reply.error == 0, reply.message

    def block_status(self, length: int, offset: int, *, flags: int = 0) -> dict[str, list[tuple[int, int]]]:
        """BLOCK_STATUS, which has to go well: descriptors by context."""
        reply = self.do(BLOCK_STATUS, offset, length, flags=flags)
        assert reply.error == 0, reply.message
        names = {number: name for name, number in self.contexts.items()}
        return {names[number]: descriptors for number, descriptors in reply.status.items()}

    # Replies

    def reply(self) -> Reply:
        """The next reply, whole; whatever the protocol forbids in it is an assertion's failure."""
        return self._structured_reply() if self.structured else self._simple_reply()

    def _simple_reply(self) -> Reply:
        magic, error, cookie = struct.unpack(">IIQ", self.take(16))
        assert magic == 0x67446698
        _, length = self._reads.pop(cookie, (0, 0))
        data = b"" if error else self.take(length)
        return Reply(cookie, error, "", data, [], {}, [Chunk(DONE, NONE, cookie, None, data)])

    def _chunk(self) -> Chunk:
        offset: int | None = None
        if self.extended:
            magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQQ", self.take(32))
            assert magic == 0x6E8A278C
        else:
            magic, flags, kind, cookie, length = struct.unpack(">IHHQI", self.take(20))
            assert magic == 0x668E33EF
        assert flags in (0, DONE)
        return Chunk(flags, kind, cookie, offset, self.take(length))

    def _structured_reply(self) -> Reply:
        chunks = [self._chunk()]
        while not chunks[-1].flags & DONE:
            chunks.append(self._chunk())
        cookie = chunks[0].cookie
        assert {chunk.cookie for chunk in chunks} == {cookie}
        assert len({chunk.offset for chunk in chunks}) == 1
        start, length = self._reads.pop(cookie, (0, 0))
        failed = chunks[-1].kind in (ERROR, ERROR_OFFSET)
        data = bytearray(0 if failed else length)
        covered: list[tuple[int, int]] = []
        holes: list[tuple[int, int]] = []
        status: dict[int, list[tuple[int, int]]] = {}
        error, message = 0, ""
        for chunk in chunks:
            payload = chunk.payload
            if chunk.kind == OFFSET_DATA:
                assert len(payload) > 8
                where = int.from_bytes(payload[:8])
                if not failed:
                    data[where - start : where - start + len(payload) - 8] = payload[8:]
                covered.append((where, len(payload) - 8))
            elif chunk.kind == OFFSET_HOLE:
                assert len(payload) == 12
                holes.append(struct.unpack(">QI", payload))
                covered.append(holes[-1])
            elif chunk.kind in (STATUS, STATUS_EXT):
                assert (chunk.kind == STATUS_EXT) == self.extended
                context, descriptors = self._descriptors(payload)
                assert context not in status
                status[context] = descriptors
            elif chunk.kind in (ERROR, ERROR_OFFSET):
                error, size = struct.unpack_from(">IH", payload)
                assert error and not message and chunk.flags & DONE
                assert len(payload) == 6 + size + (8 if chunk.kind == ERROR_OFFSET else 0)
                message = payload[6 : 6 + size].decode()
            else:
                assert chunk == Chunk(DONE, NONE, cookie, chunk.offset, b"")
        if not error and length:
            at = start
            for where, size in sorted(covered):
                assert where == at and size, "the chunks do not cover the range once"
                at += size
            assert at == start + length and len(data) == length
        return Reply(cookie, error, message, bytes(data), holes, status, chunks)

    def _descriptors(self, payload: bytes) -> tuple[int, list[tuple[int, int]]]:
        if self.extended:
            context, count = struct.unpack_from(">II", payload)
            assert len(payload) == 8 + 16 * count
            found = list(struct.iter_unpack(">QQ", payload[8:]))
        else:
            (context,) = struct.unpack_from(">I", payload)
            found = list(struct.iter_unpack(">II", payload[4:]))
        assert found and all(length for length, _ in found)
        return context, found


def status_payload(length: int, contexts: Sequence[int]) -> bytes:
    """The payload of a BLOCK_STATUS that names its contexts."""
    return struct.pack(f">Q{len(contexts)}I", length, *contexts)


def open_files() -> list[str]:
    """The descriptors that this process has open."""
    return sorted(os.listdir("/proc/self/fd"))


def where(server: DiskServer) -> str:
    """The path of a server's Unix socket."""
    assert server.socket is not None
    return server.socket


def assert_serves(server: NbdServer) -> None:
    """Another client is served, and nothing went wrong in the server's threads."""
    with RawClient(where(server)) as client:
        client.negotiate("structured", "base:allocation")
        if client.size:
            before = client.read(1, client.size - 1)
            client.write(b"?", client.size - 1)
            assert client.read(1, client.size - 1) == b"?"
            client.write(before, client.size - 1)
            assert client.block_status(client.size % 2**32 or 1, 0)["base:allocation"]
        client.send(client.header(DISC))
        assert client.at_end()
    assert server.errors == []


@contextmanager
def serving(base: Base | int, **options: int) -> Iterator[NbdServer]:
    """A server of a new disk on ``base``, or blank with so many bytes; afterwards no thread of the server's is left."""
    threads = set(threading.enumerate())
    with Disk(ZeroBase(base) if isinstance(base, int) else base, **options) as disk:  # type: ignore[arg-type]
        with NbdServer(disk) as server:
            yield server
        assert server.errors == []
    assert {thread.name for thread in set(threading.enumerate()) - threads if thread.name.startswith("cowkit")} == set()
