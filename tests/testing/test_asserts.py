"""The asserts: what they take for the same, what they say, and that they do not read what cannot differ."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowkit import CowDisk
from cowkit.errors import CheckpointError, DiskClosedError, UsageError
from cowkit.testing import assert_same, assert_unchanged
from cowkit.testing.contents import BytesBase
from cowkit.testing.differences import find_differences

SERVERS = pytest.mark.parametrize("server", ["thread", "process"])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(range(256)) * 4096)
    return path


@SERVERS
def test_a_disk_is_compared_with_its_base_an_image_another_disk_an_export_and_bytes(
    image: Path, tmp_path: Path, server: Any
) -> None:
    data = image.read_bytes()
    with CowDisk(image, server=server) as disk, CowDisk(size="1M") as other:
        other.pwrite(data, 0)
        assert_same(disk, image)
        assert_same(disk, data)
        assert_same(data, disk)
        assert_same(disk, other)
        assert_same(disk, str(image))
        assert_unchanged(disk)
        disk.pwrite(b"changed", 70_000)
        for each in (image, data, other):
            with pytest.raises(AssertionError, match=r"7 bytes differ in 1 extent\n  7 at byte 70000 \(0x11170\)"):
                assert_same(disk, each)
        with pytest.raises(AssertionError, match=r"disk\.img is not as its base: 7 bytes differ"):
            assert_unchanged(disk)
        disk.pwrite(data[70_000:70_007], 70_000)
        assert_unchanged(disk)


@pytest.mark.requires("qemu-img", "qemu-nbd", modules=["nbd"])
def test_a_qcow2_image_and_an_nbd_export_can_be_either_side(image: Path, tmp_path: Path) -> None:
    qcow2 = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "convert", "-O", "qcow2", image, qcow2], check=True)
    with CowDisk(image) as disk:
        assert_same(qcow2, image)
        assert_same(disk.uri, qcow2)
        disk.zero(1, 1)
        with pytest.raises(AssertionError, match="1 byte differs in 1 extent\n  1 at byte 1 "):
            assert_same(qcow2, disk.uri)


def test_the_message_shows_extents_the_structure_and_the_bytes_of_both_sides() -> None:
    one, other = bytearray(8192), bytearray(8192)
    one[4100:4105], one[6000] = b"hello", 1
    other[4101] = ord("x")
    with pytest.raises(AssertionError) as raised:
        assert_same(one, other)
    assert str(raised.value).splitlines()[:8] == [
        "the bytes given (the disk) is not as the bytes given (the other): 6 bytes differ in 2 extents",
        "  5 at byte 4100 (0x1004)",
        "  1 at byte 6000 (0x1770)",
        "the first, - the bytes given (the other), + the bytes given (the disk):",
        "  00000ff0  00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00  |................|",
        "- 00001000  00 00 00 00 00 78 00 00 00 00 00 00 00 00 00 00  |.....x..........|",
        "+ 00001000  00 00 00 00 68 65 6c 6c 6f 00 00 00 00 00 00 00  |....hello.......|",
        "  00001010  00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00  |................|",
    ]


def test_an_extent_with_equal_bytes_in_it_says_how_many_of_its_bytes_differ() -> None:
    with pytest.raises(AssertionError) as raised:
        assert_same(b"x\0" * 500 + bytes(1000) + b"yy", bytes(2002))
    lines = str(raised.value).splitlines()
    assert lines[0].endswith(": 502 bytes differ in 2 extents")
    assert lines[1:3] == ["  500 of the 999 from byte 0 (0x0)", "  2 at byte 2000 (0x7d0)"]


def test_no_range_at_all_is_refused_since_it_would_compare_nothing(image: Path) -> None:
    with CowDisk(image) as disk:
        disk.pwrite(b"changed", 70_000)
        with pytest.raises(UsageError, match="ranges is empty, so nothing would be compared"):
            assert_unchanged(disk, [])
        with pytest.raises(UsageError, match="ranges is empty, so nothing would be compared"):
            assert_same(disk, image, ())


@pytest.mark.requires("mke2fs")
@SERVERS
def test_the_structure_is_told_by_the_side_that_is_whole(tmp_path: Path, server: Any) -> None:
    base = tmp_path / "fs.img"
    base.write_bytes(bytes(4 << 20))
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext2", base], check=True)
    with CowDisk(base, server=server) as disk:
        disk.zero(4096, 0)
        with pytest.raises(AssertionError, match="ext2: the superblock, byte "):
            assert_unchanged(disk)


def test_different_sizes_are_a_difference_unless_ranges_are_given() -> None:
    with pytest.raises(AssertionError, match=r"^the size of the bytes .* is 3 bytes, and that of the bytes .* 4$"):
        assert_same(b"abc", b"abc\0")
    assert_same(b"abc", b"abc\0", [(0, 3)])
    assert_same(b"", b"")


@SERVERS
def test_only_the_ranges_asked_for_are_compared(image: Path, server: Any) -> None:
    with CowDisk(image, server=server) as disk:
        disk.pwrite(b"changed", 70_000)
        assert_unchanged(disk, [(0, 70_000), (70_007, "4K")])
        assert_same(disk, image, [("128K", "4K"), (0, "64K"), (5, 0)])
        with pytest.raises(AssertionError, match="1 byte differs"):
            assert_unchanged(disk, [(70_006, 1)])
        with pytest.raises(AssertionError, match="7 bytes differ"):
            assert_unchanged(disk, [(0, 10), (69_500, "1K")])
        with pytest.raises(UsageError, match="ends at byte 1048577, and there are 1048576"):
            assert_unchanged(disk, [(1, "1M")])
        with pytest.raises(UsageError, match="a range is a pair of offset and length, not 5"):
            assert_unchanged(disk, [5])  # type: ignore[list-item]


@SERVERS
def test_since_a_checkpoint(image: Path, server: Any) -> None:
    with CowDisk(image, server=server) as disk:
        disk.pwrite(b"before", 0)
        point = disk.checkpoint("installed")
        assert_unchanged(disk, since=point)
        disk.pwrite(b"after", 8192)
        assert_unchanged(disk, [(0, 8192)], since="installed")
        with pytest.raises(AssertionError, match=r"disk\.img is not as checkpoint 'installed': 5 bytes differ"):
            assert_unchanged(disk, since=point)
        with pytest.raises(CheckpointError):
            assert_unchanged(disk, since="none")


@SERVERS
@pytest.mark.parametrize("kind", ["blank", "window", "larger", "relative", "compressed"])
def test_since_a_checkpoint_of_any_disk(
    image: Path, server: Any, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(image.parent)
    (tmp_path / "z.img.gz").write_bytes(gzip.compress(image.read_bytes()))
    options: dict[str, dict[str, Any]] = {
        "blank": {"size": 130_000},
        "window": {"base": image, "offset": 4096},
        "larger": {"base": image, "size": "2M", "block_size": 8192},
        "relative": {"base": image.name},
        "compressed": {"base": tmp_path / "z.img.gz"},
    }
    with CowDisk(server=server, **options[kind]) as disk:
        disk.pwrite(b"before", 5000)
        disk.zero(512, 100_000)
        point = disk.checkpoint()
        disk.pwrite(b"before", 5000)
        disk.pwrite(bytes(512), 100_000)
        assert_unchanged(disk, since=point)
        disk.pwrite(b"behind", disk.size - 6)
        disk.pwrite(b"x", 5001)
        with pytest.raises(AssertionError, match=r"7 bytes differ in 2 extents") as caught:
            assert_unchanged(disk, since=point)
        assert "1 at byte 5001" in str(caught.value)


@SERVERS
def test_a_disk_that_is_larger_than_its_base_was_zero_there(image: Path, server: Any) -> None:
    with CowDisk(image, size="2M", server=server) as disk:
        assert_unchanged(disk)
        disk.pwrite(b"x", (2 << 20) - 1)
        with pytest.raises(AssertionError, match="1 at byte 2097151"):
            assert_unchanged(disk)


@SERVERS
def test_nothing_is_read_of_a_blank_disk_of_16_tib_but_what_was_written(server: Any) -> None:
    with CowDisk(size="16T", block_size="64K", server=server) as disk, CowDisk(size="16T", block_size="64K") as other:
        disk.pwrite(b"far away", 15 << 40)
        other.pwrite(b"far away", 15 << 40)
        assert_same(disk, other)
        with pytest.raises(AssertionError, match=f"8 at byte {15 << 40} "):
            assert_unchanged(disk)


def test_what_cannot_be_compared_is_refused(image: Path) -> None:
    with CowDisk(image) as disk:
        with pytest.raises(UsageError, match="can be compared, not 5"):
            assert_same(disk, 5)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="only a CowDisk knows what it was"):
            assert_unchanged(image)  # type: ignore[arg-type]
    with pytest.raises(DiskClosedError, match="is closed: compare it before"):
        assert_same(disk, image)


def test_the_asserts_own_frames_are_not_in_the_report(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
        from cowkit.testing import assert_same, assert_unchanged

        def test_same(cow_disk):
            assert_same(cow_disk, b"no disk")

        def test_unchanged(cow_disk):
            cow_disk.pwrite(b"x", 0)
            assert_unchanged(cow_disk)
    """)
    result = pytester.runpytest_inprocess("-p", "no:hypothesispytest")
    result.assert_outcomes(failed=2)
    result.stdout.fnmatch_lines(
        ["E*the size of blank is 67108864 bytes, and *", "E*blank is not as its base: 1 byte differs*"]
    )
    result.stdout.no_fnmatch_line("*cowkit/testing/asserts.py*")


@given(st.binary(max_size=300), st.lists(st.tuples(st.integers(0, 299), st.integers(0, 255)), max_size=20))
def test_differences_are_those_of_a_byte_by_byte_comparison(data: bytes, changes: list[tuple[int, int]]) -> None:
    other = bytearray(data)
    for place, value in changes:
        if place < len(data):
            other[place] = value
    expected = [at for at in range(len(data)) if data[at] != other[at]]
    found = find_differences(BytesBase(data), BytesBase(other), [(0, len(data))])
    if not expected:
        assert found is None
        return
    assert found is not None
    assert (found.first, found.differing) == (expected[0], len(expected))
    inside = {at for offset, length in found.extents for at in range(offset, offset + length)}
    assert found.total > len(found.extents) or set(expected) <= inside
    starts = [at for before, at in zip([-100, *expected], expected, strict=False) if at - before > 16]
    assert found.total == len(starts)
