"""One client's connection, from greeting to goodbye; runs in a thread of its own."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import suppress
from socket import SHUT_RDWR
from typing import TYPE_CHECKING

from cowkit.errors import ProtocolError
from cowkit.server.channel import Channel, Stream
from cowkit.server.negotiation import Negotiation, State
from cowkit.server.shares import Shares
from cowkit.server.transmission import Transmission
from cowkit.server.wire import TransmissionFlag

if TYPE_CHECKING:
    from cowkit.server.tls import Tls, TlsChannel  # imported late: most servers do without

_RECEIVE = 65536

_NETWORK_FAILED = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ENETRESET})


class Connection:
    """The client at the other end of ``stream``, which stays the caller's to close.

    :param tls: how to do TLS; None: not at all.
    :param on_choice: called once, when the client has chosen an export; what it raises ends the connection.
    """

    def __init__(self, stream: Stream, shares: Shares, *, tls: Tls | None, on_choice: Callable[[], None]) -> None:
        self.stream = stream
        self._shares = shares
        self._tls = tls
        self._on_choice = on_choice
        self._negotiation = Negotiation(shares, tls="off" if tls is None else tls.mode)
        self._tls_channel: TlsChannel | None = None
        self._greeted = False

    def greet(self) -> None:
        """Send the greeting at once, which fits any new socket's buffer, so that the client need not wait for a thread."""
        self._greeted = True
        with suppress(OSError):  # it has left, as :meth:`serve` will notice
            self.stream.sendall(self._negotiation.greeting())

    def shut_down(self) -> None:
        """End it as soon as may be: :meth:`serve` returns. Any thread may call this, while the stream is open."""
        self._negotiation.shut_down()
        with suppress(OSError):
            self.stream.shutdown(SHUT_RDWR)

    def serve(self) -> None:
        """Negotiate with the client, and serve it the disk that it chooses, until it has gone, however it went.

        :raises ProtocolError: the client broke the protocol; only for the log.
        :raises CowkitError: the disk that it chose cannot be made.
        """
        try:
            self._serve()
        except (ConnectionError, TimeoutError):
            pass  # the client may leave when it likes, and the server's stopping looks the same
        except OSError as error:
            if error.errno not in _NETWORK_FAILED:
                raise
        finally:
            if self._tls_channel is not None:
                self._tls_channel.finish()

    def _serve(self) -> None:
        negotiation = self._negotiation
        channel = self._negotiate()
        if negotiation.ended is not None and not negotiation.ended.clean:
            raise ProtocolError(negotiation.ended.reason)
        chosen = negotiation.chosen
        if chosen is None:
            return
        self._on_choice()
        # The client has its answer only when there is a disk for it.
        with self._shares.opened(chosen.export) as disk:
            channel.sendall(negotiation.take_output())
            Transmission(
                channel,
                disk,
                structured=chosen.structured,
                extended=chosen.extended,
                contexts=chosen.contexts,
                received=negotiation.trailing(),
                read_only=bool(chosen.export.flags & TransmissionFlag.READ_ONLY),
            ).run()

    def _negotiate(self) -> Channel:
        """Until the client has chosen, whose answer is still to be sent, or the negotiation has ended."""
        negotiation = self._negotiation
        channel: Channel = self.stream
        if not self._greeted:
            channel.sendall(negotiation.greeting())
        while True:
            while negotiation.state is State.NEGOTIATING:
                if data := channel.recv(_RECEIVE):
                    negotiation.receive(data)
                else:
                    negotiation.receive_eof()
                self._answer(channel)
            if negotiation.state is not State.UPGRADE_TLS:
                return channel
            channel = self._start_tls()
            negotiation.tls_started()

    def _answer(self, channel: Channel) -> None:
        if self._negotiation.state is not State.CHOSEN and (output := self._negotiation.take_output()):
            channel.sendall(output)

    def _start_tls(self) -> Channel:
        from cowkit.server.tls import TlsChannel

        assert self._tls is not None  # without it, negotiation refuses STARTTLS
        self._tls_channel = TlsChannel(self.stream, self._tls.context)
        self._tls_channel.handshake()
        return self._tls_channel
