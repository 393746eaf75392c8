"""The data of options, taken apart, and replies to options, put together.

Every length in an option is a claim of the client, and is checked against what is really there before anything is cut
out by it (nbd-server did not: CVE-2022-26495, CVE-2022-26496). What does not add up raises :class:`OptionRefused`,
which becomes an error reply: the option's data was already taken off the stream as a whole, so client and server stay
in step.
"""

from __future__ import annotations

import struct
from typing import Final, NamedTuple

from cowkit.errors import ProtocolError
from cowkit.server.wire import MAX_STRING, OPTION_REPLY, OPTION_REPLY_MAGIC, STRING_LENGTH, Option, Reply, wire_text

MAX_QUERIES: Final = 1024
"""The most metadata contexts that one option may ask for; more are answered ERR_TOO_BIG, which the protocol allows."""


class OptionRefused(ProtocolError):
    """An option that gets the error reply ``reply`` with this error's text. Never leaves ``Negotiation``, which goes on."""

    def __init__(self, reply: Reply, message: str) -> None:
        super().__init__(message)
        self.reply = reply


class InfoRequest(NamedTuple):
    """The data of INFO and GO."""

    name: str
    infos: frozenset[int]
    """What the client wants to know: :class:`~cowkit.server.wire.Info`, and numbers that nobody knows."""


class MetaContextRequest(NamedTuple):
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""

    name: str
    queries: tuple[str, ...]


def option_name(option: int) -> str:
    """What messages call ``option``: ``"GO"``, or ``"option 99"`` for one that the protocol does not have."""
    try:
        return Option(option).name
    except ValueError:
        return f"option {option}"


def option_reply(option: int, reply: Reply, data: bytes = b"") -> bytes:
    """One reply to ``option``, as it goes on the wire."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, reply, len(data)) + data


def error_reply(option: int, reply: Reply, message: str) -> bytes:
    """An error reply; ``message`` is for the people at the other end, and shortened to what a string may have."""
    return option_reply(option, reply, wire_text(message))


def parse_name(data: bytes, what: str) -> str:
    """The string ``data``.

    :param what: what the string is, for the error message.
    :raises OptionRefused: ERR_INVALID: longer than MAX_STRING, a NUL in it, or no UTF-8.
    """
    if len(data) > MAX_STRING:
        raise OptionRefused(Reply.ERR_INVALID, f"{what} has {len(data)} bytes: the protocol allows {MAX_STRING}")
    if b"\0" in data:
        raise OptionRefused(Reply.ERR_INVALID, f"{what} contains a NUL, which the protocol forbids")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise OptionRefused(Reply.ERR_INVALID, f"{what} is not UTF-8, which the protocol wants") from error


def parse_info_request(data: bytes) -> InfoRequest:
    """The data of INFO and GO ("Option types", ``NBD_OPT_INFO``): length and name, then a number of 16-bit infos.

    :raises OptionRefused: ERR_INVALID: the lengths do not add up, or the name is no string.
    """
    cursor = _Cursor(data)
    name = cursor.string("the export name")
    count = cursor.u16("the number of information requests")
    infos = cursor.take(2 * count, "the list of information requests")
    cursor.end()
    return InfoRequest(name, frozenset(struct.unpack(f">{count}H", infos)))


def parse_meta_context_request(data: bytes) -> MetaContextRequest:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT ("Option types"): a name, then a number of queries.

    :raises OptionRefused: ERR_INVALID: the lengths do not add up, the name or a query is no string, or a query does not
    begin
        with a namespace and a colon; ERR_TOO_BIG: more than MAX_QUERIES queries.
    """
    cursor = _Cursor(data)
    name = cursor.string("the export name")
    count = cursor.u32("the number of queries")
    if count * STRING_LENGTH.size > cursor.left:
        raise OptionRefused(
            Reply.ERR_INVALID, f"{count} queries do not fit into the {cursor.left} bytes that are left of the option"
        )
    if count > MAX_QUERIES:
        raise OptionRefused(Reply.ERR_TOO_BIG, f"{count} queries are too many: ask for at most {MAX_QUERIES} at once")
    queries = tuple(cursor.string("a metadata context query") for _ in range(count))
    cursor.end()
    for query in queries:
        if query.find(":") < 1:
            raise OptionRefused(
                Reply.ERR_INVALID, f"the query {shortened(query)} has no namespace: ask for one like 'base:allocation'"
            )
    return MetaContextRequest(name, queries)


def shortened(name: str) -> str:
    """A client's ``name`` for a message: quoted, without control characters, at most 80 characters of it."""
    return repr(name) if len(name) <= 80 else f"{name[:80]!r}..."


class _Cursor:
    """Reads option data from front to back; whatever is not there is ERR_INVALID."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, length: int, what: str) -> bytes:
        if length > self.left:
            raise OptionRefused(
                Reply.ERR_INVALID, f"{what} should have {length} bytes, and the option has {self.left} left"
            )
        self._at += length
        return self._data[self._at - length : self._at]

    def u16(self, what: str) -> int:
        return int.from_bytes(self.take(2, what), "big")

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "big")

    def string(self, what: str) -> str:
        return parse_name(self.take(self.u32(f"the length of {what}"), what), what)

    def end(self) -> None:
        if self.left:
            raise OptionRefused(Reply.ERR_INVALID, f"{self.left} bytes are left over at the end of the option")
