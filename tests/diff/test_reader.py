"""Our own reader: reads what QEMU reads, and believes nothing that it has not checked."""

from __future__ import annotations

import contextlib
import random
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cowkit.diff import ImageOptions, Qcow2Image, write_diff
from cowkit.diff.qcow2.layout import HEADER, Header
from cowkit.disk import Disk, Extent, FileBase, Kind
from cowkit.errors import ImageError, UsageError
from tests.diff.helpers import make_base, noise, run

CLUSTER = 4096
BASE = noise(5 << 20, 1)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small image with data, zero and absent clusters on top of ``base.img``, in clusters of 4096 bytes."""
    folder = tmp_path_factory.mktemp("reader")
    make_base(folder / "base.img", 5 << 20, {0: BASE})
    with Disk(FileBase(folder / "base.img"), tmpdir=folder) as disk:
        disk.pwrite(noise(20_000, 2), 10_000)
        disk.pwrite(noise(5000, 3), 3 << 20)
        disk.zero(16 << 10, 4 << 20)
        with disk.freeze() as view:
            write_diff(view, folder / "diff.qcow2", backing_file="base.img", options=ImageOptions(cluster_size=CLUSTER))
    return (folder / "diff.qcow2").read_bytes()


def base_pread(length: int, offset: int) -> bytes:
    return BASE[offset : offset + length]


def read(data: bytes, path: Path) -> bytes:
    path.write_bytes(data)
    with Qcow2Image(path, base_pread, 5 << 20) as image:
        image.check()
        return image.pread(image.size, 0)


def changed(image: bytes, **fields: int | bytes) -> bytes:
    header = Header._make(HEADER.unpack_from(image))._replace(**fields)  # type: ignore[arg-type]
    return HEADER.pack(*header) + image[HEADER.size :]


@pytest.mark.requires("qemu-img", "qemu-io")
@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
def test_what_qemu_wrote_is_read_as_qemu_reads_it(cluster_bits: int, tmp_path: Path) -> None:
    make_base(tmp_path / "base.img", 3_000_000, {0: noise(3_000_000, 1)})
    options = f"cluster_size={1 << cluster_bits}"
    path = tmp_path / "image.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, "-b", "base.img", "-F", "raw", path, "8M")
    for command in ("write -P 7 100k 300k", "write -z 200k 1M", "write -P 9 7M 5000", "discard 6M 1M"):
        run("qemu-io", "-f", "qcow2", "-c", command, path)
    run("qemu-img", "convert", "-O", "raw", path, tmp_path / "raw")
    data = (tmp_path / "base.img").read_bytes()
    with Qcow2Image(path, lambda length, offset: data[offset : offset + length], len(data)) as image:
        image.check()
        assert (image.cluster_size, image.backing_file, image.backing_format) == (1 << cluster_bits, "base.img", "raw")
        assert image.pread(image.size, 0) == (tmp_path / "raw").read_bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"magic": b"QFIx"}, "no qcow2 image"),
        ({"version": 2}, "version 2"),
        ({"version": 4}, "version 4"),
        ({"cluster_bits": 8}, "clusters of"),
        ({"cluster_bits": 22}, "clusters of"),
        ({"cluster_bits": 2**32 - 1}, "clusters of"),
        ({"size": 2**64 - 1}, "L1 table"),
        ({"crypt_method": 1}, "encrypted"),
        ({"l1_size": 0}, "L1 table"),
        ({"l1_size": 2**32 - 1}, "L1 table"),
        ({"l1_table_offset": 1}, "L1 table"),
        ({"l1_table_offset": 1 << 40}, "L1 table"),
        ({"refcount_table_offset": 0}, "refcount table"),
        ({"refcount_table_offset": 1 << 40}, "refcount table"),
        ({"refcount_table_clusters": 0}, "refcount table"),
        ({"refcount_table_clusters": 2**32 - 1}, "refcount table"),
        ({"nb_snapshots": 1}, "snapshots"),
        ({"incompatible_features": 1}, "dirty"),
        ({"incompatible_features": 2}, "corrupt"),
        ({"incompatible_features": 4}, "external data file"),
        ({"incompatible_features": 8}, "compression type"),
        ({"incompatible_features": 16}, "subclusters"),
        ({"incompatible_features": 1 << 63}, "63"),
        ({"autoclear_features": 2}, "external data file"),
        ({"snapshots_offset": 4096}, "snapshots"),
        ({"refcount_order": 7}, "refcounts"),
        ({"refcount_order": 3}, "refcounts"),
        ({"header_length": 96}, "header has"),
        ({"header_length": 107}, "header has"),
        ({"header_length": 1 << 30}, "header has"),
        ({"backing_file_offset": 1 << 40}, "backing file"),
        ({"backing_file_offset": 50}, "backing file"),
        ({"backing_file_size": 0}, "backing file"),
        ({"backing_file_size": 1024}, "backing file"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(
    fields: dict[str, int | bytes], message: str, image: bytes, tmp_path: Path
) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        read(changed(image, **fields), tmp_path / "bad.qcow2")
    assert "\n" not in str(caught.value)


def test_compatible_and_autoclear_features_may_be_anything(image: bytes, tmp_path: Path) -> None:
    whole = read(image, tmp_path / "good.qcow2")
    assert (
        read(changed(image, compatible_features=1 << 50, autoclear_features=1 << 50), tmp_path / "good.qcow2") == whole
    )


def entry_of(image: bytes, nth: int) -> int:
    """Where in the file the nth L2 entry with data is."""
    header = Header._make(HEADER.unpack_from(image))
    found = 0
    for at in range(header.l1_table_offset, header.l1_table_offset + header.l1_size * 8, 8):
        table = struct.unpack_from(">Q", image, at)[0] & ~(1 << 63)
        for entry in range(table, table + CLUSTER, 8) if table else ():
            if struct.unpack_from(">Q", image, entry)[0] > 1:
                if found == nth:
                    return entry
                found += 1
    raise AssertionError


@pytest.mark.parametrize(
    ("flip", "message"),
    [
        (1 << 63, "one user"),
        (1 << 62, "compressed"),
        (1 << 56, "reserved"),
        (1 << 9, "not where a cluster"),
        (1 << 55, "the file has"),
        (2, "reserved"),
        (1 << 12, "used twice|users"),
    ],
)
def test_an_entry_that_makes_no_sense_is_refused(flip: int, message: str, image: bytes, tmp_path: Path) -> None:
    bad = bytearray(image)
    at = entry_of(image, 2)
    struct.pack_into(">Q", bad, at, struct.unpack_from(">Q", bad, at)[0] ^ flip)
    with pytest.raises(ImageError, match=message):
        read(bytes(bad), tmp_path / "bad.qcow2")


@pytest.mark.parametrize("length", [0, 3, 50, 103, 104, 4096, 9000])
def test_an_image_that_was_cut_short_is_refused(length: int, image: bytes, tmp_path: Path) -> None:
    with pytest.raises(ImageError):
        read(image[:length], tmp_path / "short.qcow2")


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), flips=st.integers(1, 3))
def test_a_damaged_image_is_refused_or_read_but_nothing_else_happens(
    seed: int, flips: int, image: bytes, tmp_path: Path
) -> None:
    bad = damaged(image, seed, flips)
    with contextlib.suppress(ImageError):
        read(bad, tmp_path / "bad.qcow2")


@pytest.mark.requires("qemu-img")
def test_what_is_read_of_a_damaged_image_is_what_qemu_reads(image: bytes, tmp_path: Path) -> None:
    make_base(tmp_path / "base.img", 5 << 20, {0: BASE})
    path, raw = tmp_path / "bad.qcow2", tmp_path / "raw"
    compared = 0
    for seed in range(120):
        bad = damaged(image, seed, 1)
        try:
            mine = read(bad, path)
        except ImageError:
            continue
        with Qcow2Image(path) as opened:
            if opened.backing_file != "base.img" or opened.backing_format != "raw" or len(mine) % 512:
                continue  # QEMU looks for another file, or rounds the size
        done = subprocess.run(["qemu-img", "convert", "-O", "raw", path, raw], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        assert raw.read_bytes() == mine
        compared += 1
    assert compared >= 3


def damaged(image: bytes, seed: int, flips: int) -> bytes:
    """``image`` with some bits of its header and tables turned; tables are where the nonzero bytes of metadata are."""
    luck = random.Random(seed)
    header = Header._make(HEADER.unpack_from(image))
    places = [range(HEADER.size + 40), range(header.l1_table_offset, len(image))]
    for at in range(header.l1_table_offset, header.l1_table_offset + header.l1_size * 8, 8):
        table = struct.unpack_from(">Q", image, at)[0] & ~(1 << 63)
        if table:
            places.append(range(table, table + CLUSTER))
    bad = bytearray(image)
    for _ in range(flips):
        bad[luck.choice(luck.choice(places))] ^= 1 << luck.randrange(8)
    return bytes(bad)


def test_a_missing_backing_reader_is_told(image: bytes, tmp_path: Path) -> None:
    (tmp_path / "diff.qcow2").write_bytes(image)
    with Qcow2Image(tmp_path / "diff.qcow2") as opened:
        assert opened.pread(4096, 4 << 20) == bytes(4096)
        with pytest.raises(UsageError, match="backing file base"):
            opened.pread(4096, 0)
        with pytest.raises(UsageError, match="not within"):
            opened.pread(2, opened.size - 1)


def test_the_image_tells_what_it_holds(image: bytes, tmp_path: Path) -> None:
    (tmp_path / "diff.qcow2").write_bytes(image)
    with Qcow2Image(tmp_path / "diff.qcow2") as opened:
        assert list(opened.extents()) == [
            Extent(0, 8192, Kind.HOLE),
            Extent(8192, 24576, Kind.DATA),
            Extent(32768, (3 << 20) - 32768, Kind.HOLE),
            Extent(3 << 20, 8192, Kind.DATA),
            Extent((3 << 20) + 8192, (1 << 20) - 8192, Kind.HOLE),
            Extent(4 << 20, 16384, Kind.ZERO),
            Extent((4 << 20) + 16384, (1 << 20) - 16384, Kind.HOLE),
        ]


@pytest.mark.parametrize("path", ["missing", "folder", "nul\0"])
def test_what_is_no_file_is_refused(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    with pytest.raises(ImageError):
        Qcow2Image(path)
