"""The three dialects of replies: simple, structured and extended.

Which one a connection speaks is settled in negotiation. Each says the same few things; a reply is a list of buffers for one
gathered send: heads are ``bytes``, data are views of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from struct import Struct

from cowkit.disk.overlay import Segment
from cowkit.disk.source import ZEROES
from cowkit.server import wire

Buffers = list[bytes | memoryview]
Status = tuple[int, Sequence[tuple[int, int]]]
"""``(context id, [(length, flags), ...])`` of a BLOCK_STATUS."""


class Dialect(ABC):
    """How to say it. ``request`` is the struct of requests, ``magic`` what they begin with."""

    request: Struct
    magic: int
    extended = False
    structured = False

    @abstractmethod
    def done(self, cookie: int, offset: int) -> bytes:
        """It is done, and there is nothing to tell."""

    @abstractmethod
    def failed(self, cookie: int, offset: int, error: int, message: str) -> bytes:
        """It failed with this NBD error; the message is for people."""

    @abstractmethod
    def data_head(self, cookie: int, offset: int, length: int) -> bytes:
        """The head of a READ's reply whose whole data, without a break, come next."""

    @abstractmethod
    def read(self, cookie: int, offset: int, segments: Iterable[Segment], into: Buffers) -> None:
        """A READ's reply in segments."""

    def status(self, cookie: int, offset: int, statuses: Sequence[Status], into: Buffers) -> None:
        """A BLOCK_STATUS's reply."""
        raise AssertionError("a simple reply cannot carry a block status, so no context was negotiated")


class Simple(Dialect):
    """Simple replies ("Simple reply message")."""

    request = wire.REQUEST
    magic = wire.REQUEST_MAGIC

    def done(self, cookie: int, offset: int) -> bytes:
        """See :meth:`Dialect.done`."""
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie)

    def failed(self, cookie: int, offset: int, error: int, message: str) -> bytes:
        """See :meth:`Dialect.failed`; a simple reply has no place for the message."""
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, error, cookie)

    def data_head(self, cookie: int, offset: int, length: int) -> bytes:
        """See :meth:`Dialect.data_head`."""
        return wire.SIMPLE_REPLY.pack(wire.SIMPLE_REPLY_MAGIC, 0, cookie)

    def read(self, cookie: int, offset: int, segments: Iterable[Segment], into: Buffers) -> None:
        """See :meth:`Dialect.read`; zeroes travel as zeroes."""
        into.append(self.done(cookie, offset))
        for start, stop, data in segments:
            if data is not None:
                into.append(data)
                continue
            while start < stop:
                into.append(ZEROES[: stop - start])
                start += len(ZEROES)


class Structured(Dialect):
    """Structured replies ("Structured reply chunk message")."""

    request = wire.REQUEST
    magic = wire.REQUEST_MAGIC
    structured = True

    def _head(self, flags: int, kind: int, cookie: int, offset: int, length: int) -> bytes:
        return wire.STRUCTURED_REPLY.pack(wire.STRUCTURED_REPLY_MAGIC, flags, kind, cookie, length)

    def done(self, cookie: int, offset: int) -> bytes:
        """See :meth:`Dialect.done`; by way of ``_head`` it would take nearly twice as long, for each WRITE."""
        return wire.STRUCTURED_REPLY.pack(wire.STRUCTURED_REPLY_MAGIC, wire.REPLY_FLAG_DONE, wire.CHUNK_NONE, cookie, 0)

    def failed(self, cookie: int, offset: int, error: int, message: str) -> bytes:
        """See :meth:`Dialect.failed`."""
        text = wire.wire_text(message)
        head = self._head(wire.REPLY_FLAG_DONE, wire.CHUNK_ERROR, cookie, offset, wire.ERROR.size + len(text))
        return head + wire.ERROR.pack(error, len(text)) + text

    def data_head(self, cookie: int, offset: int, length: int) -> bytes:
        """See :meth:`Dialect.data_head`."""
        return wire.STRUCTURED_DATA.pack(
            wire.STRUCTURED_REPLY_MAGIC, wire.REPLY_FLAG_DONE, wire.CHUNK_OFFSET_DATA, cookie, length + 8, offset
        )

    def read(self, cookie: int, offset: int, segments: Iterable[Segment], into: Buffers) -> None:
        """See :meth:`Dialect.read`: a chunk for each run of data, and one for each run of zeroes."""
        pieces = list(segments)
        index = 0
        while index < len(pieces):
            start, stop, data = pieces[index]
            index += 1
            run = [data] if data is not None else []
            while index < len(pieces) and (pieces[index][2] is None) == (data is None):
                stop = pieces[index][1]
                if (more := pieces[index][2]) is not None:
                    run.append(more)
                index += 1
            flags = wire.REPLY_FLAG_DONE if index == len(pieces) else 0
            if data is None:
                head = self._head(flags, wire.CHUNK_OFFSET_HOLE, cookie, offset, wire.OFFSET_HOLE.size)
                into.append(head + wire.OFFSET_HOLE.pack(start, stop - start))
            else:
                head = self._head(flags, wire.CHUNK_OFFSET_DATA, cookie, offset, wire.OFFSET_DATA.size + stop - start)
                into.append(head + wire.OFFSET_DATA.pack(start))
                into.extend(run)

    def status(self, cookie: int, offset: int, statuses: Sequence[Status], into: Buffers) -> None:
        """See :meth:`Dialect.status`: a chunk for each context."""
        for index, (context, descriptors) in enumerate(statuses):
            flags = wire.REPLY_FLAG_DONE if index == len(statuses) - 1 else 0
            kind, payload = self._descriptors(context, descriptors)
            into.append(self._head(flags, kind, cookie, offset, len(payload)) + payload)

    def _descriptors(self, context: int, descriptors: Sequence[tuple[int, int]]) -> tuple[int, bytes]:
        pack = wire.DESCRIPTOR.pack
        return wire.CHUNK_BLOCK_STATUS, wire.BLOCK_STATUS.pack(context) + b"".join(
            [pack(*each) for each in descriptors]
        )


class Extended(Structured):
    """Structured replies with extended headers (branch extension-ext-header of proto.md)."""

    request = wire.EXTENDED_REQUEST
    magic = wire.EXTENDED_REQUEST_MAGIC
    extended = True

    def _head(self, flags: int, kind: int, cookie: int, offset: int, length: int) -> bytes:
        return wire.EXTENDED_REPLY.pack(wire.EXTENDED_REPLY_MAGIC, flags, kind, cookie, offset, length)

    def done(self, cookie: int, offset: int) -> bytes:
        """See :meth:`Dialect.done`."""
        return self._head(wire.REPLY_FLAG_DONE, wire.CHUNK_NONE, cookie, offset, 0)

    def data_head(self, cookie: int, offset: int, length: int) -> bytes:
        """See :meth:`Dialect.data_head`."""
        return wire.EXTENDED_DATA.pack(
            wire.EXTENDED_REPLY_MAGIC, wire.REPLY_FLAG_DONE, wire.CHUNK_OFFSET_DATA, cookie, offset, length + 8, offset
        )

    def _descriptors(self, context: int, descriptors: Sequence[tuple[int, int]]) -> tuple[int, bytes]:
        pack = wire.DESCRIPTOR_EXT.pack
        head = wire.BLOCK_STATUS_EXT.pack(context, len(descriptors))
        return wire.CHUNK_BLOCK_STATUS_EXT, head + b"".join([pack(*each) for each in descriptors])
