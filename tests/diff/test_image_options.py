"""Each kind of image: sound to QEMU, the disk to every reader, and as small as it promises."""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cowkit import CowDisk
from cowkit.diff import DiffReport, ImageOptions, Qcow2Image, backing_name, write_diff
from cowkit.diff.identity import sampled_bytes
from cowkit.disk import Disk, Extent, FileBase, Kind, ZeroBase
from cowkit.disk.extent import merged
from cowkit.errors import CowkitError, OutputError, UsageError
from tests.diff.helpers import (
    Doing,
    base_pieces,
    check_with_qemu,
    content,
    doings,
    make_base,
    noise,
    read_with_cowkit,
    read_with_dissect,
    run,
)
from tests.limits import files_limited_to

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

sizes = st.one_of(st.integers(1, 300_000), st.integers(1, 70).map(lambda n: n * 4096))
blocks = st.integers(9, 17).map(lambda n: 1 << n)
clusters = st.sampled_from([4096, 16384, 65536, "128K"])
split_clusters = st.sampled_from([16384, 65536, 2 * MIB])


def options_of(**members: st.SearchStrategy[Any]) -> st.SearchStrategy[ImageOptions]:
    return st.fixed_dictionaries(members).map(lambda chosen: ImageOptions(**chosen))


bitmaps = st.sampled_from([None, "dirty"])
kinds = st.one_of(
    options_of(cluster_size=clusters, bitmap=bitmaps, standalone=st.booleans()),
    options_of(cluster_size=split_clusters, subclusters=st.just(value=True), bitmap=bitmaps, standalone=st.booleans()),
    options_of(
        cluster_size=clusters, compress=st.sampled_from(["zlib", "zstd"]), bitmap=bitmaps, standalone=st.booleans()
    ),
)


def scenario(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def diff(disk: Disk, path: Path, options: ImageOptions) -> DiffReport:
    with disk.freeze() as view:
        name = None if options.has_all else backing_name(disk.base.given, disk.base.path, path)
        return write_diff(view, path, backing_file=name, options=options)


def damaged(folder: str, size: int, base_size: int, pieces: dict[int, int], block: int, todo: list[Doing]) -> Disk:
    """A disk in ``folder`` to which all of ``todo`` was done."""
    path = make_base(Path(folder, "base.img"), base_size, {at: noise(length, 9) for at, length in pieces.items()})
    disk = Disk(FileBase(path), block_size=block, size=size, tmpdir=folder)
    for doing in todo:
        doing.do(disk)
    return disk


@pytest.mark.requires("qemu-img", modules=["backports.zstd"])
@scenario(80)
@given(base_size=sizes, pieces=base_pieces, size=sizes, block=blocks, todo=doings, options=kinds)
def test_every_kind_of_image_is_the_disk_to_qemu_and_to_our_reader(
    base_size: int, pieces: dict[int, int], size: int, block: int, todo: list[Doing], options: ImageOptions
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "diff.qcow2")
        with damaged(folder, size, base_size, pieces, block, todo) as disk:
            diff(disk, image, options)
            expected = content(disk)
            check_with_qemu(image, expected)
            assert isinstance(disk.base, FileBase)
            assert read_with_cowkit(image, None if options.has_all else disk.base) == expected
            dirty = [(each.offset, each.end) for each in disk.dirty_extents()]
        if options.bitmap:
            unit = max(block, 512)
            with Qcow2Image(image) as reader:
                assert reader.bitmaps == ["dirty"]
                assert blocks_of([(e.offset, e.end) for e in reader.bitmap("dirty")], unit) == blocks_of(dirty, unit)


def blocks_of(ranges: list[tuple[int, int]], unit: int) -> set[int]:
    return {block for start, end in ranges for block in range(start // unit, -(-end // unit))}


@pytest.mark.requires(modules=["dissect.hypervisor"])
@scenario(40)
@given(
    base_size=sizes, pieces=base_pieces, size=sizes, block=blocks, todo=doings,
    options=st.one_of(
        options_of(cluster_size=clusters, compress=st.just("zlib")),  # of subclusters it loses its way
        options_of(cluster_size=clusters, standalone=st.just(value=True)),
    ),
)  # fmt: skip
def test_a_strangers_reader_finds_the_disk_too(
    base_size: int, pieces: dict[int, int], size: int, block: int, todo: list[Doing], options: ImageOptions
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "diff.qcow2")
        with damaged(folder, size, base_size, pieces, block, todo) as disk:
            diff(disk, image, options)
            expected = content(disk)
        assert (
            read_with_dissect(image, None if options.has_all else Path(folder, "base.img"), len(expected)) == expected
        )


@scenario(60)
@given(base_size=sizes, pieces=base_pieces, size=sizes, block=blocks, todo=doings)
def test_a_raw_file_is_the_disk_to_the_last_byte(
    base_size: int, pieces: dict[int, int], size: int, block: int, todo: list[Doing]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "now.img")
        with damaged(folder, size, base_size, pieces, block, todo) as disk:
            report = diff(disk, image, ImageOptions(raw=True))
            assert image.read_bytes() == disk.pread(size, 0)
        assert report.virtual_size == size


@pytest.fixture
def scattered(tmp_path: Path) -> Path:
    """2 GiB, a hole."""
    return make_base(tmp_path / "base.img", 2 * GIB, {})


def space(path: Path) -> int:
    return os.stat(path).st_blocks * 512


def test_a_thousand_small_changes_take_under_6_mib_with_subclusters(scattered: Path, tmp_path: Path) -> None:
    spots = random.Random(1).sample(range(2 * GIB // 4096), 1000)
    with Disk(FileBase(scattered), tmpdir=tmp_path) as disk:
        for spot in spots:
            disk.pwrite(noise(4096, 3), spot * 4096)
        diff(disk, tmp_path / "small.qcow2", ImageOptions(subclusters=True))
        diff(disk, tmp_path / "large.qcow2", ImageOptions(subclusters=False))
        with Qcow2Image(tmp_path / "small.qcow2", disk.base.pread, disk.base.size) as image:
            image.check()
            assert all(image.pread(4096, spot * 4096) == noise(4096, 3) for spot in spots)
    assert space(tmp_path / "small.qcow2") < 6 * MIB
    assert space(tmp_path / "large.qcow2") > 60 * MIB


class Solid(FileBase):
    """A file whose holes count as data, and are full of it."""

    ones = memoryview(b"1" * MIB)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        buffer[:] = self.ones[: len(buffer)]

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, Kind.DATA)


@pytest.mark.parametrize("options", [ImageOptions(), ImageOptions(subclusters=True), ImageOptions(compress="zlib")])
def test_a_trimmed_gibibyte_adds_under_a_mebibyte(options: ImageOptions, tmp_path: Path) -> None:
    with Disk(Solid(make_base(tmp_path / "base.img", 2 * GIB, {})), tmpdir=tmp_path) as disk:
        disk.trim(GIB, 4096)
        report = diff(disk, tmp_path / "diff.qcow2", options)
    assert report.zeroed_bytes == GIB
    assert report.bytes_read <= GIB + 2 * 64 * KIB + sampled_bytes(2 * GIB)
    assert space(tmp_path / "diff.qcow2") < MIB


@pytest.mark.requires("qemu-img")
def test_what_does_not_get_smaller_is_stored_as_it_is(tmp_path: Path) -> None:
    with Disk(ZeroBase(MIB), tmpdir=tmp_path) as disk:
        disk.pwrite(random.Random(1).randbytes(128 * KIB), 0)
        disk.pwrite(b"x" * 128 * KIB, 512 * KIB)
        diff(disk, tmp_path / "diff.qcow2", ImageOptions(compress="zlib"))
        check_with_qemu(tmp_path / "diff.qcow2", content(disk))
    told = json.loads(run("qemu-img", "check", "--output=json", tmp_path / "diff.qcow2"))
    assert (told["allocated-clusters"], told["compressed-clusters"]) == (4, 2)


@pytest.mark.requires("qemu-img")
@pytest.mark.parametrize(("method", "options"), [("zlib", {}), ("zstd", {"compression type": "zstd"})])
def test_qemu_says_what_kind_of_image_it_is(method: Any, options: dict[str, str], tmp_path: Path) -> None:
    with Disk(ZeroBase(MIB), tmpdir=tmp_path) as disk:
        disk.pwrite(b"x", 0)
        diff(disk, tmp_path / "diff.qcow2", ImageOptions(compress=method, bitmap="since monday"))
        diff(disk, tmp_path / "split.qcow2", ImageOptions(subclusters=True, cluster_size="2M"))
    told = json.loads(run("qemu-img", "info", "--output=json", tmp_path / "diff.qcow2"))
    data = told["format-specific"]["data"]
    assert data["compression-type"] == method
    assert data["bitmaps"] == [{"flags": [], "name": "since monday", "granularity": 4096}]
    told = json.loads(run("qemu-img", "info", "--output=json", tmp_path / "split.qcow2"))
    assert (told["cluster-size"], told["format-specific"]["data"]["extended-l2"]) == (2 * MIB, True)


@pytest.mark.requires("qemu-nbd", modules=["nbd"])
def test_qemu_nbd_serves_the_bitmap_as_the_disks_dirty_blocks(tmp_path: Path) -> None:
    import nbd

    base = make_base(tmp_path / "base.img", 600 * MIB, {0: noise(MIB, 1)})
    with Disk(FileBase(base), tmpdir=tmp_path) as disk:
        disk.pwrite(b"x", 12345)
        disk.trim(300 * MIB, 64 * MIB)
        disk.pwrite(b"x", 600 * MIB - 1)
        diff(disk, tmp_path / "diff.qcow2", ImageOptions(bitmap="dirty", cluster_size=4096))
        expected = [(e.offset, e.end) for e in disk.dirty_extents()]
    client = nbd.NBD()
    client.add_meta_context("qemu:dirty-bitmap:dirty")
    client.connect_systemd_socket_activation(
        ["qemu-nbd", "-r", "-f", "qcow2", "-B", "dirty", str(tmp_path / "diff.qcow2")]
    )
    found: list[Extent] = []

    def extents(context: str, offset: int, entries: list[int], error: Any) -> int:
        for length, flag in zip(entries[::2], entries[1::2], strict=True):
            found.append(Extent(offset, length, Kind.DATA if flag else Kind.HOLE))
            offset += length
        return 0

    at, size = 0, client.get_size()
    while at < size:
        client.block_status(min(size - at, GIB), at, extents)
        at = found[-1].end
    client.shutdown()
    assert [(e.offset, e.end) for e in merged(e for e in found if e.kind is Kind.DATA)] == expected


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"cluster_size": 2048}, "cluster size 2048 is no power of two"),
        ({"cluster_size": "4M"}, "cluster size 4194304 is no power of two"),
        ({"cluster_size": "lots"}, "cluster size 'lots' is no size"),
        ({"cluster_size": "8K", "subclusters": True}, "give a cluster size of 16384 or more"),
        ({"subclusters": True, "compress": "zstd"}, "choose one of the two"),
        ({"compress": "lzma"}, "compress is 'zlib' or 'zstd', not 'lzma'"),
        ({"bitmap": ""}, "has 0 bytes: give 1 to 1023"),
        ({"bitmap": "x" * 1024}, "has 1024 bytes: give 1 to 1023"),
        ({"bitmap": "a\0b"}, "none of them NUL"),
        ({"raw": True, "compress": "zlib", "bitmap": "x"}, "a raw file has no compression and bitmap"),
        ({"raw": True, "standalone": True, "backing_file": "x"}, "no backing file"),
        ({"backing_format": "raw\n"}, "is no name of a format"),
        ({"backing_format": "x" * 16}, "is no name of a format"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(options: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    make_base(tmp_path / "base.img", MIB, {0: b"x"})
    out = tmp_path / "diff.qcow2"
    out.write_bytes(b"old")
    with CowDisk(tmp_path / "base.img") as disk, pytest.raises(UsageError) as refused:
        disk.diff(out, **options)
    assert complaint in str(refused.value)
    assert "\n" not in str(refused.value)
    assert out.read_bytes() == b"old"


def test_a_disk_that_is_too_large_for_its_clusters_is_refused(tmp_path: Path) -> None:
    with Disk(ZeroBase(65 * TIB), block_size=8192, tmpdir=tmp_path) as disk:
        disk.pwrite(b"x", 0)
        with pytest.raises(UsageError, match="larger cluster size"):
            diff(disk, tmp_path / "diff.qcow2", ImageOptions(cluster_size="16K", subclusters=True))
        report = diff(disk, tmp_path / "diff.qcow2", ImageOptions(cluster_size="2M", bitmap="b"))
        assert report.changed_extents == 1
    with Qcow2Image(tmp_path / "diff.qcow2") as image:  # QEMU has bitmaps of 512 MiB at the most
        image.check()
        assert list(image.bitmap("b")) == [Extent(0, 32 * KIB, Kind.DATA)]


@pytest.mark.parametrize(
    "options", [ImageOptions(subclusters=True), ImageOptions(compress="zlib"), ImageOptions(raw=True)]
)
def test_a_full_disk_leaves_the_old_file(options: ImageOptions, tmp_path: Path) -> None:
    out = tmp_path / "diff.qcow2"
    out.write_bytes(b"old")
    with Disk(ZeroBase(64 * MIB), tmpdir=tmp_path) as disk:
        disk.pwrite(random.Random(1).randbytes(8 * MIB), 0)
        with files_limited_to(4 * MIB), pytest.raises(OutputError):
            diff(disk, out, options)
    assert out.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["diff.qcow2"]


def test_one_changed_sector_of_a_divided_cluster_leaves_its_neighbours_to_the_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.img", MIB, {0: noise(MIB, 1)})
    with Disk(FileBase(base), block_size=512, tmpdir=tmp_path) as disk:
        disk.pwrite(b"!", 70_000)
        disk.zero(64 * KIB, 256 * KIB)
        diff(disk, tmp_path / "diff.qcow2", ImageOptions(subclusters=True))
    with Qcow2Image(tmp_path / "diff.qcow2") as image:
        held = [each for each in image.extents() if each.kind is not Kind.HOLE]
    assert held == [Extent(69632, 2048, Kind.DATA), Extent(256 * KIB, 64 * KIB, Kind.ZERO)]


@pytest.mark.requires(modules=["backports.zstd"])
@pytest.mark.parametrize("method", ["zlib", "zstd"])
@scenario(60)
@given(data=st.data())
def test_a_damaged_compressed_image_is_an_error_of_ours(method: Any, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "diff.qcow2")
        with Disk(ZeroBase(MIB), tmpdir=folder) as disk:
            disk.pwrite(noise(200_000, 1), 1000)
            diff(disk, path, ImageOptions(compress=method, cluster_size=4096, bitmap="b"))
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(raw)
        with suppress(CowkitError), Qcow2Image(path, lambda length, offset: bytes(length), MIB) as image:
            image.pread(min(image.size, MIB), 0)
            for name in image.bitmaps:
                assert {each.kind for each in image.bitmap(name)} <= {Kind.DATA}
            image.check()
