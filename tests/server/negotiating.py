"""The client's side of a negotiation, in bytes, for tests. It shares no number and no structure with the server's code."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from cowkit.server.exports import Export
from cowkit.server.negotiation import Negotiation, TlsMode

ACK, SERVER, INFO_REPLY, META_CONTEXT = 1, 2, 3, 4
UNSUP, POLICY, INVALID, PLATFORM, TLS_REQD = (2**31 + number for number in range(1, 6))
UNKNOWN, SHUTDOWN, BLOCK_SIZE_REQD, TOO_BIG, EXT_HEADER_REQD = (2**31 + number for number in range(6, 11))

EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO = range(1, 8)
STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT, EXTENDED_HEADERS = range(8, 12)

FIXED_NEWSTYLE = b"\0\0\0\1"
NO_ZEROES_TOO = b"\0\0\0\3"


class Offer:
    """Exports by name; writes down what it is asked."""

    def __init__(self, *exports: Export, default: Export | None = None) -> None:
        self.exports = {export.name: export for export in exports}
        self.default = default
        self.asked: list[str] = []

    def list(self) -> Sequence[tuple[str, str]]:
        self.asked.append("list")
        return [(export.name, export.description) for export in self.exports.values()]

    def find(self, name: str) -> Export | None:
        self.asked.append(f"find {name}")
        return self.default if name == "" and self.default else self.exports.get(name)


def option(number: int, data: bytes = b"", *, claim: int | None = None) -> bytes:
    """An option with ``data``; ``claim`` is the length that its header says, where that is not the truth."""
    return b"IHAVEOPT" + struct.pack(">II", number, len(data) if claim is None else claim) + data


def string(text: str | bytes, *, claim: int | None = None) -> bytes:
    """A string behind its length."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack(">I", len(data) if claim is None else claim) + data


def infos(name: str | bytes, *wanted: int) -> bytes:
    """The data of INFO and GO."""
    return string(name) + struct.pack(f">H{len(wanted)}H", len(wanted), *wanted)


def queries(name: str | bytes, *wanted: str | bytes) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return string(name) + struct.pack(">I", len(wanted)) + b"".join(string(query) for query in wanted)


def replies(output: bytes) -> list[tuple[int, int, bytes]]:
    """The option replies that ``output`` consists of: option, type, data."""
    found = []
    while output:
        magic, number, kind, length = struct.unpack_from(">QIII", output)
        assert magic == 0x3E889045565A9
        assert len(output) >= 20 + length
        found.append((number, kind, output[20 : 20 + length]))
        output = output[20 + length :]
    return found


def kinds(output: bytes) -> list[int]:
    """The types of the option replies in ``output``."""
    return [kind for _, kind, _ in replies(output)]


def begun(offer: Offer, *, tls: TlsMode = "off", flags: bytes = FIXED_NEWSTYLE) -> Negotiation:
    """A negotiation behind greeting and client flags."""
    negotiation = Negotiation(offer, tls=tls)
    negotiation.greeting()
    negotiation.receive(flags)
    return negotiation


def ask(negotiation: Negotiation, number: int, data: bytes = b"") -> list[int]:
    """Send one option; the types of the replies."""
    negotiation.receive(option(number, data))
    return kinds(negotiation.take_output())
