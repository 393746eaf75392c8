"""Requests that are refused or fail: the error, the disk untouched, and the next request served."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cowkit.disk import Disk, FileBase, ZeroBase
from cowkit.server.server import NbdServer
from tests.limits import files_limited_to
from tests.server.raw_client import (
    BLOCK_STATUS,
    BOTH_STRUCTURED,
    CACHE,
    DF,
    DIALECTS,
    EINVAL,
    EIO,
    ENOMEM,
    ENOSPC,
    EPERM,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    DialectName,
    RawClient,
    assert_serves,
    serving,
    where,
)

BLOCK = 4096
SIZE = 64 * BLOCK + 100
MOST = 64 << 20
"""The maximum payload that the server tells."""

every_dialect = pytest.mark.parametrize("dialect", DIALECTS)


@pytest.fixture
def base_path(tmp_path: Path) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(os.urandom(SIZE))
    return path


@pytest.fixture
def server(base_path: Path) -> Iterator[NbdServer]:
    with serving(FileBase(base_path)) as server:
        yield server


@contextmanager
def connected(server: NbdServer, dialect: DialectName) -> Iterator[RawClient]:
    with RawClient(where(server)) as client:
        yield client.negotiate(dialect, *([] if dialect == "simple" else ["base:allocation"]))


# Beyond the end


@every_dialect
@pytest.mark.parametrize(
    ("offset", "length"),
    [(SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (2**63, 1), (2**64 - 1, 1), (2**64 - 8, 16), (1 << 40, 512)],
)
def test_beyond_the_end_is_einval_or_for_what_writes_enospc(
    server: NbdServer, dialect: DialectName, offset: int, length: int
) -> None:
    with connected(server, dialect) as client:
        for command in (READ, TRIM, CACHE, BLOCK_STATUS):
            reply = client.do(command, offset, length)
            assert reply.error == EINVAL
            assert bool(reply.message) == (dialect != "simple")
        assert client.do(WRITE_ZEROES, offset, length).error == ENOSPC
        assert client.do(WRITE, offset, data=b"x" * length).error == ENOSPC
        assert client.read(SIZE, 0) == server.disk.base.pread(SIZE, 0)
    assert server.disk.dirty_bytes == 0


@pytest.mark.parametrize("command", [READ, TRIM, CACHE, BLOCK_STATUS, WRITE_ZEROES])
@pytest.mark.parametrize(("offset", "length"), [(2**64 - 100, 200), (100, 2**64 - 1), (2**63, 2**63), (1, 2**64 - 1)])
def test_offset_and_length_of_64_bits_do_not_wrap_round(
    server: NbdServer, command: int, offset: int, length: int
) -> None:
    with connected(server, "extended") as client:
        assert client.do(command, offset, length).error == (ENOSPC if command == WRITE_ZEROES else EINVAL)
        assert client.read(1, 0)
    assert server.disk.dirty_bytes == 0


# Commands and flags


@every_dialect
@pytest.mark.parametrize("command", [8, 9, 100, 0x7FFF, 0xFFFF])
def test_an_unknown_command_is_einval(server: NbdServer, dialect: DialectName, command: int) -> None:
    with connected(server, dialect) as client:
        assert client.do(command, 0, 100).error == EINVAL
        assert client.do(FLUSH).error == 0


ALLOWED = {
    READ: FUA | DF,
    WRITE: FUA,
    FLUSH: FUA,
    TRIM: FUA,
    CACHE: FUA,
    WRITE_ZEROES: FUA | NO_HOLE | FAST_ZERO,
    BLOCK_STATUS: FUA | REQ_ONE,
}


@every_dialect
def test_each_command_takes_its_own_flags_and_no_other(server: NbdServer, dialect: DialectName) -> None:
    with connected(server, dialect) as client:
        for command, allowed in ALLOWED.items():
            if dialect == "simple":
                allowed &= ~DF
            for bit in range(16):
                flag = 1 << bit
                if dialect == "extended" and flag == PAYLOAD_LEN:
                    continue  # then the length means another thing: see the payload tests
                if command == BLOCK_STATUS and dialect == "simple" and flag & allowed:
                    continue
                data = b"data" if command == WRITE else b""
                reply = client.do(command, 0, 0 if command == FLUSH else 4, data, flags=flag)
                assert reply.error == (0 if flag & allowed else EINVAL), (command, bit)


@pytest.mark.parametrize("command", [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, 77])
@pytest.mark.parametrize("size", [1, 5000, 3 << 20])
def test_a_payload_that_a_command_does_not_take_is_drained_and_refused(
    server: NbdServer, command: int, size: int
) -> None:
    with connected(server, "extended") as client:
        cookie, request = client.request(command, 0, data=b"p" * size, flags=PAYLOAD_LEN)
        client.send(request)
        reply = client.reply()
        assert (reply.cookie, reply.error) == (cookie, EINVAL)
        assert client.read(1, 0)
    assert server.disk.dirty_bytes == 0


def test_an_extended_write_without_its_payload_flag_is_taken_as_meant(server: NbdServer) -> None:
    with connected(server, "extended") as client:
        client.send(client.header(WRITE, 0, 4, cookie=1) + b"data")
        assert client.reply().error == 0
        assert client.read(4, 0) == b"data"


# Sizes


@every_dialect
@pytest.mark.parametrize("length", [MOST + 1, 2**32 - 1])
def test_a_read_over_the_maximum_payload_is_einval(dialect: DialectName, length: int) -> None:
    with serving(5 << 30) as server, connected(server, dialect) as client:
        assert client.do(READ, 0, length).error == EINVAL
        assert client.read(10, 0) == bytes(10)


@every_dialect
def test_a_payload_over_the_maximum_is_drained_and_answered_and_the_next_request_served(dialect: DialectName) -> None:
    with serving(1 << 30) as server, connected(server, dialect) as client:
        received: list[int] = []
        reader = threading.Thread(target=lambda: received.extend(client.reply().error for _ in range(3)))
        reader.start()
        _, request = client.request(WRITE, 0, MOST + 1)
        client.send(client.request(WRITE, 7, data=b"before")[1] + request)
        piece = b"x" * (1 << 20)
        for _ in range(64):
            client.send(piece)
        client.send(b"x" + client.request(WRITE, 20, data=b"behind")[1])
        reader.join(30)
        assert received == [0, EINVAL, 0]
        assert client.read(30, 0) == bytes(7) + b"before" + bytes(7) + b"behind" + bytes(4)
        assert server.disk.dirty_bytes == BLOCK


@every_dialect
def test_the_largest_payload_is_written_and_read(dialect: DialectName) -> None:
    with serving(MOST + 5) as server, connected(server, dialect) as client:
        data = os.urandom(1 << 20) * 64
        client.write(data, 5)
        assert client.read(MOST, 5) == data
        assert client.read(5, 0) == bytes(5)


@every_dialect
def test_payloads_of_any_size_around_the_receive_buffer_are_written(dialect: DialectName) -> None:
    buffer = 2 << 20
    head = 32 if dialect == "extended" else 28
    with serving(8 << 20) as server, connected(server, dialect) as client:
        for size in (1, 4095, buffer - head - 1, buffer - head, buffer - head + 1, buffer, buffer + 1, 3 * buffer + 17):
            data = os.urandom(size)
            _, first = client.request(WRITE, 3, data=b"!")
            _, second = client.request(WRITE, 4, data=data)
            _, third = client.request(WRITE, 4 + size, data=b"?")
            client.send(first + second + third)
            assert [client.reply().error for _ in range(3)] == [0, 0, 0]
            assert client.read(size + 2, 3) == b"!" + data + b"?"


def test_a_payload_beyond_what_is_worth_draining_ends_that_connection_alone(server: NbdServer) -> None:
    with connected(server, "extended") as client:
        client.send(client.request(WRITE, 0, 2**40)[1])
        assert client.at_end()
    assert_serves(server)


def test_a_write_that_will_be_refused_is_not_held_in_memory(server: NbdServer) -> None:
    with connected(server, "structured") as client:
        reply = client.do(WRITE, SIZE, data=b"x" * (5 << 20))
        assert reply.error == ENOSPC
        assert client.do(WRITE, 0, data=b"x" * (5 << 20), flags=DF).error == EINVAL
        assert client.read(1, 0)


@every_dialect
def test_the_messages_are_text_and_the_error_chunk_is_well_formed(server: NbdServer, dialect: DialectName) -> None:
    with connected(server, dialect) as client:
        reply = client.do(READ, SIZE, 10)
        if dialect == "simple":
            assert len(reply.chunks[0].payload) == 0
        else:
            assert str(SIZE) in reply.message and "\n" not in reply.message


# Read-only


@every_dialect
def test_a_read_only_export_refuses_every_change_with_eperm_and_drains_its_payload(
    base_path: Path, dialect: DialectName
) -> None:
    with Disk(FileBase(base_path)) as disk:
        with NbdServer(disk, read_only=True) as server, connected(server, dialect) as client:
            assert client.flags & 2
            for command, length, size in (
                (WRITE, None, 100),
                (WRITE, None, 3 << 20),
                (WRITE, 0, 0),
                (WRITE, None, SIZE + 1),
                (TRIM, 100, 0),
                (WRITE_ZEROES, BLOCK, 0),
                (WRITE_ZEROES, SIZE + 1, 0),
            ):
                assert client.do(command, 0, length, b"x" * size).error == EPERM
            assert client.do(WRITE, 0, data=b"x" * 100, flags=FUA).error == EPERM
            for command in (FLUSH, CACHE):
                assert client.do(command).error == 0
            assert client.read(SIZE, 0) == base_path.read_bytes()
        assert disk.dirty_bytes == 0


# What fails beneath


@every_dialect
def test_without_room_a_write_is_enospc_the_old_bytes_stand_and_the_connection_goes_on(
    server: NbdServer, base_path: Path, dialect: DialectName
) -> None:
    model = bytearray(base_path.read_bytes())
    with connected(server, dialect) as client:
        client.write(b"early", 0)
        model[:5] = b"early"
        with files_limited_to(4 * BLOCK):
            for command, offset, length, data in (
                (WRITE, 0, None, b"x" * 8 * BLOCK),
                (WRITE, 9 * BLOCK + 5, None, b"x"),
                (WRITE, 20 * BLOCK, None, b"x" * BLOCK),
                (WRITE_ZEROES, 9 * BLOCK + 5, 2 * BLOCK, b""),
                (TRIM, 9 * BLOCK + 5, 2 * BLOCK, b""),
            ):
                assert client.do(command, offset, length, data).error == ENOSPC
                assert client.do(command, offset, length, data, flags=FUA).error == ENOSPC
            assert client.read(SIZE, 0) == model
            client.write(b"late", 2 * BLOCK)
            model[2 * BLOCK : 2 * BLOCK + 4] = b"late"
        client.write(b"x" * 8 * BLOCK, 20 * BLOCK)
        model[20 * BLOCK : 28 * BLOCK] = b"x" * 8 * BLOCK
        assert client.read(SIZE, 0) == model


@every_dialect
def test_without_room_a_long_write_is_enospc_too(dialect: DialectName) -> None:
    with serving(16 << 20) as server, connected(server, dialect) as client:
        with files_limited_to(1 << 20):
            assert client.do(WRITE, 0, data=b"x" * (3 << 20)).error == ENOSPC
            assert client.read(3 << 20, 0) == bytes(3 << 20)
        client.write(b"x" * (3 << 20), 0)


@contextmanager
def cut_short(path: Path, size: int) -> Iterator[None]:
    """The file ends sooner, and is what it was afterwards."""
    before = path.read_bytes(), path.stat().st_mtime_ns
    os.truncate(path, size)
    try:
        yield
    finally:
        path.write_bytes(before[0])
        os.utime(path, ns=(before[1], before[1]))


@every_dialect
@pytest.mark.parametrize("mapped", [False, True])
def test_a_read_of_a_base_that_was_cut_short_is_eio_and_the_connection_goes_on(
    server: NbdServer, base_path: Path, dialect: DialectName, *, mapped: bool
) -> None:
    content = base_path.read_bytes()
    if mapped:  # as it is once it was read
        server.disk.overlay.views[0] = server.disk.base.view
    with connected(server, dialect) as client, cut_short(base_path, 32 * BLOCK):
        client.write(b"kept" * 1024, 3 * BLOCK)
        requests = [client.request(READ, block * BLOCK, BLOCK) for block in (3, 60, 3, 61, 62, 0)]
        client.send(b"".join(request for _, request in requests))
        replies = [client.reply() for _ in requests]
        assert [reply.cookie for reply in replies] == [cookie for cookie, _ in requests]
        assert [reply.error for reply in replies] == [0, EIO, 0, EIO, EIO, 0]
        assert replies[0].data == replies[2].data == b"kept" * 1024
        assert replies[5].data == content[:BLOCK]
        # A write of part of a block would have to read the rest of it.
        assert client.do(WRITE, 60 * BLOCK + 1, data=b"x").error == EIO
        client.write(b"whol" * 1024, 60 * BLOCK)
        assert client.read(BLOCK, 60 * BLOCK) == b"whol" * 1024
    assert_serves(server)


@pytest.mark.parametrize("dialect", BOTH_STRUCTURED)
@pytest.mark.parametrize("mapped", [False, True])
def test_a_read_in_many_chunks_of_a_base_that_was_cut_short_ends_with_its_error(
    server: NbdServer, base_path: Path, dialect: DialectName, *, mapped: bool
) -> None:
    if mapped:
        server.disk.overlay.views[0] = server.disk.base.view
    with connected(server, dialect) as client, cut_short(base_path, 32 * BLOCK):
        client.do(TRIM, 60 * BLOCK, BLOCK)
        client.write(b"x" * BLOCK, 61 * BLOCK)
        # Base (cut off), a hole, a layer: three chunks, of which the first cannot be had.
        reply = client.do(READ, 59 * BLOCK, 3 * BLOCK)
        assert reply.error == EIO and len(reply.chunks) == 1
        # A layer, a hole, base (cut off): the last one cannot be had.
        client.do(TRIM, 62 * BLOCK, BLOCK)
        assert client.do(READ, 61 * BLOCK, 2 * BLOCK + 100).error == EIO
        assert client.read(BLOCK, 61 * BLOCK) == b"x" * BLOCK
    assert_serves(server)


@every_dialect
def test_a_read_that_can_only_be_half_sent_ends_that_connection_alone(tmp_path: Path, dialect: DialectName) -> None:
    path = tmp_path / "large.img"
    with path.open("wb") as file:
        file.write(b"x" * (4 << 20))
        os.fsync(file.fileno())  # until its blocks are allocated it looks sparse
    with serving(FileBase(path)) as server, RawClient(where(server)) as client:
        client.negotiate(dialect).read(1, 0)  # from now on the base is mapped
        with cut_short(path, 2 << 20):
            client.send(client.request(READ, 0, 4 << 20)[1])
            with pytest.raises(ConnectionError, match="too soon"):
                client.reply()
        assert_serves(server)


@every_dialect
@pytest.mark.parametrize(
    ("trouble", "error"),
    [(MemoryError(), ENOMEM), (OSError(5, "broken"), EIO), (OSError(122, "quota"), ENOSPC), (OSError(), EIO)],
)
def test_what_fails_in_the_system_is_told_and_the_connection_goes_on(
    server: NbdServer, monkeypatch: pytest.MonkeyPatch, dialect: DialectName, trouble: Exception, error: int
) -> None:
    def fail(*_: object) -> None:
        raise trouble

    with connected(server, dialect) as client:
        with monkeypatch.context() as patch:
            patch.setattr(server.disk.overlay, "zero", fail)
            assert client.do(TRIM, 0, 10).error == error
        assert client.do(TRIM, 0, 10).error == 0


def test_a_write_with_no_directory_for_the_overlay_is_eio_and_reads_go_on() -> None:
    with Disk(ZeroBase(SIZE), tmpdir="/nonexistent/folder") as disk, NbdServer(disk) as server:
        with connected(server, "structured") as client:
            reply = client.do(WRITE, 0, data=b"x")
            assert reply.error == EIO and "TMPDIR" in reply.message
            assert client.read(1, 0) == b"\0"
        assert server.errors == []


@every_dialect
def test_what_is_whole_before_a_client_is_out_of_step_has_its_replies(server: NbdServer, dialect: DialectName) -> None:
    with connected(server, dialect) as client:
        for turn in range(20):  # each time in one batch, mostly
            with connected(server, dialect) as other:
                whole = [other.request(WRITE, 0, data=bytes([turn + 1]) * 600)]
                wrong = b"\xff" + other.request(READ, 0, 1)[1][1:]
                other.send(whole[0][1] + wrong)
                reply = other.reply()
                assert (reply.cookie, reply.error) == (whole[0][0], 0)
                assert other.at_end()
        assert client.read(600, 0) == b"\x14" * 600


def test_a_block_that_cannot_be_written_again_is_told_in_words_and_the_connection_goes_on(
    server: NbdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with RawClient(where(server)).negotiate() as first:
        first.write(b"1" * BLOCK, 0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", broken)
        client = RawClient(where(server)).negotiate()
        reply = client.do(WRITE, 0, data=b"2" * BLOCK)
    assert reply.error == EIO
    assert "cannot write the overlay's file" in reply.message
    with client:
        assert client.read(BLOCK, 0) == b"1" * BLOCK


def test_a_block_of_which_the_system_writes_a_part_again_is_written_as_a_whole(
    server: NbdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def half(fd: int, data: memoryview, offset: int) -> int:
        return real(fd, data[: len(data) // 2], offset)

    with RawClient(where(server)).negotiate() as first:
        first.write(b"1" * BLOCK, 0)
    monkeypatch.setattr(os, "pwrite", half)
    with RawClient(where(server)).negotiate() as client:
        client.write(b"2" * BLOCK, 0)
        assert client.read(BLOCK, 0) == b"2" * BLOCK
