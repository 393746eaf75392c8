"""What the native writer puts into an image, and what it costs."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from cowkit.diff import ImageOptions, Qcow2Image, backing_name, write_diff
from cowkit.diff.identity import sampled_bytes
from cowkit.diff.samples import SAMPLE
from cowkit.disk import Disk, Extent, FileBase, Kind, ZeroBase
from cowkit.errors import BaseChangedError, OutputError, UsageError
from tests.diff.helpers import check_with_qemu, content, diff, make_base, noise, read_with_cowkit, run

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """1 MiB of data."""
    return make_base(tmp_path / "base.img", MIB, {0: noise(MIB, 1)})


def held(image: Path) -> list[Extent]:
    """What the image itself holds."""
    with Qcow2Image(image) as reader:
        reader.check()
        return [each for each in reader.extents() if each.kind is not Kind.HOLE]


def test_a_trimmed_cluster_becomes_a_zero_cluster(base: Path, tmp_path: Path) -> None:
    with Disk(FileBase(base), tmpdir=tmp_path) as disk:
        disk.trim(128 * KIB, 64 * KIB)
        report = diff(disk, tmp_path / "diff.qcow2")
    assert held(tmp_path / "diff.qcow2") == [Extent(64 * KIB, 128 * KIB, Kind.ZERO)]
    assert report.changed == (Extent(64 * KIB, 128 * KIB, Kind.ZERO),)
    assert report.bytes_read == sampled_bytes(base.stat().st_size) + 128 * KIB


def test_a_cluster_written_full_of_zeroes_becomes_a_zero_cluster(base: Path, tmp_path: Path) -> None:
    with Disk(FileBase(base), tmpdir=tmp_path) as disk:
        disk.pwrite(bytes(64 * KIB), 64 * KIB)
        disk.pwrite(bytes(32 * KIB), 256 * KIB)
        disk.zero(32 * KIB, 288 * KIB)
        report = diff(disk, tmp_path / "diff.qcow2")
    assert held(tmp_path / "diff.qcow2") == [Extent(at, 64 * KIB, Kind.ZERO) for at in (64 * KIB, 256 * KIB)]
    assert (report.zeroed_bytes, report.zeroed_extents) == (128 * KIB, 2)


def test_a_block_rewritten_with_the_bytes_of_the_base_is_left_out(base: Path, tmp_path: Path) -> None:
    data = base.read_bytes()
    with Disk(FileBase(base), tmpdir=tmp_path) as disk:
        disk.pwrite(data[4096:8192], 4096)
        disk.pwrite(data[128 * KIB : 512 * KIB], 128 * KIB)
        disk.pwrite(b"boo", 300 * KIB)
        report = diff(disk, tmp_path / "diff.qcow2")
    assert held(tmp_path / "diff.qcow2") == [Extent(256 * KIB, 64 * KIB, Kind.DATA)]
    assert report.changed == (Extent(300 * KIB, 4096, Kind.DATA),)
    assert report.identical_bytes == report.dirty_bytes - 4096


def test_a_zero_range_over_a_hole_of_the_base_is_left_out(tmp_path: Path) -> None:
    path = make_base(tmp_path / "base.img", MIB, {512 * KIB: noise(4096, 1)})
    with Disk(FileBase(path), tmpdir=tmp_path) as disk:
        disk.trim(MIB, 0)
        report = diff(disk, tmp_path / "diff.qcow2")
        assert read_with_cowkit(tmp_path / "diff.qcow2", None if disk.base.path is None else FileBase(path)) == bytes(
            MIB
        )
    assert held(tmp_path / "diff.qcow2") == [Extent(512 * KIB, 64 * KIB, Kind.ZERO)]
    assert report.changed == (Extent(512 * KIB, 4096, Kind.ZERO),)


def test_a_disk_that_nobody_touched_makes_an_empty_image(base: Path, tmp_path: Path) -> None:
    with Disk(FileBase(base), tmpdir=tmp_path) as disk:
        report = diff(disk, tmp_path / "diff.qcow2")
    assert held(tmp_path / "diff.qcow2") == []
    assert (report.changed_bytes, report.bytes_read) == (0, sampled_bytes(base.stat().st_size))


@pytest.mark.requires("qemu-img")
@pytest.mark.parametrize("size", [0, 1, 511, 512, 130_000, 1_000_003])
def test_sizes_that_are_no_multiple_of_anything_are_rounded_up_to_sectors(size: int, tmp_path: Path) -> None:
    path = make_base(tmp_path / "base.img", size, {0: noise(size, 1)})
    with Disk(FileBase(path), tmpdir=tmp_path) as disk:
        if size:
            disk.pwrite(b"!", size - 1)
        report = diff(disk, tmp_path / "diff.qcow2")
        check_with_qemu(tmp_path / "diff.qcow2", content(disk))
    info = json.loads(run("qemu-img", "info", "--output=json", tmp_path / "diff.qcow2"))
    assert info["virtual-size"] == report.virtual_size == -(-size // 512) * 512


@pytest.mark.requires("qemu-img")
def test_a_disk_larger_than_its_base_goes_on_with_zeroes(base: Path, tmp_path: Path) -> None:
    with Disk(FileBase(base), size=3 * MIB + 7, tmpdir=tmp_path) as disk:
        disk.pwrite(b"beyond", 2 * MIB)
        disk.pwrite(b"across", MIB - 3)
        disk.zero(MIB // 2, 2 * MIB + 64 * KIB)
        diff(disk, tmp_path / "diff.qcow2")
        check_with_qemu(tmp_path / "diff.qcow2", content(disk))
    assert [each.kind for each in held(tmp_path / "diff.qcow2")] == [Kind.DATA, Kind.DATA]


@pytest.mark.requires("qemu-img")
def test_a_disk_smaller_than_its_base_ends_with_zeroes_not_with_the_rest_of_the_base(
    base: Path, tmp_path: Path
) -> None:
    with Disk(FileBase(base), size=100_001, tmpdir=tmp_path) as disk:
        diff(disk, tmp_path / "diff.qcow2")
        check_with_qemu(tmp_path / "diff.qcow2", content(disk))


@pytest.mark.requires("qemu-img")
def test_a_blank_disk_makes_an_image_that_stands_alone(tmp_path: Path) -> None:
    with Disk(ZeroBase(GIB), tmpdir=tmp_path) as disk:
        disk.pwrite(noise(100_000, 2), 12_345)
        disk.pwrite(bytes(MIB), 512 * MIB)
        disk.trim(MIB, 700 * MIB)
        report = diff(disk, tmp_path / "diff.qcow2")
    check_with_qemu(tmp_path / "diff.qcow2")
    assert "backing-filename" not in json.loads(run("qemu-img", "info", "--output=json", tmp_path / "diff.qcow2"))
    assert report.backing_file is report.backing_format is None
    assert held(tmp_path / "diff.qcow2") == [Extent(0, 128 * KIB, Kind.DATA)]


@pytest.mark.requires("qemu-img")
@pytest.mark.parametrize("cluster_size", [1 << bits for bits in range(12, 22)])
def test_every_cluster_size_is_sound(cluster_size: int, base: Path, tmp_path: Path) -> None:
    with Disk(FileBase(base), size=20 * MIB, tmpdir=tmp_path) as disk:
        disk.pwrite(noise(3 * MIB + 5000, 2), 300 * KIB)
        disk.zero(100 * KIB, 30 * KIB)
        disk.pwrite(b"x", 19 * MIB)
        report = diff(disk, tmp_path / "diff.qcow2", cluster_size=cluster_size)
        check_with_qemu(tmp_path / "diff.qcow2", content(disk))
        read_with_cowkit(tmp_path / "diff.qcow2", FileBase(base))
    info = json.loads(run("qemu-img", "info", "--output=json", tmp_path / "diff.qcow2"))
    assert info["cluster-size"] == report.cluster_size == cluster_size


@pytest.mark.parametrize("cluster_size", [0, 512, 2048, 65535, 4 * MIB, -4096])
def test_other_cluster_sizes_are_refused(cluster_size: int, base: Path, tmp_path: Path) -> None:
    with Disk(FileBase(base), tmpdir=tmp_path) as disk, pytest.raises(UsageError, match="cluster size"):
        diff(disk, tmp_path / "diff.qcow2", cluster_size=cluster_size)
    assert not (tmp_path / "diff.qcow2").exists()


@pytest.mark.requires("qemu-img")
@pytest.mark.parametrize("size", [5 * TIB, 15 * TIB - 512])
def test_a_huge_sparse_disk_costs_little(size: int, tmp_path: Path) -> None:
    path = make_base(tmp_path / "base.img", 3 * TIB, {0: noise(MIB, 1), 2 * TIB: noise(MIB, 2)})
    with Disk(FileBase(path), size=size, tmpdir=tmp_path, block_size=MIB) as disk:
        disk.trim(size - MIB, MIB)
        disk.pwrite(b"last", size - 4)
        report = diff(disk, tmp_path / "diff.qcow2")
    check_with_qemu(tmp_path / "diff.qcow2")
    assert held(tmp_path / "diff.qcow2") == [
        Extent(2 * TIB, MIB, Kind.ZERO),
        Extent(-(-size // (64 * KIB)) * 64 * KIB - 64 * KIB, size % (64 * KIB) or 64 * KIB, Kind.DATA),
    ]
    assert report.bytes_read <= 3 * MIB
    assert report.bytes_written < MIB
    assert os.stat(tmp_path / "diff.qcow2").st_blocks * 512 < MIB


def test_a_disk_too_large_for_its_clusters_is_refused(tmp_path: Path) -> None:
    with (
        Disk(ZeroBase(9 * TIB), block_size=16 * MIB, tmpdir=tmp_path) as disk,
        pytest.raises(UsageError, match="8 TiB"),
    ):
        diff(disk, tmp_path / "diff.qcow2", cluster_size=4096)


@pytest.mark.requires("qemu-img")
def test_a_long_trim_over_data_of_the_base_reads_that_once_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "base.img"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 64 * MIB)
        for at in range(0, 64 * MIB, MIB):  # data for certain, where unwritten space is told as a hole
            file.write(noise(MIB, at // MIB))
    with Disk(FileBase(path), tmpdir=tmp_path) as disk:
        disk.trim(64 * MIB, 0)
        report = diff(disk, tmp_path / "diff.qcow2")
        check_with_qemu(tmp_path / "diff.qcow2", content(disk))
    assert report.bytes_read == sampled_bytes(64 * MIB) + 64 * MIB
    assert report.bytes_written < MIB
    assert report.changed == (Extent(0, 64 * MIB, Kind.ZERO),)


def test_zeroes_over_zeroes_of_the_base_are_no_change_whatever_the_file_system_calls_them(tmp_path: Path) -> None:
    path = tmp_path / "base.img"
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 8 * MIB)  # told as a hole, or as data once it is in the page cache
        os.pwrite(file.fileno(), bytes(4 * MIB), 0)  # zeroes that are data
        os.pwrite(file.fileno(), b"x", MIB)
    with Disk(FileBase(path), tmpdir=tmp_path) as disk:
        disk.trim(8 * MIB, 0)
        first = diff(disk, tmp_path / "first.qcow2")
        path.read_bytes()
        second = diff(disk, tmp_path / "second.qcow2")
    assert first.changed == second.changed == (Extent(MIB, 4 * KIB, Kind.ZERO),)
    assert held(tmp_path / "first.qcow2") == held(tmp_path / "second.qcow2") == [Extent(MIB, 64 * KIB, Kind.ZERO)]


def test_scattered_writes_cost_one_cluster_of_the_base_each(tmp_path: Path) -> None:
    path = tmp_path / "base.img"
    path.write_bytes(random.Random(1).randbytes(16 * MIB))
    with Disk(FileBase(path), tmpdir=tmp_path) as disk:
        for at in range(0, 16 * MIB, 256 * KIB):
            disk.pwrite(noise(4096, 1), at + 8192)
        report = diff(disk, tmp_path / "diff.qcow2")
    assert report.bytes_read == 64 * (64 * KIB + 4096) + sampled_bytes(16 * MIB)
    assert report.bytes_written <= 64 * 64 * KIB + 64 * KIB


def test_a_dense_write_over_a_hole_reads_nothing_of_the_base(tmp_path: Path) -> None:
    path = make_base(tmp_path / "base.img", 16 * MIB, {})
    with Disk(FileBase(path), tmpdir=tmp_path) as disk:
        disk.pwrite(noise(8 * MIB, 3), MIB)
        disk.pwrite(b"part of a cluster", 15 * MIB)
        report = diff(disk, tmp_path / "diff.qcow2")
        assert read_with_cowkit(tmp_path / "diff.qcow2", FileBase(path)) == content(disk)
    assert report.bytes_read == 8 * MIB + 8 * MIB // 4096 * SAMPLE + 4096 + sampled_bytes(16 * MIB)


def test_a_long_run_keeps_only_the_clusters_that_differ(tmp_path: Path) -> None:
    data = random.Random(2).randbytes(8 * MIB)
    path = tmp_path / "base.img"
    path.write_bytes(data)
    new = bytearray(data)
    for cluster in (1, 2, 17, 40, 127):
        new[cluster * 64 * KIB + 100] ^= 1
    new[64 * 64 * KIB : 66 * 64 * KIB] = bytes(128 * KIB)
    with Disk(FileBase(path), tmpdir=tmp_path) as disk:
        disk.pwrite(new, 0)
        report = diff(disk, tmp_path / "diff.qcow2")
        assert read_with_cowkit(tmp_path / "diff.qcow2", FileBase(path)) == bytes(new)
    assert report.changed_bytes == 5 * 4096 + 128 * KIB
    assert [(each.offset // (64 * KIB), each.length // (64 * KIB), str(each.kind)) for each in held(tmp_path / "diff.qcow2")] == [
        (1, 2, "data"), (17, 1, "data"), (40, 1, "data"), (64, 2, "zero"), (127, 1, "data"),
    ]  # fmt: skip


def test_writes_that_go_on_are_not_in_the_image(base: Path, tmp_path: Path) -> None:
    with Disk(FileBase(base), tmpdir=tmp_path) as disk:
        disk.pwrite(b"before", 0)
        expected = content(disk)
        with disk.freeze() as view:
            disk.pwrite(b"after!", 0)
            disk.pwrite(b"after!", 500_000)
            write_diff(view, tmp_path / "diff.qcow2", backing_file="base.img")
    assert read_with_cowkit(tmp_path / "diff.qcow2", FileBase(base)) == expected


def test_a_base_that_changed_makes_no_image(base: Path, tmp_path: Path) -> None:
    disk = Disk(FileBase(base), tmpdir=tmp_path)
    disk.pwrite(b"boo", 0)
    with base.open("ab") as file:
        file.write(b"more")
    with pytest.raises(BaseChangedError):
        diff(disk, tmp_path / "diff.qcow2")
    with pytest.raises(BaseChangedError):
        disk.close()
    assert [path.name for path in tmp_path.iterdir()] == ["base.img"]


def test_a_base_that_changes_while_it_is_read_makes_no_image(base: Path, tmp_path: Path) -> None:
    def change(done: int, total: int) -> None:
        os.utime(base, ns=(0, done))

    (tmp_path / "diff.qcow2").write_bytes(b"old")
    disk = Disk(FileBase(base), tmpdir=tmp_path)
    disk.pwrite(b"boo", 0)
    with disk.freeze() as view, pytest.raises(BaseChangedError):
        write_diff(view, tmp_path / "diff.qcow2", backing_file="base.img", progress=change)
    with pytest.raises(BaseChangedError):
        disk.close()
    assert (tmp_path / "diff.qcow2").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2


def test_progress_ends_at_the_whole(base: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with Disk(FileBase(base), tmpdir=tmp_path) as disk:
        for at in range(0, MIB, 8192):
            disk.pwrite(b"boo", at)
        with disk.freeze() as view:
            write_diff(
                view, tmp_path / "a", backing_file="base.img", progress=lambda done, total: told.append((done, total))
            )
    assert {total for _, total in told} == {MIB // 2}
    assert told[-1][0] == MIB // 2
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len(told) > 50


def test_progress_can_end_the_copying_of_a_large_base(tmp_path: Path) -> None:
    (tmp_path / "base.img").write_bytes(noise(32 * MIB, 3))

    def end(done: int, total: int) -> None:
        written = max(each.stat().st_size for each in tmp_path.iterdir() if each.name not in ("base.img", "diff.qcow2"))
        if written > 4 * MIB:
            raise OutputError(f"enough at {written // MIB}")

    with Disk(FileBase(tmp_path / "base.img"), tmpdir=tmp_path) as disk:
        disk.pwrite(b"boo", 0)
        with disk.freeze() as view, pytest.raises(OutputError, match=r"enough at ([0-9]|1[0-9])$"):
            write_diff(
                view,
                tmp_path / "diff.qcow2",
                backing_file=None,
                progress=end,
                options=ImageOptions(standalone=True),
            )
    assert [each.name for each in tmp_path.iterdir()] == ["base.img"]


def test_the_report_says_the_same_as_json_and_to_people(base: Path, tmp_path: Path) -> None:
    with Disk(FileBase(base), tmpdir=tmp_path) as disk:
        disk.pwrite(noise(8192, 5), 4096)
        disk.trim(64 * KIB, 128 * KIB)
        disk.pwrite(base.read_bytes()[:4096], 0)
        report = diff(disk, tmp_path / "diff.qcow2")
    made = json.loads(json.dumps(report.to_json()))
    assert made["schema"] == 1
    assert (made["dirty_bytes"], made["dirty_extents"]) == (76 * KIB, 2)
    assert (made["changed_bytes"], made["changed_extents"]) == (72 * KIB, 2)
    assert (made["zeroed_bytes"], made["zeroed_extents"]) == (64 * KIB, 1)
    assert made["identical_bytes"] == 4096
    assert made["changed"] == [
        {"offset": 4096, "length": 8192, "kind": "data"},
        {"offset": 128 * KIB, "length": 64 * KIB, "kind": "zero"},
    ]
    assert made["bytes_written"] <= os.path.getsize(tmp_path / "diff.qcow2")
    summary = report.summary()
    assert "72 KiB changed in 2 extents" in summary
    assert "64 KiB of it zeroed in 1 extent" in summary
    assert "4 KiB more were written but are the same" in summary


# The name of the base


def test_a_relative_base_is_recorded_relative_to_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("images", "out/deep", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to("out/deep")
    base = str(tmp_path / "images/base.img")
    assert backing_name("images/base.img", base, "diff.qcow2") == "images/base.img"
    assert backing_name("images/base.img", base, "images/diff.qcow2") == "base.img"
    assert backing_name("images/base.img", base, "out/deep/diff.qcow2") == "../../images/base.img"
    assert backing_name("images/base.img", base, "link/diff.qcow2") == "../../images/base.img"
    assert backing_name(base, base, "images/diff.qcow2") == base
    assert backing_name(None, None, "diff.qcow2") is None


def test_a_base_reached_through_a_link_keeps_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "v3.img").touch()
    (tmp_path / "current.img").symlink_to("v3.img")
    assert backing_name("current.img", str(tmp_path / "current.img"), "diff.qcow2") == "current.img"


def test_an_output_that_is_a_link_to_elsewhere_gets_an_absolute_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "diff.qcow2").symlink_to("elsewhere/diff.qcow2")
    assert backing_name("base.img", str(tmp_path / "base.img"), "diff.qcow2") == str(tmp_path / "base.img")


def test_a_name_of_over_1023_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="1024 bytes"):
        backing_name("/" + "x" * 1023, "/" + "x" * 1023, tmp_path / "diff.qcow2")
    assert len(backing_name("/" + "x" * 1022, "/" + "x" * 1022, tmp_path / "diff.qcow2") or "") == 1023


@pytest.mark.requires("qemu-img")
@pytest.mark.parametrize(
    "name", ["nbd:base.img", "a:b", "with space", "ä.img", "x" * 250, "json:{}", "comma,img", "\udcff.img"]
)
def test_qemu_finds_a_base_of_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_base(tmp_path / name, 70_000, {0: noise(70_000, 1)})
    with Disk(FileBase(name), tmpdir=tmp_path) as disk:
        disk.pwrite(b"boo", 100)
        diff(disk, Path("diff.qcow2"))
        check_with_qemu(tmp_path / "diff.qcow2", content(disk))
    with Qcow2Image("diff.qcow2") as image:
        assert os.path.join(tmp_path, image.backing_file or "") in {str(tmp_path / name), f"{tmp_path}/./{name}"}
        assert image.backing_format == "raw"


def test_the_whole_of_1023_bytes_fits_into_the_smallest_cluster(tmp_path: Path) -> None:
    path = make_base(tmp_path / "base.img", 8192, {0: noise(8192, 1)})
    name = ("./" * 512 + "base.img")[-1023:].lstrip("/")
    with Disk(FileBase(path), tmpdir=tmp_path) as disk:
        disk.pwrite(b"boo", 0)
        with disk.freeze() as view:
            write_diff(view, tmp_path / "diff.qcow2", backing_file=name, options=ImageOptions(cluster_size=4096))
    with Qcow2Image(tmp_path / "diff.qcow2") as image:
        image.check()
        assert image.backing_file == name


def test_a_name_is_needed_exactly_where_there_is_a_base(base: Path, tmp_path: Path) -> None:
    with (
        Disk(FileBase(base), tmpdir=tmp_path) as disk,
        disk.freeze() as view,
        pytest.raises(UsageError, match="backing_file"),
    ):
        write_diff(view, tmp_path / "diff.qcow2", backing_file=None)
    assert not (tmp_path / "diff.qcow2").exists()
