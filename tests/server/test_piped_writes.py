"""Long WRITEs that follow one another: their payloads go through a pipe, and everything is as it is without one."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator

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
from tests.server.raw_client import DIALECTS, EIO, ENOSPC, WRITE, DialectName, RawClient, open_files, serving, where

BLOCK = 4096
LONG = 192 << 10
"""The length of a WRITE that is received by itself."""
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
    client = RawClient(where(server)).negotiate(dialect)
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


_places = st.one_of(st.integers(0, SIZE - 1), st.integers(0, 40).map(lambda n: n * 13 * BLOCK), st.just(SIZE - 300_000))
_lengths = st.one_of(st.integers(1, 9000), st.integers(131_000, 700_000), st.sampled_from([LONG, 1 << 20, 2 << 20]))


@given(
    writes=st.lists(st.tuples(_places, _lengths, st.integers(1, 255)), min_size=1, max_size=14),
    checkpoint_before=st.integers(0, 14),
)
@settings(max_examples=25, deadline=None)
def test_long_writes_anywhere_read_as_an_array_of_bytes_would(
    writes: list[tuple[int, int, int]], checkpoint_before: int
) -> None:
    with serving(SIZE) as server, warmed_up(server) as client:
        model = bytearray(SIZE)
        model[SIZE - LONG :] = b"w" * LONG
        frozen = None
        for turn, (offset, length, fill) in enumerate(writes):
            if turn == checkpoint_before:
                frozen = server.disk.checkpoint(), bytes(model)
            data = (bytes(range(fill)) * (length // fill + 1))[: min(length, SIZE - offset)]
            client.write(data, offset)
            model[offset : offset + len(data)] = data
        assert client.read(SIZE, 0) == model
        if frozen is not None:
            server.disk.rollback(frozen[0])
            assert client.read(SIZE, 0) == frozen[1]


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
