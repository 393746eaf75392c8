"""The server's side of NBD's fixed newstyle negotiation, without any I/O: bytes in, bytes out, and a state to look at.

How the two sides come together
-------------------------------
The server speaks first: two magic numbers and 16 bits of flags. The client answers with 32 bits of flags of its own.
From then on the client asks for one *option* after the other, and the server answers each with zero or more replies of
content and then exactly one final reply, ACK or an error. Nothing is in effect because it was asked for, only because
it was acknowledged. So an option that a server does not know costs a client one round trip and nothing else, and that
is how NBD has grown since. What each option means is in ``option_answers.py``, with a table; this module is about the stream
of bytes that carries them.

An option says how long its data is. That is what keeps both sides in step: whatever the server thinks of an option, it
takes exactly that many bytes off the stream. It is also what a hostile client lies about. Here data that nobody will
look at (of unknown or refused options, or too long) is counted down as it streams in, and never kept; data that
somebody will look at is kept up to 1 MiB; and the data of all options together may come to MAX_NEGOTIATION_DATA, beyond
which the client is not negotiating but wasting our time. The same goes for more than MAX_OPTIONS options and for
MAX_NEGOTIATION_REPLIES of replies: what a client can cost is bounded. How *long* it may sit there in silence is for the
driver to say, which has the clock.

Negotiation ends in one of four ways: the client chooses an export (GO, or EXPORT_NAME as it was before GO existed), it
says ABORT, it breaks the protocol so badly that no reply can mend it, or it hangs up. A client that goes wrong ends its
own connection and nothing else.

STARTTLS makes the server forget what was negotiated before it, because until then anybody on the network could have
said it in the client's name (nbdkit kept structured replies: CVE-2021-3716). Bytes in the clear behind STARTTLS end the
connection for the same reason: no honest client sends any before it has seen the ACK.

The states
----------
::

    receive_eof(), a violation        +----------- tls_started() ------------+
            or ABORT                  v                                      |
    ENDED <------------------- NEGOTIATING ------- STARTTLS, ACK ------> UPGRADE_TLS --- receive() ---> ENDED
                                      |
                                      +--- GO, ACK or EXPORT_NAME ---> CHOSEN

CHOSEN and ENDED are final.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

from cowkit.errors import ProtocolError, UsageError
from cowkit.server.exports import Exports
from cowkit.server.option_answers import Chosen, OptionAnswers, State, TlsMode
from cowkit.server.options import OptionRefused, error_reply, option_name
from cowkit.server.wire import (
    CLIENT_FLAGS,
    GREETING,
    NBD_MAGIC,
    OPTION_HEADER,
    OPTION_MAGIC,
    ClientFlag,
    HandshakeFlag,
    Option,
)

__all__ = ["Chosen", "Ended", "Negotiation", "State", "TlsMode"]

Buffer = bytes | bytearray | memoryview

MAX_OPTIONS: Final = 1024
"""The most options of one negotiation. nbdkit stops after 32 for each export, QEMU never; honest clients use a dozen."""

MAX_NEGOTIATION_DATA: Final = 2**26
"""The most data of all options of one negotiation, in bytes, skipped or not. nbdkit ends at 64 MiB, too, for one option."""

MAX_NEGOTIATION_REPLIES: Final = 2**24
"""When the replies so far came to more than this, in bytes, there is no further option."""


class Ended(NamedTuple):
    """Why a negotiation ended without an export."""

    reason: str
    """One line for a log."""

    clean: bool
    """The client said ABORT, or hung up between two options. Otherwise it broke the protocol."""


class Negotiation:
    """One client's negotiation. The driver sends :meth:`greeting`, then receives, feeds, sends and looks at ``state``::

        negotiation = Negotiation(exports)
        connection.sendall(negotiation.greeting())
        while negotiation.state is State.NEGOTIATING:
            if data := connection.recv(65536):
                negotiation.receive(data)
            else:
                negotiation.receive_eof()
            if output := negotiation.take_output():
                connection.sendall(output)

    However the client's bytes are cut into pieces, the outcome is the same. No input makes a method raise, only a
    mistake of the driver does, or of ``exports``. Not thread-safe, but for :meth:`shut_down`.

    :param exports: what there is to choose from; whatever it raises comes out of :meth:`receive`.
    :param tls: ``"off"``: there is none; ``"allow"``: the client may start it; ``"require"``: nothing goes without it.
    :raises UsageError: ``tls`` is none of these.
    """

    def __init__(self, exports: Exports, *, tls: TlsMode = "off") -> None:
        self.state = State.NEGOTIATING
        self.chosen: Chosen | None = None
        self.ended: Ended | None = None
        self._answers = OptionAnswers(exports, tls)
        self._fixed_newstyle = False
        self._option = 0

        # When there is nothing left to skip and _wanted bytes are there, _next gets them.
        self._output = bytearray()
        self._input = bytearray()
        self._to_skip = 0
        self._wanted = CLIENT_FLAGS.size
        self._next: Callable[[bytes], None] = self._client_flags

        # What counts against the limits.
        self._options = 0
        self._data = 0
        self._replies = 0

    # For the driver

    def greeting(self) -> bytes:
        """The server's first bytes ("Newstyle negotiation" in proto.md)."""
        return GREETING.pack(NBD_MAGIC, OPTION_MAGIC, HandshakeFlag.FIXED_NEWSTYLE | HandshakeFlag.NO_ZEROES)

    def receive(self, data: Buffer) -> None:
        """Take what the client sent, in pieces of any size. What comes behind its choice is for :meth:`trailing`."""
        if self.state is State.ENDED:
            return
        skipped = min(self._to_skip, len(data))
        self._to_skip -= skipped
        self._input += memoryview(data)[skipped:]
        while self.state is State.NEGOTIATING and self._to_skip == 0 and len(self._input) >= self._wanted:
            taken = bytes(self._input[: self._wanted])
            del self._input[: self._wanted]
            self._step(taken)
        if self.state is State.UPGRADE_TLS and self._input:
            self._end("the client sent bytes in the clear between STARTTLS and TLS", clean=False)

    def receive_eof(self) -> None:
        """The client hung up, which it may do whenever it likes."""
        if self.state in (State.NEGOTIATING, State.UPGRADE_TLS):
            between = not self._input and self._next in (self._client_flags, self._option_header)
            where = "before it chose an export" if between else "in the middle of an option"
            self._end(f"the client hung up {where}", clean=between)

    def take_output(self) -> bytes:
        """What is to be sent to the client; each byte is handed out once."""
        output = bytes(self._output)
        self._output.clear()
        return output

    def tls_started(self) -> None:
        """TLS is up: whatever is received from now on came through it.

        :raises UsageError: the state is not UPGRADE_TLS.
        """
        if self.state is not State.UPGRADE_TLS:
            raise UsageError(f"TLS cannot have started: nobody asked for it, the negotiation is {self.state.value}")
        self._answers.in_tls = True
        self.state = State.NEGOTIATING

    def trailing(self) -> bytes:
        """What the client sent behind its choice: the beginning of transmission. Each byte is handed out once."""
        if self.state is not State.CHOSEN:
            return b""
        trailing = bytes(self._input)
        self._input.clear()
        return trailing

    def shut_down(self) -> None:
        """The server is about to stop: refuse every further option but ABORT. Any thread may call this."""
        self._answers.shutting_down = True

    # From bytes to options

    def _step(self, data: bytes) -> None:
        try:
            self._next(data)
        except OptionRefused as refused:
            if self._option == Option.EXPORT_NAME:
                # The one option that has no error replies: hanging up is all that can be said.
                self._end(f"EXPORT_NAME: {refused}", clean=False)
            else:
                self._send(error_reply(self._option, refused.reply, str(refused)))
        except ProtocolError as violation:
            self._end(str(violation), clean=False)

    def _client_flags(self, data: bytes) -> None:
        (flags,) = CLIENT_FLAGS.unpack(data)
        # As an int: the complement of a Flag has only bits that have a name.
        if unknown := flags & ~int(ClientFlag.FIXED_NEWSTYLE | ClientFlag.NO_ZEROES):
            raise ProtocolError(f"the client set unknown flags {unknown:#x}")
        self._fixed_newstyle = bool(flags & ClientFlag.FIXED_NEWSTYLE)
        self._answers.no_zeroes = bool(flags & ClientFlag.NO_ZEROES)
        self._expect_option()

    def _option_header(self, data: bytes) -> None:
        magic, option, length = OPTION_HEADER.unpack(data)
        if magic != OPTION_MAGIC:
            raise ProtocolError(
                f"the client began an option with {magic:#018x} instead of {OPTION_MAGIC:#018x}, IHAVEOPT"
            )
        self._option = option
        self._check_limits(length)
        if not self._fixed_newstyle and option != Option.EXPORT_NAME:
            raise ProtocolError(f"the client sent {option_name(option)} without having set the flag FIXED_NEWSTYLE")
        refused = self._answers.begin(option, length)
        if refused is not None and option == Option.EXPORT_NAME:
            raise refused
        if refused is not None:
            self._skip(length, partial(self._refuse, refused))
        elif option == Option.ABORT:
            self._skip(length, partial(self._option_data, option))
        else:
            self._expect(length, partial(self._option_data, option))

    def _check_limits(self, length: int) -> None:
        self._options += 1
        self._data += length
        if self._options > MAX_OPTIONS:
            raise ProtocolError(f"the client sent {MAX_OPTIONS} options without choosing an export, and goes on")
        if self._data > MAX_NEGOTIATION_DATA:
            raise ProtocolError(
                f"the client announced {option_name(self._option)} with {length} bytes:"
                f" all options together may have {MAX_NEGOTIATION_DATA}"
            )
        if self._replies > MAX_NEGOTIATION_REPLIES:
            raise ProtocolError(
                f"the client got {self._replies} bytes of replies without choosing an export, and asks for more"
            )

    def _option_data(self, option: int, data: bytes) -> None:
        self._expect_option()
        answer = self._answers.answer(option, data)
        self._send(answer.replies)
        if answer.state is State.ENDED:
            self._end("the client said ABORT", clean=True)
        else:
            self.state = answer.state
            self.chosen = answer.chosen

    def _refuse(self, refused: OptionRefused, _: bytes) -> None:
        self._expect_option()
        raise refused

    def _expect_option(self) -> None:
        self._expect(OPTION_HEADER.size, self._option_header)

    def _expect(self, length: int, then: Callable[[bytes], None]) -> None:
        self._wanted = length
        self._next = then

    def _skip(self, length: int, then: Callable[[bytes], None]) -> None:
        """Drop the next ``length`` bytes as they come; ``then`` sees none of them."""
        there = min(length, len(self._input))
        del self._input[:there]
        self._to_skip = length - there
        self._expect(0, then)

    def _send(self, data: bytes) -> None:
        self._output += data
        self._replies += len(data)

    def _end(self, reason: str, *, clean: bool) -> None:
        self.state = State.ENDED
        self.ended = Ended(reason, clean)
        self._input.clear()
