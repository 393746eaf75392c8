"""Long WRITEs that follow one another: their payloads go through a pipe, and everything is as it is without one."""

from __future__ import annotations

import errno
import itertools
import os
import random
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cowkit.disk import Disk, ZeroBase
from cowkit.disk.layer import Layer
from cowkit.disk.overlay import Overlay
from cowkit.disk.piped import Piped
from cowkit.errors import OverlayFullError
from cowkit.server.server import NbdServer
from tests.limits import files_limited_to
from tests.server.raw_client import (
    DF,
    DIALECTS,
    DISC,
    EINVAL,
    EIO,
    ENOSPC,
    EPERM,
    FLUSH,
    FUA,
    READ,
    TRIM,
    WRITE,
    DialectName,
    RawClient,
    Reply,
    assert_serves,
    open_files,
    serving,
    where,
)


def address(uri: str) -> tuple[str, int]:
    host, _, port = uri.removeprefix("nbd://").rpartition(":")
    return host, int(port)


BLOCK = 4096
LONG = 192 << 10
"""The length of a WRITE that is received by itself."""
LEAST = (128 << 10) + BLOCK
"""The least length that a WRITE of whole blocks needs for that. Two of them fit the client's socket."""
SIZE = (8 << 20) + 1000

every_dialect = pytest.mark.parametrize("dialect", DIALECTS)


@pytest.fixture
def server() -> Iterator[NbdServer]:
    with serving(SIZE) as server:
        yield server


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The offsets of the WRITEs that came through a pipe."""
    found: list[int] = []
    write_piped = Overlay.write_piped

    def noted(overlay: Overlay, piped: Piped, offset: int) -> None:
        found.append(offset)
        write_piped(overlay, piped, offset)

    monkeypatch.setattr(Overlay, "write_piped", noted)
    return found


def warmed_up(server: NbdServer, dialect: DialectName = "structured") -> RawClient:
    """A client whose next long WRITE goes through a pipe, after one that has not: to the end of the disk."""
    client = RawClient(where(server) if server.socket is not None else address(server.uri)).negotiate(dialect)
    client.write(b"w" * LONG, SIZE - LONG)
    return client


@every_dialect
def test_the_first_long_write_comes_by_the_buffer_and_the_next_ones_by_the_pipe(
    server: NbdServer, piped: list[int], dialect: DialectName
) -> None:
    data = random.Random(4).randbytes(3 * LONG)
    with warmed_up(server, dialect) as client:
        assert not piped
        for offset in range(0, 3 * LONG, LONG):
            client.write(data[offset : offset + LONG], offset)
        assert client.read(3 * LONG, 0) == data
        assert client.read(LONG, SIZE - LONG) == b"w" * LONG
    assert piped == [0, LONG, 2 * LONG]


def test_short_requests_in_between_are_answered_in_step(server: NbdServer, piped: list[int]) -> None:
    with warmed_up(server) as client:
        sent = b""
        for turn in range(4):
            sent += client.request(WRITE, turn * LONG, data=bytes([turn + 1]) * LONG)[1]
            sent += client.request(WRITE, turn * LONG + 7, data=b"short")[1]
        sender = threading.Thread(target=client.send, args=(sent,))
        sender.start()
        assert [client.reply().error for _ in range(8)] == [0] * 8
        sender.join()
        for turn in range(4):
            fill = bytes([turn + 1])
            assert client.read(LONG, turn * LONG) == fill * 7 + b"short" + fill * (LONG - 12)


# What the pipe took ahead


class Ahead:
    """Lets a client's first piped WRITE be written once the client has sent what follows: then the pipe takes that meanwhile."""

    def __init__(self) -> None:
        self.sent = threading.Event()
        self.held: list[int] = []
        """How many bytes the pipe held behind each payload when that was written, or failed."""

    def send(self, client: RawClient, *requests: bytes) -> None:
        """The first is a long WRITE; the others fit into the client's socket, and are behind its payload."""
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 400 << 10)
        self.sent.clear()
        client.send(requests[0])
        client.send(b"".join(requests[1:]))
        self.sent.set()


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Ahead:
    made = Ahead()
    write_piped = Overlay.write_piped

    def gated(overlay: Overlay, piped: Piped, offset: int) -> None:
        assert made.sent.wait(30)
        try:
            write_piped(overlay, piped, offset)
        finally:
            made.held.append(piped.held - piped.left)

    monkeypatch.setattr(Overlay, "write_piped", gated)
    return made


def errors(client: RawClient, cookies: Sequence[int]) -> list[int]:
    """The errors of the next replies, which are those to requests of these cookies."""
    replies: list[Reply] = [client.reply() for _ in cookies]
    assert [reply.cookie for reply in replies] == [*cookies]
    return [reply.error for reply in replies]


@every_dialect
def test_what_was_taken_ahead_is_carried_out_and_answered_in_order(
    server: NbdServer, ahead: Ahead, dialect: DialectName
) -> None:
    with warmed_up(server, dialect) as client:
        requests = [
            client.request(WRITE, 0, data=b"a" * LONG),
            client.request(WRITE, 7, data=b"short"),
            client.request(READ, 0, 20),
            client.request(WRITE, 1 << 20, data=b"b" * LEAST, flags=FUA),
            client.request(FLUSH),
            client.request(WRITE, 12, data=b"er"),
            client.request(TRIM, (1 << 20) + BLOCK, BLOCK),
            client.request(WRITE, LONG - 50, data=b"c" * LEAST),
            client.request(READ, LONG - 52, 4),
        ]
        ahead.send(client, *(request for _, request in requests))
        replies = [client.reply() for _ in requests]
        assert [(reply.cookie, reply.error) for reply in replies] == [(cookie, 0) for cookie, _ in requests]
        assert replies[2].data in (b"aaaaaaashort" + b"a" * 8, b"aaaaaaashorter" + b"a" * 6)
        assert replies[8].data == b"aacc"
        assert client.read(LONG - 50 + LEAST, 0) == b"aaaaaaashorter" + b"a" * (LONG - 64) + b"c" * LEAST
        trimmed = b"b" * BLOCK + bytes(BLOCK) + b"b" * (LEAST - 2 * BLOCK)
        assert client.read(LEAST + 1, 1 << 20) == trimmed + b"\0"
    assert ahead.held[0] == sum(len(request) for _, request in requests[1:])


@every_dialect
def test_a_run_of_long_writes_goes_through_the_pipe_by_what_it_took_ahead(
    server: NbdServer, ahead: Ahead, dialect: DialectName
) -> None:
    data = random.Random(8).randbytes(LONG + 2 * LEAST)
    with warmed_up(server, dialect) as client:
        first = client.request(WRITE, 0, data=data[:LONG])
        second = client.request(WRITE, LONG, data=data[LONG : LONG + LEAST])
        third = client.request(WRITE, LONG + LEAST, data=data[LONG + LEAST :])
        ahead.send(client, first[1], second[1], third[1])
        assert errors(client, [first[0], second[0], third[0]]) == [0, 0, 0]
        assert client.read(len(data) + 1, 0) == data + b"\0"
    head = len(third[1]) - LEAST
    assert ahead.held == [2 * (head + LEAST), head + LEAST, 0]


def test_of_requests_that_overlap_the_last_one_stands(server: NbdServer, ahead: Ahead) -> None:
    with warmed_up(server) as client:
        requests = [client.request(WRITE, turn * 100, data=b"abc"[turn : turn + 1] * LEAST) for turn in range(3)]
        ahead.send(client, *(request for _, request in requests))
        assert errors(client, [cookie for cookie, _ in requests]) == [0, 0, 0]
        assert client.read(LEAST + 200, 0) == b"a" * 100 + b"b" * 100 + b"c" * LEAST
    assert len(ahead.held) == 3


@every_dialect
@pytest.mark.parametrize(
    ("command", "offset", "flags", "error"),
    [
        pytest.param(WRITE, BLOCK, DF, EINVAL, id="an invalid flag"),
        pytest.param(WRITE, SIZE - LEAST + 1, 0, ENOSPC, id="beyond the end"),
        pytest.param(WRITE, 1 << 62, 0, ENOSPC, id="far beyond the end"),
        pytest.param(99, BLOCK, 0, EINVAL, id="an unknown command"),
    ],
)
def test_a_request_that_is_refused_is_out_of_the_way_of_the_next(
    server: NbdServer, ahead: Ahead, dialect: DialectName, command: int, offset: int, flags: int, error: int
) -> None:
    with warmed_up(server, dialect) as client:
        requests = [
            client.request(WRITE, BLOCK, data=b"a" * LONG),
            client.request(command, offset, LEAST, b"x" * LEAST if command == WRITE else b"", flags=flags),
            client.request(WRITE, 2 << 20, data=b"b" * LEAST),
        ]
        ahead.send(client, *(request for _, request in requests))
        assert errors(client, [cookie for cookie, _ in requests]) == [0, error, 0]
        client.write(b"c" * LONG, 3 << 20)
        content = client.read(SIZE, 0)
    assert ahead.held[0] >= len(requests[1][1])
    expected = bytearray(SIZE)
    for fill, place, length in (
        (b"a", BLOCK, LONG),
        (b"b", 2 << 20, LEAST),
        (b"c", 3 << 20, LONG),
        (b"w", SIZE - LONG, LONG),
    ):
        expected[place : place + length] = fill * length
    assert content == expected


@every_dialect
def test_each_long_write_to_a_read_only_export_is_refused_and_the_next_request_found(dialect: DialectName) -> None:
    with Disk(ZeroBase(SIZE)) as disk, NbdServer(disk, read_only=True) as server:
        with RawClient(where(server)).negotiate(dialect) as client:
            requests = [client.request(WRITE, turn * LONG, data=b"x" * LONG) for turn in range(5)]
            sender = threading.Thread(target=client.send, args=(b"".join(request for _, request in requests),))
            sender.start()
            assert errors(client, [cookie for cookie, _ in requests]) == [EPERM] * 5
            sender.join()
            assert client.read(5 * LONG, 0) == bytes(5 * LONG)
        assert server.errors == []


def test_behind_a_disconnect_nothing_is_carried_out(server: NbdServer, ahead: Ahead) -> None:
    with warmed_up(server) as client:
        first = client.request(WRITE, 0, data=b"a" * LONG)
        ahead.send(client, first[1], client.header(DISC), client.request(WRITE, 0, data=b"b" * LEAST)[1])
        assert errors(client, [first[0]]) == [0]
        assert client.at_end()
    assert ahead.held == [28 + 28 + LEAST]
    with RawClient(where(server)).negotiate() as other:
        assert other.read(LONG, 0) == b"a" * LONG


@every_dialect
def test_a_client_that_is_out_of_step_behind_a_payload_has_that_written_and_is_hung_up_on(
    server: NbdServer, ahead: Ahead, dialect: DialectName
) -> None:
    with warmed_up(server, dialect) as client:
        first = client.request(WRITE, 0, data=b"a" * LONG)
        wrong = b"\xff" + client.request(WRITE, 0, data=b"b" * LEAST)[1][1:]
        ahead.send(client, first[1], wrong)
        assert errors(client, [first[0]]) == [0]
        assert client.at_end()
    with RawClient(where(server)).negotiate() as other:
        assert other.read(LONG, 0) == b"a" * LONG
    assert_serves(server)


@every_dialect
@pytest.mark.parametrize("rest", [0, 1, 10, "head", LEAST // 2, "all but one"])
def test_the_end_of_the_stream_within_what_was_taken_ahead_writes_none_of_that(
    ahead: Ahead, dialect: DialectName, rest: int | str
) -> None:
    before = open_files()
    with serving(SIZE) as server:
        with warmed_up(server, dialect) as client:
            first = client.request(WRITE, 0, data=b"a" * LONG)
            second = client.request(WRITE, 0, data=b"b" * LEAST)[1]
            part = {"head": len(second) - LEAST, "all but one": len(second) - 1}.get(str(rest), rest)
            assert isinstance(part, int)
            ahead.send(client, first[1], second[:part])
            client.sock.shutdown(socket.SHUT_WR)
            assert errors(client, [first[0]]) == [0]
            assert client.at_end()
        assert ahead.held == [part]
        with RawClient(where(server)).negotiate() as other:
            assert other.read(LONG, 0) == b"a" * LONG
    assert open_files() == before


@every_dialect
@pytest.mark.parametrize(
    ("length", "part"), [(LEAST, 1), (LEAST, 10), (LEAST, LONG // 2), (3 << 20, 10), (3 << 20, LONG)]
)
def test_a_request_of_which_a_part_was_taken_ahead_is_carried_out_once_the_rest_has_come(
    server: NbdServer, ahead: Ahead, dialect: DialectName, length: int, part: int
) -> None:
    data = random.Random(10).randbytes(length)
    with warmed_up(server, dialect) as client:
        first = client.request(WRITE, 0, data=b"a" * LONG)
        second = client.request(WRITE, LONG, data=data)
        ahead.send(client, first[1], second[1][:part])
        assert errors(client, [first[0]]) == [0]
        assert ahead.held == [part]
        client.send(second[1][part:])
        assert errors(client, [second[0]]) == [0]
        assert client.read(LONG + length, 0) == b"a" * LONG + data


@every_dialect
def test_payloads_that_are_longer_than_what_is_taken_ahead_come_whole(
    server: NbdServer, piped: list[int], dialect: DialectName
) -> None:
    data = random.Random(11).randbytes(1_500_000)
    with warmed_up(server, dialect) as client:
        for _ in range(2):
            client.write(data, BLOCK)
        assert client.read(len(data), BLOCK) == data
    assert piped


def test_a_checkpoint_comes_before_a_payload_of_which_a_part_was_taken_ahead(server: NbdServer, ahead: Ahead) -> None:
    with warmed_up(server) as client:
        first = client.request(WRITE, 0, data=b"a" * LONG)
        second = client.request(WRITE, BLOCK, data=b"b" * LEAST)
        ahead.send(client, first[1], second[1][: LEAST // 2])
        assert errors(client, [first[0]]) == [0]
        assert ahead.held == [LEAST // 2]
        point = server.disk.checkpoint()
        client.send(second[1][LEAST // 2 :])
        assert errors(client, [second[0]]) == [0]
        assert client.read(BLOCK + LEAST, 0) == b"a" * BLOCK + b"b" * LEAST
        server.disk.rollback(point)
        assert client.read(LONG, 0) == b"a" * LONG


@pytest.mark.parametrize("rewritten", [False, True], ids=["fresh", "rewritten"])
@pytest.mark.parametrize("piece", [0, 1], ids=["at once", "in the middle"])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_of_several_writes_one_that_fails_leaves_the_others_their_own_bytes(
    server: NbdServer, ahead: Ahead, monkeypatch: pytest.MonkeyPatch, failing: int, piece: int, rewritten: bool
) -> None:
    offsets = [0, 1 << 20, 2 << 20]
    to_file = Piped.to_file

    def broken(piped: Piped, fd: int, most: int, offset: int) -> int:
        if piece <= offset - offsets[failing] < 1 << 20:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return to_file(piped, fd, most, offset)

    with warmed_up(server) as client:
        if rewritten:
            for offset in offsets:
                server.disk.pwrite(b"o" * LONG, offset)
        data = [random.Random(turn).randbytes(LONG if turn == 0 else LEAST) for turn in range(3)]
        requests = [client.request(WRITE, offset, data=each) for offset, each in zip(offsets, data, strict=True)]
        with monkeypatch.context() as patch:
            patch.setattr(Piped, "to_file", broken)
            ahead.send(client, *(request for _, request in requests))
            wanted = [0, 0, 0]
            wanted[failing] = EIO
            assert errors(client, [cookie for cookie, _ in requests]) == wanted
        for turn in {0, 1, 2} - {failing}:
            assert client.read(len(data[turn]), offsets[turn]) == data[turn]
        client.write(b"n" * LONG, offsets[failing])
        assert client.read(LONG, offsets[failing]) == b"n" * LONG
    assert len(ahead.held) == 3
    if failing or (piece and rewritten):  # what fails within its first 128 KiB takes nothing
        assert ahead.held[0] == sum(len(request) for _, request in requests[1:])


@every_dialect
@pytest.mark.parametrize("within", [0, 1], ids=["whole blocks", "within blocks"])
def test_of_several_writes_one_without_room_leaves_the_others_their_own_bytes(
    server: NbdServer, ahead: Ahead, dialect: DialectName, within: int
) -> None:
    with warmed_up(server, dialect) as client:
        requests = [
            client.request(WRITE, 0, data=b"a" * LONG),
            client.request(WRITE, (1 << 20) - 16 * BLOCK + within, data=b"x" * LEAST),
            client.request(WRITE, LONG, data=b"c" * LEAST),
        ]
        with files_limited_to(1 << 20):
            ahead.send(client, *(request for _, request in requests))
            assert errors(client, [cookie for cookie, _ in requests]) == [0, ENOSPC, 0]
            assert client.read(2 << 20, 0) == (b"a" * LONG + b"c" * LEAST).ljust(2 << 20, b"\0")
    assert len(ahead.held) == 3


def test_a_file_system_that_takes_nothing_from_pipes_leaves_what_is_behind_to_the_next(
    server: NbdServer, ahead: Ahead, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_file = Piped.to_file

    def invalid(piped: Piped, fd: int, most: int, offset: int) -> int:
        if offset != 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return to_file(piped, fd, most, offset)

    monkeypatch.setattr(Piped, "to_file", invalid)
    with warmed_up(server) as client:
        data = random.Random(9).randbytes(LONG + 2 * LEAST)
        ends = [0, LONG, LONG + LEAST, len(data)]
        requests = [client.request(WRITE, start, data=data[start:end]) for start, end in itertools.pairwise(ends)]
        ahead.send(client, *(request for _, request in requests))
        assert errors(client, [cookie for cookie, _ in requests]) == [0, 0, 0]
        assert client.read(len(data), 0) == data
    assert len(ahead.held) == 3


# Against a model


class Op(NamedTuple):
    command: int
    offset: int
    length: int
    fill: int


_places = st.one_of(st.integers(0, SIZE - 1), st.integers(0, 40).map(lambda n: n * 13 * BLOCK), st.just(SIZE - 300_000))
_lengths = st.one_of(
    st.integers(1, 9000),
    st.integers(131_000, 700_000),
    st.sampled_from([128 << 10, (128 << 10) + 1, LEAST, LONG, 1 << 20, 2 << 20]),
)
_commands = st.sampled_from([WRITE, WRITE, WRITE, WRITE, READ, TRIM, FLUSH, 99])


@pytest.mark.parametrize("length", [LONG, 3 * LONG, 1 << 20])
def test_over_tcp_a_long_write_that_nothing_follows_is_answered(length: int, piped: list[int]) -> None:
    with (
        Disk(ZeroBase(SIZE)) as disk,
        NbdServer(disk, tcp="127.0.0.1:0") as server,
        RawClient(address(server.uri)).negotiate() as client,
    ):
        for turn in range(5):
            client.write(bytes([turn + 1]) * length, turn * length // 2)
        assert client.read(length, 2 * length) == b"\5" * length
    assert piped


@given(
    ops=st.lists(st.builds(Op, _commands, _places, _lengths, st.integers(1, 255)), min_size=1, max_size=14),
    depth=st.integers(1, 6),
    tcp=st.booleans(),
    dialect=st.sampled_from(DIALECTS),
    checkpoint_before=st.integers(0, 14),
)
@settings(max_examples=25, deadline=None)
def test_long_writes_anywhere_at_any_depth_read_as_an_array_of_bytes_would(
    ops: list[Op], depth: int, tcp: bool, dialect: DialectName, checkpoint_before: int
) -> None:
    with (
        serving(SIZE) as unix,
        NbdServer(unix.disk, tcp="127.0.0.1:0") as server,
        warmed_up(server if tcp else unix, dialect) as client,
    ):
        model = bytearray(SIZE)
        model[SIZE - LONG :] = b"w" * LONG
        frozen = None
        for first in range(0, len(ops), depth):
            if first <= checkpoint_before < first + depth:
                frozen = server.disk.checkpoint(), bytes(model)
            requests = []
            for op in ops[first : first + depth]:
                length = min(op.length, SIZE - op.offset)
                data = (bytes(range(op.fill)) * (length // op.fill + 1))[:length] if op.command == WRITE else b""
                asked = (0, 0) if op.command == FLUSH else (op.offset, length)
                requests.append(client.request(op.command, *asked, data))
                if op.command in (WRITE, TRIM):
                    model[op.offset : op.offset + length] = data or bytes(length)
            sender = threading.Thread(target=client.send, args=(b"".join(request for _, request in requests),))
            sender.start()
            found = errors(client, [cookie for cookie, _ in requests])
            sender.join()
            assert found == [EINVAL if op.command == 99 else 0 for op in ops[first : first + depth]]
        assert client.read(SIZE, 0) == model
        if frozen is not None:
            server.disk.rollback(frozen[0])
            assert client.read(SIZE, 0) == frozen[1]


# Several connections


def test_many_connections_write_long_ones_at_once(server: NbdServer, piped: list[int]) -> None:
    with warmed_up(server) as first, warmed_up(server) as second, warmed_up(server) as third:
        clients = [first, second, third]

        def write(number: int) -> None:
            for turn in range(12):
                clients[number].write(bytes([number + 65]) * LONG, (turn * 3 + number) * LONG)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert first.read(36 * LONG, 0) == (b"A" * LONG + b"B" * LONG + b"C" * LONG) * 12
    assert len(piped) == 36


def test_many_connections_write_long_and_short_ones_at_several_depths_at_once(server: NbdServer) -> None:
    turns, room = 24, SIZE // 4
    with ExitStack() as stack:
        clients = [stack.enter_context(warmed_up(server, DIALECTS[number % 3])) for number in range(4)]
        server.disk.pwrite(bytes(LONG), SIZE - LONG)
        wanted = [bytearray(room) for _ in clients]
        found: list[list[int]] = [[] for _ in clients]

        def write(number: int, depth: int) -> None:
            client, model, chance = clients[number], wanted[number], random.Random(number)
            for _ in range(0, turns, depth):
                requests = []
                for _ in range(depth):
                    length = chance.choice([LEAST, LONG, 700_000, 512, BLOCK])
                    offset = chance.randrange(room - length)
                    data = chance.randbytes(length)
                    model[offset : offset + length] = data
                    requests.append(client.request(WRITE, number * room + offset, data=data))
                sender = threading.Thread(target=client.send, args=(b"".join(request for _, request in requests),))
                sender.start()
                found[number] += errors(client, [cookie for cookie, _ in requests])
                sender.join()

        threads = [threading.Thread(target=write, args=(number, depth)) for number, depth in enumerate((1, 2, 4, 8))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [[0] * turns] * 4
        assert clients[0].read(4 * room, 0) == b"".join(wanted)


# The way there and back


@every_dialect
def test_a_payload_in_pieces_that_fill_the_pipe_goes_on_by_the_buffer(server: NbdServer, dialect: DialectName) -> None:
    data = random.Random(5).randbytes(1 << 20)
    with warmed_up(server, dialect) as client:
        for _ in range(2):
            request = client.request(WRITE, 5, data=data)[1]
            for start in range(0, len(request), 1001):
                client.send(request[start : start + 1001])
            assert client.reply().error == 0
            assert client.read(len(data), 5) == data


def test_a_checkpoint_does_not_wait_for_a_payload_and_comes_before_it(server: NbdServer) -> None:
    with warmed_up(server) as client, RawClient(where(server)).negotiate() as other:
        request = client.request(WRITE, 0, data=b"n" * LONG)[1]
        client.send(request[: LONG // 2])
        assert other.read(LONG, 0) == bytes(LONG)
        point = server.disk.checkpoint()
        client.send(request[LONG // 2 :])
        assert client.reply().error == 0
        assert client.read(LONG, 0) == b"n" * LONG
        server.disk.rollback(point)
        assert client.read(LONG, 0) == bytes(LONG)


def test_a_disconnect_within_a_payload_writes_nothing_and_leaves_no_descriptor() -> None:
    before = open_files()
    with serving(SIZE) as server:
        with warmed_up(server) as client:
            client.write(b"a" * LONG, 0)
            client.send(client.request(WRITE, 0, data=b"b" * LONG)[1][:-1])
        with RawClient(where(server)).negotiate() as other:
            assert other.read(LONG, 0) == b"a" * LONG
    assert open_files() == before


@every_dialect
def test_without_room_a_piped_write_is_enospc_and_the_old_bytes_stand(
    server: NbdServer, piped: list[int], dialect: DialectName
) -> None:
    with warmed_up(server, dialect) as client:
        client.write(b"o" * 20_000, 1 << 20)  # fresh ones and one's own are hit at once
        client.write(b"w" * LONG, SIZE - LONG)
        with files_limited_to((1 << 20) + 50_000):
            for offset in ((1 << 20) - BLOCK, (1 << 20) + 32_768, (1 << 20) + 30_001, 3 << 20):
                assert client.do(WRITE, offset, data=b"x" * LONG).error == ENOSPC
                client.write(b"y" * LONG, 0)
            assert client.read(3 << 20, 1 << 20) == (b"o" * 20_000).ljust(3 << 20, b"\0")
        client.write(b"z" * LONG, (1 << 20) + 32_768)
        assert client.read(LONG, (1 << 20) + 32_768) == b"z" * LONG
    assert len(piped) == 8


def leave_a_spare_layer(disk: Disk) -> None:
    """One that can be given back, to have room."""
    point = disk.checkpoint()
    disk.pwrite(b"spare" * 1000, 0)
    disk.rollback(point)


def test_a_payload_that_was_written_in_part_is_whole_once_there_is_room(
    server: NbdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(6).randbytes(2 * LONG)
    with warmed_up(server) as client:
        leave_a_spare_layer(server.disk)
        client.write(b"w" * LONG, SIZE - LONG)

        tried = []

        def full(layer: Layer, piped: Piped, offset: int) -> None:
            tried.append(offset)
            layer.write_piped(piped, LONG, offset)
            raise OverlayFullError("no room")

        monkeypatch.setattr(Layer, "write_fresh_piped", full)
        client.write(data, 0)
        assert client.read(len(data), 0) == data
        assert tried == [0]


def test_a_payload_that_a_file_system_took_in_part_but_not_from_a_pipe_is_whole_once_there_is_room(
    server: NbdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(7).randbytes(2 * LONG)
    with warmed_up(server) as client:
        leave_a_spare_layer(server.disk)
        client.write(b"w" * LONG, SIZE - LONG)

        write = Layer.write
        tried: list[int] = []

        def invalid(piped: Piped, fd: int, most: int, offset: int) -> int:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

        def full(layer: Layer, parts: list[memoryview], offset: int) -> None:
            if tried:
                write(layer, parts, offset)
                return
            tried.append(offset)
            write(layer, [parts[0][:50_000]], offset)
            raise OverlayFullError("no room")

        monkeypatch.setattr(Piped, "to_file", invalid)
        monkeypatch.setattr(Layer, "write", full)
        client.write(data, 0)
        assert client.read(len(data), 0) == data
        assert tried == [0]


def test_a_file_system_that_takes_nothing_from_pipes_is_written_to_all_the_same(
    server: NbdServer, piped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def invalid(piped: Piped, fd: int, most: int, offset: int) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(Piped, "to_file", invalid)
    with warmed_up(server) as client:
        for fill in (b"f", b"g"):
            client.write(fill * 3 * LONG, BLOCK)
        assert client.read(3 * LONG, BLOCK) == b"g" * 3 * LONG
    assert piped == [BLOCK, BLOCK]


def test_after_a_write_that_failed_the_next_one_has_its_own_bytes(
    server: NbdServer, piped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(piped: Piped, fd: int, most: int, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with warmed_up(server) as client:
        client.write(b"1" * LONG, 0)
        with monkeypatch.context() as patch:
            patch.setattr(Piped, "to_file", broken)
            assert client.do(WRITE, 0, data=b"2" * LONG).error == EIO
        client.write(b"3" * LONG, 0)
        assert client.read(LONG, 0) == b"3" * LONG
    assert piped == [0, 0, 0]


@pytest.mark.parametrize("broken", ["__init__", "receive"])
def test_without_pipes_long_writes_come_by_the_buffer(
    server: NbdServer, piped: list[int], monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: object, ahead: bool = False) -> int:
        raise OSError(errno.EMFILE if broken == "__init__" else errno.EINVAL, "not here")

    monkeypatch.setattr(Piped, broken, fail)
    with warmed_up(server) as client:
        for _ in range(3):
            client.write(b"p" * LONG, 1)
        assert client.read(LONG + 2, 0) == b"\0" + b"p" * LONG + b"\0"
    assert not piped


def test_the_trace_has_piped_writes_too() -> None:
    with serving(ZeroBase(SIZE), trace=10) as server:
        disk = server.disk
        with warmed_up(server) as client:
            client.write(b"t" * LONG, BLOCK)
        assert disk.trace is not None
        assert [str(event).split()[-2:] for event in disk.trace.events()] == [
            ["write", f"{SIZE - LONG}+{LONG}"],
            ["write", f"{BLOCK}+{LONG}"],
        ]
