"""What has broken other NBD servers: each test sends those very bytes, then shows another client served by the same server.

Most of the handshake's are also there without any I/O, in test_negotiation.py.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowkit.disk import Disk, FileBase, ZeroBase
from cowkit.server.server import NbdServer
from tests.limits import files_limited_to
from tests.server.negotiating import (
    ABORT,
    ACK,
    EXPORT_NAME,
    EXTENDED_HEADERS,
    GO,
    INFO,
    INVALID,
    LIST,
    LIST_META_CONTEXT,
    SET_META_CONTEXT,
    STARTTLS,
    STRUCTURED_REPLY,
    TOO_BIG,
    UNKNOWN,
    UNSUP,
    infos,
    option,
    queries,
    string,
)
from tests.server.raw_client import (
    BLOCK_STATUS,
    BOTH_STRUCTURED,
    CACHE,
    DIALECTS,
    ENOSPC,
    READ,
    TIMEOUT,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    DialectName,
    RawClient,
    assert_serves,
    open_files,
    serving,
    where,
)

BLOCK = 4096
SIZE = 1 << 20
GIB = 1 << 30
ALLOCATION, DIRTY, DEPTH = "base:allocation", "qemu:dirty-bitmap:cow", "qemu:allocation-depth"


@pytest.fixture
def server() -> Iterator[NbdServer]:
    with serving(SIZE) as server:
        yield server


@contextmanager
def greeted(server: NbdServer) -> Iterator[RawClient]:
    """A connection behind greeting and client flags."""
    with RawClient(where(server)) as client:
        client.greet()
        yield client


# nbdkit


def test_nbdkit_cve_2019_14850_a_client_that_never_negotiates_costs_no_disk(tmp_path: Path) -> None:
    path = tmp_path / "base.img"
    path.write_bytes(b"b" * SIZE)
    with serving(FileBase(path)) as server:
        gc.collect()
        before = open_files()
        clients = [RawClient(where(server)) for _ in range(20)]
        try:
            for number, client in enumerate(clients):
                client.greet()
                if number % 2:
                    assert client.ask(INFO, infos("")) == ACK
            # Two descriptors for each connection, of which one is the client's: nothing was opened, mapped or made.
            assert len(open_files()) <= len(before) + 2 * len(clients)
            assert server.disk.overlay.views[0] is None
            assert server.disk.overlay.layers == {}
        finally:
            for client in clients:
                client.close()
        assert_serves(server)


@pytest.mark.parametrize(
    "order",
    [[INFO, GO], [INFO, INFO, GO], [GO], [INFO, LIST, INFO, STRUCTURED_REPLY, INFO, GO], [LIST, LIST, INFO, GO]],
)
def test_nbdkit_cve_2019_14851_info_and_go_in_odd_orders_choose_the_last(server: NbdServer, order: list[int]) -> None:
    with greeted(server) as client:
        for number in order[:-1]:
            for name in ("", "another", "", "x" * 300):
                expected = ACK if name == "" or number not in (INFO, GO) else UNKNOWN
                if number == STRUCTURED_REPLY:
                    client.ask(number)
                else:
                    assert client.ask(number, infos(name) if number == INFO else b"") == expected
        assert client.ask(GO, infos("another")) == UNKNOWN
        client.structured = STRUCTURED_REPLY in order
        client.go()
        assert client.read(10, 0) == bytes(10)
    assert_serves(server)


def test_nbdkit_cve_2021_3716_starttls_after_structured_replies(server: NbdServer) -> None:
    # Without TLS configured nothing is upgraded; what an upgrade forgets is in test_negotiation.py.
    with greeted(server) as client:
        assert client.ask(STRUCTURED_REPLY) == ACK
        assert client.ask(STARTTLS) == UNSUP
        client.structured = True
        client.go()
        assert client.read(10, 0) == bytes(10)
    assert_serves(server)


@pytest.mark.parametrize("dialect", BOTH_STRUCTURED)
@pytest.mark.parametrize("length", [2**32 - 1, 2**32 - 2, 2**32 - 512, 2**32 - 4096, 2**31, 2**31 - 1])
@pytest.mark.parametrize("offset", [0, 1, 4095, 4096])
def test_nbdkit_cve_2025_47711_47712_block_status_near_4_gib_over_a_larger_extent(
    dialect: DialectName, length: int, offset: int
) -> None:
    with serving(9 * GIB) as server:
        with RawClient(where(server)) as client:
            client.negotiate(dialect, ALLOCATION, DIRTY, DEPTH)
            for flags in (0, 1 << 3):
                found = client.block_status(length, offset, flags=flags)
                assert found == {ALLOCATION: [(length, 3)], DIRTY: [(length, 0)], DEPTH: [(length, 0)]}
        assert_serves(server)


def test_nbdkit_before_1_34_a_client_hangs_up_with_replies_outstanding(server: NbdServer) -> None:
    for dialect in DIALECTS:
        with RawClient(where(server)) as client:
            client.negotiate(dialect)
            client.send(b"".join(client.request(READ, 0, SIZE)[1] for _ in range(100)))
            client.take(10)
    assert_serves(server)


# nbdkit's cow filter


@pytest.mark.parametrize("size", [100_000, 131_072, 65_537])
def test_nbdkit_cow_a_ragged_trim_zeroes_the_right_end(size: int) -> None:
    with serving(size) as server:
        with RawClient(where(server)) as client:
            client.negotiate("structured")
            client.write(b"\x21" * 100_000 if size >= 100_000 else b"\x21" * size, 0)
            client.do(TRIM, 0, min(size, 100_000))
            assert client.read(size, 0) == bytes(size)
        assert_serves(server)


def test_nbdkit_cow_with_copy_on_read_a_full_overlay_fails_no_read(tmp_path: Path) -> None:
    path = tmp_path / "base.img"
    path.write_bytes(os.urandom(SIZE))
    with serving(FileBase(path), cow_on_read=True) as server:
        for dialect in DIALECTS:
            with RawClient(where(server)) as client:
                client.negotiate(dialect)
                with files_limited_to(0):
                    assert client.do(WRITE, 0, data=b"x").error == ENOSPC
                    assert client.read(SIZE, 0) == path.read_bytes()
        assert_serves(server)


@pytest.mark.parametrize("size", [4 * GIB, 4 * GIB - 1, 4 * GIB + 1, 4 * GIB - 4095])
def test_nbdkit_cow_a_disk_of_4_gib_has_a_map_for_all_of_it(size: int) -> None:
    with serving(size) as server:
        with RawClient(where(server)) as client:
            client.negotiate("structured", DIRTY)
            assert client.size == size
            marks = [0, 2 * GIB, size - 4097, size - 1]
            for number, offset in enumerate(marks):
                client.write(bytes([number + 1]), offset)
            assert [client.read(1, offset)[0] for offset in marks] == [1, 2, 3, 4]
            assert client.block_status(8192, size - 8192)[DIRTY][-1][1] == 1
            assert client.read(1, 1) == b"\0"
        assert_serves(server)


BASE_BYTE, FULL_BYTE, PART_BYTE = b"o", b"f", b"p"


@pytest.mark.parametrize("rounds", [300, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("other", ["full-block write", "write-zeroes", "cache", "read"])
def test_nbdkit_cow_a_partial_write_is_never_lost_to_another_connection(
    tmp_path: Path, other: str, rounds: int
) -> None:
    path = tmp_path / "base.img"
    path.write_bytes(BASE_BYTE * rounds * BLOCK)
    command, rest = {
        "full-block write": (WRITE, FULL_BYTE),
        "write-zeroes": (WRITE_ZEROES, b"\0"),
        "cache": (CACHE, BASE_BYTE),
        "read": (READ, BASE_BYTE),
    }[other]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with serving(FileBase(path), cow_on_cache=other == "cache", cow_on_read=other == "read") as server:
            barrier = threading.Barrier(2, timeout=TIMEOUT)
            failures: list[BaseException] = []

            def race(each: Callable[[RawClient, int], None]) -> None:
                try:
                    with RawClient(where(server)) as client:
                        client.negotiate("structured")
                        for block in range(rounds):
                            barrier.wait()
                            each(client, block * BLOCK)
                except BaseException as error:
                    failures.append(error)
                    barrier.abort()

            def beside(client: RawClient, offset: int) -> None:
                data = FULL_BYTE * BLOCK if command == WRITE else b""
                assert client.do(command, offset, BLOCK, data).error == 0

            threads = [
                threading.Thread(
                    target=race, args=(lambda client, offset: client.write(PART_BYTE * 100, offset + 50),)
                ),
                threading.Thread(target=race, args=(beside,)),
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(100)
            assert failures == []
            allowed = {PART_BYTE * 100} | ({rest * 100} if command in (WRITE, WRITE_ZEROES) else set())
            for block in range(rounds):
                found = server.disk.pread(BLOCK, block * BLOCK)
                assert found[:50] + found[150:] == rest * (BLOCK - 100)
                assert found[50:150] in allowed
            assert_serves(server)
    finally:
        sys.setswitchinterval(interval)


# qemu-nbd


HANDSHAKE = (
    b"\0\0\0\3"
    + option(STRUCTURED_REPLY)
    + option(LIST)
    + option(SET_META_CONTEXT, queries("", ALLOCATION))
    + option(INFO, infos("", 3))
    + option(GO, infos("", 1, 3))
)


def test_qemu_cve_2017_7539_9524_and_nbd_server_cve_2013_7441_a_disconnect_anywhere_in_negotiation(
    server: NbdServer,
) -> None:
    for cut in range(len(HANDSHAKE)):
        with RawClient(where(server)) as client:
            client.send(HANDSHAKE[:cut])
            if cut % 2:  # half of them without having read a word
                client.take(18)
    assert_serves(server)


@pytest.mark.parametrize(
    "garbage",
    [
        bytes(1000),
        b"\xff" * 1000,
        b"\0\0\0\3" + bytes(1000),
        b"\0\0\0\3IHAVEOPT" + b"\xff" * 1000,
        b"\x80\0\0\3" + HANDSHAKE[4:],
    ],
)
def test_qemu_cve_2017_7539_garbage_in_negotiation_ends_that_connection_alone(
    server: NbdServer, garbage: bytes
) -> None:
    with RawClient(where(server)) as client:
        client.send(garbage)
        client.take(18)
        assert client.at_end()
    assert_serves(server)


@pytest.mark.parametrize("length", [257, 1024, 4095, 4096])
def test_qemu_cve_2017_15118_names_of_257_to_4096_bytes(server: NbdServer, length: int) -> None:
    name = "n" * length
    with greeted(server) as client:
        assert client.ask(INFO, infos(name)) == UNKNOWN
        assert client.ask(STRUCTURED_REPLY) == ACK
        assert client.ask(SET_META_CONTEXT, queries(name, ALLOCATION)) == UNKNOWN
        client.send(option(EXPORT_NAME, name.encode()))
        assert client.at_end()
    with NbdServer(server.disk, export_name=name) as named:
        with RawClient(where(named)) as client:
            assert client.negotiate("structured", ALLOCATION, name=name).read(1, 0) == b"\0"
        assert_serves(named)
    assert_serves(server)


@pytest.mark.parametrize("claim", [2**32 - 1, 2**31, (1 << 26) + 1])
@pytest.mark.parametrize("number", [LIST, INFO, GO, EXPORT_NAME, SET_META_CONTEXT, STRUCTURED_REPLY, 77])
def test_qemu_cve_2017_15119_an_option_of_up_to_4_gib_is_refused_at_its_header(
    server: NbdServer, number: int, claim: int
) -> None:
    with greeted(server) as client:
        client.send(option(number, claim=claim))
        assert client.at_end()
    assert_serves(server)


def test_qemu_cve_2017_15119_an_option_too_long_is_skipped_and_answered(server: NbdServer) -> None:
    data = b"x" * (3 << 20)
    with greeted(server) as client:
        for number, answer in ((GO, TOO_BIG), (77, UNSUP), (LIST, INVALID), (SET_META_CONTEXT, TOO_BIG)):
            assert client.ask(number, data) == answer
        client.go()
        assert client.read(1, 0) == b"\0"
    assert_serves(server)


@pytest.mark.parametrize("name", ["n" * 4096, "\xe9" * 2048, "\1" * 4096, "'" * 4096])
def test_qemu_cve_2020_10761_an_unknown_name_is_not_echoed_beyond_what_a_string_may_have(
    server: NbdServer, name: str
) -> None:
    with greeted(server) as client:
        assert client.ask(STRUCTURED_REPLY) == ACK
        requests = [
            (INFO, infos(name)),
            (GO, infos(name)),
            (LIST_META_CONTEXT, queries(name)),
            (SET_META_CONTEXT, queries(name)),
        ]
        for number, data in requests:
            client.send(option(number, data))
            ((_, kind, message),) = client.option_replies()
            assert kind == UNKNOWN
            assert len(message.decode()) <= 4096
    assert_serves(server)


def test_qemu_cve_2024_7409_a_server_stops_with_clients_connecting_and_another_serves_on() -> None:
    with Disk(ZeroBase(SIZE)) as disk, NbdServer(disk) as other:
        for _ in range(20):
            stopping = NbdServer(disk)
            connecting = []
            try:
                for number in range(8):
                    sock = socket.socket(socket.AF_UNIX)
                    sock.setblocking(False)
                    sock.connect(where(stopping))
                    connecting.append(sock)
                    if number % 2:
                        sock.send(HANDSHAKE[: number * 12])
                stopper = threading.Thread(target=stopping.stop)
                stopper.start()
                stopper.join(TIMEOUT)
                assert not stopper.is_alive()
                assert stopping.errors == []
            finally:
                for sock in connecting:
                    sock.close()
        assert_serves(other)


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("length", [(32 << 20) + 1, 48 << 20])
def test_qemu_nbd_s_requests_over_32_mib_are_carried_out(dialect: DialectName, length: int) -> None:
    with serving(64 << 20) as server:
        with RawClient(where(server)) as client:
            client.negotiate(dialect)
            data = bytes(range(256)) * (length // 256) + b"!" * (length % 256)
            client.write(data, 99)
            assert client.read(length, 99) == data
        assert_serves(server)


# nbd-server


@pytest.mark.parametrize("claim", [2**32 - 1, 2**31, 4097, 100, 5])
@pytest.mark.parametrize("number", [INFO, GO, LIST_META_CONTEXT, SET_META_CONTEXT])
def test_nbd_server_cve_2022_26495_26496_an_inner_length_larger_than_its_option(
    server: NbdServer, number: int, claim: int
) -> None:
    with greeted(server) as client:
        assert client.ask(STRUCTURED_REPLY) == ACK
        assert client.ask(number, string("", claim=claim)) == INVALID
        assert client.ask(number, string("name", claim=claim)) == INVALID
        if number in (LIST_META_CONTEXT, SET_META_CONTEXT):
            assert (
                client.ask(number, string("") + b"\0\0\0\1" + string(ALLOCATION, claim=min(claim + 11, 2**32 - 1)))
                == INVALID
            )
            assert client.ask(number, string("") + b"\xff\xff\xff\xff" + string(ALLOCATION)) == INVALID
        else:
            assert client.ask(number, string("") + b"\xff\xff") == INVALID
        client.structured = True
        client.go()
        assert client.read(1, 0) == b"\0"
    assert_serves(server)


def test_nbd_server_cve_2015_0847_a_storm_of_signals_neither_stops_the_service_nor_the_end(tmp_path: Path) -> None:
    path = str(tmp_path / "nbd")
    command = [sys.executable, "-m", "cowkit.cli.main", "serve", "--size", "1M", "--socket", path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            with RawClient(path) as client:
                client.negotiate("structured")
                for number in range(1000):
                    for each in (signal.SIGCHLD, signal.SIGHUP, signal.SIGCHLD):
                        process.send_signal(each)
                    client.write(b"%4d" % number, number * 4)
                assert client.read(8, 3988) == b" 997 998"
                with RawClient(path) as other:
                    assert other.negotiate("extended").read(4, 3996) == b" 999"
                for _ in range(100):
                    process.send_signal(signal.SIGCHLD)
                    process.send_signal(signal.SIGTERM)
                # One SIGTERM ends it properly; another that comes when all is cleaned up may be how the process dies.
                assert process.wait(TIMEOUT) in (0, -signal.SIGTERM)
                assert not os.path.lexists(path)
        finally:
            process.kill()


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("length", [(64 << 20) + 1, 200 << 20])
def test_nbd_server_write_zeroes_over_64_mib_zeroes_all_of_it(dialect: DialectName, length: int) -> None:
    with serving(256 << 20) as server:
        with RawClient(where(server)) as client:
            client.negotiate(dialect)
            marks = [5, (64 << 20) - 1, 64 << 20, 5 + length - 1, 5 + length]
            for offset in marks:
                client.write(b"x", offset)
            assert client.do(WRITE_ZEROES, 5, length).error == 0
            assert [client.read(1, offset) for offset in marks] == [b"\0"] * 4 + [b"x"]
        assert_serves(server)


@pytest.mark.parametrize("dialect", BOTH_STRUCTURED)
def test_nbd_server_reads_from_the_overlay_carry_their_own_offsets(tmp_path: Path, dialect: DialectName) -> None:
    path = tmp_path / "base.img"
    path.write_bytes(b"b" * SIZE)
    with serving(FileBase(path)) as server:
        with RawClient(where(server)) as client:
            client.negotiate(dialect)
            client.write(b"o" * BLOCK, 5 * BLOCK)
            client.do(TRIM, 7 * BLOCK, BLOCK)
            client.write(b"p" * BLOCK, 8 * BLOCK)
            reply = client.do(READ, 4 * BLOCK + 7, 6 * BLOCK)
            assert [int.from_bytes(chunk.payload[:8]) for chunk in reply.chunks] == [
                4 * BLOCK + 7,
                7 * BLOCK,
                8 * BLOCK,
            ]
            model = b"b" * (BLOCK - 7) + b"o" * BLOCK + b"b" * BLOCK + bytes(BLOCK) + b"p" * BLOCK + b"b" * (BLOCK + 7)
            assert reply.data == model
        assert_serves(server)


def test_options_after_abort_and_a_client_that_leaves_before_its_acknowledgement(server: NbdServer) -> None:
    with greeted(server) as client:
        assert client.ask(EXTENDED_HEADERS) == ACK
        client.send(option(ABORT, b"data that ABORT ignores") + option(LIST))
        assert [kind for _, kind, _ in client.option_replies()] == [ACK]
        assert client.at_end()
    with greeted(server) as client:
        client.send(option(ABORT))
    assert_serves(server)


def test_a_block_status_of_all_of_a_large_disk_does_not_hold_up_others() -> None:
    with serving(1 << 42) as server:
        with RawClient(where(server)) as client, RawClient(where(server)) as other:
            client.negotiate("extended", ALLOCATION, DIRTY, DEPTH)
            other.negotiate("simple")
            client.send(client.request(BLOCK_STATUS, 0, 1 << 42)[1])
            assert other.read(1, 0) == b"\0"
            assert {sum(length for length, _ in found) for found in client.reply().status.values()} == {1 << 42}
        assert_serves(server)
