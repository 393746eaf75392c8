"""Applying a difference to a copy of its base, and to the base itself."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from cowkit import CowDisk
from cowkit.bases import open_base
from cowkit.bases.unfinished import journal_of
from cowkit.diff.applying import in_place
from cowkit.diff.applying.copy import apply_to
from cowkit.diff.applying.in_place import apply_in_place, finish
from cowkit.diff.applying.journal import Journal
from cowkit.diff.applying.report import ApplyReport
from cowkit.diff.verify import verify_diff
from cowkit.disk.files import pwrite_whole
from cowkit.errors import BaseOpenError, ImageError, OutputError, UsageError, WrongBaseError
from tests.diff.helpers import make_base, noise, run
from tests.limits import files_limited_to

KIB, MIB = 1 << 10, 1 << 20
SIZE = 3 * MIB + 512


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base.img", SIZE, {0: noise(MIB, 1), 2 * MIB: noise(MIB, 2)})


def wreck(disk: CowDisk) -> None:
    disk.pwrite(noise(70_000, 3), 100_000)
    disk.zero(200_000, 2 * MIB)
    disk.trim(4096, MIB + 8192)
    disk.pwrite(b"end", disk.size - 3)


def wrecked(base: Path | None, image: Path, *, then: dict[str, Any] | None = None, **options: Any) -> bytes:
    """What the disk reads as whose difference is at ``image`` then."""
    with CowDisk(base, **options) as disk:
        wreck(disk)
        disk.diff(image, **(then or {}))
        return disk.pread(disk.size, 0)


@pytest.mark.parametrize(
    "then", [{}, {"subclusters": True}, {"compress": "zlib"}, {"cluster_size": "2M", "hash": "full"}]
)
@pytest.mark.parametrize("options", [{}, {"size": "5M"}, {"round": "down"}, {"round": "up"}])
def test_a_copy_has_the_disk(options: dict[str, Any], then: dict[str, Any], base: Path, tmp_path: Path) -> None:
    before = base.read_bytes()
    expected = wrecked(base, tmp_path / "diff.qcow2", then=then, **options)
    report = apply_to(tmp_path / "diff.qcow2", tmp_path / "new.img", full="hash" in then)
    assert (tmp_path / "new.img").read_bytes() == expected
    assert report.size == len(expected)
    assert base.read_bytes() == before
    assert os.stat(tmp_path / "new.img").st_blocks * 512 < 3 * MIB or "cluster_size" in then


@pytest.mark.parametrize("how", ["clone", "system", "by hand"])
def test_every_way_to_copy_makes_the_same_file(
    how: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = wrecked(base, tmp_path / "diff.qcow2")
    if how == "clone":

        def clone(fd: int, request: int, source: int) -> None:
            os.sendfile(fd, source, 0, SIZE)  # what FICLONE leaves, on a file system that has no clones

        monkeypatch.setattr(fcntl, "ioctl", clone)
    elif how == "by hand":

        def refuse(*arguments: object) -> int:
            raise OSError(errno.EXDEV, "Invalid cross-device link")

        monkeypatch.setattr(os, "copy_file_range", refuse)
    apply_to(tmp_path / "diff.qcow2", tmp_path / "new.img")
    assert (tmp_path / "new.img").read_bytes() == expected


def test_a_chain_goes_into_the_copy_and_a_blank_disk_has_one_too(base: Path, tmp_path: Path) -> None:
    for bottom in (base, None):
        with CowDisk(bottom, size=None if bottom else SIZE) as disk:
            wreck(disk)
            disk.diff(tmp_path / "d1.qcow2")
            disk.checkpoint("one")
            disk.pwrite(b"two", 1_500_000)
            disk.diff(tmp_path / "d2.qcow2", since="one", backing_file="d1.qcow2")
            expected = disk.pread(SIZE, 0)
        report = apply_to(tmp_path / "d2.qcow2", tmp_path / "new.img")
        assert (tmp_path / "new.img").read_bytes()[:SIZE] == expected
        assert report.base == (str(bottom) if bottom else None)
        assert ("a copy of the base with" if bottom else "which stands on no base") in report.summary()


@pytest.mark.requires("qemu-img", "qemu-nbd", "setpriv", modules=["nbd"])
def test_a_base_in_a_format_of_qemus_has_a_raw_copy_and_is_not_written(base: Path, tmp_path: Path) -> None:
    image = tmp_path / "base.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, image)
    expected = wrecked(image, tmp_path / "diff.qcow2")
    apply_to(tmp_path / "diff.qcow2", tmp_path / "new.img")
    assert (tmp_path / "new.img").read_bytes() == expected
    before = image.read_bytes()
    with pytest.raises(UsageError, match=r"is a qcow2 image, and cowkit writes to raw files alone"):
        apply_in_place(tmp_path / "diff.qcow2")
    assert image.read_bytes() == before


def test_what_the_copy_needs_is_not_replaced_by_it(base: Path, tmp_path: Path) -> None:
    wrecked(base, tmp_path / "diff.qcow2")
    for needed in (base, tmp_path / "diff.qcow2"):
        with pytest.raises(OutputError, match="it is the same file as"):
            apply_to(tmp_path / "diff.qcow2", needed)


def test_an_old_copy_stays_where_there_is_no_room(base: Path, tmp_path: Path) -> None:
    wrecked(base, tmp_path / "diff.qcow2")
    (tmp_path / "new.img").write_bytes(b"old")
    before = sorted(os.listdir(tmp_path))
    with files_limited_to(MIB), pytest.raises(OutputError, match=r"cannot write .*new\.img: File too large"):
        apply_to(tmp_path / "diff.qcow2", tmp_path / "new.img")
    assert (tmp_path / "new.img").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize(
    "refuses", [apply_in_place, lambda diff, base: apply_to(diff, diff.parent / "new.img", base=base)]
)
def test_another_base_is_refused_and_left_alone(refuses: Any, base: Path, tmp_path: Path) -> None:
    wrecked(base, tmp_path / "diff.qcow2")
    other = make_base(tmp_path / "other.img", SIZE, {0: noise(MIB, 9)})
    before = other.read_bytes()
    with pytest.raises(WrongBaseError, match=r"diff\.qcow2 is a difference to another base than .*other\.img"):
        refuses(tmp_path / "diff.qcow2", base=other)
    assert other.read_bytes() == before
    assert not (tmp_path / "new.img").exists()


# In place


@pytest.mark.parametrize("options", [{}, {"size": "5M"}, {"round": "up"}])
def test_the_base_itself_has_the_disk_and_the_difference_fits_it_no_more(
    options: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    expected = wrecked(base, tmp_path / "diff.qcow2", **options)
    report = apply_in_place(tmp_path / "diff.qcow2")
    assert base.read_bytes() == expected
    assert (report.size, report.finished) == (len(expected), False)
    assert sorted(os.listdir(tmp_path)) == ["base.img", "diff.qcow2"]
    with pytest.raises(WrongBaseError):
        apply_in_place(tmp_path / "diff.qcow2")
    assert finish(base) is None


def test_what_becomes_of_other_differences_is_told_as_it_is(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.img", 40 * MIB, {20 * MIB: noise(MIB, 1)})
    with CowDisk(base) as disk:
        disk.diff(tmp_path / "nothing.qcow2")
        disk.pwrite(b"x", 20 * MIB + 12_345)
        disk.diff(tmp_path / "aside.qcow2")
        disk.pwrite(b"x", 0)
        disk.diff(tmp_path / "seen.qcow2")
    report = apply_in_place(tmp_path / "nothing.qcow2")
    assert (report.others, "is the base that it was" in report.summary()) == ("fit", True)
    report = apply_in_place(tmp_path / "aside.qcow2")
    assert (report.others, "no block that is sampled" in report.summary()) == ("unnoticed", True)
    report = apply_in_place(tmp_path / "seen.qcow2")  # which is such another difference
    assert (report.others, "refused from now on" in report.summary()) == ("refused", True)
    with pytest.raises(WrongBaseError):
        apply_in_place(tmp_path / "nothing.qcow2")


def test_a_base_that_grew_by_less_than_a_sector_is_not_called_the_base_that_it_was(tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(noise(2000, 1))
    with CowDisk(base) as disk:
        disk.pwrite(b"x", 0)
        disk.diff(tmp_path / "old.qcow2")
    with CowDisk(base, size=2040) as disk:
        disk.diff(tmp_path / "grown.qcow2")
    report = apply_in_place(tmp_path / "grown.qcow2")
    assert (report.size_before, report.size, base.stat().st_size) == (2000, 2040, 2040)
    assert "the base that it was" not in report.summary()
    assert "nothing but its size has changed, from 2000 to 2040 bytes" in report.summary()
    assert report.others == "fit"
    apply_to(tmp_path / "old.qcow2", tmp_path / "out.img")  # which it does
    assert (tmp_path / "out.img").read_bytes() == b"x" + noise(2000, 1)[1:]


def test_a_base_that_was_written_to_is_blamed_and_not_what_stands_on_it(base: Path, tmp_path: Path) -> None:
    with CowDisk(base) as disk:
        disk.pwrite(b"one", 0)
        disk.diff(tmp_path / "d1.qcow2")
        disk.checkpoint("one")
        disk.pwrite(b"two", 2 * MIB)
        disk.diff(tmp_path / "d2.qcow2", since="one", backing_file="d1.qcow2")
    moved = tmp_path / "moved.img"
    os.rename(base, moved)
    apply_in_place(tmp_path / "d2.qcow2", base=moved)
    with pytest.raises(WrongBaseError, match=r"d1\.qcow2 is a difference to another base than .*moved\.img"):
        apply_to(tmp_path / "d2.qcow2", tmp_path / "new.img", base=moved)


def test_a_journal_that_was_never_whole_is_removed_by_the_next_and_not_from_a_living_one(
    base: Path, tmp_path: Path
) -> None:
    wrecked(base, tmp_path / "diff.qcow2")
    left = Path(journal_of(str(base)) + ".new")
    left.write_bytes(b"cowkit apply")
    with base.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another `cowkit apply`"):
            finish(base)
        assert left.exists()
    assert finish(base) is None
    assert not left.exists()
    left.write_bytes(b"cowkit apply")
    base.write_bytes(bytes(SIZE))
    with pytest.raises(WrongBaseError):
        apply_in_place(tmp_path / "diff.qcow2")
    assert not left.exists()


def test_a_base_that_would_lose_its_end_is_left_alone(base: Path, tmp_path: Path) -> None:
    wrecked(base, tmp_path / "diff.qcow2", round="down")
    with pytest.raises(UsageError, match="of which the end would be lost"):
        apply_in_place(tmp_path / "diff.qcow2")


class Killed(BaseException):
    """As good as SIGKILL, where nothing cleans up."""


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """End the next in-place apply at its write of that number to the base."""
    count = 0
    real = pwrite_whole

    def write(fd: int, data: memoryview, offset: int) -> None:
        nonlocal count
        count += 1
        if count == number:
            real(fd, data[: len(data) // 2], offset)
            raise Killed
        real(fd, data, offset)

    monkeypatch.setattr(in_place, "pwrite_whole", write)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("how", ["again", "finish", "without the difference"])
def test_an_interrupted_one_is_finished_by_the_next(
    how: str, number: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diff = tmp_path / "diff.qcow2"
    expected = wrecked(base, diff)
    with monkeypatch.context() as patch:
        stop_at(patch, number)
        with pytest.raises(Killed):
            apply_in_place(diff)
    assert base.read_bytes() != expected
    for use in (CowDisk, open_base):
        with pytest.raises(BaseOpenError, match=r"is half written: .* finish it with `cowkit apply --finish "):
            use(base)
    with pytest.raises(BaseOpenError, match="half written"):
        apply_to(diff, tmp_path / "new.img")
    if how == "again":
        report = apply_in_place(diff)
    else:
        if how == "without the difference":
            diff.unlink()
        ended = finish(base)
        assert ended is not None
        report = ended
    assert report.finished
    assert base.read_bytes() == expected
    assert not os.path.exists(journal_of(str(base)))


def test_an_interrupted_one_of_another_difference_is_finished_first(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = wrecked(base, tmp_path / "d1.qcow2")
    shutil.copy(base, tmp_path / "copy.img")
    apply_to(tmp_path / "d1.qcow2", tmp_path / "after-one.img")
    with CowDisk(tmp_path / "after-one.img") as disk:
        disk.pwrite(b"two", 1_500_000)
        disk.diff(tmp_path / "d2.qcow2")
        both = disk.pread(SIZE, 0)
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(Killed):
            apply_in_place(tmp_path / "d1.qcow2")
    told: list[ApplyReport] = []
    apply_in_place(tmp_path / "d2.qcow2", base=base, on_finished=told.append)
    assert [Path(str(each.path)).name for each in told] == ["d1.qcow2"]
    assert base.read_bytes() == both != expected


def test_no_room_for_the_journal_leaves_the_base_as_it_was(base: Path, tmp_path: Path) -> None:
    with CowDisk(base) as disk:
        disk.pwrite(noise(2 * MIB, 5), 0)
        disk.diff(tmp_path / "diff.qcow2")
    before = base.read_bytes()
    with (
        files_limited_to(MIB),
        pytest.raises(OutputError, match=r"File too large.*base is as it was|nothing of it has changed"),
    ):
        apply_in_place(tmp_path / "diff.qcow2")
    assert base.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["base.img", "diff.qcow2"]


def test_no_room_in_the_middle_is_said_and_made_up_for_later(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = wrecked(base, tmp_path / "diff.qcow2")

    def full(fd: int, data: memoryview, offset: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(in_place, "pwrite_whole", full)
        with pytest.raises(OutputError, match="No space left on device; part of it is written, and nothing is lost"):
            apply_in_place(tmp_path / "diff.qcow2")
    assert apply_in_place(tmp_path / "diff.qcow2").finished
    assert base.read_bytes() == expected


@pytest.mark.parametrize("at", [0, 30, 300, -1, -40])
@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_journal_is_never_written_to_the_base(
    cut: bool, at: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrecked(base, tmp_path / "diff.qcow2")
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(Killed):
            apply_in_place(tmp_path / "diff.qcow2")
    journal = Path(journal_of(str(base)))
    data = bytearray(journal.read_bytes())
    data[at] ^= 1
    journal.write_bytes(data[:at] if cut else data)
    before = base.read_bytes()
    with pytest.raises(OutputError, match="is damaged, so the apply that it is of cannot be finished"):
        apply_in_place(tmp_path / "diff.qcow2")
    assert base.read_bytes() == before
    assert journal.exists()


@pytest.mark.requires("qemu-img", "qemu-nbd", modules=["nbd"])
@pytest.mark.parametrize("chain", [1, 2])
def test_a_qcow2_base_is_the_base_and_no_part_of_the_difference(base: Path, tmp_path: Path, chain: int) -> None:
    vm = tmp_path / "vm.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", base, vm)
    with CowDisk(vm) as disk:
        disk.pwrite(b"one", 0)
        disk.diff(tmp_path / "d1.qcow2")
        disk.checkpoint("one")
        disk.pwrite(b"two", 70_000)
        disk.diff(tmp_path / "d2.qcow2", since="one", backing_file="d1.qcow2")
        states = [b"", b"", disk.pread(disk.size, 0)]
        disk.rollback("one")
        states[1] = disk.pread(disk.size, 0)
    diff = tmp_path / f"d{chain}.qcow2"
    with pytest.raises(
        UsageError, match=r"vm\.qcow2 is a qcow2 image, and cowkit writes to raw files alone.*qemu-img commit"
    ):
        apply_in_place(diff)
    found = verify_diff(diff)
    assert (found.base, found.images) == (str(vm), tuple(str(tmp_path / f"d{n}.qcow2") for n in range(chain, 0, -1)))
    assert found.compared_bytes == chain * 65536
    assert found.recognised
    apply_to(diff, tmp_path / "new.img")

    assert (tmp_path / "new.img").read_bytes() == states[chain]
    with pytest.raises(WrongBaseError, match=r"is a difference to .*vm\.qcow2, and no disk without a base"):
        CowDisk(overlay=diff)
    with CowDisk(vm, overlay=diff) as disk:
        assert disk.dirty_bytes == chain * 65536
    os.truncate(vm, 0)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", tmp_path / "new.img", vm)
    with pytest.raises(WrongBaseError, match="is a difference to another base"):
        verify_diff(diff)


def test_two_at_once_do_not_meet(base: Path, tmp_path: Path) -> None:
    wrecked(base, tmp_path / "diff.qcow2")
    with base.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another `cowkit apply` is at work on it"):
            apply_in_place(tmp_path / "diff.qcow2")


def test_what_cannot_be_written_to_is_refused(base: Path, tmp_path: Path) -> None:
    wrecked(None, tmp_path / "alone.qcow2", size=SIZE)
    with pytest.raises(UsageError, match="stands alone: there is no base to apply it to"):
        apply_in_place(tmp_path / "alone.qcow2")
    wrecked(base, tmp_path / "diff.qcow2")
    for wrong, error in ((tmp_path, UsageError), (tmp_path / "none.img", OutputError), ("a\0b", OutputError)):
        with pytest.raises(error):
            apply_in_place(tmp_path / "diff.qcow2", base=wrong)
    (tmp_path / "diff.qcow2").write_bytes((tmp_path / "diff.qcow2").read_bytes()[:70_000])
    before = base.read_bytes()
    with pytest.raises(ImageError):
        apply_in_place(tmp_path / "diff.qcow2")
    assert base.read_bytes() == before
    assert not os.path.exists(journal_of(str(base)))


def test_the_journal_is_for_its_owner_alone_and_holds_what_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrecked(base, tmp_path / "diff.qcow2")
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(Killed):
            apply_in_place(tmp_path / "diff.qcow2")
    assert os.stat(journal_of(str(base))).st_mode & 0o777 == 0o600
    with Journal(str(base)) as journal:
        records = list(journal.records())
        assert journal.facts.written_bytes == sum(len(data) for _, data in records)
        assert journal.facts.zeroed_bytes > 0
