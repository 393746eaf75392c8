"""BLOCK_STATUS: the three kinds of metadata context, in both dialects that have them."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from cowkit.disk import Disk, FileBase, ZeroBase
from cowkit.server.block_status import MOST_DESCRIPTORS, describe
from cowkit.server.server import NbdServer
from tests.server.negotiating import ACK, LIST_META_CONTEXT, META_CONTEXT, option, queries
from tests.server.raw_client import (
    BLOCK_STATUS,
    BOTH_STRUCTURED,
    DONE,
    EINVAL,
    FUA,
    PAYLOAD_LEN,
    REQ_ONE,
    STATUS,
    STATUS_EXT,
    DialectName,
    RawClient,
    assert_serves,
    serving,
    status_payload,
    where,
)

BLOCK = 4096
GIB = 1 << 30
ALLOCATION, DIRTY, DEPTH = "base:allocation", "qemu:dirty-bitmap:cow", "qemu:allocation-depth"
HOLE_AND_ZERO = 3

both = pytest.mark.parametrize("dialect", BOTH_STRUCTURED)


@pytest.fixture
def sparse(tmp_path: Path) -> FileBase:
    """Sixteen blocks; the first four and the last are data, the others a hole."""
    path = tmp_path / "sparse.img"
    with path.open("wb") as file:
        file.truncate(16 * BLOCK)
        file.write(b"d" * 4 * BLOCK)
        file.seek(15 * BLOCK)
        file.write(b"e" * BLOCK)
    return FileBase(path)


@pytest.fixture
def server(sparse: FileBase) -> Iterator[NbdServer]:
    with serving(sparse) as server:
        yield server


def blocks(*runs: tuple[int, int]) -> list[tuple[int, int]]:
    """Descriptors given in blocks."""
    return [(count * BLOCK, flags) for count, flags in runs]


@both
def test_base_allocation_tells_data_holes_of_the_base_and_zeroes(server: NbdServer, dialect: DialectName) -> None:
    disk = server.disk
    disk.zero(BLOCK, BLOCK)
    disk.pwrite(b"x", 8 * BLOCK)
    with RawClient(where(server)) as client:
        client.negotiate(dialect, ALLOCATION)
        found = client.block_status(16 * BLOCK, 0)[ALLOCATION]
    assert found == blocks((1, 0), (1, HOLE_AND_ZERO), (2, 0), (4, HOLE_AND_ZERO), (1, 0), (6, HOLE_AND_ZERO), (1, 0))


@both
def test_the_dirty_bitmap_tells_what_the_overlay_owns_since_the_beginning(
    server: NbdServer, dialect: DialectName
) -> None:
    disk = server.disk
    disk.pwrite(b"x" * 2 * BLOCK, 2 * BLOCK + 5)
    disk.trim(BLOCK, 9 * BLOCK)
    disk.checkpoint("later")
    disk.pwrite(b"y", 0)
    with RawClient(where(server)) as client:
        client.negotiate(dialect, DIRTY)
        found = client.block_status(16 * BLOCK, 0)[DIRTY]
    assert found == blocks((1, 1), (1, 0), (3, 1), (4, 0), (1, 1), (6, 0))


@both
def test_each_checkpoint_has_a_bitmap_of_what_was_changed_since(server: NbdServer, dialect: DialectName) -> None:
    disk = server.disk
    disk.pwrite(b"x" * BLOCK, 0)
    disk.checkpoint("one")
    disk.pwrite(b"x" * BLOCK, BLOCK)
    disk.checkpoint("two")
    disk.pwrite(b"x" * BLOCK, 0)
    disk.trim(BLOCK, 5 * BLOCK)
    names = [f"qemu:dirty-bitmap:{name}" for name in ("cow", "one", "two")]
    with RawClient(where(server)) as client:
        client.negotiate(dialect, *names)
        found = client.block_status(16 * BLOCK, 0)
    assert found[names[0]] == blocks((2, 1), (3, 0), (1, 1), (10, 0))
    assert found[names[1]] == blocks((2, 1), (3, 0), (1, 1), (10, 0))
    assert found[names[2]] == blocks((1, 1), (4, 0), (1, 1), (10, 0))


@both
def test_the_allocation_depth_counts_layers_from_the_newest_down_to_the_base(
    server: NbdServer, dialect: DialectName
) -> None:
    disk = server.disk
    for block, name in ((0, "a"), (1, "b"), (2, "c")):
        disk.pwrite(b"x" * BLOCK, block * BLOCK)
        disk.checkpoint(name)
    with RawClient(where(server)) as client:
        client.negotiate(dialect, DEPTH)
        # The newest layer is the one that the next write goes to: empty as yet.
        assert client.block_status(16 * BLOCK, 0)[DEPTH] == blocks((1, 4), (1, 3), (1, 2), (1, 5), (11, 0), (1, 5))
        disk.pwrite(b"x" * BLOCK, 9 * BLOCK)
        disk.trim(BLOCK, 11 * BLOCK)
        found = client.block_status(16 * BLOCK, 0)[DEPTH]
    assert found == blocks((1, 4), (1, 3), (1, 2), (1, 5), (5, 0), (1, 1), (1, 0), (1, 1), (3, 0), (1, 5))


def test_a_layer_that_another_connection_adds_meanwhile_is_the_newest() -> None:
    with Disk(ZeroBase(16 * BLOCK)) as disk:
        disk.pwrite(b"x", 0)
        disk.checkpoint()
        overlay, real = disk.overlay, disk.overlay.map

        class Map:
            """The owner map; when its runs are looked at, somebody writes first."""

            def runs(self, first: int, last: int) -> Iterator[tuple[int, int, int]]:
                overlay.map = real
                overlay.write(memoryview(b"y"), 4 * BLOCK)
                return real.runs(first, last)

        overlay.map = Map()  # type: ignore[assignment]
        assert describe(disk, DEPTH, 0, 16 * BLOCK, MOST_DESCRIPTORS) == blocks((1, 2), (3, 0), (1, 1), (11, 0))


@both
def test_there_is_one_chunk_for_each_negotiated_context_and_the_last_says_done(
    server: NbdServer, dialect: DialectName
) -> None:
    with RawClient(where(server)) as client:
        client.negotiate(dialect, DEPTH, ALLOCATION, DIRTY)
        reply = client.do(BLOCK_STATUS, 0, 16 * BLOCK)
        assert set(reply.status) == set(client.contexts.values()) and len(reply.status) == 3
        assert [chunk.flags for chunk in reply.chunks] == [0, 0, DONE]
        assert {chunk.kind for chunk in reply.chunks} == {STATUS if dialect == "structured" else STATUS_EXT}


@both
def test_with_req_one_there_is_exactly_one_extent_and_it_does_not_pass_the_request(
    server: NbdServer, dialect: DialectName
) -> None:
    server.disk.pwrite(b"x" * BLOCK, 2 * BLOCK)
    with RawClient(where(server)) as client:
        client.negotiate(dialect, ALLOCATION, DIRTY, DEPTH)
        for offset, length in ((0, 16 * BLOCK), (10, 3), (2 * BLOCK - 1, 2 * BLOCK), (5 * BLOCK, BLOCK)):
            for found in client.block_status(length, offset, flags=REQ_ONE).values():
                assert len(found) == 1 and 0 < found[0][0] <= length


@both
def test_extents_begin_at_the_offset_and_end_within_the_request(server: NbdServer, dialect: DialectName) -> None:
    server.disk.pwrite(b"x" * BLOCK, 2 * BLOCK)
    with RawClient(where(server)) as client:
        client.negotiate(dialect, ALLOCATION, DIRTY, DEPTH)
        for offset, length in ((1, 1), (4095, 2), (BLOCK + 7, 9 * BLOCK), (16 * BLOCK - 1, 1), (0, 16 * BLOCK)):
            for found in client.block_status(length, offset, flags=FUA).values():
                assert sum(size for size, _ in found) == length
                assert all(one[1] != other[1] for one, other in itertools.pairwise(found))


@both
def test_a_block_status_of_no_bytes_or_without_contexts_is_invalid(server: NbdServer, dialect: DialectName) -> None:
    with RawClient(where(server)) as client:
        client.negotiate(dialect, ALLOCATION)
        assert client.do(BLOCK_STATUS, 0, 0).error == EINVAL
        assert client.do(BLOCK_STATUS, 0, 1).error == 0
    with RawClient(where(server)) as client:
        client.negotiate(dialect)
        assert client.do(BLOCK_STATUS, 0, 1).error == EINVAL
        assert client.do(BLOCK_STATUS, 0, 0).error == EINVAL


def test_simple_replies_have_no_block_status(server: NbdServer) -> None:
    with RawClient(where(server)) as client:
        client.negotiate("simple")
        assert client.do(BLOCK_STATUS, 0, 1).error == EINVAL
        assert client.read(1, 0) == b"d"


@both
def test_a_reply_has_so_many_extents_at_most_and_the_client_asks_on(
    monkeypatch: pytest.MonkeyPatch, dialect: DialectName
) -> None:
    assert MOST_DESCRIPTORS <= 2**20
    monkeypatch.setattr("cowkit.server.requests.MOST_DESCRIPTORS", 100)
    with serving(1000 * BLOCK) as server, RawClient(where(server)) as client:
        for block in range(0, 1000, 2):
            server.disk.pwrite(b"x", block * BLOCK)
        client.negotiate(dialect, ALLOCATION, DIRTY)
        at, found = 0, []
        while at < 1000 * BLOCK:
            replied = client.block_status(1000 * BLOCK - at, at)
            assert {len(each) for each in replied.values()} == {50}
            found += replied[DIRTY]
            at = sum(length for length, _ in found)
        assert found == [(BLOCK, 1 - block % 2) for block in range(1000)]


def test_a_block_status_over_8_gib_is_one_extended_request() -> None:
    with serving(16 * GIB) as server, RawClient(where(server)) as client:
        client.negotiate("extended", ALLOCATION, DIRTY, DEPTH)
        server.disk.pwrite(b"x" * BLOCK, 8 * GIB)
        found = client.block_status(8 * GIB + 2 * BLOCK, 0)
        assert found[ALLOCATION] == [(8 * GIB, HOLE_AND_ZERO), (BLOCK, 0), (BLOCK, HOLE_AND_ZERO)]
        assert found[DIRTY] == [(8 * GIB, 0), (BLOCK, 1), (BLOCK, 0)]
        assert found[DEPTH] == [(8 * GIB, 0), (BLOCK, 1), (BLOCK, 0)]


def test_a_status_payload_names_the_contexts_that_are_told(server: NbdServer) -> None:
    with RawClient(where(server)) as client:
        client.negotiate("extended", ALLOCATION, DIRTY, DEPTH)
        for names in ([DIRTY], [DEPTH, ALLOCATION], [ALLOCATION, DIRTY, DEPTH]):
            ids = [client.contexts[name] for name in names]
            payload = status_payload(3 * BLOCK, ids)
            reply = client.do(BLOCK_STATUS, BLOCK, data=payload, flags=PAYLOAD_LEN)
            assert reply.error == 0 and list(reply.status) == ids
            assert {sum(length for length, _ in found) for found in reply.status.values()} == {3 * BLOCK}
            reply = client.do(BLOCK_STATUS, BLOCK, data=payload, flags=PAYLOAD_LEN | REQ_ONE)
            assert {len(found) for found in reply.status.values()} == {1}


@pytest.mark.parametrize(
    ("length", "ids", "more"),
    [
        (10, [], b""),
        (10, [99], b""),
        (10, [0, 0], b""),
        (10, [0], b"\0"),
        (0, [0], b""),
        (16 * BLOCK + 1, [0], b""),
        (2**64 - 1, [0], b""),
        (10, list(range(100_000)), b""),
        (10, [0] * 600_000, b""),
    ],
)
def test_a_status_payload_that_makes_no_sense_is_invalid_and_the_next_request_is_served(
    server: NbdServer, length: int, ids: Sequence[int], more: bytes
) -> None:
    with RawClient(where(server)) as client:
        client.negotiate("extended", ALLOCATION)
        reply = client.do(BLOCK_STATUS, 0, data=status_payload(length, ids) + more, flags=PAYLOAD_LEN)
        assert reply.error == EINVAL and reply.message
        assert client.do(BLOCK_STATUS, 0, data=b"short", flags=PAYLOAD_LEN).error == EINVAL
        assert client.read(1, 0) == b"d"


def test_the_bitmap_of_a_checkpoint_that_is_gone_is_an_error_and_the_connection_goes_on(server: NbdServer) -> None:
    server.disk.checkpoint("first")
    server.disk.checkpoint("second")
    with RawClient(where(server)) as client:
        client.negotiate("structured", "qemu:dirty-bitmap:second")
        assert client.block_status(BLOCK, 0)
        server.disk.rollback("first")
        reply = client.do(BLOCK_STATUS, 0, BLOCK)
        assert reply.error == EINVAL and "second" in reply.message
        assert client.read(1, 0) == b"d"


def test_contexts_are_listed_with_one_for_each_checkpoint(server: NbdServer) -> None:
    server.disk.checkpoint("a")
    with RawClient(where(server)) as client:
        client.greet()
        for wanted, expected in (
            ((), [ALLOCATION, DEPTH, DIRTY, "qemu:dirty-bitmap:a"]),
            (("qemu:",), [DEPTH, DIRTY, "qemu:dirty-bitmap:a"]),
            (("qemu:dirty-bitmap:",), [DIRTY, "qemu:dirty-bitmap:a"]),
            (("nobody:knows", "base:"), [ALLOCATION]),
        ):
            client.send(option(LIST_META_CONTEXT, queries("", *wanted)))
            *listed, last = client.option_replies()
            assert last[1] == ACK and {kind for _, kind, _ in listed} == {META_CONTEXT}
            assert [data[4:].decode() for _, _, data in listed] == expected
    assert_serves(server)


@both
def test_after_random_changes_each_context_tells_what_the_disk_knows(tmp_path: Path, dialect: DialectName) -> None:
    rng = random.Random(3)
    count = 300
    path = tmp_path / "base.img"
    with path.open("wb") as file:
        file.truncate(count * BLOCK - 100)
        for _ in range(20):
            file.seek(rng.randrange(count - 1) * BLOCK)
            file.write(b"d" * BLOCK)
    with serving(FileBase(path)) as server:
        disk = server.disk
        for step in range(200):
            offset = rng.randrange(disk.size)
            length = min(rng.choice([1, 500, BLOCK, 10 * BLOCK]), disk.size - offset)
            if rng.random() < 0.5:
                disk.pwrite(b"w" * length, offset)
            else:
                disk.trim(length, offset)
            if step % 50 == 49:
                disk.checkpoint(f"at-{step}")
        names = [f"at-{step}" for step in (49, 99, 149, 199)]
        with RawClient(where(server)) as client:
            client.negotiate(dialect, ALLOCATION, DIRTY, DEPTH, *(f"qemu:dirty-bitmap:{name}" for name in names))
            for _ in range(50):
                offset = rng.randrange(disk.size)
                length = rng.randrange(1, disk.size - offset + 1)
                found = client.block_status(length, offset)
                assert _runs(found[ALLOCATION], offset, 0) == _joined(
                    (e.offset, e.length) for e in disk.allocation(offset, length) if e.kind == "data"
                )
                assert _runs(found[DIRTY], offset, 1) == _joined(
                    (e.offset, e.length) for e in disk.dirty_extents(offset, length)
                )
                for name in names:
                    assert _runs(found[f"qemu:dirty-bitmap:{name}"], offset, 1) == _joined(
                        (e.offset, e.length) for e in disk.dirty_extents(offset, length, since=name)
                    )
                deep = {block for depth in range(1, 6) for block in _blocks(found[DEPTH], offset, depth)}
                assert {*_blocks(found[DIRTY], offset, 1)} <= deep


def _runs(found: list[tuple[int, int]], offset: int, flags: int) -> list[tuple[int, int]]:
    runs = []
    for length, state in found:
        if state == flags:
            runs.append((offset, length))
        offset += length
    return runs


def _blocks(found: list[tuple[int, int]], offset: int, flags: int) -> Iterator[int]:
    for start, length in _runs(found, offset, flags):
        yield from range(start // BLOCK, (start + length - 1) // BLOCK + 1)


def _joined(runs: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for offset, length in runs:
        if joined and sum(joined[-1]) == offset:
            joined[-1] = (joined[-1][0], joined[-1][1] + length)
        else:
            joined.append((offset, length))
    return joined


def test_statuses_beside_writes_and_checkpoints_are_whole(server: NbdServer) -> None:
    ended = threading.Event()

    def work() -> None:
        rng = random.Random(1)
        for number in range(150):
            server.disk.pwrite(b"x", rng.randrange(16 * BLOCK))
            server.disk.checkpoint()
            if number % 20 == 19:
                server.disk.reset()
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        with RawClient(where(server)) as client:
            client.negotiate("structured", ALLOCATION, DIRTY, DEPTH)
            while not ended.is_set():
                for found in client.block_status(16 * BLOCK, 0).values():
                    assert sum(length for length, _ in found) == 16 * BLOCK
    finally:
        thread.join(30)
