"""Large pieces arrive whole, whichever way they take to the file."""

from __future__ import annotations

import errno
import mmap
import os
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from cowkit.diff.bulk_writer import BulkWriter
from cowkit.diff.output import AtomicOutput
from cowkit.errors import OutputError


def aligned(data: bytes) -> memoryview:
    """``data`` in memory from which O_DIRECT can write."""
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memoryview(memory)


PIECES = [
    aligned(random.Random(seed).randbytes(size << 10)) for seed, size in enumerate((64, 1024, 3072, 256, 2048, 1024))
]


def write_all(path: Path) -> None:
    with AtomicOutput(path) as output:
        offset = 0
        for piece in PIECES:
            output.pwrite_meanwhile(piece, offset)
            offset += len(piece)


@pytest.mark.parametrize("replaced", [True, False])
@pytest.mark.parametrize("slow", [True, False], ids=["page cache slow", "page cache quick"])
@pytest.mark.parametrize("fault", [errno.EOPNOTSUPP, errno.ENOSPC, None], ids=str)
def test_all_pieces_arrive_whether_or_not_room_can_be_allocated_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int | None, slow: bool, replaced: bool
) -> None:
    out = tmp_path / "out"
    if replaced:
        out.write_bytes(b"old")
    if fault is not None:

        def refuse(fd: int, offset: int, length: int) -> None:
            raise OSError(fault, os.strerror(fault))

        monkeypatch.setattr(os, "posix_fallocate", refuse)
    if slow:
        monkeypatch.setattr("cowkit.diff.bulk_writer._SLOW", 0.0)
    write_all(out)
    assert out.read_bytes() == b"".join(PIECES)


def test_a_failure_in_the_thread_comes_out_at_the_next_call(tmp_path: Path) -> None:
    def fail(pieces: Sequence[memoryview], offset: int) -> None:
        raise OutputError("no room")

    writer = BulkWriter(fail)
    writer.path = str(tmp_path / "out")
    writer.fd = os.open(writer.path, os.O_RDWR | os.O_CREAT)
    try:
        writer.write([PIECES[2]], len(PIECES[2]), 0)  # large: the thread writes it
        with pytest.raises(OutputError, match="no room"):
            writer.drain()
    finally:
        writer.close()
        os.close(writer.fd)


def test_a_file_that_replaces_another_has_no_block_left_to_be_allocated(tmp_path: Path) -> None:
    """What would have the file system write all of it within the rename (ext4's auto_da_alloc)."""
    allocated: list[tuple[int, int]] = []
    real = os.posix_fallocate

    def count(fd: int, offset: int, length: int) -> None:
        allocated.append((offset, length))
        real(fd, offset, length)

    (tmp_path / "out").write_bytes(b"old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "posix_fallocate", count)
        patch.setattr("cowkit.disk.room._EMULATED", (60.0, 0.0))
        with AtomicOutput(tmp_path / "out") as output:
            output.pwrite(b"head", 0)
            output.pwrite_meanwhile(PIECES[1], 4096)
            output.pwrite_meanwhile(PIECES[0], 4096 + len(PIECES[1]))
    assert sorted(allocated) == [(0, 4), (4096, 1 << 20), (4096 + (1 << 20), 64 << 10)]
