"""What is sampled instead of compared: the outcome is the same to the byte, and little of the base is read."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cowkit.diff import ImageOptions, Qcow2Image, write_diff
from cowkit.diff.bulk_writer import BulkWriter
from cowkit.diff.identity import sampled_bytes
from cowkit.diff.samples import MOST_SAMPLES, SAMPLE, Samples
from cowkit.disk import Disk, Extent, FileBase, Kind, ZeroBase
from cowkit.errors import BaseChangedError
from tests.diff.helpers import content, diff, noise, read_with_cowkit

KIB, MIB = 1024, 1 << 20
BLOCK = 4 * KIB
BLOCKS = 64

HEAD = noise(SAMPLE, 7)


def _of_base(block: int) -> bytes:
    """What the base has: zeroes in some blocks, a common beginning in all others."""
    return bytes(BLOCK) if block % 5 == 0 else HEAD + noise(BLOCK - SAMPLE, block)


CONTENTS: dict[str, Callable[[int], bytes]] = {
    "other": lambda block: noise(BLOCK, 1000 + block),
    "the same": _of_base,
    "zeroes": lambda block: bytes(BLOCK),
    "another end": lambda block: _of_base(block)[:-1] + b"!",
    "zeroes but the end": lambda block: bytes(BLOCK - 1) + b"!",
}

WRITES = st.lists(
    st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 40), st.sampled_from([*CONTENTS, "checkpoint"])), max_size=8
)


@settings(deadline=None, max_examples=60)
@given(
    writes=WRITES,
    size=st.sampled_from([BLOCKS * BLOCK, BLOCKS * BLOCK - 1000, (BLOCKS + 20) * BLOCK]),
    options=st.sampled_from(
        [
            ImageOptions(subclusters=True),
            ImageOptions(),
            ImageOptions(cluster_size=BLOCK),
            ImageOptions(compress="zlib"),
        ]
    ),
    sparse=st.booleans(),
)
def test_an_image_and_its_report_are_right_whatever_blocks_begin_with(
    tmp_path_factory: pytest.TempPathFactory,
    writes: list[tuple[int, int, str]],
    size: int,
    options: ImageOptions,
    sparse: bool,
) -> None:
    folder = tmp_path_factory.mktemp("sieve")
    path = folder / "base.img"
    base = b"".join(_of_base(block) for block in range(BLOCKS))
    with path.open("wb") as file:
        for block in range(BLOCKS):
            if not sparse or block % 5:
                file.seek(block * BLOCK)
                file.write(base[block * BLOCK : (block + 1) * BLOCK])
        file.truncate(BLOCKS * BLOCK)
    before = base.ljust(size, b"\0")
    with Disk(FileBase(path), size=size, tmpdir=folder) as disk:
        for first, count, what in writes:
            if what == "checkpoint":
                disk.checkpoint()
                continue
            data = b"".join(CONTENTS[what](block) for block in range(first, min(first + count, BLOCKS)))
            disk.pwrite(data[: size - first * BLOCK], first * BLOCK)
        with disk.freeze() as view:
            report = write_diff(view, folder / "d.qcow2", backing_file="base.img", options=options)
        expected = content(disk)
        assert isinstance(disk.base, FileBase)
        assert read_with_cowkit(folder / "d.qcow2", disk.base) == expected
    changed = {
        at for at in range(0, size, BLOCK) if expected[at : min(at + BLOCK, size)] != before[at : min(at + BLOCK, size)]
    }
    assert {at for each in report.changed for at in range(each.offset, each.end, BLOCK)} == changed
    zero = {at for at in changed if not any(expected[at : at + BLOCK])}
    told = {at for each in report.changed if each.kind is Kind.ZERO for at in range(each.offset, each.end, BLOCK)}
    assert told == zero


@pytest.mark.parametrize("options", [ImageOptions(), ImageOptions(subclusters=True), ImageOptions(cluster_size=4096)])
def test_of_what_really_changed_hardly_more_than_the_new_bytes_is_read(tmp_path: Path, options: ImageOptions) -> None:
    path = tmp_path / "base.img"
    path.write_bytes(random.Random(1).randbytes(16 * MIB))
    with Disk(FileBase(path), tmpdir=tmp_path) as disk:
        for at in range(0, 16 * MIB, 4 * MIB):
            disk.pwrite(noise(MIB, at), at + 64 * KIB)
        with disk.freeze() as view:
            report = write_diff(view, tmp_path / "d.qcow2", backing_file="base.img", options=options)
    assert report.changed_bytes == report.dirty_bytes == 4 * MIB
    assert report.bytes_read - sampled_bytes(16 * MIB) == 4 * MIB + 4 * MIB // BLOCK * 2 * SAMPLE


def test_of_a_blank_disk_nothing_but_the_new_bytes_is_read(tmp_path: Path) -> None:
    with Disk(ZeroBase(64 * MIB), tmpdir=tmp_path) as disk:
        disk.pwrite(noise(MIB, 1), 64 * KIB)
        with disk.freeze() as view:
            report = write_diff(view, tmp_path / "d.qcow2", backing_file=None)
    assert report.bytes_read == MIB + MIB // BLOCK * SAMPLE


def test_blocks_of_several_layers_side_by_side_are_written_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "base.img"
    path.write_bytes(random.Random(1).randbytes(4 * MIB))
    with Disk(FileBase(path), tmpdir=tmp_path) as disk:
        disk.pwrite(noise(2 * MIB, 1), MIB)
        for turn in range(5):
            disk.checkpoint()
            for block in range(turn, 512, 7):
                disk.pwrite(noise(BLOCK, 100 + turn), MIB + block * BLOCK)
        report = diff(disk, tmp_path / "d.qcow2")
        assert report.changed == (Extent(MIB, 2 * MIB, Kind.DATA),)
        assert isinstance(disk.base, FileBase)
        assert read_with_cowkit(tmp_path / "d.qcow2", disk.base) == content(disk)


@pytest.mark.parametrize("options", [ImageOptions(), ImageOptions(subclusters=True)])
def test_a_base_that_is_cut_short_under_the_writer_is_what_is_blamed(tmp_path: Path, options: ImageOptions) -> None:
    path = tmp_path / "base.img"
    path.write_bytes(random.Random(1).randbytes(4 * MIB))
    disk = Disk(FileBase(path), tmpdir=tmp_path)
    disk.pwrite(noise(2 * MIB, 1), MIB)
    with disk.freeze() as view:
        known = view.base.verify_path
        cut = False

        def verify() -> None:
            nonlocal cut
            known()
            if not cut:
                cut = True
                os.truncate(path, MIB)

        view.base.verify_path = verify  # type: ignore[method-assign]
        with pytest.raises(BaseChangedError, match=r"base\.img"):
            write_diff(view, tmp_path / "d.qcow2", backing_file="base.img", options=options)
    assert not (tmp_path / "d.qcow2").exists()
    with pytest.raises(BaseChangedError):
        disk.close()


@given(
    heads=st.lists(st.tuples(st.sampled_from("xyz0"), st.sampled_from("xyz0")), min_size=1, max_size=MOST_SAMPLES // 8),
    blank=st.booleans(),
)
def test_unsure_are_those_whose_samples_are_alike_or_zeroes(heads: list[tuple[str, str]], blank: bool) -> None:
    def samples(letters: list[str]) -> list[memoryview]:
        return [memoryview((b"\0" if each == "0" else each.encode()) * SAMPLE) for each in letters]

    taken = Samples()
    try:
        found = taken.unsure(samples([now for now, _ in heads]), None if blank else samples([old for _, old in heads]))
    finally:
        taken.close()
    assert found == [at for at, (now, old) in enumerate(heads) if now == "0" or (now == old and not blank)]


def test_an_image_with_subclusters_is_one_that_its_own_reader_finds_sound(tmp_path: Path) -> None:
    path = tmp_path / "base.img"
    path.write_bytes(random.Random(1).randbytes(8 * MIB))
    with Disk(FileBase(path), tmpdir=tmp_path) as disk:
        for at in range(0, 8 * MIB, 40 * KIB):
            disk.pwrite(noise(BLOCK * (1 + at % 3), at), at)
        disk.trim(3 * MIB, 2 * MIB + BLOCK)
        with disk.freeze() as view:
            write_diff(view, tmp_path / "d.qcow2", backing_file="base.img", options=ImageOptions(subclusters=True))
        with Qcow2Image(tmp_path / "d.qcow2", disk.base.pread, disk.base.size) as image:
            image.check()
            assert image.pread(image.size, 0) == content(disk)


def test_nothing_that_is_still_being_written_is_filled_with_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces are written by a thread, from memory that is used again; small ones in between come from elsewhere."""
    path = tmp_path / "base.img"
    path.write_bytes(random.Random(1).randbytes(48 * MIB))
    late = threading.Event()
    put = BulkWriter._put

    def dawdling(self: BulkWriter, pieces: Sequence[memoryview], length: int, offset: int) -> None:
        late.wait(0.02)  # never set: a writer that takes this long
        put(self, pieces, length, offset)

    monkeypatch.setattr(BulkWriter, "_put", dawdling)
    monkeypatch.setattr("cowkit.diff.bulk_writer._WORTH_A_THREAD", -1.0)

    def unsure(blocks: int, seed: int) -> bytes:
        return b"".join(bytes(SAMPLE) + noise(BLOCK - SAMPLE, seed + each) for each in range(blocks))

    with Disk(FileBase(path), tmpdir=tmp_path) as disk:
        disk.pwrite(noise(2 * MIB, 1), 0)
        at = 4 * MIB
        for turn in range(2):
            disk.pwrite(unsure(128, turn * 1000), at)
            at += MIB
            for each in range(256):
                disk.pwrite(unsure(1, turn * 1000 + 500 + each), at)
                at += 64 * KIB
        with disk.freeze() as view:
            report = write_diff(view, tmp_path / "d.qcow2", backing_file="base.img")
        assert report.subclusters
        assert isinstance(disk.base, FileBase)
        assert read_with_cowkit(tmp_path / "d.qcow2", disk.base) == content(disk)


@pytest.mark.parametrize("first", [0, 64 * KIB])
def test_a_run_whose_blocks_lie_in_two_layers_in_turn_is_written(tmp_path: Path, first: int) -> None:
    with Disk(ZeroBase(64 * MIB), tmpdir=tmp_path) as disk:
        if first:
            disk.pwrite(noise(first, 1), 0)
        for at in range(MIB, 9 * MIB, 2 * BLOCK):
            disk.pwrite(noise(BLOCK, at), at)
        disk.checkpoint()
        for at in range(MIB + BLOCK, 9 * MIB, 2 * BLOCK):
            disk.pwrite(noise(BLOCK, at), at)
        with disk.freeze() as view:
            write_diff(view, tmp_path / "d.qcow2", backing_file=None)
        with Qcow2Image(tmp_path / "d.qcow2") as image:
            assert image.pread(image.size, 0) == content(disk)


def test_without_a_descriptor_for_samples_all_is_read_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    path = tmp_path / "base.img"
    path.write_bytes(random.Random(1).randbytes(4 * MIB))
    base = FileBase(path)
    with Disk(base, tmpdir=tmp_path) as disk:
        disk.pwrite(noise(MIB, 2), MIB)
        monkeypatch.setattr(os, "memfd_create", refuse)
        report = diff(disk, tmp_path / "d.qcow2")
        assert report.changed_bytes == MIB
        assert read_with_cowkit(tmp_path / "d.qcow2", base) == content(disk)
