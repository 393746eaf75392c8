"""Verifying a difference: two readers, the base that it was made of, and what it is compared with."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from cowkit import CowDisk
from cowkit.diff import Qcow2Image
from cowkit.diff.applying.copy import apply_to
from cowkit.diff.qcow2.layout import ENTRY
from cowkit.diff.verify import Disagreement, Verification, verify_diff
from cowkit.errors import BaseOpenError, ImageError, MissingToolError, UsageError, WrongBaseError
from cowkit.keeping.applying import apply_to_base
from tests.diff.helpers import make_base, noise, run

pytestmark = pytest.mark.requires("qemu-img", "qemu-nbd", "setpriv", modules=["nbd"])

KIB, MIB = 1 << 10, 1 << 20
SIZE = 3 * MIB + 512


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base.img", SIZE, {0: noise(MIB, 1), 2 * MIB: noise(MIB, 2)})


@pytest.fixture
def diff(base: Path, tmp_path: Path) -> Path:
    with CowDisk(base) as disk:
        wreck(disk)
        disk.diff(tmp_path / "diff.qcow2")
    return tmp_path / "diff.qcow2"


def wreck(disk: CowDisk) -> None:
    disk.pwrite(noise(70_000, 3), 100_000)
    disk.zero(200_000, 2 * MIB)
    disk.pwrite(b"end", disk.size - 3)


def agreed(found: Verification) -> bool:
    return found.disagreements == () and bool(found.to_json()["same"])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"subclusters": True},
        {"compress": "zlib"},
        {"compress": "zstd"},
        {"cluster_size": 4096, "bitmap": "what is dirty"},
        {"cluster_size": "2M", "hash": "full"},
        {"standalone": True},
    ],
)
def test_all_that_cowkit_writes_is_the_same_to_both_readers_and_to_the_disk(
    options: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    with CowDisk(base) as disk:
        wreck(disk)
        disk.diff(tmp_path / "diff.qcow2", **options)
        found = verify_diff(tmp_path / "diff.qcow2", against=disk.uri, full=options.get("hash") == "full")
        assert agreed(found)
        assert found.compared_bytes >= 270_000
        if options.get("cluster_size") != "2M":
            assert found.against_bytes < 3 * MIB  # what is zeroed or a hole in both is not read
        disk.pwrite(b"later", 1_500_000)
        found = verify_diff(tmp_path / "diff.qcow2", against=disk.uri)
    assert [(each.offset, each.length) for each in found.disagreements] == [(1_499_648, 512)]
    assert found.disagreements[0].reader == "against"
    assert "512 bytes at 1499648 differ" in found.summary()


@pytest.mark.parametrize("size", [0, 512, 130_000, MIB + 512])
@pytest.mark.parametrize("blank", [False, True])
def test_odd_sizes_and_blank_disks(size: int, blank: bool, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.img", size, {0: noise(size, 1)} if size else {})
    with CowDisk(None if blank else base, size=size if blank else None) as disk:
        if size:
            disk.pwrite(b"x", size - 1)
        disk.diff(tmp_path / "diff.qcow2")
        assert agreed(verify_diff(tmp_path / "diff.qcow2", against=disk.uri))


def test_a_chain_of_increments_is_read_as_a_whole(base: Path, tmp_path: Path) -> None:
    with CowDisk(base) as disk:
        wreck(disk)
        disk.diff(tmp_path / "d1.qcow2")
        disk.checkpoint("one")
        disk.pwrite(b"two", 1_500_000)
        disk.diff(tmp_path / "d2.qcow2", since="one", backing_file="d1.qcow2", subclusters=True)
        found = verify_diff(tmp_path / "d2.qcow2", against=disk.uri)
    assert agreed(found)
    assert [Path(each).name for each in found.images] == ["d2.qcow2", "d1.qcow2"]
    shutil.move(base, tmp_path / "moved.img")
    with pytest.raises(BaseOpenError, match=r"d1\.qcow2 stands on it: name the base, if it is elsewhere \(--base\)"):
        verify_diff(tmp_path / "d2.qcow2")
    assert agreed(verify_diff(tmp_path / "d2.qcow2", base=tmp_path / "moved.img"))


@pytest.mark.parametrize("name", ["a,b=c.img", "it is.img", "b:c.img"])
def test_names_that_mean_something_to_qemu(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path / name, MIB, {0: noise(MIB, 1)})
    with CowDisk(base) as disk:
        disk.pwrite(b"changed", 0)
        disk.diff(tmp_path / "d,i=f:f.qcow2")
    assert agreed(verify_diff(tmp_path / "d,i=f:f.qcow2"))


def test_a_base_in_a_format_of_qemus_or_behind_a_uri(base: Path, tmp_path: Path) -> None:
    image = tmp_path / "base.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, image)
    with CowDisk(image) as lower, CowDisk(lower.uri) as disk:
        disk.pwrite(b"changed", 4096)
        disk.diff(tmp_path / "of-uri.qcow2")
        assert agreed(verify_diff(tmp_path / "of-uri.qcow2", against=disk.uri))
        lower.pwrite(b"changed", 8192)
        lower.diff(tmp_path / "of-image.qcow2")
    assert agreed(verify_diff(tmp_path / "of-image.qcow2"))


def test_another_base_is_refused(diff: Path, base: Path, tmp_path: Path) -> None:
    other = make_base(tmp_path / "other.img", SIZE, {0: noise(MIB, 9)})
    with pytest.raises(WrongBaseError, match=r"diff\.qcow2 is a difference to another base than .*other\.img"):
        verify_diff(diff, base=other)
    with base.open("r+b") as file:
        file.write(b"x")
    with pytest.raises(WrongBaseError, match="may have been written to since"):
        verify_diff(diff)


def test_a_change_where_nothing_is_sampled_is_found_by_the_whole_digest(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.img", 40 * MIB, {20 * MIB: noise(MIB, 1)})
    with CowDisk(base) as disk:
        disk.diff(tmp_path / "sampled.qcow2")
        disk.diff(tmp_path / "full.qcow2", hash="full")
    assert verify_diff(tmp_path / "full.qcow2").whole_base
    assert not verify_diff(tmp_path / "full.qcow2", full=False).whole_base
    assert not verify_diff(tmp_path / "sampled.qcow2").whole_base
    with base.open("r+b") as file:
        file.seek(20 * MIB + 12_345)
        file.write(b"x")
    assert agreed(verify_diff(tmp_path / "full.qcow2", full=False))
    for full in (None, True):
        with pytest.raises(WrongBaseError, match="the digest of all its bytes differs"):
            verify_diff(tmp_path / "full.qcow2", full=full)
    with pytest.raises(WrongBaseError, match="the digest of all its bytes differs"):
        CowDisk(base, overlay=tmp_path / "full.qcow2")
    with pytest.raises(WrongBaseError, match="the digest of all its bytes differs"):
        apply_to(tmp_path / "full.qcow2", tmp_path / "new.img")
    with pytest.raises(WrongBaseError, match="the digest of all its bytes differs"):
        apply_to_base(tmp_path / "full.qcow2")
    assert not (tmp_path / "new.img").exists()
    with pytest.raises(UsageError, match="does not record the digest of its whole base"):
        verify_diff(tmp_path / "sampled.qcow2", full=True)


def test_the_whole_digest_of_what_one_of_a_chain_stands_on_tells_of_all_below_it(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.img", 40 * MIB, {20 * MIB: noise(MIB, 1)})
    with CowDisk(base) as disk:
        disk.diff(tmp_path / "d1.qcow2")
        disk.checkpoint("one")
        disk.diff(tmp_path / "sampled.qcow2", since="one", backing_file="d1.qcow2")
        disk.diff(tmp_path / "d2.qcow2", since="one", backing_file="d1.qcow2", hash="full")
        disk.checkpoint("two")
        disk.diff(tmp_path / "d3.qcow2", since="two", backing_file="d2.qcow2")
    with pytest.raises(UsageError, match=r"^\S*sampled\.qcow2 does not record the digest of its whole base: "):
        verify_diff(tmp_path / "sampled.qcow2", full=True)
    for image in ("d2.qcow2", "d3.qcow2"):
        for full in (None, True):
            assert verify_diff(tmp_path / image, full=full).whole_base
        assert not verify_diff(tmp_path / image, full=False).whole_base
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, tmp_path / "d1.qcow2")
    found = verify_diff(tmp_path / "d2.qcow2", full=True)
    assert (found.whole_base, found.recognised) == (True, True)
    with base.open("r+b") as file:
        file.seek(20 * MIB + 12_345)
        file.write(b"x")
    for image in ("d2.qcow2", "d3.qcow2"):
        with pytest.raises(
            WrongBaseError, match=r"d2\.qcow2 is a difference to another base .*the digest of all its bytes"
        ):
            apply_to(tmp_path / image, tmp_path / "new.img", full=True)


def test_a_difference_of_another_program_is_read_and_said_to_know_no_base(base: Path, tmp_path: Path) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, tmp_path / "diff.qcow2")
    run("qemu-io", "-c", "write -P 7 64k 4k", tmp_path / "diff.qcow2")
    found = verify_diff(tmp_path / "diff.qcow2")
    assert agreed(found)
    assert not found.recognised


def test_what_is_of_another_size_differs_in_what_only_one_has(diff: Path, tmp_path: Path) -> None:
    (tmp_path / "short.img").write_bytes(b"")
    found = verify_diff(diff, against=tmp_path / "short.img")
    assert found.disagreements == (Disagreement(0, SIZE, "against"),)


def test_what_only_qemu_sees_is_found_by_the_second_reader(diff: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Qcow2Image.pread

    def wrong(self: Qcow2Image, length: int, offset: int) -> bytes:
        data = real(self, length, offset)
        return data.replace(b"end", b"END")

    monkeypatch.setattr(Qcow2Image, "pread", wrong)
    monkeypatch.setattr(Qcow2Image, "extents", lambda self, offset=0, length=None: iter(()))  # as if it held nothing
    found = verify_diff(diff)
    assert found.disagreements == (Disagreement(SIZE - 512, 512, "qemu"),)


def test_a_leaked_cluster_is_one_line(diff: Path) -> None:
    with diff.open("r+b") as file:
        file.seek(0, 2)
        file.truncate(file.tell() + 65536)
        with Qcow2Image(diff) as image:
            table = image._header.refcount_table_offset
        file.seek(table)
        (block,) = ENTRY.unpack(file.read(8))
        file.seek(block)
        counts = file.read(65536)
        file.seek(block + 2 * (len(counts.rstrip(b"\0")) + 1 >> 1))
        file.write(b"\0\1")
    with pytest.raises(ImageError, match="has 0 users and a refcount of 1"):
        verify_diff(diff)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            ["-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", "--object", "secret,id=s,data=abc"],
            "is encrypted, and cowkit reads no encrypted images: .* `qemu-img convert`",
        ),
        (
            ["-o", "compat=0.10"],
            r"is of qcow2 version 2, .* `qemu-img amend -f qcow2 -o compat=1\.1 .*image\.qcow2` makes it one",
        ),
        (["-o", "data_file=data.raw"], r"incompatible feature 2 \(external data file\)"),
    ],
)
def test_what_cowkit_does_not_read_is_refused_by_name(options: list[str], why: str, tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    options = [each.replace("data.raw", str(tmp_path / "data.raw")) for each in options]
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, image, "1M")
    with pytest.raises(ImageError, match=why):
        verify_diff(image)


def test_without_qemu_it_says_how_to_get_it(diff: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(MissingToolError, match="is not installed"):
        verify_diff(diff)


def test_on_a_compressed_base_what_the_images_hold_is_compared(base: Path, tmp_path: Path) -> None:
    run("gzip", "-k", base)
    with CowDisk(base.with_name("base.img.gz")) as disk:
        disk.pwrite(b"changed", 0)
        disk.diff(tmp_path / "diff.qcow2", backing_file="base.img", hash="full")
    assert agreed(verify_diff(tmp_path / "diff.qcow2", full=True))
    with CowDisk(base, overlay=tmp_path / "diff.qcow2") as disk:
        disk.zero(8192, 4096)
        disk.diff(tmp_path / "next.qcow2", since="overlay", backing_file="diff.qcow2")
    compressed = base.with_name("base.img.gz")
    for name in ("diff.qcow2", "next.qcow2"):
        found = verify_diff(tmp_path / name, base=compressed)
        assert agreed(found)
        assert (found.base, found.compared_bytes > 0) == (str(compressed), True)
    found = verify_diff(tmp_path / "diff.qcow2", base=compressed, against=base)
    assert [(each.offset, each.reader) for each in found.disagreements] == [(0, "against")]
    compressed.unlink()
    base.write_bytes(bytes(base.stat().st_size))
    run("gzip", "-k", base)
    with pytest.raises(WrongBaseError):
        verify_diff(tmp_path / "diff.qcow2", base=compressed)


def test_progress_is_told_up_to_the_end(diff: Path) -> None:
    told: list[tuple[int, int]] = []
    found = verify_diff(diff, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (found.compared_bytes, found.compared_bytes)
