"""When an image has subclusters though nobody asked for them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowkit import CowDisk
from cowkit.diff import ImageOptions, write_diff
from cowkit.diff.qcow2.layout import DEFAULT_CLUSTER
from cowkit.diff.scattered import WORTH_SUBCLUSTERS, carried_along, settled
from cowkit.disk import Disk, Extent, FileBase, Kind
from tests.diff.helpers import noise, read_with_cowkit

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
BLOCK = 4 * KIB
ENOUGH = -(-WORTH_SUBCLUSTERS // (DEFAULT_CLUSTER - BLOCK))
"""Changes of one block in as many clusters, from which on it is worth while."""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    return path


def scatter(disk: CowDisk | Disk, count: int) -> None:
    for at in range(count):
        disk.pwrite(b"!" * BLOCK, at * 2 * DEFAULT_CLUSTER + 3 * BLOCK)


def features(path: Path) -> dict[str, object]:
    info = subprocess.run(["qemu-img", "info", "--output=json", path], check=True, capture_output=True).stdout
    data: dict[str, object] = json.loads(info)["format-specific"]["data"]
    return data


@pytest.mark.requires("qemu-img")
@pytest.mark.parametrize("more", [0, 1])
def test_subclusters_come_with_16_mib_of_unchanged_bytes_that_they_save(base: Path, tmp_path: Path, more: int) -> None:
    out = tmp_path / "d.qcow2"
    with CowDisk(base) as disk:
        scatter(disk, ENOUGH - 1 + more)
        report = disk.diff(out)
        assert report.subclusters is bool(more)
        assert report.cluster_size == DEFAULT_CLUSTER
        assert ("with subclusters, for QEMU" in report.summary()) is bool(more)
        estimate = disk.changes(image=ImageOptions()).estimate
        assert estimate is not None
        assert (estimate.subclusters, estimate.file_size) == (bool(more), out.stat().st_size)
    assert features(out)["extended-l2"] is bool(more)
    subprocess.run(["qemu-img", "check", "-q", out], check=True)


@pytest.mark.parametrize(
    "options",
    [
        ImageOptions(subclusters=False),
        ImageOptions(cluster_size="64K"),
        ImageOptions(compress="zlib"),
        ImageOptions(standalone=True),
        ImageOptions(raw=True),
        ImageOptions(format="rbd"),
    ],
)
def test_who_asks_for_something_else_gets_no_subclusters(base: Path, options: ImageOptions) -> None:
    with Disk(FileBase(base)) as disk:
        scatter(disk, ENOUGH)
        with disk.freeze() as view:
            assert settled(options, view).subclusters in (False, options.subclusters)
            assert settled(ImageOptions(), view).subclusters is True


def test_a_disk_that_tables_of_subclusters_do_not_reach_is_written_without(tmp_path: Path) -> None:
    with CowDisk(size="100T", block_size="64K", tmpdir=tmp_path) as disk:
        for at in range(2):
            disk.pwrite(b"!", at * GIB)
        assert not disk.diff(tmp_path / "d.qcow2").subclusters


@given(runs=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=30))
def test_what_would_be_carried_along_is_counted_to_the_byte(runs: list[tuple[int, int]]) -> None:
    extents, written, at = [], set(), 0
    for gap, length in runs:
        extents.append(Extent((at + gap) * BLOCK, length * BLOCK, Kind.DATA))
        written |= set(range(at + gap, at + gap + length))
        at += gap + length
    clusters = {block * BLOCK // DEFAULT_CLUSTER for block in written}
    everything = len(clusters) * DEFAULT_CLUSTER - len(written) * BLOCK
    assert carried_along(extents, 1 << 60) == everything
    assert carried_along(extents, everything) >= everything


def test_an_image_with_subclusters_has_the_disks_bytes(base: Path, tmp_path: Path) -> None:
    with Disk(FileBase(base), tmpdir=tmp_path) as disk:
        scatter(disk, ENOUGH)
        disk.pwrite(noise(MIB, 1), 50 * MIB + 512)
        disk.trim(10 * MIB, 40 * MIB)
        with disk.freeze() as view:
            report = write_diff(view, tmp_path / "d.qcow2", backing_file="disk.img")
        assert report.subclusters
        assert report.bytes_written < 4 * MIB
        assert isinstance(disk.base, FileBase)
        assert read_with_cowkit(tmp_path / "d.qcow2", disk.base) == disk.pread(64 * MIB, 0)
