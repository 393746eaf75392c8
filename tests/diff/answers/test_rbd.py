"""What `rbd import-diff` reads: applied to a copy of the base, as Ceph's document has it, the difference gives the disk."""

from __future__ import annotations

import struct
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings

from cowkit import CowDisk
from cowkit.diff import ImageOptions
from cowkit.errors import UsageError
from tests.diff.helpers import Doing, base_pieces, doings, make_base, noise
from tests.diff.test_native_properties import powers, sizes


class Parsed(NamedTuple):
    metadata: dict[bytes, object]
    records: list[tuple[bytes, int, int]]
    content: bytes


def applied(path: Path, before: bytes) -> Parsed:
    """What is in the file, read from doc/dev/rbd-diff.rst of Ceph ("rbd diff v1"), and ``before`` with it applied."""
    data = path.read_bytes()
    assert data.startswith(b"rbd diff v1\n")
    at = 12
    metadata: dict[bytes, object] = {}
    records: list[tuple[bytes, int, int]] = []
    disk = bytearray(before)
    while (tag := data[at : at + 1]) != b"e":
        at += 1
        if tag in b"ft":
            (length,) = struct.unpack_from("<I", data, at)
            metadata[tag] = data[at + 4 : at + 4 + length].decode()
            at += 4 + length
        elif tag == b"s":
            (size,) = struct.unpack_from("<Q", data, at)
            metadata[tag] = size
            disk = disk[:size] + bytes(max(0, size - len(disk)))
            at += 8
        else:
            offset, length = struct.unpack_from("<QQ", data, at)
            at += 16
            records.append((tag, offset, length))
            assert tag in b"wz"
            assert 0 < length <= len(disk) - offset
            if tag == b"w":
                disk[offset : offset + length] = data[at : at + length]
                at += length
            else:
                disk[offset : offset + length] = bytes(length)
    assert at + 1 == len(data)
    return Parsed(metadata, records, bytes(disk))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(base_size=sizes, pieces=base_pieces, block=powers, todo=doings)
def test_applied_to_the_base_it_is_the_disk(
    base_size: int, pieces: dict[int, int], block: int, todo: list[Doing]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = make_base(Path(folder, "base.img"), base_size, {at: noise(n, 9) for at, n in pieces.items()})
        with CowDisk(path, block_size=block) as disk:
            for doing in todo:
                doing.do(disk.engine)
            report = disk.diff(Path(folder, "d.rbd"), format="rbd")
            size = disk.changes(image=ImageOptions(format="rbd")).estimate
            found = applied(Path(folder, "d.rbd"), path.read_bytes())
            assert found.content == disk.pread(disk.size, 0)
            assert found.metadata == {b"s": disk.size}
            assert size is not None
            assert size.file_size == Path(folder, "d.rbd").stat().st_size == report.bytes_written


def test_checkpoints_are_its_snapshots(tmp_path: Path) -> None:
    with CowDisk(size="1M") as disk:
        disk.pwrite(b"one" * 1000, 0)
        disk.checkpoint("one")
        before = disk.pread(disk.size, 0)
        disk.pwrite(b"two" * 1000, 65536)
        disk.zero(4096, 0)
        disk.checkpoint("two")
        report = disk.diff(tmp_path / "d.rbd", since="one", at="two", format="rbd")
        found = applied(tmp_path / "d.rbd", before)
        assert found.metadata == {b"f": "one", b"t": "two", b"s": 1 << 20}
        assert found.records == [(b"z", 0, 4096), (b"w", 65536, 4096)]
        assert found.content == disk.pread(disk.size, 0)
        assert report.backing_file is None


def test_a_name_that_ceph_does_not_take_is_refused(tmp_path: Path) -> None:
    with CowDisk(size="1M") as disk:
        disk.checkpoint("pool/image@snap")
        with pytest.raises(UsageError, match="has no '@' or '/' in it"):
            disk.diff(tmp_path / "d.rbd", at="pool/image@snap", format="rbd")
    assert list(tmp_path.iterdir()) == []


def test_what_rbd_does_not_have_is_refused(tmp_path: Path) -> None:
    with CowDisk(size="1M") as disk:
        with pytest.raises(UsageError, match="has no subclusters"):
            disk.diff(tmp_path / "d.rbd", format="rbd", subclusters=True)
        with pytest.raises(UsageError, match="has no backing file"):
            disk.diff(tmp_path / "d.rbd", format="rbd", backing_file="x")
