"""Who stands on whom in a chain of differences, and that nobody takes another one's place."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowkit import CowDisk
from cowkit.diff import Qcow2Image
from cowkit.diff.applying.copy import apply_to
from cowkit.diff.applying.in_place import apply_in_place
from cowkit.diff.identity import BLOCK, MOST_WRITTEN, positions, spread
from cowkit.diff.qcow2.stamp import stamp
from cowkit.diff.recorded import Recorded
from cowkit.diff.verify import verify_diff
from cowkit.disk import Kind
from cowkit.disk.extent import Extent
from cowkit.errors import CowkitError, UsageError, WrongBaseError
from cowkit.testing import assert_same
from tests.diff.helpers import make_base, noise, run

KIB, MIB = 1 << 10, 1 << 20
SIZE = 40 * MIB
PLACES = (30_728 * KIB, 20 * MIB + 12 * KIB, 10 * MIB + 12 * KIB)
"""Where no block is sampled of a base of that size."""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    assert not {*PLACES} & {*positions(SIZE)}
    return make_base(tmp_path / "base.img", SIZE, {0: noise(MIB, 1)})


def chain(base: Path, members: int, **image: Any) -> bytes:
    """Keep differences d1, d2, ... beside ``base``, each on top of the one before it; what the disk is in the end."""
    with CowDisk(base) as disk:
        for number, place in enumerate(PLACES[:members], 1):
            disk.pwrite(noise(4 * KIB, number), place)
            more: dict[str, Any] = {}
            if number > 1:
                more = {"since": str(number - 1), "backing_file": f"d{number - 1}.qcow2"}
            disk.diff(base.parent / f"d{number}.qcow2", **more, **image)
            disk.checkpoint(str(number))
        return disk.pread(disk.size, 0)


def to_a_copy(diff: Path, base: Path | None) -> None:
    apply_to(diff, diff.with_name("new.img"), base=base)


def in_place(diff: Path, base: Path | None) -> None:
    apply_in_place(diff, base=base)


def verify(diff: Path, base: Path | None) -> None:
    verify_diff(diff, base=base)


def overlay(diff: Path, base: Path | None) -> None:
    CowDisk(base, overlay=diff).close()


each_user = pytest.mark.parametrize(
    "use", [to_a_copy, in_place, overlay, pytest.param(verify, marks=pytest.mark.requires("qemu-img", "qemu-nbd"))]
)
Use = Callable[[Path, Path | None], None]


def refused(use: Use, diff: Path, base: Path | None) -> str:
    """What is said of it; nothing has been written."""
    before = {each: each.read_bytes() for each in diff.parent.iterdir()}
    with pytest.raises(CowkitError) as error:
        use(diff, base)
    assert {each: each.read_bytes() for each in diff.parent.iterdir()} == before
    assert "\n" not in str(error.value)
    return str(error.value)


@each_user
@pytest.mark.parametrize(("members", "gone"), [(2, 1), (3, 1), (3, 2)])
@pytest.mark.parametrize("image", [{}, {"subclusters": True, "hash": "full"}], ids=["plain", "full"])
def test_the_base_is_not_taken_for_a_difference_that_is_missing(
    use: Use, members: int, gone: int, image: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    chain(base, members, **image)
    (tmp_path / f"d{gone}.qcow2").rename(tmp_path / "away")
    said = refused(use, tmp_path / f"d{members}.qcow2", base)
    assert f"d{gone + 1}.qcow2 stands on one more difference, d{gone}.qcow2, which is missing" in said
    if use is not overlay:
        said = refused(use, tmp_path / f"d{members}.qcow2", None)
        assert f"stands on one more difference, d{gone}.qcow2, which is missing" in said


@each_user
def test_another_difference_of_the_same_base_is_not_taken_for_the_one_below(
    use: Use, base: Path, tmp_path: Path
) -> None:
    chain(base, 2)
    wrong = tmp_path / "d1.qcow2"
    for places in ((), PLACES[1:2], PLACES[2:]):
        with CowDisk(base) as disk:
            for place in places:
                disk.pwrite(noise(4 * KIB, 2), place)
            disk.diff(wrong)
        said = refused(use, tmp_path / "d2.qcow2", base)
        assert "d2.qcow2 is a difference to another base than" in said
        assert "blocks that were written before it was made, or after, differ" in said


@pytest.mark.requires("qemu-img")
def test_the_one_below_may_be_moved_and_written_in_another_way(base: Path, tmp_path: Path) -> None:
    expected = chain(base, 3)
    one, two, three = (tmp_path / f"d{number}.qcow2" for number in (1, 2, 3))
    with CowDisk(base, overlay=one) as disk:
        disk.diff(one, compress="zlib", cluster_size="2M")
    moved = Path(shutil.move(base, tmp_path / "moved.img"))
    run("qemu-img", "rebase", "-u", "-b", "moved.img", "-F", "raw", one)
    run("qemu-img", "convert", "-O", "qcow2", two, tmp_path / "flat.qcow2")
    to_a_copy(three, moved)
    assert (tmp_path / "new.img").read_bytes() == expected
    run("qemu-img", "rebase", "-u", "-b", "flat.qcow2", "-F", "qcow2", three)
    to_a_copy(three, None)
    assert (tmp_path / "new.img").read_bytes() == expected


@pytest.mark.parametrize("raw", [False, True])
def test_what_was_kept_as_a_raw_file_is_the_base_of_an_increment(raw: bool, base: Path, tmp_path: Path) -> None:
    with CowDisk(base) as disk:
        disk.pwrite(b"one", PLACES[0])
        disk.checkpoint("one")
        disk.diff(tmp_path / "kept", raw=raw)
        disk.pwrite(b"two", PLACES[1])
        disk.diff(tmp_path / "d.qcow2", since="one", backing_file="kept")
        expected = disk.pread(disk.size, 0)
    to_a_copy(tmp_path / "d.qcow2", None)
    assert (tmp_path / "new.img").read_bytes() == expected
    if raw:
        said = refused(to_a_copy, tmp_path / "d.qcow2", base)
        assert "blocks that were written" in said


@pytest.mark.requires("qemu-img", "qemu-nbd", "setpriv", modules=["nbd"])
def test_a_difference_that_is_used_as_a_base_is_one_more_difference(base: Path, tmp_path: Path) -> None:
    chain(base, 1)
    with CowDisk(tmp_path / "d1.qcow2") as disk:
        disk.pwrite(b"on top", PLACES[1])
        disk.diff(tmp_path / "d2.qcow2")
        expected = disk.pread(disk.size, 0)
    to_a_copy(tmp_path / "d2.qcow2", base)
    assert (tmp_path / "new.img").read_bytes() == expected
    shutil.copy(tmp_path / "d1.qcow2", tmp_path / "moved.qcow2")
    (tmp_path / "d1.qcow2").unlink()
    assert "one more difference, " in refused(to_a_copy, tmp_path / "d2.qcow2", base)
    run("qemu-img", "convert", "-O", "qcow2", base, tmp_path / "base.qcow2")
    assert "one more difference, " in refused(to_a_copy, tmp_path / "d2.qcow2", tmp_path / "base.qcow2")
    to_a_copy(tmp_path / "d2.qcow2", tmp_path / "moved.qcow2")
    assert (tmp_path / "new.img").read_bytes() == expected
    with CowDisk(base) as disk:
        disk.diff(tmp_path / "d1.qcow2")
    assert "blocks that were written" in refused(to_a_copy, tmp_path / "d2.qcow2", base)


def test_an_increment_that_does_not_record_what_was_written_is_read_as_before(base: Path, tmp_path: Path) -> None:
    expected = chain(base, 2)
    image = tmp_path / "d2.qcow2"
    with Qcow2Image(image) as opened:
        recorded = Recorded.of_image(opened)
    assert recorded.base is not None
    assert recorded.base.written is not None
    stamp(image, Recorded(recorded.base._replace(written=None)))
    to_a_copy(image, base)
    assert (tmp_path / "new.img").read_bytes() == expected


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(1, 500)), max_size=200), st.integers(0, MOST_WRITTEN))
def test_blocks_are_spread_over_what_was_written(gaps: list[tuple[int, int]], most: int) -> None:
    extents, at = [], 0
    for gap, length in gaps:
        extents.append(Extent((at + gap) * 512, length * 512, Kind.DATA))
        at += gap + length
    found = spread(extents, most)
    assert len(found) <= most
    assert found == sorted({*found})
    assert bool(found) is bool(extents and most)
    for offset in found:
        assert offset % BLOCK == 0
        assert any(offset < each.end and offset + BLOCK > each.offset for each in extents)


def test_of_many_writes_a_few_blocks_are_recorded_and_they_fit_into_the_smallest_cluster(tmp_path: Path) -> None:
    with CowDisk(size=4 << 40) as disk:
        for number in range(300):
            disk.pwrite(b"x", (4 << 40) - 1 - number * (1 << 33))
        disk.checkpoint("one")
        for number in range(300):
            disk.pwrite(b"y", (3 << 40) - 1 - number * (1 << 33))
        name = "./" * 506 + "/d1.qcow2"
        disk.diff(tmp_path / "d.qcow2", since="one", backing_file=name, cluster_size=4096, hash="sampled")
    with Qcow2Image(tmp_path / "d.qcow2") as image:
        identity = Recorded.of_image(image).base
    assert identity is not None
    assert identity.written is not None
    assert 32 < len(identity.written.at) <= MOST_WRITTEN


# The disk's exact size


@pytest.mark.parametrize("standalone", [False, True])
@pytest.mark.parametrize(
    ("of_base", "size"), [(130_000, 130_048), (130_000, 130_001), (4_194_404, 4_194_405), (None, 1000), (None, 1)]
)
def test_a_disk_has_its_own_size_again_to_the_byte(
    of_base: int | None, size: int, standalone: bool, tmp_path: Path
) -> None:
    base = None if of_base is None else make_base(tmp_path / "base.img", of_base, {0: noise(of_base, 1)})
    with CowDisk(base, size=size) as disk:
        disk.pwrite(b"\xdb", size - 1)
        disk.diff(tmp_path / "d.qcow2", standalone=standalone)
        expected = disk.pread(size, 0)
    below = None if standalone else base
    report = apply_to(tmp_path / "d.qcow2", tmp_path / "new.img", base=below)
    assert (tmp_path / "new.img").read_bytes() == expected
    assert report.size == size
    with CowDisk(below, overlay=tmp_path / "d.qcow2") as disk:
        assert disk.pread(disk.size, 0) == expected
    with CowDisk(below, overlay=tmp_path / "d.qcow2", size=size + 1) as disk:
        assert disk.pread(disk.size, 0) == expected + b"\0"
    if size > 1 and below is None:
        with pytest.raises(UsageError, match=f"size {size - 1} is below that of"):
            CowDisk(overlay=tmp_path / "d.qcow2", size=size - 1)
    if below is not None:
        with CowDisk(base) as smaller, pytest.raises(WrongBaseError, match=f"of a disk of {size} bytes"):
            smaller._lay_over(tmp_path / "d.qcow2")


def test_in_place_the_base_becomes_as_long_as_the_disk_and_stays_the_base_of_others_where_it_looks_the_same(
    tmp_path: Path,
) -> None:
    base = make_base(tmp_path / "base.img", 40 * MIB + 4, {0: noise(MIB, 1)})
    with CowDisk(base, size=40 * MIB + 512) as disk:
        disk.diff(tmp_path / "other.qcow2")
        disk.pwrite(b"x", PLACES[0])
        disk.diff(tmp_path / "d.qcow2")
    assert apply_in_place(tmp_path / "d.qcow2").others == "unnoticed"
    assert os.path.getsize(base) == 40 * MIB + 512
    overlay(tmp_path / "other.qcow2", base)


@pytest.mark.requires("qemu-img")
def test_an_image_that_somebody_has_resized_has_the_new_size(tmp_path: Path) -> None:
    with CowDisk(size=1000) as disk:
        disk.diff(tmp_path / "d.qcow2")
    run("qemu-img", "resize", "-q", tmp_path / "d.qcow2", "2048")
    assert apply_to(tmp_path / "d.qcow2", tmp_path / "new.img").size == 2048


@pytest.mark.requires("qemu-img", "qemu-nbd", modules=["nbd"])
def test_verify_tells_a_file_that_lacks_the_end_of_the_disk(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.img", 130_000, {0: noise(130_000, 1)})
    with CowDisk(base, size=130_048) as disk:
        disk.diff(tmp_path / "d.qcow2")
    found = verify_diff(tmp_path / "d.qcow2", against=base)
    assert [each[:2] for each in found.disagreements] == [(130_000, 48)]
    assert found.size == 130_048


@pytest.mark.requires("qemu-img", "qemu-nbd", "qemu-io", "setpriv", modules=["nbd"])
def test_a_difference_as_a_base_has_the_size_of_its_disk_unless_others_have_written_behind_it(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.img", 130_000, {0: noise(130_000, 1)})
    one, two, new = tmp_path / "d1.qcow2", tmp_path / "d2.qcow2", tmp_path / "new.img"
    with CowDisk(base) as disk:
        disk.pwrite(b"last", 129_996)
        disk.diff(one)
        assert_same(disk, one)
    with CowDisk(one) as disk:
        disk.pwrite(b"second last", 129_980)
        expected = disk.pread(disk.size, 0)
        disk.diff(two)
    assert expected == base.read_bytes()[:129_980] + b"second last" + base.read_bytes()[129_991:129_996] + b"last"
    to_a_copy(two, None)
    assert new.read_bytes() == expected
    verify(two, None)
    assert_same(two, new)
    with CowDisk(two, offset=129_980) as disk:
        assert disk.pread(disk.size, 0) == expected[129_980:]
    with CowDisk(base, overlay=two) as disk:
        assert disk.pread(disk.size, 0) == expected
    run("qemu-io", "-c", "write -P 7 129536 512", two)
    with CowDisk(two) as disk:
        assert disk.pread(disk.size, 0) == expected[:129_536] + b"\7" * 512
