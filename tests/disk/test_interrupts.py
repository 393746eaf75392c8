"""Whatever stops a disk's work from outside, an exception at any moment or a fork, leaves the disk usable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cowkit.disk import Disk, FileBase, FrozenView, ZeroBase
from cowkit.errors import CheckpointError, DiskClosedError, OverlayFullError
from tests.limits import files_limited_to

BLOCK = 4096

INTERRUPTED = """
import os, random, signal, sys
from cowkit.disk import Disk, ZeroBase

class Interrupt(Exception):
    pass

def interrupt(*_):
    raise Interrupt

signal.signal(signal.SIGALRM, interrupt)
rng = random.Random(int(sys.argv[1]))
disk = Disk(ZeroBase(64 << 20), cow_on_cache=True)
before = len(os.listdir("/proc/self/fd"))
for turn in range(400):
    work = [
        lambda: disk.pwrite(b"x" * 9000, rng.randrange(60 << 20)),
        lambda: disk.pwrite(b"y" * (4 << 20), rng.randrange(60 << 20)),
        lambda: disk.pread(9000, rng.randrange(60 << 20)),
        lambda: disk.trim(1 << 20, rng.randrange(60 << 20)),
        lambda: disk.rollback(disk.checkpoint()),
        lambda: disk.reset(),
        lambda: disk.freeze().close(),
    ]
    try:
        # Again and again: an exception in a finalizer is dropped.
        signal.setitimer(signal.ITIMER_REAL, rng.choice([1, 3, 10, 30, 100]) * 1e-5, 0.01)
        while True:
            rng.choice(work)()
    except Interrupt:
        pass
    try:
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupt:
        pass
    disk.pwrite(b"alive", 100)
    disk.checkpoint()
    assert disk.pread(5, 100) == b"alive"
    if turn % 10 == 0:
        disk.reset()
disk.close()
"""


@pytest.mark.parametrize("seed", range(2))
def test_an_interrupt_at_any_moment_leaves_no_lock_taken(seed: int) -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", INTERRUPTED, str(seed)], timeout=30, check=False)
    assert done.returncode == 0


def in_child(work: object) -> int:
    """Run ``work`` in a forked child, which ends with 0 if it returns True, and give its exit status."""
    child = os.fork()
    if child == 0:
        status = 3
        try:
            status = 0 if callable(work) and work() else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_child_is_told_that_the_disk_is_not_its_own_and_can_do_it_no_harm() -> None:
    with Disk(ZeroBase(16 * BLOCK)) as disk:
        disk.pwrite(b"parent", 0)

        def child() -> bool:
            for call in (disk.reset, disk.checkpoint, disk.freeze, lambda: disk.pwrite(b"child!", 0)):
                with pytest.raises(DiskClosedError, match="forked"):
                    call()
            disk.close()
            return disk.closed

        assert in_child(child) == 0
        assert disk.pread(6, 0) == b"parent"
        disk.pwrite(b"more", BLOCK)


def test_a_child_forked_while_threads_write_can_let_go_of_the_disk() -> None:
    with Disk(ZeroBase(64 * BLOCK)) as disk:
        ended = threading.Event()

        def write() -> None:
            while not ended.is_set():
                disk.pwrite(b"x" * 3 * BLOCK, 100)
                disk.checkpoint()
                disk.reset()

        threads = [threading.Thread(target=write) for _ in range(2)]
        for thread in threads:
            thread.start()

        def child() -> bool:
            signal.alarm(20)
            disk.close()
            return True

        try:
            assert [in_child(child) for _ in range(5)] == [0] * 5
        finally:
            ended.set()
            for thread in threads:
                thread.join()


def test_views_whose_closing_was_interrupted_leave_no_layers_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Disk, view: FrozenView) -> None:
        raise KeyboardInterrupt

    with Disk(ZeroBase(64 * BLOCK)) as disk:
        for block in range(4):
            disk.pwrite(b"w" * BLOCK, block * BLOCK)
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(Disk, "_view_closed", interrupted)
                disk.freeze().close()
        disk.pwrite(b"w" * BLOCK, 4 * BLOCK)
        disk.freeze().close()
        assert len(disk.overlay.layers) == 1
        assert disk.pread(6 * BLOCK, 0) == b"w" * 5 * BLOCK + bytes(BLOCK)


def test_a_layer_is_not_used_again_while_somebody_has_a_view_of_it() -> None:
    with Disk(ZeroBase(64 * BLOCK)) as disk:
        point = disk.checkpoint()
        disk.pwrite(b"w" * 8 * BLOCK, 0)
        (segment,) = list(disk.overlay.segments(0, 8 * BLOCK))
        disk.rollback(point)
        disk.pwrite(b"n" * 8 * BLOCK, 0)
        view = segment[2]
        assert view is not None
        reading, writing = os.pipe()
        os.write(writing, view[: 8 * BLOCK])  # a system call may look, Python may not
        assert os.read(reading, 8 * BLOCK) == b"w" * 8 * BLOCK
        os.close(reading)
        os.close(writing)


def test_rolling_back_beside_first_writes_leaves_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    disk = Disk(ZeroBase(64 * BLOCK))
    point = disk.checkpoint()
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            disk.pwrite(b"x" * BLOCK, 0)

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(400):
        disk.rollback(point)
    ended.set()
    for thread in threads:
        thread.join()
    disk.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_disk_that_has_all_the_layers_it_can_have_refuses_checkpoints_and_views_but_no_write() -> None:
    with Disk(ZeroBase(BLOCK)) as disk:
        with pytest.raises(CheckpointError, match="layers"):
            while True:
                disk.pwrite(b"x", 0)
                disk.checkpoint()
        with pytest.raises(CheckpointError, match="layers"):
            disk.freeze()
        disk.pwrite(b"y", 0)
        assert disk.pread(1, 0) == b"y"


def test_reading_a_sparse_base_in_memory_takes_no_memory() -> None:
    folder = Path("/dev/shm")
    if not folder.is_dir() or os.statvfs(folder).f_bavail < 4096:
        pytest.skip("there is no tmpfs at /dev/shm")
    path = folder / f"cowkit-test-{os.getpid()}-{threading.get_ident()}.img"
    try:
        with path.open("wb") as file:
            file.truncate(8 << 20)
        with Disk(FileBase(path)) as disk:
            for offset in range(0, 8 << 20, 16384):
                for _, _, view in disk.overlay.segments(offset, offset + 16384):
                    assert view is None or bytes(view[:1]) == b"\0"
        assert path.stat().st_blocks == 0
    finally:
        path.unlink()


def test_no_room_is_remembered_with_its_reason(tmp_path: Path) -> None:
    with Disk(ZeroBase(1 << 20), tmpdir=tmp_path) as disk:
        assert disk.overlay.failure is None
        with files_limited_to(BLOCK), pytest.raises(OverlayFullError):
            disk.pwrite(b"x" * 3 * BLOCK, 0)
        assert "ulimit" in str(disk.overlay.failure)
