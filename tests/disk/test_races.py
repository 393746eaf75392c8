"""An acknowledged write is never lost, whatever goes on beside it: each race is forced, then tried at random."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cowkit.disk import Disk, FileBase, ZeroBase

BLOCK = 4096
BASE_BYTE, FULL_BYTE, PART_BYTE = b"o", b"f", b"p"


class PausingBase(FileBase):
    """A real file whose first read for copying up stops until it is told to go on."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reached = threading.Event()
        self.go_on = threading.Event()
        self.armed = True

    def read_into(self, buffer: memoryview, offset: int) -> None:
        super().read_into(buffer, offset)
        if self.armed:
            self.armed = False
            self.reached.set()
            assert self.go_on.wait(30)


@pytest.fixture
def base(tmp_path: Path) -> PausingBase:
    path = tmp_path / "base.img"
    path.write_bytes(BASE_BYTE * 8 * BLOCK)
    return PausingBase(path)


@pytest.fixture
def many_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def beside(base: PausingBase, slow: Callable[[], object], quick: Callable[[], object]) -> None:
    """Run ``quick`` while ``slow`` has read old bytes and not yet written them; ``quick`` may finish first, or have to wait."""
    slow_thread, quick_thread = threading.Thread(target=slow), threading.Thread(target=quick)
    slow_thread.start()
    assert base.reached.wait(30)
    quick_thread.start()
    quick_thread.join(0.1)
    base.go_on.set()
    slow_thread.join(30)
    quick_thread.join(30)
    assert not slow_thread.is_alive() and not quick_thread.is_alive()


@pytest.mark.parametrize("offset", [0, 100, BLOCK - 10])
def test_copying_up_for_a_partial_write_does_not_undo_a_full_write_beside_it(base: PausingBase, offset: int) -> None:
    with Disk(base) as disk:
        beside(base, lambda: disk.pwrite(PART_BYTE * 10, offset), lambda: disk.pwrite(FULL_BYTE * BLOCK, 0))
        found = disk.pread(BLOCK, 0)
        assert found.replace(PART_BYTE, FULL_BYTE) == FULL_BYTE * BLOCK


def test_copying_up_for_two_partial_writes_of_one_block_keeps_both(base: PausingBase) -> None:
    with Disk(base) as disk:
        beside(base, lambda: disk.pwrite(PART_BYTE * 10, 0), lambda: disk.pwrite(FULL_BYTE * 10, 50))
        found = disk.pread(BLOCK, 0)
        assert (found[:10], found[50:60]) == (PART_BYTE * 10, FULL_BYTE * 10)


@pytest.mark.parametrize("forget", ["zero", "trim"])
def test_copying_up_for_a_partial_write_does_not_undo_zeroes_beside_it(base: PausingBase, forget: str) -> None:
    with Disk(base) as disk:
        beside(base, lambda: disk.pwrite(PART_BYTE * 10, 0), lambda: getattr(disk, forget)(BLOCK, 0))
        assert BASE_BYTE not in disk.pread(BLOCK, 0)


def test_caching_into_the_overlay_does_not_undo_a_write_beside_it(base: PausingBase) -> None:
    with Disk(base, cow_on_cache=True) as disk:
        beside(base, lambda: disk.cache(8 * BLOCK, 0), lambda: disk.pwrite(FULL_BYTE * BLOCK, BLOCK))
        assert disk.pread(BLOCK, BLOCK) == FULL_BYTE * BLOCK


def test_copying_on_read_does_not_undo_a_write_beside_it(base: PausingBase) -> None:
    with Disk(base, cow_on_read=True) as disk:
        beside(base, lambda: disk.pread(8 * BLOCK, 0), lambda: disk.pwrite(FULL_BYTE * 100, BLOCK))
        assert disk.pread(100, BLOCK) == FULL_BYTE * 100


@pytest.mark.parametrize("point", ["checkpoint", "freeze"])
def test_a_point_in_time_waits_for_the_write_under_way(base: PausingBase, point: str) -> None:
    with Disk(base) as disk:
        taken: list[bytes] = []

        def take() -> None:
            if point == "freeze":
                with disk.freeze() as view:
                    taken.append(view.pread(2 * BLOCK, 0))
            else:
                disk.checkpoint("point")

        beside(base, lambda: disk.pwrite(PART_BYTE * BLOCK, 100), take)
        if point == "checkpoint":
            disk.pwrite(FULL_BYTE * 3 * BLOCK, 0)
            disk.rollback("point")
            taken.append(disk.pread(2 * BLOCK, 0))
        whole = BASE_BYTE * 100 + PART_BYTE * BLOCK + BASE_BYTE * (BLOCK - 100)
        assert taken[0] in (whole, BASE_BYTE * 2 * BLOCK)


def run_all(*works: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not failures
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.usefixtures("many_switches")
@pytest.mark.parametrize("other", ["full", "zero", "cache", "read"])
def test_no_partial_write_is_lost_in_many_rounds_beside(tmp_path: Path, other: str) -> None:
    path = tmp_path / "base.img"
    blocks = 1500
    path.write_bytes(BASE_BYTE * blocks * BLOCK)
    with Disk(FileBase(path), cow_on_cache=other == "cache", cow_on_read=other == "read") as disk:
        barrier = threading.Barrier(2, timeout=60)
        beside_it: Callable[[int], object] = {
            "full": lambda offset: disk.pwrite(FULL_BYTE * BLOCK, offset),
            "zero": lambda offset: disk.zero(BLOCK, offset),
            "cache": lambda offset: disk.cache(BLOCK, offset),
            "read": lambda offset: disk.pread(BLOCK, offset),
        }[other]

        def first() -> None:
            for block in range(blocks):
                barrier.wait()
                disk.pwrite(PART_BYTE * 100, block * BLOCK + 50)

        def second() -> None:
            for block in range(blocks):
                barrier.wait()
                beside_it(block * BLOCK)

        run_all(first, second)
        rest = {"full": FULL_BYTE, "zero": b"\0", "cache": BASE_BYTE, "read": BASE_BYTE}[other]
        for block in range(blocks):
            found = disk.pread(BLOCK, block * BLOCK)
            assert set(found[:50] + found[150:]) == set(rest)
            assert found[50:150] in (PART_BYTE * 100, *([rest * 100] if other in ("full", "zero") else []))


@pytest.mark.usefixtures("many_switches")
def test_each_thread_reads_back_its_own_writes_beside_checkpoints_views_and_diffs() -> None:
    regions, size = 3, 64 * BLOCK
    with Disk(ZeroBase(regions * size)) as disk:
        ended = threading.Event()

        def writer(region: int) -> Callable[[], None]:
            def work() -> None:
                rng = random.Random(region)
                model = bytearray(size)
                for _ in range(800):
                    offset = rng.randrange(size)
                    length = min(rng.choice([1, 100, BLOCK, 3 * BLOCK]), size - offset)
                    if rng.random() < 0.2:
                        disk.trim(length, region * size + offset)
                        model[offset : offset + length] = bytes(length)
                    else:
                        data = rng.randbytes(length)
                        disk.pwrite(data, region * size + offset)
                        model[offset : offset + length] = data
                    assert disk.pread(length, region * size + offset) == model[offset : offset + length]
                assert disk.pread(size, region * size) == model

            return work

        def points() -> None:
            while not ended.is_set():
                with disk.freeze() as view:
                    once = view.pread(regions * size, 0)
                    assert view.pread(regions * size, 0) == once
            assert len(disk.overlay.stack) <= 1

        def writers() -> None:
            try:
                run_all(*(writer(region) for region in range(regions)))
            finally:
                ended.set()

        run_all(points, writers)


@pytest.mark.usefixtures("many_switches")
def test_a_checkpoint_has_each_write_wholly_or_not_at_all() -> None:
    blocks = 64
    with Disk(ZeroBase(blocks * BLOCK)) as disk:
        ended = threading.Event()

        def write_generations() -> None:
            for generation in range(1, 120):
                disk.pwrite(bytes([generation]) * (blocks * BLOCK - 2), 1)
            ended.set()

        def look() -> None:
            while not ended.is_set():
                with disk.freeze() as view:
                    assert len(set(view.pread(blocks * BLOCK - 2, 1))) == 1

        run_all(write_generations, look)
