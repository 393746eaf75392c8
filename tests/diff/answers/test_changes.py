"""What a report of changes says: against a simple model, and as exactly as it promises."""

from __future__ import annotations

import json
import os
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cowkit import CowDisk
from cowkit.diff import ImageOptions
from cowkit.diff.answers import ChangesReport
from cowkit.diff.answers.amounts import amounts, without
from cowkit.diff.answers.of_image import changes_in
from cowkit.diff.answers.picture import picture
from cowkit.diff.answers.strip import strip
from cowkit.diff.samples import SAMPLE
from cowkit.disk import Extent, Kind
from cowkit.errors import ImageError
from tests.diff.helpers import Doing, base_pieces, doings, make_base, noise
from tests.diff.test_image_options import kinds
from tests.diff.test_native_properties import powers, sizes


def scenario(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@scenario(30)
@given(
    base_size=sizes,
    pieces=base_pieces,
    grown=st.sampled_from([0, 0, 1, 5000, 70_000]),
    block=powers,
    todo=doings,
    split=st.integers(1, 300_000),
)
def test_each_byte_that_differs_is_in_a_changed_extent_and_the_amounts_add_up(
    base_size: int, pieces: dict[int, int], grown: int, block: int, todo: list[Doing], split: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = make_base(Path(folder, "base.img"), base_size, {at: noise(n, 9) for at, n in pieces.items()})
        with CowDisk(path, block_size=block, size=base_size + grown) as disk:
            for doing in todo:
                doing.do(disk.engine)
            report = disk.changes()
            now, written = disk.pread(disk.size, 0), disk.diff(Path(folder, "d.qcow2"), changes=True)
            before = path.read_bytes()[: disk.size].ljust(disk.size, b"\0")
            dirty = tuple(disk.dirty_extents())
        state = ["same"] * len(now)
        for extent in report.changed:
            for at in range(extent.offset, extent.end):
                state[at] = "zero" if extent.kind is Kind.ZERO else "data"
        assert all(state[at] != "same" for at in range(len(now)) if now[at] != before[at])
        assert all(not now[at] for at in range(len(now)) if state[at] == "zero")
        found = report.amounts
        assert found.changed.bytes == len(now) - state.count("same")
        assert found.zeroed.bytes == state.count("zero")
        assert found.dirty.bytes == sum(each.length for each in dirty) == found.changed.bytes + found.identical.bytes
        assert found.trimmed.bytes == sum(each.length for each in dirty if each.kind is Kind.ZERO)
        assert (report.dirty, report.changed) == (dirty, written.changed)
        assert written.changes is not None
        assert written.changes.amounts == found
        assert (written.changed_bytes, written.identical_bytes) == (found.changed.bytes, found.identical.bytes)
        assert ChangesReport.from_json(json.loads(json.dumps(report.to_json()))) == report._replace(
            seconds=round(report.seconds, 6)
        )
        # Of two parts, the sum is the whole.
        first, second = amounts(dirty, report.changed, 0, split), amounts(dirty, report.changed, split)
        assert [a.bytes + b.bytes for a, b in zip(first, second, strict=True)] == [each.bytes for each in found]
        ET.fromstring(picture(report, "t"))
        assert len(strip(report.changed, report.size, 40, dirty=report.dirty)) == 40


@scenario(30)
@given(base_size=sizes, pieces=base_pieces, block=powers, todo=doings, options=kinds | st.just(ImageOptions(raw=True)))
def test_an_estimate_is_the_size_of_the_image_and_the_others_are_no_smaller_than_theirs(
    base_size: int, pieces: dict[int, int], block: int, todo: list[Doing], options: ImageOptions
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = make_base(Path(folder, "base.img"), base_size, {at: noise(n, 9) for at, n in pieces.items()})
        image = Path(folder, "d.qcow2")
        with CowDisk(path, block_size=block) as disk:
            for doing in todo:
                doing.do(disk.engine)
            estimate = disk.changes(image=options).estimate
            assert estimate is not None
            disk.diff(image, **options._asdict())
            assert estimate.file_size == image.stat().st_size
            for other in estimate.others:
                disk.diff(image, cluster_size=other.cluster_size, subclusters=other.subclusters)
                assert other.file_size >= image.stat().st_size


def test_the_sizes_with_other_clusters_are_exact_where_nothing_reads_as_zeroes_by_chance(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.img", 16 << 20, {0: os.urandom(8 << 20)})
    with CowDisk(base) as disk:
        disk.zero(4096, 1 << 20)  # zeroes in a cluster that has other data
        disk.zero(65536, 3 << 20)  # a cluster of zeroes
        disk.pwrite(os.urandom(70_000), 5_000_000)
        disk.pwrite(os.urandom(4096), 12 << 20)
        estimate = disk.changes(image=ImageOptions()).estimate
        assert estimate is not None
        assert len(estimate.others) == 7
        for other in estimate.others:
            disk.diff(tmp_path / "d", cluster_size=other.cluster_size, subclusters=other.subclusters)
            assert other.file_size == (tmp_path / "d").stat().st_size, other


def test_what_an_estimate_says_to_be_on_the_disk_is_there(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.img", 64 << 20, {0: os.urandom(1 << 20)})
    with CowDisk(base) as disk:
        for at in range(0, 64 << 20, 3 << 20):
            disk.pwrite(os.urandom(4096), at + 8192)
        for options in (ImageOptions(), ImageOptions(subclusters=True), ImageOptions(raw=True), ImageOptions(4096)):
            estimate = disk.changes(image=options).estimate
            disk.diff(tmp_path / "d", **options._asdict())
            assert estimate is not None
            on_disk = (tmp_path / "d").stat().st_blocks * 512
            assert estimate.allocated <= on_disk <= estimate.allocated + 65536, (
                "the file system's own tables come on top"
            )


def test_nothing_is_written_for_answers(tmp_path: Path) -> None:
    with CowDisk(size="8M", tmpdir=tmp_path) as disk:
        disk.pwrite(b"x" * 100000, 12345)
        disk.changes(files=True, image=ImageOptions(compress="zlib"))
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["thread", "process"])
def test_each_kind_of_amount_counts_what_its_name_says(tmp_path: Path, where: Any) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(b"a" * (1 << 20))
    with CowDisk(base, server=where) as disk:
        disk.pwrite(b"b" * 8192, 0)
        disk.pwrite(b"a" * 4096, 16384)
        disk.pwrite(bytes(4096), 32768)
        disk.trim(65536, 131072)
        found = disk.changes().amounts
    assert (found.dirty.bytes, found.changed.bytes, found.identical.bytes) == (81920, 77824, 4096)
    assert (found.zeroed.bytes, found.trimmed.bytes) == (69632, 65536)
    assert (found.changed.extents, found.zeroed.extents, found.trimmed.extents) == (3, 2, 1)


def test_an_empty_disk_and_one_that_nobody_wrote_to_have_a_picture(tmp_path: Path) -> None:
    empty = tmp_path / "empty.img"
    empty.touch()
    for disk in (CowDisk(empty), CowDisk(size=130_000)):
        with disk:
            report = disk.changes(image=ImageOptions())
            ET.fromstring(picture(report, "x"))
            assert strip(report.changed, report.size, 10) == "·" * 10
            assert report.amounts.changed.bytes == 0


def test_a_picture_shows_each_partition_and_the_least_change() -> None:
    with CowDisk(size="64M") as disk:
        disk.pwrite(b"x", 48 << 20)
        found = disk.changes().to_json()
    report = ChangesReport.from_json(
        {
            **found,
            "partitions": [
                {"number": 1, "offset": 1 << 20, "size": 1 << 20, "file_system": None, **_nothing()},
                {"number": 2, "offset": 2 << 20, "size": 1 << 20, "file_system": "ext4", **_nothing()},
            ],
        }
    )
    drawn = ET.fromstring(picture(report, 'a <b> & "c" \x1b'))
    texts = [each.text or "" for each in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert texts[0] == 'a <b> & "c" \ufffd'
    assert any(each.startswith("partition 2: ext4, 1 MiB at 2097152") for each in texts)
    rectangles = [each.get("class") for each in drawn.iter("{http://www.w3.org/2000/svg}rect")]
    assert rectangles.count("partition") == 2
    assert rectangles.count("changed") >= 2, "in the disk's bar, a byte's block of a thousandth, and in the legend"


def _nothing() -> dict[str, int]:
    return {
        f"{name}_{unit}": 0
        for name in ("dirty", "changed", "identical", "zeroed", "trimmed")
        for unit in ("bytes", "extents")
    }


ordered = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=8).map(
    lambda pairs: [
        Extent(sum(sum(each) for each in pairs[:n]) + gap, length, Kind.DATA) for n, (gap, length) in enumerate(pairs)
    ]
)


@given(extents=ordered, others=ordered)
def test_what_is_without_something_is_a_difference_of_sets(extents: list[Extent], others: list[Extent]) -> None:
    def bytes_of(some: list[Extent]) -> set[int]:
        return {at for each in some for at in range(each.offset, each.end)}

    left = list(without(extents, others))
    assert bytes_of(left) == bytes_of(extents) - bytes_of(others)
    assert sum(each.length for each in left) == len(bytes_of(left))


# Of an image


def test_a_kept_difference_tells_where_it_differs_and_in_which_partition(tmp_path: Path) -> None:
    base = tmp_path / "disk.img"
    base.write_bytes(bytes(8 << 20))
    mbr = bytearray(512)
    mbr[446:462] = b"\0\0\0\0\x83\0\0\0" + (2048).to_bytes(4, "little") + (4096).to_bytes(4, "little")
    mbr[510:512] = b"\x55\xaa"
    with base.open("r+b") as file:
        file.write(mbr)
    with CowDisk(base) as disk:
        disk.pwrite(b"x" * 65536, 1 << 20)
        disk.pwrite(b"x" * 65536, 7 << 20)
        disk.diff(tmp_path / "one.qcow2")
        disk.checkpoint("one")
        disk.pwrite(b"y", 2 << 20)
        disk.diff(tmp_path / "two.qcow2", since="one", backing_file="one.qcow2")
    one, two = changes_in(tmp_path / "one.qcow2"), changes_in(tmp_path / "two.qcow2")
    assert [each.amounts.changed.bytes for each in one.partitions] == [65536]
    assert one.unpartitioned is not None
    assert one.unpartitioned.changed.bytes == 65536
    assert [(each.offset, each.length) for each in two.changed] == [(2 << 20, 65536)]
    assert [each.number for each in two.partitions] == [1], "the table is in the base of its base"
    base.unlink()
    assert changes_in(tmp_path / "two.qcow2").partitions == ()


def test_what_is_no_image_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"nothing")
    with pytest.raises(ImageError, match="is no qcow2 image"):
        changes_in(tmp_path / "x")


def test_looking_at_what_surely_changed_reads_samples_alone(tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(noise(8 << 20, 1))
    with CowDisk(base) as disk:
        disk.pwrite(noise(4 << 20, 2), 4096)
        report = disk.changes()
    assert sum(each.length for each in report.changed) == 4 << 20
    assert report.bytes_read == 1024 * 2 * SAMPLE
