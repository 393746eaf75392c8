"""What each member of a chain tells of itself, whoever wrote it, so that another one is not taken for it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowkit import CowDisk
from cowkit.bases import open_base
from cowkit.diff.chain import DiffChain
from cowkit.diff.identity import MOST_WRITTEN, shared
from cowkit.diff.members import _held_by_state, members_of
from cowkit.disk import Kind
from cowkit.disk.extent import Extent, merged
from tests.diff.helpers import make_base, noise, run
from tests.diff.test_chain import KIB, PLACES, SIZE, Use, each_user, overlay, refused, to_a_copy

with_qemu = pytest.mark.requires("qemu-img", "qemu-nbd", "qemu-io", "setpriv", modules=["nbd"])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base.img", SIZE, {0: noise(64 * KIB, 1)})


def on_top(below: Path, image: Path, number: int) -> bytes:
    """Keep a difference of a disk with ``below`` as its base; what the disk is in the end."""
    with CowDisk(below) as disk:
        disk.pwrite(noise(4 * KIB, number), PLACES[number - 1])
        disk.diff(image)
        return disk.pread(disk.size, 0)


def kept_by_files(base: Path, one: Path, two: Path, three: Path) -> bytes:
    on_top(base, one, 1)
    on_top(one, two, 2)
    return on_top(two, three, 3)


def kept_by_checkpoints(base: Path, one: Path, two: Path, three: Path) -> bytes:
    on_top(base, one, 1)
    with CowDisk(one) as disk:
        disk.pwrite(noise(4 * KIB, 2), PLACES[1])
        disk.checkpoint("two")
        disk.diff(two)
        disk.pwrite(noise(4 * KIB, 3), PLACES[2])
        disk.diff(three, since="two", backing_file=two)
        return disk.pread(disk.size, 0)


def kept_by_qemu(base: Path, one: Path, two: Path, three: Path) -> bytes:
    on_top(base, one, 1)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", one, two)
    run("qemu-io", "-c", f"write -P 2 {PLACES[1]} 4k", two)
    return on_top(two, three, 3)


def by_qemu(image: Path, below: Path) -> None:
    """Have QEMU write a difference again, which forgets who its base is."""
    again = image.with_name("again")
    run("qemu-img", "convert", "-c", "-O", "qcow2", "-B", below, "-F", "qcow2", image, again)
    again.replace(image)


each_way = pytest.mark.parametrize("keep", [kept_by_files, kept_by_checkpoints, kept_by_qemu])
Keep = Callable[[Path, Path, Path, Path], bytes]


@with_qemu
@each_way
@each_user
def test_another_one_is_not_taken_for_a_difference_below_what_qemu_has_written(
    use: Use, keep: Keep, base: Path, tmp_path: Path
) -> None:
    one, two, three = (tmp_path / f"d{number}.qcow2" for number in (1, 2, 3))
    expected = keep(base, one, two, three)
    by_qemu(two, one)
    to_a_copy(three, base)
    assert (tmp_path / "new.img").read_bytes() == expected
    with CowDisk(base) as disk:
        disk.pwrite(b"another", PLACES[0])
        disk.diff(one)
    said = refused(use, three, base)
    assert "blocks that were written" in said
    assert "d2.qcow2, which, or what that stands on, may have been written to since" in said


@with_qemu
@each_user
def test_the_base_is_not_taken_for_what_is_missing_below_what_qemu_has_written(
    use: Use, base: Path, tmp_path: Path
) -> None:
    one, two, three = (tmp_path / f"d{number}.qcow2" for number in (1, 2, 3))
    expected = kept_by_files(base, one, two, three)
    by_qemu(two, one)
    moved = one.rename(tmp_path / "moved.qcow2")
    for image in (two, three):
        said = refused(use, image, base)
        assert "d2.qcow2 stands on one more image, " in said
        assert "which is missing: put that back" in said
        if use is not overlay:
            said = refused(use, image, None)
            assert "d2.qcow2 stands on one more image, " in said
            assert "name the base" not in said
    to_a_copy(three, moved)
    assert (tmp_path / "new.img").read_bytes() == expected


@with_qemu
def test_members_hold_together_what_the_chain_holds_and_each_what_those_above_let_through(
    base: Path, tmp_path: Path
) -> None:
    one, two, three = (tmp_path / f"d{number}.qcow2" for number in (1, 2, 3))
    kept_by_files(base, one, two, three)
    run("qemu-io", "-c", f"write -P 7 {PLACES[0]} 128k", "-c", "write -z 0 64k", two)
    opened = open_base(three)
    with DiffChain(three) as chain:
        held = [each for each in chain.held() if each.kind is not Kind.HOLE]
    try:
        members = members_of(opened)
    finally:
        opened.release()
    start = PLACES[0] // (64 * KIB) * 64 * KIB
    assert members[1][0] == Extent(0, 64 * KIB, Kind.ZERO)
    assert [each for member in members for each in member if each.end > start and each.offset < start + 64 * KIB] == [
        Extent(start, 192 * KIB, Kind.DATA)
    ]
    assert list(merged(sorted(each for member in members for each in member))) == held


extents = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), max_size=9).map(
    lambda gaps: [
        Extent(sum(sum(each) for each in gaps[:index]) + gap, length, Kind.DATA)
        for index, (gap, length) in enumerate(gaps)
    ]
)


@given(extents, st.integers(0, 99), st.integers(0, 99))
def test_a_state_holds_what_is_dirty_and_lets_the_rest_through(dirty: list[Extent], offset: int, end: int) -> None:
    model = ["."] * 200
    for each in dirty:
        model[each.offset : each.end] = "x" * each.length
    found = list(_held_by_state(dirty, offset, end))
    assert "".join("." * each.length if each.kind is Kind.HOLE else "x" * each.length for each in found) == "".join(
        model[offset:end]
    )
    assert all(one.end == other.offset for one, other in pairwise(found))


@given(st.lists(st.lists(st.integers(0, 999), max_size=200), max_size=80), st.integers(0, MOST_WRITTEN))
def test_each_part_has_its_share_of_the_blocks_and_what_one_leaves_others_have(
    parts: list[list[int]], most: int
) -> None:
    written = [
        [Extent((block * 80 + number) * 4096, 4096, Kind.DATA) for block in sorted({*part})]
        for number, part in enumerate(parts)
    ]
    there = {each.offset for part in written for each in part}
    found = shared(written, most)
    assert found == sorted({*found} & there)
    assert len(found) <= most
    if len(there) <= most:
        assert len(found) == len(there)
    if most >= sum(map(bool, parts)):
        assert all({each.offset for each in part} & {*found} for part in written if part)
