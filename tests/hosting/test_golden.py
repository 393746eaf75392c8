"""A golden base as a base: what it reads as, shared by disks and threads, damaged, and without room to unpack it."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cowkit import CowDisk
from cowkit.disk import Kind
from cowkit.disk.layer import Layer
from cowkit.errors import BaseChangedError, BaseOpenError, OverlayFullError
from cowkit.fixtures.goldens.store import Store
from cowkit.hosting.golden import GoldenBase, Record, identities, open_golden, read_record, record_path

SIZE = (5 << 16) + 1000
CONTENT = random.Random(1).randbytes(SIZE)


def golden(folder: Path, base: Path | str | None, size: int, writes: list[tuple[int, int, bool]]) -> tuple[str, bytes]:
    """A golden base with ``writes`` (offset, length, zeroes or data) on it; and what it should read as."""
    model = bytearray(size)
    stands_on = []
    if base is not None:
        with CowDisk(base) as disk:
            model[: disk.size] = disk.pread(disk.size, 0)
        stands_on = identities(os.fspath(base))
    with CowDisk(base, size=size) as disk:
        for offset, length, zeroes in writes:
            offset = min(offset, size)
            length = min(length, size - offset)
            data = bytes(length) if zeroes else random.Random(offset).randbytes(length)
            if zeroes:
                disk.zero(length, offset)
            else:
                disk.pwrite(data, offset)
            model[offset : offset + length] = data
        disk.diff(folder / "one.building.qcow2", compress="zlib")
    record = Record("one", "0" * 64, size, 0, 0, "", stands_on, "run", "run")
    kept = Store(folder).publish(str(folder / "one.building.qcow2"), record)
    os.close(kept.pin)
    return kept.path, bytes(model)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(CONTENT)
    return path


WRITES = st.lists(st.tuples(st.integers(0, 2 * SIZE), st.integers(0, 3 << 16), st.booleans()), max_size=5)
READS = st.lists(st.tuples(st.integers(0, 2 * SIZE), st.integers(0, 3 << 16)), max_size=8)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(writes=WRITES, more=WRITES, reads=READS, size=st.sampled_from([SIZE, SIZE + 1, 2 * SIZE]))
def test_it_reads_as_the_disk_that_it_was_made_from_also_on_top_of_another(
    tmp_path_factory: pytest.TempPathFactory,
    writes: list[tuple[int, int, bool]],
    more: list[tuple[int, int, bool]],
    reads: list[tuple[int, int]],
    size: int,
) -> None:
    folder = tmp_path_factory.mktemp("golden")
    (folder / "disk.img").write_bytes(CONTENT)
    first, _ = golden(folder, folder / "disk.img", size, writes)
    second, model = golden(folder, first, size + 1, more)
    with CowDisk(second) as disk, CowDisk(second) as other:
        assert disk.engine.base is other.engine.base
        assert disk.size == len(model)
        for offset, length in reads:
            offset = min(offset, disk.size)
            length = min(length, disk.size - offset)
            assert disk.pread(length, offset) == model[offset : offset + length]
        assert other.pread(other.size, 0) == model
        found = list(disk.engine.base.extents(0, disk.size))
        assert sum(extent.length for extent in found) == disk.size
        for extent in found:
            if extent.kind is Kind.HOLE:
                assert not model[extent.offset : extent.end].strip(b"\0")


def test_many_threads_may_read_what_is_just_being_unpacked(tmp_path: Path, base: Path) -> None:
    path, model = golden(tmp_path, base, SIZE, [(0, SIZE, False)])
    wrong = []
    with CowDisk(path) as disk:
        gate = threading.Barrier(8)

        def read(seed: int) -> None:
            gate.wait()
            for _ in range(40):
                offset = random.randrange(SIZE - 5000)
                if disk.pread(5000, offset) != model[offset : offset + 5000]:
                    wrong.append(seed)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_it_is_open_as_long_as_a_disk_needs_it_and_no_longer(tmp_path: Path, base: Path) -> None:
    path, _ = golden(tmp_path, base, SIZE, [(0, 10, False)])
    before = len(os.listdir("/proc/self/fd"))
    with CowDisk(path) as disk:
        with CowDisk(path) as other:
            assert other.engine.base is disk.engine.base
        assert disk.pread(1, 0)
        assert len(os.listdir("/proc/self/fd")) > before
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_room_to_unpack_it_reads_all_the_same(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model = golden(tmp_path, base, SIZE, [(0, SIZE, False)])

    def full(*_: object) -> None:
        raise OverlayFullError("no room")

    monkeypatch.setattr(Layer, "write", full)
    with CowDisk(path) as disk:
        for _ in range(2):
            assert disk.pread(SIZE, 0) == model


def test_one_that_was_written_to_or_whose_base_changed_is_refused(tmp_path: Path, base: Path) -> None:
    path, _ = golden(tmp_path, base, SIZE, [(0, 10, False)])
    os.utime(base)
    with pytest.raises(BaseChangedError, match=r"disk\.img changed since the golden base 'one' was made on it"):
        CowDisk(path)
    os.utime(path)
    with pytest.raises(BaseOpenError, match="was written to since it was made: remove it, and run again"):
        CowDisk(path)
    os.unlink(path)
    with pytest.raises(BaseOpenError, match="No such file"):
        CowDisk(path)


def test_a_disk_of_it_is_told_when_the_base_below_changes(tmp_path: Path, base: Path) -> None:
    path, _ = golden(tmp_path, base, SIZE, [(0, 10, False)])
    disk = CowDisk(path)
    with open(base, "r+b") as file:
        file.truncate(100)
    with pytest.raises(BaseChangedError, match="its size went from"):
        disk.close()


def test_a_record_that_makes_no_sense_is_none(tmp_path: Path, base: Path) -> None:
    path, _ = golden(tmp_path, base, SIZE, [(0, 10, False)])
    text = Path(record_path(path)).read_text()
    for wrong in (
        "",
        "[]",
        "{}",
        text.replace('"format": 1', '"format": 2'),
        text.replace('"key"', '"other"'),
        text[:-9],
    ):
        Path(record_path(path)).write_text(wrong)
        assert read_record(path) is None
        assert open_golden(path, str(tmp_path)) is None


def test_a_forked_child_opens_its_own(tmp_path: Path, base: Path) -> None:
    path, model = golden(tmp_path, base, SIZE, [(0, SIZE, False)])
    with CowDisk(path) as disk:
        child = os.fork()
        if not child:
            status = 1
            try:
                with CowDisk(path) as own:
                    status = own.pread(SIZE, 0) != model or own.engine.base is disk.engine.base
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        assert isinstance(disk.engine.base, GoldenBase)
