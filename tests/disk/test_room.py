"""When room is found in a file, and how much of it ahead of what is written."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cowkit.disk import room
from cowkit.disk.room import Room

KIB = 1 << 10
MIB = 1 << 20
PIECE = 256 * KIB
LIMIT = 64 * MIB


class System:
    """Files that have what was found in them, and nothing else."""

    def __init__(self) -> None:
        self.found: list[tuple[int, int]] = []
        """Where each range begins and ends."""
        self.fails = 0
        """The error of what goes beyond ``full``."""
        self.full = LIMIT
        self.writes = False
        """Whether the C library writes to each block instead."""
        self.free = 100 << 30
        self.seconds = 0.0

    def find(self, _: int, offset: int, length: int) -> None:
        if offset + length > self.full:
            raise OSError(self.fails, os.strerror(self.fails))
        self.found.append((offset, offset + length))

    def seek(self, _: int, offset: int, whence: int) -> int:
        assert whence == os.SEEK_DATA
        if self.writes:
            return offset
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))

    def space(self, _: int) -> os.statvfs_result:
        return os.statvfs_result((4096, 4096, 0, 0, self.free // 4096, 0, 0, 0, 0, 255))

    @property
    def ends(self) -> int:
        """Where the found room ends."""
        return max(end for _, end in self.found)


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    made = System()
    monkeypatch.setattr("os.posix_fallocate", made.find)
    monkeypatch.setattr("os.lseek", made.seek)
    monkeypatch.setattr("os.fstatvfs", made.space)
    monkeypatch.setattr(room, "on_tmpfs", lambda _: False)
    return made


def stream(to: Room, start: int, pieces: int) -> None:
    for number in range(pieces):
        to.find(3, start + number * PIECE, PIECE, limit=LIMIT)


def test_pieces_that_do_not_follow_one_another_find_their_own_room_and_no_more(system: System) -> None:
    made = Room()
    for offset in (0, 8 * MIB, 4 * MIB, 16 * MIB):
        made.find(3, offset, PIECE, limit=LIMIT)
    assert system.found == [(offset, offset + PIECE) for offset in (0, 8 * MIB, 4 * MIB, 16 * MIB)]


def test_room_is_found_for_each_byte_of_a_stream_once(system: System) -> None:
    stream(Room(), 0, 40)
    assert system.found[0][0] == 0
    assert all(end == start for (_, end), (start, _) in zip(system.found, system.found[1:], strict=False))
    assert system.ends >= 40 * PIECE
    assert len(system.found) < 10


def test_no_more_is_found_ahead_than_the_stream_has_had_nor_than_4_mib(system: System) -> None:
    made = Room()
    for number in range(200):
        made.find(3, number * PIECE, PIECE, limit=LIMIT)
        written = (number + 1) * PIECE
        assert system.ends - written <= min(written, 4 * MIB)


def test_none_is_found_beyond_the_limit(system: System) -> None:
    stream(Room(), 0, LIMIT // PIECE)
    assert system.ends == LIMIT


def test_without_a_limit_none_is_found_ahead(system: System) -> None:
    made = Room()
    for number in range(20):
        made.find(3, number * PIECE, PIECE)
        assert system.ends == (number + 1) * PIECE


def test_room_ahead_of_what_does_not_come_is_4_mib_in_all_and_then_no_more_is_found(system: System) -> None:
    made = Room()
    ends = []
    for number in range(200):
        stream(made, number * 16 * PIECE % LIMIT, 4)
        ends.append(sum(end - start for start, end in system.found) - (number + 1) * 4 * PIECE)
    assert 0 < ends[-1] <= 8 * MIB
    assert ends[-1] == ends[100]


def test_what_was_found_ahead_is_given_up_once_and_no_more_is_found(system: System) -> None:
    made = Room()
    stream(made, 0, 3)
    assert made.give_up()
    assert not made.give_up()
    system.found.clear()
    stream(made, 3 * PIECE, 5)
    assert system.found == [((3 + number) * PIECE, (4 + number) * PIECE) for number in range(5)]


def test_where_none_was_found_ahead_there_is_none_to_give_up(system: System) -> None:
    made = Room()
    made.find(3, 0, PIECE, limit=LIMIT)
    assert not made.give_up()


def test_a_new_stream_begins_small(system: System) -> None:
    made = Room()
    stream(made, 0, 40)
    system.found.clear()
    stream(made, 32 * MIB, 2)
    assert system.found == [(32 * MIB, 32 * MIB + PIECE), (32 * MIB + PIECE, 32 * MIB + 3 * PIECE)]


def test_where_little_is_left_none_is_found_ahead(system: System) -> None:
    system.free = (1 << 30) - 4096
    made = Room()
    for number in range(20):
        made.find(3, number * PIECE, PIECE, limit=LIMIT)
        assert system.ends == (number + 1) * PIECE


def test_where_there_is_none_ahead_the_piece_itself_still_finds_it(system: System) -> None:
    system.fails = errno.ENOSPC
    system.full = 3 * PIECE
    stream(Room(), 0, 3)
    assert system.ends == system.full


def test_where_there_is_none_at_all_it_is_not_looked_for_again(system: System) -> None:
    system.fails = errno.ENOSPC
    system.full = 3 * PIECE
    made = Room()
    stream(made, 0, 5)
    system.full = LIMIT
    system.found.clear()
    stream(made, 0, 5)
    assert system.found == []


def test_where_finding_room_means_writing_none_is_found_ahead_for_others_may_write_there(system: System) -> None:
    system.writes = True
    made = Room()
    for number in range(20):
        made.find(3, number * PIECE, PIECE, limit=LIMIT)
        assert system.ends == (number + 1) * PIECE


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def test_what_is_there_already_stays_when_room_is_found_around_it(file: int) -> None:
    os.ftruncate(file, 8 * MIB)
    os.pwrite(file, b"mine" * KIB, 3 * PIECE + 512)
    made = Room()
    for number in range(8):
        made.find(file, number * PIECE, PIECE, limit=8 * MIB)
    assert os.pread(file, 4 * KIB, 3 * PIECE + 512) == b"mine" * KIB
    assert os.fstat(file).st_size == 8 * MIB
