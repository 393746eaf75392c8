"""A disk that goes on from an earlier difference."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from cowkit import CowDisk, diff_images
from cowkit.diff import Qcow2Image
from cowkit.disk import FileBase
from cowkit.errors import CheckpointError, CowkitError, ImageError, OverlayFullError, UsageError, WrongBaseError
from tests.cli.helpers import content
from tests.diff.helpers import make_base, noise, run
from tests.limits import files_limited_to

KIB, MIB = 1 << 10, 1 << 20
SIZE = 3 * MIB + 512


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base.img", SIZE, {0: noise(MIB, 1), 2 * MIB: noise(MIB, 2)})


def wreck(disk: CowDisk, seed: int) -> None:
    """Write, zero and trim here and there, differently for each ``seed``."""
    disk.pwrite(noise(70_000, seed), 100_000 * seed)
    disk.zero(5000, 40_000 + 4096 * seed)
    disk.trim(200_000, 2 * MIB + 200_000 * seed)
    disk.pwrite(b"end", disk.size - 3)


def whole(disk: CowDisk) -> bytes:
    return disk.pread(disk.size, 0)


@pytest.mark.parametrize("server", ["thread", "process"])
@pytest.mark.parametrize(
    "options", [{}, {"subclusters": True}, {"compress": "zlib"}, {"cluster_size": 4096}, {"bitmap": "b"}]
)
def test_the_disk_begins_as_the_difference_is_and_its_difference_is_the_whole_one(
    server: Any, options: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    with CowDisk(base) as disk:
        wreck(disk, 1)
        disk.diff(tmp_path / "d1.qcow2", **options)
        after_one = whole(disk)
        wreck(disk, 2)
        after_two = whole(disk)
    with CowDisk(base, overlay=tmp_path / "d1.qcow2", server=server) as disk:
        (tmp_path / "d1.qcow2").unlink()  # not needed any more
        assert (disk.size, whole(disk)) == (SIZE, after_one)
        wreck(disk, 2)
        assert whole(disk) == after_two
        disk.diff(tmp_path / "both.qcow2")
    assert content(tmp_path / "both.qcow2", base)[:SIZE] == after_two


def test_back_to_the_overlay_or_to_the_base(base: Path, tmp_path: Path) -> None:
    with CowDisk(base) as disk:
        wreck(disk, 1)
        disk.diff(tmp_path / "d1.qcow2")
        after_one = whole(disk)
    with CowDisk(base, overlay=tmp_path / "d1.qcow2") as disk:
        assert [point.name for point in disk.checkpoints] == ["overlay"]
        wreck(disk, 2)
        disk.rollback("overlay")
        assert whole(disk) == after_one
        assert disk.diff(tmp_path / "nothing.qcow2", since="overlay", backing_file="d1.qcow2").changed_bytes == 0
        disk.reset()
        assert whole(disk) == base.read_bytes()
        with pytest.raises(CheckpointError):
            disk.rollback("overlay")


@pytest.mark.parametrize("blank", [False, True])
def test_a_chain_of_differences_is_loaded_as_one(blank: bool, base: Path, tmp_path: Path) -> None:
    states = []
    with CowDisk(None if blank else base, size=SIZE if blank else None) as disk:
        for number in (1, 2, 3):
            wreck(disk, number)
            since = f"p{number - 1}" if number > 1 else None
            disk.diff(
                tmp_path / f"d{number}.qcow2", since=since, backing_file=f"d{number - 1}.qcow2" if since else None
            )
            disk.checkpoint(f"p{number}")
            states.append(whole(disk))
    for number in (1, 2, 3):
        with CowDisk(
            None if blank else base, size=SIZE if blank else None, overlay=tmp_path / f"d{number}.qcow2"
        ) as disk:
            assert whole(disk) == states[number - 1]
    with CowDisk(overlay=tmp_path / "d3.qcow2") if blank else CowDisk(base, overlay=tmp_path / "d3.qcow2") as disk:
        assert disk.size == (-(-SIZE // 512) * 512 if blank else SIZE)
    # An increment on top of another one than it was made of
    shutil.move(tmp_path / "d1.qcow2", tmp_path / "d2.qcow2")
    with pytest.raises(WrongBaseError, match=r"d3\.qcow2 is a difference to another base than .*d2\.qcow2"):
        CowDisk(None if blank else base, size=SIZE if blank else None, overlay=tmp_path / "d3.qcow2")


def test_a_base_that_was_moved_is_recognised_and_another_one_is_not(base: Path, tmp_path: Path) -> None:
    with CowDisk(base) as disk:
        wreck(disk, 1)
        disk.diff(tmp_path / "diff.qcow2")
        changed = whole(disk)
    moved = Path(shutil.move(base, tmp_path / "moved.img"))
    with CowDisk(moved, overlay=tmp_path / "diff.qcow2") as disk:
        assert whole(disk) == changed
    other = make_base(tmp_path / "other.img", SIZE, {0: noise(MIB, 7)})
    for wrong, why in (
        (other, "blocks that were sampled differ"),
        (make_base(base, MIB, {}), "its size is 1048576 bytes"),
    ):
        with pytest.raises(WrongBaseError, match=why) as refused:
            CowDisk(wrong, overlay=tmp_path / "diff.qcow2")
        assert "diff.qcow2" in str(refused.value)
        assert wrong.name in str(refused.value)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "format",
    ["raw", pytest.param("qcow2", marks=pytest.mark.requires("qemu-img", "qemu-nbd", "setpriv", modules=["nbd"]))],
)
def test_an_increment_is_not_taken_for_a_difference_to_the_base_where_both_have_the_same_samples(
    format: str, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "raw.img", 40 * MIB, {0: noise(MIB, 1)})
    if format != "raw":
        run("qemu-img", "convert", "-f", "raw", "-O", format, base, tmp_path / f"base.{format}")
        base = tmp_path / f"base.{format}"
    with CowDisk(base) as disk:
        disk.pwrite(b"where nothing is sampled", 20 * MIB + 12_345)
        disk.diff(tmp_path / "d1.qcow2")
        disk.checkpoint("one")
        disk.pwrite(b"two", 30 * MIB)
        disk.diff(tmp_path / "d2.qcow2", since="one", backing_file="d1.qcow2")
        changed = whole(disk)
    copy = Path(shutil.move(base, tmp_path / f"copy{base.suffix}"))
    with CowDisk(copy, overlay=tmp_path / "d2.qcow2") as disk:
        assert whole(disk) == changed


@pytest.mark.parametrize(
    ("first", "then", "size"),
    [
        ({"size": "5M"}, {}, 5 * MIB),
        ({"size": "5M"}, {"size": "6M"}, 6 * MIB),
        ({"round": "down"}, {}, 3 * MIB),
        ({"round": "up"}, {}, 3 * MIB + 4096),
        ({"round": "down"}, {"size": 3 * MIB + 8192}, 3 * MIB + 8192),
        ({}, {"round": "up"}, 3 * MIB + 4096),
        ({"size": 3 * MIB + 9000}, {"size": 3 * MIB + 9000}, 3 * MIB + 9000),  # the image has it in whole sectors
    ],
)
def test_the_disk_is_as_large_as_the_difference_or_larger(
    first: dict[str, Any], then: dict[str, Any], size: int, base: Path, tmp_path: Path
) -> None:
    with CowDisk(base, **first) as disk:
        wreck(disk, 1)
        disk.diff(tmp_path / "diff.qcow2")
        changed = whole(disk)
    with CowDisk(base, overlay=tmp_path / "diff.qcow2", **then) as disk:
        assert disk.size == size
        assert whole(disk) == changed.ljust(size, b"\0")


def test_an_increment_of_a_larger_disk_stands_on_the_difference_that_it_began_with(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.img", 8 * MIB, {7 * MIB: noise(MIB, 1)})
    first, second, third = (tmp_path / f"d{number}.qcow2" for number in (1, 2, 3))
    with CowDisk(base) as disk:
        disk.pwrite(noise(65_536, 2), MIB)
        disk.diff(first)
    with CowDisk(base, size="16M", overlay=first) as disk:
        assert disk.dirty_bytes == 65_536  # and not the room that was added
        disk.pwrite(noise(65_536, 3), 12 * MIB)
        report = disk.diff(second, since="overlay", backing_file=first)
        assert (report.changed_bytes, report.size, report.base_size, report.resized) == (
            65_536,
            16 * MIB,
            8 * MIB,
            True,
        )
        expected = whole(disk)
        disk.checkpoint("later")
        with pytest.raises(UsageError, match="it has 8388608 bytes, not 16777216"):
            disk.diff(third, since="later", backing_file=first)  # which has not what is written beyond its end
    with CowDisk(base, overlay=second) as disk:
        assert (disk.dirty_bytes, whole(disk)) == (2 * 65_536, expected)
    with CowDisk(base, size="16M", overlay=second) as disk:
        disk.diff(third)
    assert content(third, base) == expected


def test_what_a_smaller_disk_cut_off_stays_away_from_a_larger_one(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.img", 8 * MIB, {5 * MIB: noise(MIB, 1)})
    smaller = make_base(tmp_path / "smaller.img", 4 * MIB, {})
    diff_images(smaller, base, tmp_path / "d.qcow2")
    with CowDisk(base, size="16M", overlay=tmp_path / "d.qcow2") as disk:
        assert (disk.dirty_bytes, whole(disk)) == (MIB, bytes(16 * MIB))


def test_a_size_below_the_difference_is_refused(base: Path, tmp_path: Path) -> None:
    with CowDisk(base, size="5M") as disk:
        disk.diff(tmp_path / "diff.qcow2")
    with pytest.raises(UsageError, match=r"size 4194304 is below that of .*diff.qcow2, 5242880"):
        CowDisk(base, size="4M", overlay=tmp_path / "diff.qcow2")


@pytest.mark.requires("qemu-img", "qemu-io")
def test_a_difference_of_another_program_is_taken_where_its_name_leads_to_the_base(base: Path, tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, tmp_path / "diff.qcow2")
    run("qemu-io", "-c", "write -P 7 64k 4k", tmp_path / "diff.qcow2")
    with CowDisk(base, overlay=tmp_path / "diff.qcow2") as disk:
        assert disk.pread(4096, 64 * KIB) == b"\x07" * 4096
    copy = shutil.copy(base, tmp_path / "copy.img")
    with pytest.raises(WrongBaseError, match=r"does not record who that is, so .*copy\.img may be another base"):
        CowDisk(copy, overlay=tmp_path / "diff.qcow2")


@pytest.mark.requires("qemu-img", "qemu-nbd", "setpriv", modules=["nbd"])
def test_a_base_in_a_format_of_qemus(base: Path, tmp_path: Path) -> None:
    image = tmp_path / "base.qcow2"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", base, image)
    with CowDisk(image) as disk:
        wreck(disk, 1)
        disk.diff(tmp_path / "diff.qcow2")
        changed = whole(disk)
    with CowDisk(image, overlay=tmp_path / "diff.qcow2") as disk:
        assert whole(disk) == changed
    shutil.move(image, tmp_path / "moved.qcow2")
    with CowDisk(tmp_path / "moved.qcow2", overlay=tmp_path / "diff.qcow2") as disk:
        assert whole(disk) == changed
    run("qemu-img", "create", "-q", "-f", "qcow2", image, "3M")
    with pytest.raises(WrongBaseError, match=r"diff\.qcow2 is a difference to another base than .*base\.qcow2"):
        CowDisk(image, overlay=tmp_path / "diff.qcow2")


def test_a_part_of_the_base_is_another_base(base: Path, tmp_path: Path) -> None:
    with CowDisk(base) as disk:
        disk.diff(tmp_path / "diff.qcow2")
    with pytest.raises(WrongBaseError, match="its size is"):
        CowDisk(base, offset="1M", overlay=tmp_path / "diff.qcow2")


def test_what_stands_alone_is_no_difference_to_a_base_and_the_other_way_round(base: Path, tmp_path: Path) -> None:
    with CowDisk(base) as disk:
        disk.diff(tmp_path / "alone.qcow2", standalone=True)
        disk.diff(tmp_path / "diff.qcow2")
    with pytest.raises(WrongBaseError, match="stands alone and is no difference to"):
        CowDisk(base, overlay=tmp_path / "alone.qcow2")
    with pytest.raises(WrongBaseError, match=r"is a difference to .*base\.img, and no disk without a base"):
        CowDisk(size=SIZE, overlay=tmp_path / "diff.qcow2")
    with CowDisk(overlay=tmp_path / "alone.qcow2") as disk:
        assert whole(disk)[:SIZE] == base.read_bytes()


def test_what_is_no_difference_is_refused_and_nothing_stays_open(base: Path, tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for wrong in (base, tmp_path / "none.qcow2", tmp_path):
        with pytest.raises(ImageError):
            CowDisk(base, overlay=wrong)
    with CowDisk(base) as disk:
        disk.pwrite(noise(MIB, 5), 0)
        disk.diff(tmp_path / "diff.qcow2")
    with files_limited_to(64 * KIB), pytest.raises(OverlayFullError):
        CowDisk(base, overlay=tmp_path / "diff.qcow2")
    with (tmp_path / "diff.qcow2").open("r+b") as file:
        file.truncate(100 * KIB)
    with pytest.raises(ImageError, match="damaged"):
        CowDisk(base, overlay=tmp_path / "diff.qcow2")
    assert len(os.listdir("/proc/self/fd")) == len(before)


@pytest.mark.requires(modules=["nbd"])
def test_each_connection_has_a_disk_that_begins_as_the_overlay(base: Path, tmp_path: Path) -> None:
    import nbd

    with CowDisk(base) as disk:
        wreck(disk, 1)
        disk.diff(tmp_path / "diff.qcow2")
        changed = whole(disk)
    with CowDisk(base, overlay=tmp_path / "diff.qcow2") as disk:
        disk.pwrite(b"the disk itself goes on", 0)
        server = disk.serve(share="connection")
        for _ in range(2):
            client = nbd.NBD()
            client.connect_uri(server.uri)
            assert bytes(client.pread(client.get_size(), 0)) == changed
            client.pwrite(b"private", 0)
            client.shutdown()
        server.stop()


def test_the_marks_and_the_factory_take_it(base: Path, tmp_path: Path, pytester: pytest.Pytester) -> None:
    with CowDisk(base) as disk:
        disk.pwrite(b"earlier", 4096)
        disk.diff(tmp_path / "diff.qcow2")
    pytester.makepyfile(f"""
        import pytest

        @pytest.mark.cow_disk(base={str(base)!r}, overlay="diff.qcow2")
        def test_marked(cow_disk):
            assert cow_disk.pread(7, 4096) == b"earlier"

        def test_made(cow_disk_factory):
            assert cow_disk_factory({str(base)!r}, overlay={str(tmp_path / "diff.qcow2")!r}).pread(7, 4096) == b"earlier"
    """)
    shutil.copy(tmp_path / "diff.qcow2", pytester.path)
    pytester.runpytest_inprocess("-p", "no:cacheprovider").assert_outcomes(passed=2)


def test_a_relative_name_is_the_callers_also_in_a_host(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = b""
    with CowDisk(base) as disk:
        wreck(disk, 1)
        disk.diff(tmp_path / "diff.qcow2")
        expected = whole(disk)
    monkeypatch.chdir(tmp_path)
    with CowDisk(base, overlay="diff.qcow2", server="process") as disk:
        assert whole(disk) == expected
        disk.rollback("overlay")
    (tmp_path / "other.img").write_bytes(bytes(SIZE))
    with pytest.raises(WrongBaseError, match=r"diff\.qcow2 is a difference to another base than other\.img"):
        CowDisk("other.img", overlay="diff.qcow2", server="process")


def test_a_base_that_was_written_to_since_is_refused(base: Path, tmp_path: Path) -> None:
    with CowDisk(base) as disk:
        disk.diff(tmp_path / "diff.qcow2")
    with base.open("r+b") as file:
        file.write(b"x")
    with pytest.raises(WrongBaseError, match="may have been written to since"):
        CowDisk(base, overlay=tmp_path / "diff.qcow2")
    assert issubclass(WrongBaseError, CowkitError)


def test_an_image_in_itself_is_refused(base: Path, tmp_path: Path) -> None:
    with CowDisk(base) as disk:
        disk.diff(tmp_path / "diff.qcow2", backing_file="diff2.qcow2", backing_format="qcow2")
    shutil.move(tmp_path / "diff.qcow2", tmp_path / "diff2.qcow2")
    make_base(tmp_path / "other.img", SIZE, {0: noise(MIB, 7)})
    with pytest.raises(ImageError, match="endless"):
        CowDisk(tmp_path / "other.img", overlay=tmp_path / "diff2.qcow2")
    with Qcow2Image(tmp_path / "diff2.qcow2") as image:
        assert image.backing_file == "diff2.qcow2"
    FileBase(base).release()
