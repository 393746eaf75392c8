"""Every command in every dialect, over a real socket, on a real disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowkit.disk import FileBase, Kind
from cowkit.server.server import NbdServer
from tests.server.raw_client import (
    BOTH_STRUCTURED,
    CACHE,
    DF,
    DIALECTS,
    DISC,
    DONE,
    FAST_ZERO,
    FLUSH,
    FUA,
    NO_HOLE,
    NONE,
    OFFSET_DATA,
    OFFSET_HOLE,
    READ,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    DialectName,
    RawClient,
    serving,
    where,
)

BLOCK = 4096
SIZE = 32 * BLOCK + 1000
GIB = 1 << 30


@pytest.fixture
def content() -> bytes:
    return bytes(range(1, 251)) * (SIZE // 250) + b"!" * (SIZE % 250)


@pytest.fixture
def server(tmp_path: Path, content: bytes) -> Iterator[NbdServer]:
    path = tmp_path / "base.img"
    path.write_bytes(content)
    with serving(FileBase(path)) as server:
        yield server


@pytest.fixture(params=DIALECTS)
def client(server: NbdServer, request: pytest.FixtureRequest) -> Iterator[RawClient]:
    with RawClient(where(server)) as client:
        yield client.negotiate(request.param)


@pytest.fixture(params=BOTH_STRUCTURED)
def structured(server: NbdServer, request: pytest.FixtureRequest) -> Iterator[RawClient]:
    with RawClient(where(server)) as client:
        yield client.negotiate(request.param)


# READ


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1), (0, SIZE), (SIZE - 1, 1), (4095, 2), (5, 3 * BLOCK), (BLOCK, BLOCK), (SIZE - 1001, 1001)],
)
def test_read_gives_the_bytes_of_the_base(client: RawClient, content: bytes, offset: int, length: int) -> None:
    assert client.read(length, offset) == content[offset : offset + length]


def test_read_gives_what_was_written_zeroed_and_never_touched_in_one_reply(client: RawClient, content: bytes) -> None:
    model = bytearray(content)
    client.write(b"w" * 6000, BLOCK + 7)
    model[BLOCK + 7 : BLOCK + 6007] = b"w" * 6000
    client.do(WRITE_ZEROES, 4 * BLOCK - 100, 3 * BLOCK)
    model[4 * BLOCK - 100 : 7 * BLOCK - 100] = bytes(3 * BLOCK)
    client.write(b"x" * BLOCK, 9 * BLOCK)
    model[9 * BLOCK : 10 * BLOCK] = b"x" * BLOCK
    for offset, length in ((0, SIZE), (3, SIZE - 3), (BLOCK, 5 * BLOCK), (6 * BLOCK, BLOCK)):
        assert client.read(length, offset) == model[offset : offset + length]


def test_a_structured_read_has_a_hole_chunk_for_each_run_of_zeroes_and_done_on_the_last(structured: RawClient) -> None:
    structured.do(TRIM, BLOCK, 2 * BLOCK)
    structured.do(WRITE_ZEROES, 5 * BLOCK, 2 * BLOCK)
    reply = structured.do(READ, 0, 7 * BLOCK)
    assert reply.holes == [(BLOCK, 2 * BLOCK), (5 * BLOCK, 2 * BLOCK)]
    assert [chunk.kind for chunk in reply.chunks] == [OFFSET_DATA, OFFSET_HOLE, OFFSET_DATA, OFFSET_HOLE]
    assert [chunk.flags for chunk in reply.chunks] == [0, 0, 0, DONE]


def test_a_structured_read_is_never_answered_with_a_simple_reply(structured: RawClient, content: bytes) -> None:
    reply = structured.do(READ, 0, 100)
    assert [(chunk.kind, chunk.flags) for chunk in reply.chunks] == [(OFFSET_DATA, DONE)]
    assert reply.data == content[:100]


def test_the_chunks_of_a_read_carry_the_disks_offsets_wherever_it_begins(structured: RawClient) -> None:
    structured.write(b"o" * BLOCK, 3 * BLOCK)
    structured.do(TRIM, 5 * BLOCK, BLOCK)
    reply = structured.do(READ, 2 * BLOCK + 10, 5 * BLOCK)
    offsets = [int.from_bytes(chunk.payload[:8]) for chunk in reply.chunks]
    assert offsets == [2 * BLOCK + 10, 5 * BLOCK, 6 * BLOCK]
    assert reply.data[BLOCK - 10 : 2 * BLOCK - 10] == b"o" * BLOCK


def test_with_df_a_read_is_one_chunk_whatever_it_is_made_of(structured: RawClient, content: bytes) -> None:
    structured.do(TRIM, BLOCK, 2 * BLOCK)
    structured.write(b"x" * BLOCK, 5 * BLOCK)
    reply = structured.do(READ, 10, 20 * BLOCK, flags=DF)
    assert [(chunk.kind, chunk.flags) for chunk in reply.chunks] == [(OFFSET_DATA, DONE)]
    model = bytearray(content)
    model[BLOCK : 3 * BLOCK] = bytes(2 * BLOCK)
    model[5 * BLOCK : 6 * BLOCK] = b"x" * BLOCK
    assert reply.data == model[10 : 20 * BLOCK + 10]


@pytest.mark.parametrize("dialect", BOTH_STRUCTURED)
def test_with_df_even_64_mib_of_zeroes_and_data_are_one_chunk(dialect: DialectName) -> None:
    with serving(64 << 20) as server, RawClient(where(server)) as client:
        client.negotiate(dialect)
        client.write(b"x", 40 << 20)
        reply = client.do(READ, 0, 64 << 20, flags=DF)
        assert [chunk.kind for chunk in reply.chunks] == [OFFSET_DATA]
        assert reply.data[40 << 20 : (40 << 20) + 1] == b"x"
        assert reply.data.count(0) == (64 << 20) - 1


@pytest.mark.parametrize("dialect", BOTH_STRUCTURED)
def test_the_holes_of_a_sparse_base_travel_as_holes(tmp_path: Path, dialect: DialectName) -> None:
    path = tmp_path / "sparse.img"
    with path.open("wb") as file:
        file.truncate(4 << 20)
        file.seek(1 << 20)
        file.write(b"d" * 65536)
    with serving(FileBase(path)) as server, RawClient(where(server)) as client:
        client.negotiate(dialect)
        reply = client.do(READ, 0, 4 << 20)
        assert reply.data == path.read_bytes()
        assert sum(length for _, length in reply.holes) >= 3 << 20


def test_a_read_with_fua_is_a_read(client: RawClient, content: bytes) -> None:
    assert client.do(READ, 1, 50, flags=FUA).data == content[1:51]


def test_requests_of_no_bytes_are_answered_and_change_nothing(server: NbdServer, client: RawClient) -> None:
    for command in (READ, WRITE, TRIM, CACHE, WRITE_ZEROES):
        for offset in (0, 77, SIZE):
            reply = client.do(command, offset, 0)
            assert (reply.error, reply.data) == (0, b"")
    assert server.disk.dirty_bytes == 0


# WRITE


def test_what_write_acknowledged_every_connection_reads(server: NbdServer, client: RawClient) -> None:
    client.write(b"seen by all", 5000)
    with RawClient(where(server)) as other:
        assert other.negotiate("simple").read(11, 5000) == b"seen by all"
    assert server.disk.pread(11, 5000) == b"seen by all"


def test_a_write_of_part_of_a_block_keeps_the_rest_of_it(client: RawClient, content: bytes) -> None:
    client.write(b"xyz", 2 * BLOCK - 1)
    assert client.read(SIZE, 0) == content[: 2 * BLOCK - 1] + b"xyz" + content[2 * BLOCK + 2 :]


def test_the_last_bytes_of_a_ragged_disk_can_be_written(client: RawClient, content: bytes) -> None:
    client.write(b"end", SIZE - 3)
    assert client.read(1003, SIZE - 1003) == content[SIZE - 1003 : -3] + b"end"


@pytest.mark.parametrize("command", [WRITE, WRITE_ZEROES, TRIM])
def test_a_change_with_fua_is_there_for_every_connection_when_it_is_answered(
    server: NbdServer, client: RawClient, command: int
) -> None:
    data = b"f" * 300 if command == WRITE else b""
    assert client.do(command, 6000, 300, data, flags=FUA).error == 0
    with RawClient(where(server)) as other:
        assert other.negotiate("structured").read(300, 6000) == (data or bytes(300))


def test_fua_is_accepted_on_every_command(server: NbdServer, request: pytest.FixtureRequest) -> None:
    for dialect in DIALECTS:
        with RawClient(where(server)) as client:
            client.negotiate(dialect, *(["base:allocation"] if dialect != "simple" else []))
            assert client.flags & 1 << 3
            for command in range(8):
                if command == DISC or (command == 7 and dialect == "simple"):
                    continue
                data = b"1234" if command == WRITE else b""
                length = 0 if command == FLUSH else 4
                assert client.do(command, 0, length, data, flags=FUA).error == 0


# FLUSH


def test_a_flush_covers_what_other_connections_wrote(server: NbdServer, client: RawClient) -> None:
    with RawClient(where(server)) as other:
        other.negotiate("structured").write(b"other's", 9000)
        assert client.do(FLUSH).error == 0
        assert client.read(7, 9000) == b"other's"


# DISC


def test_disc_finishes_what_is_outstanding_has_no_reply_and_closes(server: NbdServer, client: RawClient) -> None:
    requests = [client.request(WRITE, block * BLOCK, data=b"z" * 100)[1] for block in range(20)]
    client.send(b"".join(requests) + client.header(DISC) + client.request(WRITE, 0, data=b"never")[1])
    assert [client.reply().error for _ in requests] == [0] * 20
    assert client.at_end()
    assert server.disk.pread(5, 0) == b"zzzzz"


def test_disc_takes_any_flags_and_lengths(client: RawClient) -> None:
    client.send(client.header(DISC, 2**64 - 1, 2**32 - 1, flags=FUA | DF))
    assert client.at_end()


# TRIM and WRITE_ZEROES


@pytest.mark.parametrize(
    ("offset", "length"), [(0, SIZE), (0, BLOCK), (100, 50), (BLOCK - 1, 2), (77, 3 * BLOCK), (SIZE - 5, 5)]
)
@pytest.mark.parametrize("command", [TRIM, WRITE_ZEROES])
def test_trim_and_write_zeroes_read_back_zero_and_nothing_else_does(
    client: RawClient, content: bytes, command: int, offset: int, length: int
) -> None:
    client.write(content[:BLOCK], 0)
    assert client.do(command, offset, length).error == 0
    model = bytearray(content)
    model[offset : offset + length] = bytes(length)
    assert client.read(SIZE, 0) == model


@pytest.mark.parametrize("flags", [0, NO_HOLE, FAST_ZERO, NO_HOLE | FAST_ZERO, FUA | NO_HOLE | FAST_ZERO])
def test_write_zeroes_takes_its_flags(client: RawClient, flags: int) -> None:
    assert client.do(WRITE_ZEROES, 100, 2 * BLOCK, flags=flags).error == 0
    assert client.read(2 * BLOCK, 100) == bytes(2 * BLOCK)


@pytest.mark.parametrize("command", [TRIM, WRITE_ZEROES])
def test_trim_and_write_zeroes_free_overlay_space(tmp_path: Path, command: int) -> None:
    with serving(16 << 20) as server, RawClient(where(server)) as client:
        client.negotiate("structured").write(os.urandom(8 << 20), 0)
        overlay = server.disk.overlay
        before = overlay.layers[overlay.top].space()
        client.do(command, 0, 8 << 20)
        assert overlay.layers[overlay.top].space() <= before - (7 << 20)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_write_zeroes_of_nearly_4_gib_zeroes_all_of_it(dialect: DialectName) -> None:
    size = 5 * GIB
    with serving(size) as server, RawClient(where(server)) as client:
        client.negotiate(dialect)
        marks = [0, (64 << 20) - 1, 64 << 20, 2 * GIB, 4 * GIB - 2, 4 * GIB - 1, 4 * GIB]
        for offset in marks:
            client.write(b"x", offset)
        assert client.do(WRITE_ZEROES, 0, 2**32 - 1).error == 0
        assert [client.read(1, offset) for offset in marks] == [b"\0"] * 5 + [b"x", b"x"]


@pytest.mark.parametrize("command", [TRIM, WRITE_ZEROES])
def test_8_gib_are_zeroed_in_one_extended_request(command: int) -> None:
    with serving(16 * GIB) as server, RawClient(where(server)) as client:
        client.negotiate("extended")
        marks = [BLOCK - 1, BLOCK, 4 * GIB - 1, 4 * GIB, 8 * GIB + BLOCK - 1, 8 * GIB + BLOCK]
        for offset in marks:
            client.write(b"x", offset)
        assert client.do(command, BLOCK, 8 * GIB).error == 0
        assert [client.read(1, offset) for offset in marks] == [b"x", *[b"\0"] * 4, b"x"]
        assert [extent.kind for extent in server.disk.dirty_extents()] == [Kind.DATA, Kind.ZERO, Kind.DATA]


# CACHE


def test_cache_has_no_visible_effect(server: NbdServer, client: RawClient, content: bytes) -> None:
    assert client.do(CACHE, 10, SIZE - 10).error == 0
    assert client.read(SIZE, 0) == content
    assert server.disk.dirty_bytes == 0


def test_cache_with_copy_on_cache_copies_into_the_overlay(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cached.img"
    path.write_bytes(content)
    with serving(FileBase(path), cow_on_cache=True) as server, RawClient(where(server)) as client:
        client.negotiate("structured")
        assert client.do(CACHE, BLOCK, 2 * BLOCK).error == 0
        assert [*server.disk.dirty_extents()] == [(BLOCK, 2 * BLOCK, Kind.DATA)]
        assert client.read(SIZE, 0) == content


# Replies


def test_a_reply_carries_the_cookie_whatever_it_is(client: RawClient) -> None:
    for cookie in (0, 1, 2**63, 2**64 - 1):
        client.send(client.header(FLUSH, cookie=cookie))
        assert client.reply().cookie == cookie


def test_an_extended_reply_echoes_the_offset(server: NbdServer) -> None:
    with RawClient(where(server)) as client:
        client.negotiate("extended", "base:allocation")
        client.do(TRIM, BLOCK, BLOCK)
        for command, length in ((READ, 3 * BLOCK), (TRIM, 5), (CACHE, 5), (WRITE_ZEROES, 5), (7, 100)):
            assert {chunk.offset for chunk in client.do(command, 7, length).chunks} == {7}
        assert {chunk.offset for chunk in client.do(READ, 2**64 - 1, 5).chunks} == {2**64 - 1}


def test_success_without_data_is_one_empty_chunk(structured: RawClient) -> None:
    reply = structured.do(FLUSH)
    assert [(chunk.kind, chunk.flags, chunk.payload) for chunk in reply.chunks] == [(NONE, DONE, b"")]


def test_each_request_of_a_long_pipeline_is_answered(client: RawClient) -> None:
    requests = [client.request((READ, WRITE_ZEROES, FLUSH)[n % 3], 0, 0 if n % 3 == 2 else 64) for n in range(3000)]
    client.send(b"".join(request for _, request in requests))
    assert {client.reply().cookie for _ in requests} == {cookie for cookie, _ in requests}


def test_the_server_offers_what_it_can_do(server: NbdServer) -> None:
    everywhere = sum(1 << bit for bit in (0, 2, 3, 5, 6, 8, 10, 11))
    for dialect, more in (("simple", 0), ("structured", 1 << 7), ("extended", 1 << 7 | 1 << 12)):
        with RawClient(where(server)) as client:
            client.negotiate(dialect, *(["base:allocation"] if more else []))  # type: ignore[arg-type]
            assert (client.size, client.flags) == (SIZE, everywhere | more)
