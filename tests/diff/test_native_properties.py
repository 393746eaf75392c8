"""Random disks: the image is sound and reads as the disk does, for every reader, and holds only what changed."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cowkit.diff import DiffReport, Qcow2Image
from cowkit.diff.identity import sampled_bytes
from cowkit.diff.samples import SAMPLE
from cowkit.diff.sieve import LEAST_UNIT
from cowkit.disk import Disk, Extent, FileBase, FrozenView, Kind
from tests.diff.helpers import (
    Doing,
    base_pieces,
    check_with_qemu,
    content,
    diff,
    doings,
    make_base,
    noise,
    read_with_cowkit,
    read_with_dissect,
)

sizes = st.one_of(st.integers(1, 300_000), st.integers(1, 70).map(lambda n: n * 4096))
powers = st.integers(9, 17).map(lambda n: 1 << n)
cluster_sizes = st.sampled_from([4096, 8192, 65536, 131072])


def scenario(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.mark.requires(modules=["dissect.hypervisor"])
@scenario(100)
@example(  # the whole block is read after its sample
    base_size=65536, pieces={0: 1}, size=None, block=65536, cluster=65536,
    todo=[Doing(what="write", at=1, length=0, seed=0)], forked=False,
)  # fmt: skip
@given(
    base_size=sizes, pieces=base_pieces, size=st.none() | sizes, block=powers, cluster=cluster_sizes, todo=doings,
    forked=st.booleans(),
)  # fmt: skip
def test_every_reader_finds_the_disk_in_the_image(
    base_size: int, pieces: dict[int, int], size: int | None, block: int, cluster: int, todo: list[Doing], forked: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = {at: noise(length, 9) if length % 3 else bytes(length) for at, length in pieces.items()}
        path = make_base(Path(folder, "base.img"), base_size, data)
        image = Path(folder, "diff.qcow2")
        with Disk(FileBase(path), block_size=block, size=size, tmpdir=folder) as disk:
            for n, doing in enumerate(todo):
                doing.do(disk)
                if forked and n == len(todo) // 2:
                    disk.checkpoint()
            report = diff(disk, image, cluster_size=cluster)
            expected = content(disk)
            assert isinstance(disk.base, FileBase)
            assert report.virtual_size == len(expected)
            assert read_with_cowkit(image, disk.base) == expected
            assert read_with_dissect(image, path, len(expected)) == expected
            with disk.freeze() as view:
                check_report(report, view, image)


@pytest.mark.requires("qemu-img")
@scenario(40)
@given(base_size=sizes, pieces=base_pieces, size=st.none() | sizes, block=powers, cluster=cluster_sizes, todo=doings)
def test_qemu_finds_the_disk_in_the_image_and_no_fault(
    base_size: int, pieces: dict[int, int], size: int | None, block: int, cluster: int, todo: list[Doing]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = {at: noise(length, 9) if length % 3 else bytes(length) for at, length in pieces.items()}
        path = make_base(Path(folder, "base.img"), base_size, data)
        image = Path(folder, "diff.qcow2")
        with Disk(FileBase(path), block_size=block, size=size, tmpdir=folder) as disk:
            for doing in todo:
                doing.do(disk)
            diff(disk, image, cluster_size=cluster)
            check_with_qemu(image, content(disk))


def check_report(report: DiffReport, view: FrozenView, image: Path) -> None:
    """The report against a model that looks at every block of the disk."""
    unit = min(view.block_size, report.cluster_size)
    dirty = list(view.dirty_extents())
    assert report.dirty_bytes == sum(e.length for e in dirty)
    assert report.dirty_extents == len(dirty)
    assert report.identical_bytes >= 0
    assert sum(e.length for e in report.changed) == report.changed_bytes
    assert sum(e.length for e in report.changed if e.kind is Kind.ZERO) == report.zeroed_bytes
    assert sum(e.kind is Kind.ZERO for e in report.changed) == report.zeroed_extents
    for one, two in pairwise(report.changed):
        assert one.end < two.offset or (one.end == two.offset and one.kind is not two.kind)
    told = {block: e.kind for e in report.changed for block in range(e.offset // unit, -(-e.end // unit))}
    for block in range(-(-view.size // unit)):
        offset = block * unit
        length = min(unit, view.size - offset)
        new, old = view.pread(length, offset), bytearray(length)
        view.read_base_into(memoryview(old), offset)
        if new != old:
            assert told.get(block) is (Kind.DATA if new.strip(b"\0") else Kind.ZERO)
        else:
            assert block not in told
    touched = {c for e in dirty for c in range(e.offset // report.cluster_size, -(-e.end // report.cluster_size))}
    # The last cluster may be in the image without need, to cut off a base that is longer.
    last = {view.size // report.cluster_size} if view.base.size > view.size and view.size % 512 else set()
    found = report.bytes_read - sampled_bytes(view.base.size)
    # Of a block whose beginning does not tell, that was read before the whole.
    samples = len(touched) * report.cluster_size // max(unit, LEAST_UNIT) * 2 * SAMPLE
    assert found <= len(touched | last) * report.cluster_size + report.dirty_bytes + samples
    # No cluster is in the image where nothing changed.
    changed = {
        c for e in report.changed for c in range(e.offset // report.cluster_size, -(-e.end // report.cluster_size))
    }
    with Qcow2Image(image) as reader:
        for e in reader.extents():
            if e.kind is Kind.HOLE:
                continue
            held = set(range(e.offset // report.cluster_size, -(-e.end // report.cluster_size)))
            assert held <= changed | last


def test_the_model_itself_tells_changed_from_unchanged(tmp_path: Path) -> None:
    path = make_base(tmp_path / "base.img", 65536, {0: noise(65536, 1)})
    with Disk(FileBase(path), tmpdir=tmp_path) as disk:
        disk.pwrite(b"boo", 5000)
        disk.pwrite(noise(65536, 1)[8192:12288], 8192)
        report = diff(disk, tmp_path / "diff.qcow2")
    assert report.changed == (Extent(4096, 4096, Kind.DATA),)
    assert report.identical_bytes == 4096
