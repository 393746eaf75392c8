"""A small NBD server for one test each: right in all but what the test has it say."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

REQUEST = struct.Struct(">IHHQQI")
OPTION_REPLY = struct.Struct(">QIII")
CHUNK = struct.Struct(">IHHQI")
DONE = 1
OFFSET_DATA, OFFSET_HOLE, STATUS, ERROR = 1, 2, 5, 32769
READ, DISCONNECT, BLOCK_STATUS = 0, 2, 7
CAN_MULTI_CONN = 1 << 8


Chunks = list[tuple[int, int, bytes]]
Reply = Callable[[int, int], Chunks | bytes | None]
"""What answers a request (offset, length): chunks; bytes that are sent as they are; None hangs up."""


def data(offset: int, length: int) -> Chunks:
    """An honest answer to a read of zeroes."""
    return [(DONE, OFFSET_DATA, struct.pack(">Q", offset) + bytes(length))]


def status(*pairs: tuple[int, int], context: int = 1) -> Chunks:
    return [(DONE, STATUS, struct.pack(">I", context) + b"".join(struct.pack(">II", *pair) for pair in pairs))]


class LyingServer:
    def __init__(
        self, sizes: Iterator[int], read: Reply, block_status: Reply | None, contexts: tuple[str, ...]
    ) -> None:
        self._sizes, self._read, self._status, self._contexts = sizes, read, block_status, contexts
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"nbd://127.0.0.1:{self.listener.getsockname()[1]}"
        self._peers: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def stop(self) -> None:
        with suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self._threads[0].join()
        for peer in self._peers:
            with suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self.listener.accept()
            except OSError:
                return
            self._peers.append(peer)
            self._threads.append(threading.Thread(target=self._serve, args=(peer, next(self._sizes))))
            self._threads[-1].start()

    def _serve(self, peer: socket.socket, size: int) -> None:
        with peer, suppress(OSError, EOFError):
            self._negotiate(peer, size)
            while True:
                _, _, kind, cookie, offset, length = REQUEST.unpack(take(peer, REQUEST.size))
                if kind == DISCONNECT:
                    return
                assert kind in (READ, BLOCK_STATUS)
                reply = self._read if kind == READ else self._status
                assert reply is not None
                said = reply(offset, length)
                if said is None:
                    return
                if isinstance(said, bytes):
                    peer.sendall(said)
                    continue
                for flags, which, payload in said:
                    peer.sendall(CHUNK.pack(0x668E33EF, flags, which, cookie, len(payload)) + payload)

    def _negotiate(self, peer: socket.socket, size: int) -> None:
        peer.sendall(b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3))
        take(peer, 4)
        while True:
            _, option, length = struct.unpack(">QII", take(peer, 16))
            asked = take(peer, length)

            def answer(kind: int, payload: bytes = b"", option: int = option) -> None:
                peer.sendall(OPTION_REPLY.pack(0x3E889045565A9, option, kind, len(payload)) + payload)

            if option == 8 or (option == 10 and self._status is not None):
                if option == 10:
                    for number, name in enumerate(self._contexts, 1):
                        if name.encode() in asked:
                            answer(4, struct.pack(">I", number) + name.encode())
                answer(1)
            elif option == 7:
                answer(3, struct.pack(">HQH", 0, size, 3 | CAN_MULTI_CONN))
                answer(1)
                return
            else:
                answer(0x80000001)


def take(peer: socket.socket, length: int) -> bytes:
    found = b""
    while len(found) < length:
        part = peer.recv(length - len(found))
        if not part:
            raise EOFError
        found += part
    return found


@contextmanager
def lying_server(
    sizes: Iterator[int],
    *,
    read: Reply = data,
    block_status: Reply | None = None,
    contexts: tuple[str, ...] = ("base:allocation",),
) -> Iterator[str]:
    """Its URI; ``sizes`` are those that one client after the other is told."""
    server = LyingServer(sizes, read, block_status, contexts)
    try:
        yield server.uri
    finally:
        server.stop()
