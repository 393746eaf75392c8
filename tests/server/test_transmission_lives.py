"""Connections that end badly, or never, and servers that stop: nobody else notices, and nothing is left."""

from __future__ import annotations

import fcntl
import gc
import os
import socket
import termios
import threading
import time
from collections.abc import Iterator

import pytest

from cowkit.disk import Disk, ZeroBase
from cowkit.server.server import NbdServer
from tests.server.negotiating import FIXED_NEWSTYLE, GO, infos, option
from tests.server.raw_client import (
    BLOCK_STATUS,
    DIALECTS,
    DISC,
    FLUSH,
    PAYLOAD_LEN,
    READ,
    TIMEOUT,
    TRIM,
    WRITE,
    DialectName,
    RawClient,
    assert_serves,
    open_files,
    serving,
    status_payload,
    where,
)

BLOCK = 4096
SIZE = 4 << 20


@pytest.fixture
def server() -> Iterator[NbdServer]:
    with serving(SIZE) as server:
        yield server


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_request_may_arrive_in_pieces_cut_anywhere(server: NbdServer, dialect: DialectName) -> None:
    with RawClient(where(server)) as client:
        client.negotiate(dialect)
        for cut in range(1, 90):
            requests = client.request(WRITE, 0, data=b"%32d" % cut)[1] + client.request(READ, 0, 32)[1]
            client.send(requests[:cut])
            client.send(requests[cut:])
            assert client.reply().error == 0
            assert client.reply().data == b"%32d" % cut


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_disconnect_at_every_byte_of_a_request_ends_that_connection_alone(
    server: NbdServer, dialect: DialectName
) -> None:
    with RawClient(where(server)) as other:
        other.negotiate("structured")
        with RawClient(where(server)) as client:
            client.negotiate(dialect)
            request = client.request(WRITE, 0, data=b"w" * 20)[1]
        for cut in range(len(request)):
            with RawClient(where(server)) as client:
                client.negotiate(dialect)
                client.send(client.request(WRITE, BLOCK, data=b"whole")[1] + request[:cut])
                client.sock.shutdown(socket.SHUT_WR)
                assert client.reply().error == 0
                assert client.at_end()
            assert other.read(20, 0) == bytes(20)
        assert other.read(5, BLOCK) == b"whole"
    assert_serves(server)


@pytest.mark.parametrize("received", [0, 1, 100_000, (2 << 20) - 1, (2 << 20) + 1, (3 << 20) - 1])
def test_a_disconnect_within_a_long_payload_writes_nothing(server: NbdServer, received: int) -> None:
    for over in (3 << 20, 100 << 20):
        with RawClient(where(server)) as client:
            client.negotiate("structured")
            client.send(client.request(WRITE, 0, over)[1] + b"x" * received)
            client.sock.shutdown(socket.SHUT_WR)
            assert client.at_end()
    assert server.disk.dirty_bytes == 0
    assert_serves(server)


def test_a_disconnect_within_a_status_payload_ends_that_connection_alone(server: NbdServer) -> None:
    payload = status_payload(BLOCK, [0])
    for cut in range(len(payload)):
        with RawClient(where(server)) as client:
            client.negotiate("extended", "base:allocation")
            client.send(client.request(BLOCK_STATUS, 0, data=payload, flags=PAYLOAD_LEN)[1][: cut - len(payload)])
            client.sock.shutdown(socket.SHUT_WR)
            assert client.at_end()
    assert_serves(server)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_client_that_hangs_up_with_replies_outstanding_ends_that_connection_alone(
    server: NbdServer, dialect: DialectName
) -> None:
    for _ in range(5):
        with RawClient(where(server)) as client:
            client.negotiate(dialect)
            client.send(b"".join(client.request(READ, 0, SIZE)[1] for _ in range(50)))
    assert_serves(server)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_no_request_ends_that_connection_alone(server: NbdServer, dialect: DialectName) -> None:
    for garbage in (bytes(32), b"\xff" * 32, b"GET / HTTP/1.1\r\nHost: example\r\n\r\n", os.urandom(64)):
        with RawClient(where(server)) as client:
            client.negotiate(dialect)
            client.send(client.request(WRITE, 0, data=b"x")[1])
            assert client.reply().error == 0
            client.send(garbage)
            assert client.at_end()
    assert_serves(server)


def test_the_other_dialects_header_ends_that_connection_alone(server: NbdServer) -> None:
    for dialect in DIALECTS:
        with RawClient(where(server)) as client:
            client.negotiate(dialect)
            client.extended = not client.extended
            client.send(client.header(FLUSH) * 2)  # two, since a compact one alone is shorter than an extended one
            assert client.at_end()
    assert_serves(server)


def test_a_client_that_reads_no_replies_holds_up_neither_others_nor_points_in_time_nor_the_stop() -> None:
    with Disk(ZeroBase(SIZE)) as disk:
        disk.pwrite(os.urandom(SIZE), 0)
        with NbdServer(disk) as server, RawClient(where(server)) as deaf:
            deaf.negotiate("structured")
            requests = b"".join(deaf.request(READ, 0, SIZE)[1] for _ in range(64))
            deaf.send(requests)
            assert deaf.take(1)  # it is being answered, and the rest does not fit any socket's buffer
            with RawClient(where(server)) as other:
                other.negotiate("structured")
                for number in range(100):
                    other.write(b"%8d" % number, number * BLOCK)
                    assert other.read(8, number * BLOCK) == b"%8d" % number
            point = disk.checkpoint()
            with disk.freeze():
                disk.rollback(point)
            server.stop()
        assert server.errors == [] and server.connections == 0


def stops(server: NbdServer) -> None:
    """It stops in time, and has nothing to complain about."""
    stopper = threading.Thread(target=server.stop)
    stopper.start()
    stopper.join(TIMEOUT)
    assert not stopper.is_alive()
    assert server.errors == [] and server.connections == 0


STAGES = {
    "not a word": b"",
    "in the flags": FIXED_NEWSTYLE[:2],
    "before an option": FIXED_NEWSTYLE,
    "in an option's header": FIXED_NEWSTYLE + b"IHAVE",
    "in an option's data": FIXED_NEWSTYLE + option(GO, infos("some name"))[:-5],
    "in data that is skipped": FIXED_NEWSTYLE + option(99, b"x" * 1000, claim=1 << 20),
    "in transmission": FIXED_NEWSTYLE + option(GO, infos("")),
    "in a request": FIXED_NEWSTYLE + option(GO, infos("")) + b"\x25\x60\x95\x13\0\0",
    "in a payload": FIXED_NEWSTYLE
    + option(GO, infos(""))
    + bytes.fromhex("25609513 0000 0001")
    + bytes(16)
    + b"\0\0\1\0x",
    "in a long payload": FIXED_NEWSTYLE
    + option(GO, infos(""))
    + bytes.fromhex("25609513 0000 0001")
    + bytes(16)
    + b"\3\0\0\0x",
    "in a drained payload": FIXED_NEWSTYLE
    + option(GO, infos(""))
    + bytes.fromhex("25609513 0000 0001")
    + bytes(16)
    + b"\7\0\0\0x",
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_server_stops_with_clients_connected_at_any_stage(stage: str) -> None:
    with serving(SIZE) as server:
        clients = [RawClient(where(server)) for _ in range(3)]
        try:
            for client in clients:
                client.send(STAGES[stage])
            with RawClient(where(server)) as last:  # behind the others in the queue, so they have been accepted
                last.take(18)
                stops(server)
            for client in clients:
                with pytest.raises(ConnectionError):
                    while True:
                        client.take(1)
        finally:
            for client in clients:
                client.close()


def test_a_server_stops_while_clients_connect() -> None:
    for _ in range(10):
        with serving(SIZE) as server:
            path, stopped = where(server), threading.Event()

            def connect(path: str = path, stopped: threading.Event = stopped) -> None:
                while not stopped.is_set():
                    try:
                        with RawClient(path) as client:
                            client.negotiate("structured").read(1, 0)
                    except (OSError, AssertionError):
                        continue

            threads = [threading.Thread(target=connect) for _ in range(4)]
            for thread in threads:
                thread.start()
            assert_serves(server)
            try:
                stops(server)
            finally:
                stopped.set()
                for thread in threads:
                    thread.join(TIMEOUT)


def test_a_server_stops_while_requests_are_under_way() -> None:
    with serving(64 << 20) as server:
        path = where(server)
        ready = threading.Barrier(5, timeout=TIMEOUT)

        def work(number: int) -> None:
            with RawClient(path) as client:
                client.negotiate(DIALECTS[number % 3])
                ready.wait()
                try:
                    while True:
                        client.write(bytes([number]) * 100_000, number * (8 << 20) + 77)
                        client.do(TRIM, number * (8 << 20), 8 << 20)
                        client.read(100_000, number * (8 << 20))
                except ConnectionError:
                    pass

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        ready.wait()
        stops(server)
        for thread in threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive()


def test_a_thousand_connections_one_after_the_other_leave_no_thread_and_no_descriptor() -> None:
    with serving(SIZE) as server:
        assert_serves(server)
        gc.collect()
        files, threads = len(open_files()), threading.active_count()
        for number in range(1000):
            with RawClient(where(server)) as client:
                if number % 4:
                    client.negotiate(DIALECTS[number % 3]).write(b"x", number)
                if number % 4 == 2:
                    client.send(client.header(DISC))
                    assert client.at_end()
        assert_serves(server)
        server.stop()
        gc.collect()
        assert len(open_files()) <= files
        assert threading.active_count() <= threads


def test_many_connections_at_once_see_one_disk(server: NbdServer) -> None:
    clients = [RawClient(where(server)).negotiate(DIALECTS[number % 3]) for number in range(40)]
    try:
        for number, client in enumerate(clients):
            client.write(bytes([number]) * 600, number * 600)
        expected = b"".join(bytes([number]) * 600 for number in range(40))
        assert {client.read(len(expected), 0) for client in clients} == {expected}
    finally:
        for client in clients:
            client.close()


def test_a_long_reply_waits_whole_in_the_kernel_for_a_client_that_does_not_read(server: NbdServer) -> None:
    length = 320 << 10  # a client's usual share of the kernel's memory is 208 KiB, overhead included
    with RawClient(where(server)) as client:
        client.negotiate()
        client.write(os.urandom(length), 0)
        client.send(client.request(READ, 0, length)[1])
        unread = bytearray(4)
        deadline = time.monotonic() + TIMEOUT
        while int.from_bytes(unread, "little") < length and time.monotonic() < deadline:
            fcntl.ioctl(client.sock, termios.FIONREAD, unread)
        assert int.from_bytes(unread, "little") >= length
        assert client.reply().error == 0
