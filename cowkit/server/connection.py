"""One client's connection, from greeting to goodbye; runs in a thread of its own."""

from __future__ import annotations

import socket

from cowkit.disk import Disk
from cowkit.errors import ProtocolError
from cowkit.server.exports import Exports
from cowkit.server.negotiation import Negotiation, State
from cowkit.server.transmission import Transmission
from cowkit.server.wire import TransmissionFlag

_RECEIVE = 65536


def serve_connection(sock: socket.socket, exports: Exports) -> None:
    """Negotiate with the client at the other end of ``sock``, and serve it the disk that it chooses.

    Returns when the client has gone, however it went.

    :raises ProtocolError: the client broke the protocol; only for the log.
    """
    try:
        negotiation = Negotiation(exports)
        sock.sendall(negotiation.greeting())
        while negotiation.state is State.NEGOTIATING:
            if data := sock.recv(_RECEIVE):
                negotiation.receive(data)
            else:
                negotiation.receive_eof()
            if output := negotiation.take_output():
                sock.sendall(output)
        if negotiation.ended is not None and not negotiation.ended.clean:
            raise ProtocolError(negotiation.ended.reason)
        chosen = negotiation.chosen
        if chosen is None:
            return
        disk = chosen.export.handle
        assert isinstance(disk, Disk)
        Transmission(
            sock,
            disk,
            structured=chosen.structured,
            extended=chosen.extended,
            contexts=chosen.contexts,
            received=negotiation.trailing(),
            read_only=bool(chosen.export.flags & TransmissionFlag.READ_ONLY),
        ).run()
    except (ConnectionError, TimeoutError):
        pass  # the client may leave when it likes, and the server's stopping looks the same
