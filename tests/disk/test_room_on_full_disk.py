"""Room that was found ahead of writes is there for other writes when the disk is full."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest

from cowkit.disk import Disk, ZeroBase

MIB = 1 << 20
PIECE = 256 << 10
SIZE = 64 * MIB


class Full:
    """A file system on which a file has so much room; what is written is always new."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room = room
        self._find, self._write = os.posix_fallocate, os.pwritev
        monkeypatch.setattr("os.posix_fallocate", self.find)
        monkeypatch.setattr("os.pwritev", self.write)

    def check(self, fd: int, more: int) -> None:
        if os.fstat(fd).st_blocks * 512 + more > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def find(self, fd: int, offset: int, length: int) -> None:
        self.check(fd, length)
        self._find(fd, offset, length)

    def write(self, fd: int, parts: list[memoryview], offset: int) -> int:
        self.check(fd, sum(map(len, parts)))
        return self._write(fd, parts, offset)


def test_room_found_ahead_is_given_back_when_there_is_none_for_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = random.Random(1).randbytes(PIECE)
    with Disk(ZeroBase(SIZE), tmpdir=str(tmp_path)) as disk:
        for number in range(12):
            disk.pwrite(data, number * PIECE)
        held = disk.overlay.layers[disk.overlay.top].space()
        if held <= 12 * PIECE:
            pytest.skip("no room is found ahead on this file system")
        Full(monkeypatch, held)
        disk.pwrite(data, 32 * MIB)
        assert disk.overlay.layers[disk.overlay.top].space() <= held
        for offset in (*range(0, 12 * PIECE, PIECE), 32 * MIB):
            assert disk.pread(PIECE, offset) == data
