"""Large pieces arrive whole, whichever way they take to the file."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cowkit.diff import bulk_writer
from cowkit.diff.batch import BatchInProgress
from cowkit.diff.bulk_writer import UNDER_WAY, BulkWriter, portions
from cowkit.diff.output import AtomicOutput
from cowkit.disk.extent import Kind
from cowkit.errors import OutputError

TraceFunction = Callable[[FrameType, str, Any], Any]


def aligned(data: bytes) -> memoryview:
    """``data`` in memory from which O_DIRECT can write."""
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memoryview(memory)


PIECES = [
    aligned(random.Random(seed).randbytes(size << 10)) for seed, size in enumerate((64, 1024, 3072, 256, 2048, 1024))
]


@pytest.fixture
def by_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all pieces written by the thread, as they are after a slow one."""
    monkeypatch.setattr("cowkit.diff.bulk_writer._WORTH_A_THREAD", -1.0)


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
        monkeypatch.setattr("cowkit.diff.bulk_writer._WORTH_A_THREAD", 0.0)
    write_all(out)
    assert out.read_bytes() == b"".join(PIECES)


HERE, THERE = "MainThread", "cowkit-diff-writer"


@pytest.mark.parametrize(
    ("slow", "writers"),
    [
        ([False, False, True, False, False], [HERE] * 5),
        ([True, False, False], [HERE, THERE, THERE]),
        ([False, True, True, False], [HERE, HERE, HERE, THERE]),
    ],
    ids=["one slow piece among quick ones", "the first piece is slow", "most are slow"],
)
def test_a_thread_writes_what_comes_once_the_page_cache_is_slow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow: list[bool], writers: list[str]
) -> None:
    now = 0.0
    found: list[str] = []

    def write(pieces: Sequence[memoryview], offset: int) -> None:
        nonlocal now
        now += 60 * slow[len(found)]
        found.append(threading.current_thread().name)

    monkeypatch.setattr("cowkit.diff.bulk_writer.time.perf_counter", lambda: now)
    writer = BulkWriter(write)
    writer.fd = fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    try:
        for _ in slow:
            writer.write([PIECES[2]], len(PIECES[2]), 1)  # at an odd offset: through the page cache
            writer.drain()
    finally:
        writer.close()
        os.close(fd)
    assert found == writers


@pytest.mark.usefixtures("by_thread")
def test_a_failure_in_the_thread_comes_out_at_the_next_call(tmp_path: Path) -> None:
    def fail(pieces: Sequence[memoryview], offset: int) -> None:
        raise OutputError("no room")

    writer = BulkWriter(fail)
    writer.path = str(tmp_path / "out")
    writer.fd = fd = os.open(writer.path, os.O_RDWR | os.O_CREAT)
    try:
        writer.write([PIECES[2]], len(PIECES[2]), 0)
        with pytest.raises(OutputError, match="no room"):
            writer.drain()
    finally:
        writer.close()
        os.close(fd)


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


@pytest.mark.usefixtures("by_thread")
def test_when_the_third_call_returns_the_first_piece_is_written(tmp_path: Path) -> None:
    may_go, returned = threading.Event(), threading.Event()
    written: list[int] = []

    def write(pieces: Sequence[memoryview], offset: int) -> None:
        may_go.wait(30)
        written.append(offset)

    writer = BulkWriter(write)
    writer.fd = fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    piece = PIECES[2]

    def third() -> None:
        writer.write([piece], len(piece), 2)
        returned.set()

    try:
        writer.write([piece], len(piece), 0)
        writer.write([piece], len(piece), 1)
        assert written == []  # two may be under way
        another = threading.Thread(target=third)
        another.start()
        assert not returned.wait(0.05)
        may_go.set()
        another.join(30)
        assert written[:1] == [0]
        writer.drain()
        assert written == [0, 1, 2]
    finally:
        may_go.set()
        writer.close()
        os.close(fd)


def test_a_batch_stays_as_it_is_while_those_come_together_that_may_be_under_way_behind_it() -> None:
    progress = BatchInProgress(4096)
    batches = []
    for number in range(1 + UNDER_WAY):
        progress.space(4096)[:] = bytes([number]) * 4096
        progress.add(number * 4096, 4096, Kind.DATA)
        batches.append(progress.take())
    assert [bytes(batch.data) for batch in batches] == [bytes([number]) * 4096 for number in range(1 + UNDER_WAY)]


@pytest.mark.usefixtures("by_thread")
def test_an_interrupt_of_close_waits_for_the_piece_that_is_being_written_and_gives_up_the_next(tmp_path: Path) -> None:
    """The descriptors are closed behind it: whoever opens a file next may have the same numbers."""
    began, may_go, late = threading.Event(), threading.Event(), threading.Event()
    written: list[int] = []

    def write(pieces: Sequence[memoryview], offset: int) -> None:
        began.set()
        may_go.wait(30)
        late.wait(0.05)  # never set: a write that takes this long
        written.append(offset)

    def interrupt(number: int, frame: object) -> None:
        may_go.set()
        raise KeyboardInterrupt

    writer = BulkWriter(write)
    writer.fd = fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        writer.write([PIECES[2]], len(PIECES[2]), 0)
        writer.write([PIECES[2]], len(PIECES[2]), 1)
        assert began.wait(30)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            writer.close()
        assert written == [0]
        assert writer.fd == -1
    finally:
        signal.signal(signal.SIGALRM, before)
        may_go.set()
        os.close(fd)


@pytest.mark.usefixtures("by_thread")
@pytest.mark.parametrize("writes", [True, False], ids=["while it writes", "when it has written"])
@pytest.mark.parametrize("at", range(1, 25))
def test_an_interrupt_anywhere_in_the_wait_of_close_does_not_end_the_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, writes: bool
) -> None:
    began, may_go = threading.Event(), threading.Event()
    written: list[int] = []
    lines = 0

    def write(pieces: Sequence[memoryview], offset: int) -> None:
        began.set()
        may_go.wait(30)
        written.append(offset)

    def trace(frame: FrameType, event: str, argument: Any) -> TraceFunction | None:
        nonlocal lines
        if frame.f_code not in (BulkWriter._end.__code__, BulkWriter._has_written.__code__):
            return None
        if event in ("call", "line"):
            lines += 1
            if lines == at:
                threading.Timer(0.02, may_go.set).start()
                raise KeyboardInterrupt
        return trace

    monkeypatch.setattr("cowkit.diff.bulk_writer._BEGINS_WITHIN", 0.001)  # it asks all the time
    writer = BulkWriter(write)
    writer.fd = fd = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    before = sys.gettrace()
    try:
        writer.write([PIECES[2]], len(PIECES[2]), 0)
        assert began.wait(30)
        if not writes:
            may_go.set()
            writer.drain()
        sys.settrace(trace)
        try:
            writer.close()
        except KeyboardInterrupt:
            assert lines >= at
        else:
            assert lines < at
        finally:
            sys.settrace(before)
        assert written == [0]
        assert writer.fd == -1
    finally:
        may_go.set()
        os.close(fd)


@pytest.mark.usefixtures("by_thread")
def test_where_no_thread_is_to_be_had_pieces_are_written_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    write_all(tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == b"".join(PIECES)


@pytest.mark.usefixtures("by_thread")
def test_in_a_fork_which_has_no_such_thread_closing_does_not_wait_for_it(tmp_path: Path) -> None:
    with AtomicOutput(tmp_path / "out") as output:
        output.pwrite_meanwhile(PIECES[2], 0)
        output.drain()
        child = os.fork()
        if not child:
            signal.alarm(20)
            output._bulk.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


@given(lengths=st.lists(st.integers(0, 3 * bulk_writer._PORTION), max_size=8))
@example(lengths=[])
@example(lengths=[bulk_writer._PORTION, 1])
@example(lengths=[bulk_writer._PORTION * 16])
@settings(max_examples=40, deadline=None)
def test_portions_are_the_pieces_in_order_and_none_is_long(lengths: list[int]) -> None:
    whole = memoryview(os.urandom(sum(lengths)))
    pieces = [whole[end - length : end] for length, end in zip(lengths, accumulate(lengths), strict=True)]
    found = [b"".join(portion) for portion in portions(pieces)]
    assert b"".join(found) == whole
    assert all(len(portion) == bulk_writer._PORTION for portion in found[:-1])
    assert len(found[-1]) <= bulk_writer._PORTION
