"""A difference records who its base is, and another base is not taken for it."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cowkit.diff import ImageOptions, Qcow2Image, backing_name, write_diff
from cowkit.diff.identity import BLOCK, BaseIdentity, identify, positions, sampled_bytes
from cowkit.diff.qcow2.layout import EXTENSION_IDENTITY, HEADER, Header
from cowkit.diff.qcow2.stamp import stamp
from cowkit.diff.recorded import Recorded
from cowkit.disk import Base, Disk, FileBase, ZeroBase
from cowkit.errors import ImageError, OutputError
from tests.diff.helpers import make_base, noise, run

MIB = 1 << 20
LONGEST = "./" * 507 + "/base.img"


def changed_disk(base: Path, image: Path, options: ImageOptions | None = None, name: str | None = None) -> None:
    with Disk(FileBase(base), tmpdir=base.parent) as disk:
        disk.pwrite(b"changed", min(5000, max(0, disk.size - 7)))
        with disk.freeze() as view:
            name = name or backing_name(disk.base.given, disk.base.path, image)
            write_diff(view, image, backing_file=name, options=options or ImageOptions())


def recorded(image: Path) -> BaseIdentity:
    with Qcow2Image(image) as opened:
        assert opened.identity is not None
        found = Recorded.from_bytes(opened.identity, str(image)).base
        assert found is not None
        return found


def identity_of(path: Path, *, full: bool = False) -> BaseIdentity:
    base = FileBase(path)
    try:
        return identify(base, full=full)
    finally:
        base.release()


class Counting(ZeroBase):
    """A base of zeroes that counts what is read of it."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.reads: list[int] = []

    def read_into(self, buffer: memoryview, offset: int) -> None:
        assert offset + len(buffer) <= self.size
        self.reads.append(len(buffer))
        super().read_into(buffer, offset)


@given(st.integers(0, 1 << 50))
def test_an_identity_costs_at_most_64_blocks_and_has_the_first_and_the_last(size: int) -> None:
    base = Counting(size)
    identify(base)
    assert len(base.reads) <= 64
    assert sum(base.reads) == sampled_bytes(size) <= 64 * BLOCK
    if size:
        assert positions(size)[0] == 0
        assert positions(size)[-1] == (size - 1) // BLOCK * BLOCK


@pytest.mark.parametrize("size", [0, 1, 511, 512, 4096, 130_000, MIB + 512, 200_000, 40 * MIB])
def test_what_is_recorded_is_the_identity_of_the_base(size: int, tmp_path: Path) -> None:
    base = tmp_path / "base.img"
    base.write_bytes(random.Random(size).randbytes(size))
    with Disk(FileBase(base), tmpdir=tmp_path, size=size + 512) as disk, disk.freeze() as view:
        write_diff(view, tmp_path / "diff.qcow2", backing_file="base.img", options=ImageOptions(hash="full"))
    found = recorded(tmp_path / "diff.qcow2")
    assert found == identity_of(base, full=True)
    assert found.size == size
    assert found.full == hashlib.sha256(base.read_bytes()).hexdigest()


def test_only_a_full_digest_tells_a_change_where_nothing_is_sampled(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.img", 40 * MIB, {0: noise(40 * MIB, 3)})
    before = identity_of(base, full=True)
    place = next(at for at in range(0, 40 * MIB, BLOCK) if at not in positions(40 * MIB))
    with base.open("r+b") as file:
        file.seek(place)
        file.write(bytes(BLOCK))
    changed = FileBase(base)
    assert before.differs_from(changed) is None
    assert before.differs_from(changed, full=True) == "the digest of all its bytes differs"
    changed.release()
    with base.open("r+b") as file:
        file.write(b"\0")
    first = FileBase(base)
    assert before.differs_from(first) == "blocks that were sampled differ"
    first.release()


@pytest.mark.parametrize(
    ("size", "other", "same"), [(130_000, 130_048, True), (130_000, 130_049, False), (512, 1, True)]
)
def test_sizes_are_compared_in_sectors_with_zeroes_behind(size: int, other: int, same: bool, tmp_path: Path) -> None:
    data = noise(min(size, other), 2)
    one, two = (make_base(tmp_path / name, length, {0: data}) for name, length in (("one", size), ("two", other)))
    base: Base = FileBase(two)
    assert (identity_of(one, full=True).differs_from(base, full=True) is None) is same
    base.release()


@pytest.mark.requires("qemu-img")
@pytest.mark.parametrize("name", ["base.img", LONGEST])
@pytest.mark.parametrize(
    "options",
    [
        ImageOptions(cluster_size=4096, bitmap="b" * 1000, hash="full"),
        ImageOptions(cluster_size=4096, compress="zstd", hash="full"),
        ImageOptions(cluster_size="2M", hash="full"),
        ImageOptions(subclusters=True),
    ],
)
def test_there_is_room_for_it_beside_all_else_and_qemu_reads_the_image(
    name: str, options: ImageOptions, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base.img", MIB, {0: noise(MIB, 1)})
    changed_disk(base, tmp_path / "diff.qcow2", options, name)
    run("qemu-img", "check", "-q", tmp_path / "diff.qcow2")
    with Qcow2Image(tmp_path / "diff.qcow2") as image:
        image.check()
        assert image.backing_file == name
    assert recorded(tmp_path / "diff.qcow2").size == MIB


@pytest.mark.requires("qemu-img")
def test_qemu_keeps_it_when_it_rewrites_the_header(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.img", MIB, {0: noise(MIB, 1)})
    image = tmp_path / "diff.qcow2"
    changed_disk(base, image)
    before = recorded(image)
    shutil.copy(base, tmp_path / "moved-to-a-longer-name.img")
    run("qemu-img", "rebase", "-u", "-b", "moved-to-a-longer-name.img", "-F", "raw", image)
    run("qemu-img", "amend", "-o", "lazy_refcounts=on", image)
    run("qemu-img", "check", "-q", "-r", "all", image)
    run("qemu-io", "-c", "write 64k 4k", image)
    assert recorded(image) == before


def test_a_blank_disk_and_a_whole_image_record_no_base(tmp_path: Path) -> None:
    with Disk(ZeroBase(MIB), tmpdir=tmp_path) as disk, disk.freeze() as view:
        write_diff(view, tmp_path / "diff.qcow2", backing_file=None)
    with Qcow2Image(tmp_path / "diff.qcow2") as image:
        assert image.identity is None


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"{}",
        b"[]",
        b"nonsense",
        b"\xff\xfe",
        b"[" * 1000,
        b'{"v":1}',
        b'{"v":1,"size":-1,"sampled":"00"}',
        b'{"v":1,"disk":-1}',
        b'{"v":1,"disk":true}',
        b'{"v":1,"size":4097,"sampled":"%b","written":"%b","blocks":[2]}' % (b"0" * 64, b"0" * 64),
        b'{"v":1,"size":9000,"sampled":"%b","written":"%b","blocks":[1,0]}' % (b"0" * 64, b"0" * 64),
        b'{"v":1,"size":9000,"sampled":"%b","written":"%b","blocks":[[0]]}' % (b"0" * 64, b"0" * 64),
        b'{"v":1,"size":9000,"sampled":"%b","written":"00","blocks":[0]}' % (b"0" * 64),
        b"7" * 3000,
    ],
)
def test_what_is_no_identity_is_refused_in_one_line(said: bytes) -> None:
    with pytest.raises(ImageError, match=r"image d.qcow2 is damaged: its base's identity cannot be read"):
        Recorded.from_bytes(said, "d.qcow2")


def test_an_identity_of_a_later_version_is_called_so() -> None:
    with pytest.raises(ImageError, match="in version 2: a later cowkit reads it"):
        Recorded.from_bytes(b'{"v":2,"blake":"7"}', "d.qcow2")


# Images of other programs


@pytest.mark.requires("qemu-img")
@pytest.mark.parametrize("backing", ["base.img", None, LONGEST])
@pytest.mark.parametrize("options", ["cluster_size=4096", "compression_type=zstd", "extended_l2=on", "refcount_bits=1"])
def test_an_image_of_qemus_is_stamped_twice_and_stays_what_it_was(
    backing: str | None, options: str, tmp_path: Path
) -> None:
    assert len(LONGEST) == 1023
    base = make_base(tmp_path / "base.img", MIB, {0: noise(MIB, 1)})
    image = tmp_path / "diff.qcow2"
    names = ["-u", "-b", backing, "-F", "raw"] if backing else []
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *names, image, "1M")
    before = run("qemu-img", "info", "-U", "--output=json", image)
    for full in (True, False):
        stamp(image, Recorded(identity_of(base, full=full)))
        with Qcow2Image(image) as opened:
            assert opened.backing_file == backing
        assert recorded(image) == identity_of(base, full=full)
    run("qemu-img", "check", "-q", image)
    assert run("qemu-img", "info", "-U", "--output=json", image) == before


@pytest.mark.requires("qemu-img")
def test_where_there_is_no_room_the_names_of_features_go_and_then_it_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.img", MIB, {0: noise(MIB, 1)})
    image = tmp_path / "diff.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=1024", image, "1M")
    stamp(image, Recorded(identity_of(base, full=True)))
    assert recorded(image) == identity_of(base, full=True)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "cluster_size=512", image, "1M")
    before = image.read_bytes()
    long = HEADER.unpack_from(before)
    header = Header._make(long)._replace(backing_file_offset=header_end(before), backing_file_size=300)
    image.write_bytes(HEADER.pack(*header) + before[HEADER.size :])
    before = image.read_bytes()
    with pytest.raises(ImageError, match="no room"):
        stamp(image, Recorded(identity_of(base, full=True)))
    assert image.read_bytes() == before


def header_end(raw: bytes) -> int:
    return int(struct.unpack_from(">I", raw, 100)[0]) + 8 + 8


def test_what_is_no_image_is_not_stamped(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.img", MIB, {0: noise(MIB, 1)})
    before = base.read_bytes()
    with pytest.raises(ImageError, match=r"base.img is no qcow2 image"):
        stamp(base, Recorded(identity_of(base)))
    assert base.read_bytes() == before
    with pytest.raises(OutputError, match="No such file"):
        stamp(tmp_path / "none.qcow2", Recorded(identity_of(base)))


def test_the_type_of_the_extension_is_no_number_of_qemus() -> None:
    assert EXTENSION_IDENTITY not in (0, 0xE2792ACA, 0x6803F857, 0x23852875, 0x0537BE77, 0x44415441)
    assert os.fsencode(EXTENSION_IDENTITY.to_bytes(4, "big").decode()) == b"cowk"
