"""What each option means: option in, replies out, and what client and server have agreed on so far.

The option table
----------------
====================  ==============  =============================================================================
option                data, in bytes  what is answered, besides ACK
====================  ==============  =============================================================================
EXPORT_NAME           to 4096         no reply but size and flags. Whatever is wrong ends the connection: an unknown
                                      name, TLS required, after EXTENDED_HEADERS, a minimum block over 1
ABORT                 any             always ACK, then the end
LIST                  0               SERVER for each export
PEEK_EXPORT           any             ERR_UNSUP: withdrawn from the protocol
STARTTLS              0               ERR_UNSUP with TLS off, ERR_INVALID a second time
INFO, GO              to 1 MiB        INFO: EXPORT always, others when asked for; ERR_UNKNOWN; ERR_BLOCK_SIZE_REQD
                                      when the minimum block is over 1 and BLOCK_SIZE was not asked for
STRUCTURED_REPLY      0               ERR_INVALID a second time, ERR_EXT_HEADER_REQD after EXTENDED_HEADERS
LIST_META_CONTEXT     to 1 MiB        META_CONTEXT for each; ERR_UNKNOWN; ERR_TOO_BIG for over 1024 queries
SET_META_CONTEXT      to 1 MiB        the same, and ERR_INVALID before STRUCTURED_REPLY or EXTENDED_HEADERS.
                                      Forgets the earlier set, whatever the answer
EXTENDED_HEADERS      0               ERR_INVALID a second time
anything else         any             ERR_UNSUP
====================  ==============  =============================================================================

Data is answered ERR_INVALID where there should be none, or where it makes no sense, and ERR_TOO_BIG where there is too
much of it. Where TLS is required and not there yet, everything but STARTTLS and ABORT is answered ERR_TLS_REQD; when
the server is shutting down, everything but ABORT is answered ERR_SHUTDOWN.

INFO and GO are answered alike, whatever the answer: the protocol demands that a GO behind an INFO that went well goes
well. LIST_META_CONTEXT needs no structured replies: the protocol lets a server insist on them, and neither QEMU nor
nbdkit does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import Enum
from typing import ClassVar, Final, Literal, NamedTuple, get_args

from cowkit.errors import UsageError
from cowkit.server import meta_contexts
from cowkit.server.exports import Export, Exports
from cowkit.server.options import (
    OptionRefused,
    error_reply,
    option_name,
    option_reply,
    parse_info_request,
    parse_meta_context_request,
    parse_name,
    shortened,
)
from cowkit.server.wire import (
    EXPORT_NAME_REPLY,
    EXPORT_NAME_ZEROES,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    INFO_TYPE,
    MAX_STRING,
    META_CONTEXT_ID,
    STRING_LENGTH,
    Info,
    Option,
    Reply,
    TransmissionFlag,
)

TlsMode = Literal["off", "allow", "require"]

MAX_OPTION_DATA: Final = 2**20
"""The most data of one option that is looked at, in bytes: INFO with every possible request has 135,172."""


class State(Enum):
    """Where a negotiation stands, and so what its driver has to do."""

    NEGOTIATING = "negotiating"
    """Feed it what the client sends."""

    UPGRADE_TLS = "upgrade_tls"
    """Send the output, then start TLS on the connection and call ``tls_started()``."""

    CHOSEN = "chosen"
    """Send the output; then comes transmission on the terms of ``chosen``, beginning with the bytes of ``trailing()``."""

    ENDED = "ended"
    """Send the output and close the connection; ``ended`` says why."""


class Chosen(NamedTuple):
    """What client and server agreed on."""

    export: Export

    structured: bool
    """READ is answered with structured (or extended) replies only."""

    extended: bool
    """Requests and replies have extended headers, only. Implies ``structured``."""

    contexts: tuple[tuple[int, str], ...]
    """Id and name of each metadata context that BLOCK_STATUS reports on."""


class Answer(NamedTuple):
    """What an option comes to."""

    replies: bytes
    state: State = State.NEGOTIATING
    chosen: Chosen | None = None
    """What was chosen, when ``state`` is CHOSEN."""


class _Rule(NamedTuple):
    longest: int
    """The most data that the option may have, in bytes."""
    handle: Callable[[OptionAnswers, int, bytes], Answer]


class OptionAnswers:
    """The meaning of one client's options.

    :param tls: ``"off"``: there is none; ``"allow"``: the client may start it; ``"require"``: nothing goes without it.
        proto.md calls these NOTLS, SELECTIVETLS (with no export that needs it) and FORCEDTLS ("TLS support").
    :raises UsageError: ``tls`` is none of these.
    """

    def __init__(self, exports: Exports, tls: TlsMode) -> None:
        if tls not in get_args(TlsMode):
            raise UsageError(f"tls must be one of {', '.join(get_args(TlsMode))}, not {tls!r}")
        self.in_tls = False
        self.no_zeroes = False
        self.shutting_down = False
        self._exports = exports
        self._tls = tls
        self._forget()

    def _forget(self) -> None:
        self._structured = False
        self._extended = False
        self._forget_contexts()

    def _forget_contexts(self) -> None:
        """No metadata context is selected any more."""
        self._selected: tuple[tuple[int, str], ...] = ()
        self._selected_for: str | None = None

    def begin(self, option: int, length: int) -> OptionRefused | None:
        """The header of ``option`` is there: why ``length`` bytes of data are refused whatever they are, if they are."""
        if option == Option.SET_META_CONTEXT:
            # It replaces the earlier set even when it fails, and it can fail before anything looks at its data.
            self._forget_contexts()
        name = option_name(option)
        if option == Option.ABORT:
            return None
        if self.shutting_down:
            return OptionRefused(Reply.ERR_SHUTDOWN, "the server is shutting down")
        if self._tls == "require" and not self.in_tls and option != Option.STARTTLS:
            return OptionRefused(Reply.ERR_TLS_REQD, f"{name} needs TLS here: send STARTTLS first")
        rule = self._RULES.get(option)
        if rule is None or (option == Option.STARTTLS and self._tls == "off"):
            return OptionRefused(Reply.ERR_UNSUP, f"{name} is not supported")
        if length <= rule.longest:
            return None
        if rule.longest == 0:
            return OptionRefused(Reply.ERR_INVALID, f"{name} takes no data, and came with {length} bytes")
        return OptionRefused(Reply.ERR_TOO_BIG, f"{name} came with {length} bytes of data: the limit is {rule.longest}")

    def answer(self, option: int, data: bytes) -> Answer:
        """Act on ``option``, which :meth:`begin` did not refuse.

        :raises OptionRefused: its data, or what was agreed on before, forbids it.
        """
        return self._RULES[option].handle(self, option, data)

    # One method for each option; the table is at the end of the class.

    def _export_name(self, _option: int, data: bytes) -> Answer:
        name = parse_name(data, "the export name")
        if self._extended:
            raise OptionRefused(Reply.ERR_INVALID, "forbidden after EXTENDED_HEADERS, which goes with GO")
        export = self._find(name)
        if export.minimum_block > 1:
            raise OptionRefused(
                Reply.ERR_BLOCK_SIZE_REQD,
                f"the export's minimum block is {export.minimum_block} bytes, which only GO can tell",
            )
        zeroes = b"" if self.no_zeroes else EXPORT_NAME_ZEROES
        return Answer(
            EXPORT_NAME_REPLY.pack(export.size, self._flags(export, name)) + zeroes, *self._choose(export, name)
        )

    def _abort(self, option: int, _data: bytes) -> Answer:
        return Answer(option_reply(option, Reply.ACK), State.ENDED)

    def _list(self, option: int, _data: bytes) -> Answer:
        replies = []
        for name, description in self._exports.list():
            encoded = name.encode()
            server = STRING_LENGTH.pack(len(encoded)) + encoded + description.encode()
            replies.append(option_reply(option, Reply.SERVER, server))
        return Answer(b"".join([*replies, option_reply(option, Reply.ACK)]))

    def _starttls(self, option: int, _data: bytes) -> Answer:
        if self.in_tls:
            raise OptionRefused(Reply.ERR_INVALID, "TLS is on already")
        self._forget()
        return Answer(option_reply(option, Reply.ACK), State.UPGRADE_TLS)

    def _info_or_go(self, option: int, data: bytes) -> Answer:
        name, infos = parse_info_request(data)
        export = self._find(name)
        told = [INFO_EXPORT.pack(Info.EXPORT, export.size, self._flags(export, name))]
        if Info.NAME in infos:
            told.append(INFO_TYPE.pack(Info.NAME) + export.name.encode())
        if Info.DESCRIPTION in infos and export.description:
            told.append(INFO_TYPE.pack(Info.DESCRIPTION) + export.description.encode())
        if Info.BLOCK_SIZE in infos or export.minimum_block > 1:
            sizes = (export.minimum_block, export.preferred_block, export.maximum_payload)
            told.append(INFO_BLOCK_SIZE.pack(Info.BLOCK_SIZE, *sizes))
        replies = b"".join(option_reply(option, Reply.INFO, info) for info in told)
        if export.minimum_block > 1 and Info.BLOCK_SIZE not in infos:
            text = f"the minimum block is {export.minimum_block} bytes: ask for the block sizes"
            return Answer(replies + error_reply(option, Reply.ERR_BLOCK_SIZE_REQD, text))
        replies += option_reply(option, Reply.ACK)
        return Answer(replies, *self._choose(export, name)) if option == Option.GO else Answer(replies)

    def _structured_reply(self, option: int, _data: bytes) -> Answer:
        if self._extended:
            raise OptionRefused(Reply.ERR_EXT_HEADER_REQD, "extended headers are on, and take precedence")
        if self._structured:
            raise OptionRefused(Reply.ERR_INVALID, "structured replies are on already")
        self._structured = True
        return Answer(option_reply(option, Reply.ACK))

    def _extended_headers(self, option: int, _data: bytes) -> Answer:
        if self._extended:
            raise OptionRefused(Reply.ERR_INVALID, "extended headers are on already")
        self._structured = True
        self._extended = True
        return Answer(option_reply(option, Reply.ACK))

    def _list_meta_context(self, option: int, data: bytes) -> Answer:
        name, queries = parse_meta_context_request(data)
        export = self._find(name)
        return self._meta_contexts(option, [(0, context) for context in meta_contexts.listed(export.contexts, queries)])

    def _set_meta_context(self, option: int, data: bytes) -> Answer:
        if not self._structured:
            raise OptionRefused(
                Reply.ERR_INVALID, "SET_META_CONTEXT goes with STRUCTURED_REPLY or EXTENDED_HEADERS: send that first"
            )
        name, queries = parse_meta_context_request(data)
        export = self._find(name)
        self._selected = tuple(meta_contexts.selected(export.contexts, queries))
        self._selected_for = name
        return self._meta_contexts(option, self._selected)

    # What they share

    def _find(self, name: str) -> Export:
        export = self._exports.find(name)
        if export is None:
            what = f"export {shortened(name)}" if name else "default export"
            raise OptionRefused(Reply.ERR_UNKNOWN, f"there is no {what} here")
        return export

    def _meta_contexts(self, option: int, contexts: Iterable[tuple[int, str]]) -> Answer:
        replies = [
            option_reply(option, Reply.META_CONTEXT, META_CONTEXT_ID.pack(number) + context.encode())
            for number, context in contexts
        ]
        return Answer(b"".join([*replies, option_reply(option, Reply.ACK)]))

    def _contexts_for(self, name: str) -> tuple[tuple[int, str], ...]:
        """What is selected, unless it was selected for an export of another name."""
        return self._selected if name == self._selected_for else ()

    def _flags(self, export: Export, name: str) -> int:
        flags = export.flags | TransmissionFlag.HAS_FLAGS
        if self._structured:
            flags |= TransmissionFlag.SEND_DF
        if self._extended and self._contexts_for(name):
            flags |= TransmissionFlag.BLOCK_STATUS_PAYLOAD
        return int(flags)

    def _choose(self, export: Export, name: str) -> tuple[State, Chosen]:
        return State.CHOSEN, Chosen(export, self._structured, self._extended, self._contexts_for(name))

    # The table: how much data each option may have, and who acts on it.
    _RULES: ClassVar[dict[int, _Rule]] = {
        Option.EXPORT_NAME: _Rule(MAX_STRING, _export_name),
        Option.ABORT: _Rule(0, _abort),
        Option.LIST: _Rule(0, _list),
        Option.STARTTLS: _Rule(0, _starttls),
        Option.INFO: _Rule(MAX_OPTION_DATA, _info_or_go),
        Option.GO: _Rule(MAX_OPTION_DATA, _info_or_go),
        Option.STRUCTURED_REPLY: _Rule(0, _structured_reply),
        Option.LIST_META_CONTEXT: _Rule(MAX_OPTION_DATA, _list_meta_context),
        Option.SET_META_CONTEXT: _Rule(MAX_OPTION_DATA, _set_meta_context),
        Option.EXTENDED_HEADERS: _Rule(0, _extended_headers),
    }
